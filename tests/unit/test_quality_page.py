"""The quality page: self-contained, escaped, bounded, and true to its figures."""

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest

from qarm_feast.behaviour import BehaviourPairs
from qarm_feast.codebook import Codebook, EncoderFacts, ItemVectors, QuantizerConfig
from qarm_feast.codebook_config import ContinuityConfig, GateConfig
from qarm_feast.continuity import ParentCodes, refresh_codebook
from qarm_feast.quality import ItemFacts, codebook_quality
from qarm_feast.quality_page.charts import Series, bar_chart, load_chart
from qarm_feast.quality_page.page import PageInput, quality_page
from qarm_feast.quality_page.tree import MAX_ITEMS, MAX_ITEMS_PER_PREFIX, prefix_tree
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.registry import gate_readings

NUM_ITEMS = 120
RQ = RqConfig(codebook_size=(6, 5))
NASTY = '</script><script>alert(1)</script> & "quotes" $body'


def _train(version: str, x_ND: np.ndarray) -> Codebook:
    return Codebook.train(
        version,
        np.arange(len(x_ND)),
        x_ND,
        config=QuantizerConfig(rq=RQ, vq=VqConfig(num_neighbors=5)),
        encoder=EncoderFacts("e1", "0" * 64, None),
        created=datetime(2024, 1, 1, tzinfo=UTC),
    )


@pytest.fixture(name="x_ND", scope="module")
def _vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((NUM_ITEMS, 6)).astype(np.float32)


def _content(
    codebook: Codebook, x_ND: np.ndarray, title: str, gates: GateConfig, num_pairs: int = 40
) -> PageInput:
    codes = codebook.encode(np.arange(NUM_ITEMS), ["h"] * NUM_ITEMS, x_ND)
    pairs_P2 = np.stack([np.arange(num_pairs), np.arange(num_pairs) + 1], axis=1)
    pairs = BehaviourPairs(pairs_P2, np.ones(num_pairs, dtype=np.int64))
    titles = [title] * NUM_ITEMS
    quality = codebook_quality(codebook, codes, x_ND, ItemFacts(pairs, titles))
    return PageInput(
        codebook.manifest,
        quality,
        gate_readings(quality, gates),
        codes.item_ids_N,
        codes.rq_NL,
        titles,
    )


class _Tags(HTMLParser):
    """Collects tags, attributes that could fetch something, and unclosed elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(page: str) -> _Tags:
    tags = _Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_whole_and_fetches_nothing(x_ND: np.ndarray) -> None:
    page = quality_page(_content(_train("v1", x_ND), x_ND, "a lamp", GateConfig()))

    tags = _parsed(page)
    assert tags.fetched == []
    assert not re.search(r"https?:|@import|url\(", page)
    assert tags.tags.count("svg") == 6


def test_a_title_cannot_leave_its_place(x_ND: np.ndarray) -> None:
    page = quality_page(_content(_train("v1", x_ND), x_ND, NASTY, GateConfig()))

    assert _parsed(page).tags.count("script") == 2
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    data = re.search(r'id="branches">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data[1])[0][4][0][2][0][1] == NASTY


def test_gates_are_shown_with_value_and_limit(x_ND: np.ndarray) -> None:
    gates = GateConfig(max_collision_rate=0.0, min_hr10=0.0, max_relative_residual_norm=None)
    content = _content(_train("v1", x_ND), x_ND, "a lamp", gates)

    page = quality_page(content)

    rate = content.quality["collision_rate"]
    assert f"<b>{rate:.3f}</b>" in page
    assert f"limit ≤ 0, missed by {rate:.3f}" in page
    assert "kept: limit ≥ 0</span>" in page
    assert "gate off" in page
    assert "Publishing is refused, not kept: Collision rate." in page


def test_kept_gates_say_so(x_ND: np.ndarray) -> None:
    page = quality_page(_content(_train("v1", x_ND), x_ND, "a lamp", GateConfig()))

    assert "All gates that are switched on are kept." in page
    assert "Kept from" not in page


def test_a_refreshed_version_shows_what_it_kept(x_ND: np.ndarray) -> None:
    items = ItemVectors(np.arange(NUM_ITEMS), ["h"] * NUM_ITEMS, x_ND)
    parent = ParentCodes.served_by(_train("v1", x_ND), items)
    codebook = refresh_codebook(
        _train("v2", x_ND), items, items.item_ids_N, parent, ContinuityConfig(), RQ
    )

    page = quality_page(_content(codebook, x_ND, "a lamp", GateConfig()))

    churn = codebook.manifest.continuity["churn"]
    assert "Kept from v1" in page
    assert f"full code</td><td>{churn['full']:.1%}".replace("%", " %") in page
    assert "level 1: 6 of 6, level 2: 5 of 5" in page


def test_a_catalogue_without_test_pairs_says_so(x_ND: np.ndarray) -> None:
    content = _content(_train("v1", x_ND), x_ND, "a lamp", GateConfig(), num_pairs=0)

    assert "No user of the test period took two items" in quality_page(content)


def test_the_tree_lists_a_small_catalogue_whole() -> None:
    rq_NL = np.array([[1, 0, 4], [0, 2, 5], [1, 0, 6], [1, 3, 7]])

    tree = prefix_tree(np.array([10, 11, 12, 13]), rq_NL, ["red lamp", "saw", "red desk", "red"])

    assert (tree["num_items"], tree["num_listed"]) == (4, 4)
    assert tree["branches"] == [
        (1, 3, ["red", "desk", "lamp"], 2, [
            (0, 2, [(10, "red lamp", "4"), (12, "red desk", "6")]), (3, 1, [(13, "red", "7")])
        ]),
        (0, 1, ["saw"], 1, [(2, 1, [(11, "saw", "5")])]),
    ]  # fmt: skip


def test_the_tree_of_a_large_catalogue_is_cut_and_counts_all() -> None:
    rng = np.random.default_rng(0)
    rq_NL = rng.integers(40, size=(50_000, 3))
    titles = [f"title {n} " + "x" * 80 for n in range(50_000)]

    tree = prefix_tree(np.arange(50_000), rq_NL, titles)

    assert tree["num_listed"] <= MAX_ITEMS
    assert sum(branch[1] for branch in tree["branches"]) == 50_000
    assert max(len(prefix[2]) for b in tree["branches"] for prefix in b[4]) <= MAX_ITEMS_PER_PREFIX
    assert len(json.dumps(tree)) < 1_000_000


def test_bars_stand_for_their_values() -> None:
    svg = bar_chart(["a<b", "c"], [Series("n", [1.0, 0.5])], x_label="x", y_label="y", y_max=1.0)

    heights = [float(h) for h in re.findall(r'class="bar s0".*?height="([\d.]+)"', svg)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.1)
    assert "a&lt;b" in svg


def test_an_even_load_lies_on_the_dashed_line_and_a_dead_code_on_the_lower_edge() -> None:
    svg = load_chart([Series("level 1", [1.0, 1.0, 0.0])], x_label="codes", y_label="load")

    even = re.search(r'class="even".*?y1="([\d.]+)"', svg)
    points = re.search(r'points="([^"]+)"', svg)
    assert even is not None
    assert points is not None
    heights = [float(point.split(",")[1]) for point in points[1].split()]
    assert heights[0] == heights[1] == float(even[1])
    assert heights[2] == max(heights) > float(even[1])

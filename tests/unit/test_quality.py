"""Shape letters in this file: N items, K codes, D embedding width, L levels."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest

from qarm_feast.behaviour import BehaviourPairs
from qarm_feast.codebook import Codebook, EncoderFacts, ItemCodes, QuantizerConfig
from qarm_feast.errors import DataError
from qarm_feast.quality import (
    ItemFacts,
    code_use,
    codebook_quality,
    full_code_figures,
    mean_cosine_by_shared_prefix,
    worst_buckets,
)
from qarm_feast.quantizers import RqConfig, VqConfig


def test_code_use_of_even_codes() -> None:
    use = code_use(np.array([2, 2, 2, 2]))

    assert use["code_entropy_bits"] == 2
    assert use["entropy_share"] == 1
    assert use["perplexity"] == 4
    assert use["gini"] == 0
    assert (use["num_dead"], use["codebook_coverage"], use["largest_bucket"]) == (0, 1, 2)


def test_code_use_of_skewed_codes() -> None:
    use = code_use(np.array([0, 6, 2, 0]))

    assert use["code_entropy_bits"] == pytest.approx(0.811278)
    assert use["entropy_share"] == pytest.approx(0.811278 / 2)
    assert use["perplexity"] == pytest.approx(1.754765)
    assert use["gini"] == pytest.approx(0.625)
    assert (use["num_used"], use["num_dead"], use["largest_bucket"]) == (2, 2, 6)
    assert use["codebook_coverage"] == 0.5


def test_full_code_figures_of_a_hand_made_set() -> None:
    rq_NL = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [2, 2], [3, 3]])

    assert full_code_figures(rq_NL) == {
        "num_unique_codes": 5,
        "collision_rate": 1 - 5 / 8,
        "singleton_share": 3 / 8,
        "max_bucket": 3,
        "mean_items_per_shared_code": 2.5,
    }
    assert full_code_figures(rq_NL[3:5])["mean_items_per_shared_code"] == 0


def test_mean_cosine_by_shared_prefix_equals_all_pairs_one_by_one() -> None:
    rng = np.random.default_rng(0)
    rq_NL = rng.integers(3, size=(60, 3))
    rq_NL[rq_NL[:, 0] == 2, 1:] = 0
    x_ND = rng.standard_normal((60, 4))
    unit_ND = (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)).astype(np.float32)
    cosines: dict[int, list[float]] = {}
    for i in range(60):
        for j in range(i):
            shared = int(np.argmin(np.append(rq_NL[i] == rq_NL[j], False)))
            cosines.setdefault(shared, []).append(float(unit_ND[i] @ unit_ND[j]))

    found = mean_cosine_by_shared_prefix(rq_NL, unit_ND)

    assert found == pytest.approx([np.mean(cosines[n]) for n in range(4)], abs=1e-6)


def test_mean_cosine_of_a_prefix_length_that_no_pair_shares_is_none() -> None:
    unit_ND = np.eye(2, dtype=np.float32)

    assert mean_cosine_by_shared_prefix(np.array([[0, 1], [0, 2]]), unit_ND) == [None, 0, None]


def _trained(num_items: int, sizes: tuple[int, ...]) -> tuple[Codebook, np.ndarray, np.ndarray]:
    x_ND = np.random.default_rng(1).standard_normal((num_items, 6)).astype(np.float32)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    item_ids_N = np.arange(num_items, dtype=np.int64)
    codebook = Codebook.train(
        "v1",
        item_ids_N,
        x_ND,
        config=QuantizerConfig(rq=RqConfig(codebook_size=sizes), vq=VqConfig(num_neighbors=5)),
        encoder=EncoderFacts("e1", "0" * 64, None),
        created=datetime(2024, 1, 1, tzinfo=UTC),
    )
    return codebook, item_ids_N, x_ND


def test_the_report_holds_every_measure_and_is_json() -> None:
    codebook, item_ids_N, x_ND = _trained(300, (16, 8))
    codes = codebook.encode(item_ids_N, ["h"] * 300, x_ND)

    pairs = BehaviourPairs(np.array([[0, 1], [1, 2]]), np.array([1, 2]))
    titles = [f"title {n}" for n in range(300)]

    quality = codebook_quality(codebook, codes, x_ND, ItemFacts(pairs, titles))

    assert json.loads(json.dumps(quality, allow_nan=False)) == quality
    residual_ND = x_ND - codebook.decode_rq(codes.rq_NL)
    assert quality["quantization_mse"] == pytest.approx(np.square(residual_ND).mean(), rel=1e-4)
    assert quality["levels"][1]["relative_residual_norm"] == pytest.approx(
        np.linalg.norm(residual_ND) / np.sqrt(300), rel=1e-4
    )
    assert quality["levels"][0]["codebook_size"] == 16
    assert quality["vq"]["codebook_size"] == 300
    assert quality["vq"]["mean_cosine_first"] > quality["vq"]["mean_cosine_all"]
    assert quality["behaviour"]["num_pairs"] == 3
    assert quality["worst_buckets"][0]["num_items"] == quality["max_bucket"]


def test_worst_buckets_come_by_size_then_by_unlikeness_with_titles() -> None:
    unit_ND = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]], dtype=np.float32)
    rq_NL = np.array([[0], [0], [1], [1], [2], [0]])
    item_ids_N = np.array([15, 14, 13, 12, 11, 10])
    codes = ItemCodes(item_ids_N, np.zeros((6, 1), dtype=np.int64), rq_NL)

    found = worst_buckets(codes, unit_ND, [f"title {item}" for item in item_ids_N])

    assert found == [
        {
            "rq_code": [0],
            "num_items": 3,
            "mean_cosine": 1.0,
            "item_ids": [10, 14, 15],
            "titles": ["title 10", "title 14", "title 15"],
        },
        {
            "rq_code": [1],
            "num_items": 2,
            "mean_cosine": 0.0,
            "item_ids": [12, 13],
            "titles": ["title 12", "title 13"],
        },
    ]


def test_hit_rates_equal_a_plain_ranking() -> None:
    codebook, item_ids_N, x_ND = _trained(200, (16, 8))
    codes = codebook.encode(item_ids_N, ["h"] * 200, x_ND)
    decoded_ND = codebook.decode_rq(codes.rq_NL).astype(np.float64)
    chances = {1: 0.0, 10: 0.0}
    for i in range(200):
        true_N = np.square(x_ND[i].astype(np.float64) - x_ND).sum(axis=1)
        true_N[i] = np.inf
        wanted = int(true_N.argmin())
        same = (codes.rq_NL == codes.rq_NL[wanted]).all(axis=1)
        own = (codes.rq_NL == codes.rq_NL[i]).all(axis=1)
        code_N = np.square(decoded_ND[i] - decoded_ND).sum(axis=1)
        code_N[own] = -1.0
        others = np.arange(200) != i
        closer = int(((code_N < code_N[wanted]) & ~same & others).sum())
        tied = int((same & others).sum())
        for k in chances:
            chances[k] += min(max((k - closer) / tied, 0), 1) / 200

    quality = codebook_quality(codebook, codes, x_ND)

    assert 0.05 < quality["hr1"] < quality["hr10"] < 1
    assert quality["hr1"] == pytest.approx(chances[1])
    assert quality["hr10"] == pytest.approx(chances[10])


def test_finer_codebooks_have_better_figures() -> None:
    coarse, fine = (_trained(400, sizes) for sizes in ((4, 4), (32, 32)))
    figures = [
        codebook_quality(codebook, codebook.encode(ids_N, ["h"] * 400, x_ND), x_ND)
        for codebook, ids_N, x_ND in (coarse, fine)
    ]

    assert figures[1]["quantization_mse"] < figures[0]["quantization_mse"]
    assert figures[1]["hr10"] > figures[0]["hr10"]
    assert figures[1]["collision_rate"] < figures[0]["collision_rate"]


def test_quality_of_one_item_is_refused() -> None:
    codebook, item_ids_N, x_ND = _trained(100, (4,))
    codes = codebook.encode(item_ids_N[:1], ["h"], x_ND[:1])

    with pytest.raises(DataError, match="at least two items"):
        codebook_quality(codebook, codes, x_ND[:1])

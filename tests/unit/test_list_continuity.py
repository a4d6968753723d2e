"""VQ lists over a refresh.

Shape letters in this file: N items, D embedding width, P pool rows, V old neighbours, k neighbours.
"""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from qarm_feast.codebook import Codebook, EncoderFacts, ItemVectors, QuantizerConfig
from qarm_feast.codebook_config import ContinuityConfig
from qarm_feast.continuity import ParentCodes, refresh_codebook
from qarm_feast.list_continuity import NO_NEIGHBOR, held_lists
from qarm_feast.overrides import NO_ROW
from qarm_feast.quantizers import NeighborQuantizer, RqConfig, VqConfig
from qarm_feast.quantizers.base import unit_rows

NO_RESET = np.zeros(0, dtype=np.int64)
CONFIG = QuantizerConfig(rq=RqConfig(codebook_size=(4,)), vq=VqConfig(num_neighbors=3))
ENCODER = EncoderFacts("e2", "b" * 64, None)
CREATED = datetime(2024, 4, 1, tzinfo=UTC)


def _line(*places: float) -> NeighborQuantizer:
    """A pool on a line, two neighbours; the items of its rows are 100, 101 ..."""
    pool_PD = np.array([[place] for place in places], dtype=np.float32)
    ids_P = np.arange(100, 100 + len(places))
    return NeighborQuantizer(VqConfig(num_neighbors=2), pool_PD, ids_P)


def _at(*places: float) -> ItemVectors:
    x_ND = np.array([[place] for place in places], dtype=np.float32)
    return ItemVectors(np.arange(len(places)), ["h"] * len(places), x_ND)


def test_an_old_neighbour_stays_up_to_the_hysteresis_and_the_nearest_fill_the_list() -> None:
    # From 0: squared distances 4, 9 (the second nearest), 16, 25.
    pool = _line(2, 3, 4, 5)
    old_NV = np.array([[3, 2], [3, 2], [1, 0], [NO_NEIGHBOR, NO_NEIGHBOR]])
    items = _at(0, 0, 0, 0)

    # 16 <= 1.8 * 9 < 25, and with 1.7 * 9 neither stays.
    wide = held_lists(pool, items, old_NV, NO_RESET, 0.8)
    narrow = held_lists(pool, items, old_NV, NO_RESET, 0.7)

    assert wide.vq_Nk.tolist() == [[0, 2], [0, 2], [0, 1], [0, 1]]
    assert narrow.vq_Nk.tolist() == [[0, 1]] * 4
    assert wide.figures["churn"] == pytest.approx(2 / 3)
    assert wide.figures["naive_churn"] == pytest.approx(2 / 3)
    assert wide.figures["neighbor_recall"] == 6 / 8
    assert wide.figures["distance_over_nearest"] == pytest.approx((2 * 20 + 2 * 13) / (4 * 13) - 1)


def test_a_list_whose_members_are_all_near_enough_stays_and_is_told_by_distance() -> None:
    kept = held_lists(_line(2, 3, 4, 5), _at(0), np.array([[3, 2]]), NO_RESET, 2.0)

    assert kept.vq_Nk.tolist() == [[2, 3]]
    assert (kept.figures["churn"], kept.figures["naive_churn"]) == (0.0, 1.0)


def test_a_neighbour_whose_row_started_anew_or_is_gone_does_not_stay() -> None:
    pool, items = _line(2, 3, 4, 5), _at(0, 0)

    # Row 9 is gone with a larger pool; row 3 holds another item now.
    kept = held_lists(pool, items, np.array([[9, 2], [3, 2]]), np.array([3]), 100.0)

    assert kept.vq_Nk.tolist() == [[0, 2], [0, 2]]
    assert kept.figures["churn"] == 1.0


@pytest.mark.parametrize(("num_old", "list_"), [(1, [0, 3]), (3, [1, 2])])
def test_a_code_may_have_become_longer_or_shorter(num_old: int, list_: list[int]) -> None:
    old_NV = np.array([[3, 2, 1][:num_old]])

    assert held_lists(_line(2, 3, 4, 5), _at(0), old_NV, NO_RESET, 2.0).vq_Nk.tolist() == [list_]


def _reference(
    x_D: np.ndarray, pool_PD: np.ndarray, own_row: int, old: list[int], k: int, h: float
) -> list[int]:
    d2_P = ((pool_PD.astype(np.float64) - x_D.astype(np.float64)) ** 2).sum(axis=1)
    order = [row for row in np.argsort(d2_P, kind="stable").tolist() if row != own_row]
    limit = (1 + h) * d2_P[order[k - 1]]
    stays = [row for row in old if row != NO_NEIGHBOR and d2_P[row] <= limit]
    chosen = stays + [row for row in order if row not in stays]
    return sorted(chosen[:k], key=lambda row: d2_P[row])


def test_held_lists_equal_a_plain_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qarm_feast.list_continuity._ITEMS_PER_BLOCK", 64)
    rng = np.random.default_rng(0)
    pool_PD = unit_rows(rng.standard_normal((60, 6)).astype(np.float32))
    x_ND = unit_rows(rng.standard_normal((150, 6)).astype(np.float32))
    ids_N = np.arange(150)
    pool = NeighborQuantizer(VqConfig(num_neighbors=5), pool_PD, np.arange(60) * 2)
    old_NV = pool.encode(unit_rows(x_ND + 0.15 * rng.standard_normal((150, 6))).astype("f4"), ids_N)
    old_NV[:10] = NO_NEIGHBOR
    vectors = ItemVectors(ids_N, ["h"] * 150, x_ND)

    for hysteresis in (0.0, 0.1, 0.5):
        kept = held_lists(pool, vectors, old_NV, NO_RESET, hysteresis)

        own_rows = [item // 2 if item % 2 == 0 and item < 120 else -1 for item in range(150)]
        expected = [
            _reference(x_D, pool_PD, own, old, 5, hysteresis)
            for x_D, own, old in zip(x_ND, own_rows, old_NV.tolist(), strict=True)
        ]
        np.testing.assert_array_equal(kept.vq_Nk, expected)
        assert kept.figures["churn"] <= kept.figures["naive_churn"]


def _vectors(seed: int = 0, num_items: int = 300) -> ItemVectors:
    rng = np.random.default_rng(seed)
    centres_KD = np.random.default_rng(99).standard_normal((4, 8))
    x_ND = centres_KD[rng.integers(4, size=num_items)] + 0.3 * rng.standard_normal((num_items, 8))
    ids_N = np.arange(1000, 1000 + num_items, dtype=np.int64)
    return ItemVectors(ids_N, [f"h{item}" for item in ids_N], x_ND.astype(np.float32))


def _drifted(vectors: ItemVectors, seed: int) -> ItemVectors:
    noise_ND = 0.1 * np.random.default_rng(seed).standard_normal(vectors.x_ND.shape)
    return replace(vectors, x_ND=(vectors.x_ND + noise_ND).astype(np.float32))


def _train(vectors: ItemVectors, version: str) -> Codebook:
    return Codebook.train(
        version, vectors.item_ids_N, vectors.x_ND, config=CONFIG, encoder=ENCODER, created=CREATED
    )


def _refresh(vectors: ItemVectors, parent: ParentCodes, list_hysteresis: float) -> Codebook:
    keep = ContinuityConfig(list_hysteresis=list_hysteresis)
    naive = _train(vectors, "v2")
    return refresh_codebook(naive, vectors, vectors.item_ids_N, parent, keep, CONFIG.rq)


def test_kept_lists_are_served_by_encode_until_the_content_changes(tmp_path: Path) -> None:
    old, new = _vectors(), _drifted(_vectors(), seed=3)
    parent = ParentCodes.served_by(_train(old, "v1"), old)
    refreshed = _refresh(new, parent, 0.5)
    refreshed.save(str(tmp_path))

    loaded = Codebook.load(str(tmp_path), "v2")
    served = loaded.encode(new.item_ids_N, new.content_hashes_N, new.x_ND).vq_NV
    edited = loaded.encode(new.item_ids_N, ["edited"] * 300, new.x_ND).vq_NV

    figures = loaded.manifest.continuity["lists"]
    changed = (np.sort(served, axis=1) != np.sort(parent.vq_NV, axis=1)).any(axis=1)
    assert loaded.manifest == refreshed.manifest
    assert figures["churn"] == pytest.approx(changed.mean())
    assert figures["churn"] < 0.7 * figures["naive_churn"]
    np.testing.assert_array_equal(edited, loaded.vq.encode(unit_rows(new.x_ND), new.item_ids_N))
    is_stored_N = (served != edited).any(axis=1)
    assert int(is_stored_N.sum()) == loaded.manifest.num_list_overrides > 0
    assert served.dtype == np.int64


def test_lists_served_one_by_one_equal_those_of_a_whole_batch() -> None:
    old, new = _vectors(), _drifted(_vectors(), seed=3)
    refreshed = _refresh(new, ParentCodes.served_by(_train(old, "v1"), old), 0.3)
    hashes = list(new.content_hashes_N)
    hashes[::3] = ["edited"] * 100

    whole = refreshed.encode(new.item_ids_N, hashes, new.x_ND).vq_NV
    single = [
        refreshed.encode(new.item_ids_N[[row]], [hashes[row]], new.x_ND[[row]]).vq_NV[0]
        for row in range(0, 300, 7)
    ]

    np.testing.assert_array_equal(whole[::7], single)


def test_in_the_same_space_no_list_changes_and_none_is_stored() -> None:
    old = _vectors()

    refreshed = _refresh(old, ParentCodes.served_by(_train(old, "v1"), old), 0.3)

    figures = refreshed.manifest.continuity["lists"]
    assert (figures["churn"], figures["naive_churn"], figures["neighbor_recall"]) == (0, 0, 1)
    assert refreshed.manifest.num_list_overrides == 0
    assert not any(name.startswith("list_overrides") for name in refreshed.manifest.files)


def test_over_a_chain_no_member_is_farther_than_the_hysteresis_allows() -> None:
    vectors = _vectors()
    parent = ParentCodes.served_by(_train(vectors, "v1"), vectors)
    for number in range(2, 6):
        vectors = _drifted(vectors, seed=number)
        naive = _train(vectors, f"v{number}")
        refreshed = refresh_codebook(
            naive, vectors, vectors.item_ids_N, parent, ContinuityConfig(), CONFIG.rq
        )
        parent = ParentCodes.served_by(refreshed, vectors)
        unit_ND, pool_PD = unit_rows(vectors.x_ND), refreshed.vq.pool_vectors_PD

        nearest_Nk = refreshed.vq.encode(unit_ND, vectors.item_ids_N)
        last_N = np.square(unit_ND - pool_PD[nearest_Nk[:, -1]]).sum(axis=1)
        farthest_N = np.square(unit_ND - pool_PD[parent.vq_NV[:, -1]]).sum(axis=1)
        assert (farthest_N <= 1.5 * last_N * (1 + 1e-5)).all()
        assert (farthest_N > last_N).any()


def test_lists_of_new_items_and_of_new_content_are_the_nearest() -> None:
    old, new = _vectors(), _drifted(_vectors(num_items=310), seed=3)
    new = replace(new, content_hashes_N=["edited"] * 5 + list(new.content_hashes_N[5:]))

    refreshed = _refresh(new, ParentCodes.served_by(_train(old, "v1"), old), 0.5)

    table = refreshed.list_overrides
    rows_N = table.rows_of(new.item_ids_N, new.content_hashes_N)
    assert (rows_N[:5] == NO_ROW).all()
    assert (rows_N[300:] == NO_ROW).all()
    assert (rows_N != NO_ROW).any()

from collections.abc import Callable

import numpy as np
import pytest

from qarm_feast.alignment import later_behaviour, protocols
from qarm_feast.alignment.evaluate import (
    Measured,
    bootstrap_means,
    evaluate_vectors,
    format_report,
    report_of,
)
from qarm_feast.alignment.later_behaviour import LaterBehaviour, read_behaviour
from qarm_feast.alignment.protocols import item_cf_hits, neighbor_auc, zero_shot_hits
from qarm_feast.input_data import InputData

Loader = Callable[..., InputData]


def random_rows(num_users: int = 30, num_items: int = 25) -> list[tuple[int, int, int, str, bool]]:
    """Users take popular items more often; some items only appear later, some rows repeat."""
    generator = np.random.default_rng(3)
    chance = np.arange(1, num_items + 1, dtype=float)
    rows = [(99, item, 0, "train", False) for item in range(num_items - 4)]
    for user in range(num_users):
        taken = generator.choice(num_items, 9, p=chance / chance.sum())
        splits = ["train"] * 4 + ["valid"] * 3 + ["test"] * 2
        for second, (item, split) in enumerate(zip(taken, splits, strict=True), start=1):
            is_unseen = split == "train" and item >= num_items - 4
            rows.append((user, int(item), second, split, not is_unseen and second % 5 != 0))
    return [row for row in rows if not (row[3] == "train" and row[1] >= num_items - 4)]


def taken_by(rows: list[tuple[int, int, int, str, bool]], splits: tuple[str, ...]) -> dict:
    """Return the items of each user in order of time, positives of some splits alone."""
    taken: dict[int, list[int]] = {}
    for user, item, _, split, is_click in sorted(rows, key=lambda row: (row[0], row[2], row[1])):
        if is_click and split in splits:
            taken.setdefault(user, []).append(item)
    return taken


@pytest.mark.parametrize("split", ["valid", "test"])
def test_neighbors_and_item_cf_are_those_counted_one_by_one(split: str, load_rows: Loader) -> None:
    rows = random_rows()
    before = ("train",) if split == "valid" else ("train", "valid")
    later, known = taken_by(rows, (split,)), taken_by(rows, (*before, split))

    behaviour = read_behaviour(load_rows(rows), split)

    expected = {}
    for item in range(25):
        users = [user for user, items in later.items() if item in items]
        counts = {other: sum(other in known[user] for user in users) for other in range(25)}
        scores = [
            (counts[other], counts[other] / max(sum(other in known[u] for u in later), 1) ** 0.5)
            for other in range(25)
        ]
        others = [other for other in range(25) if other != item and counts[other]]
        if others:
            best = sorted(others, key=lambda other: (-scores[other][0], other))[:5]
            expected[item] = (best, min(others, key=lambda other: (-scores[other][1], other)))
    assert behaviour.query_items_Q.tolist() == list(expected)
    for row, (best, by_cf) in enumerate(expected.values()):
        found = behaviour.neighbor_items_QK[row]
        assert found[found >= 0].tolist() == best
        assert behaviour.cf_items_Q[row] == by_cf


@pytest.mark.parametrize("split", ["valid", "test"])
def test_histories_end_before_the_first_later_positive(split: str, load_rows: Loader) -> None:
    rows = random_rows()
    earlier = taken_by(rows, ("train",) if split == "valid" else ("train", "valid"))
    later = taken_by(rows, (split,))

    behaviour = read_behaviour(load_rows(rows), split)

    users = [user for user in sorted(later) if user in earlier]
    histories = [np.flatnonzero(row) for row in behaviour.history_UM.toarray()]
    assert [set(history) for history in histories] == [set(earlier[user]) for user in users]
    assert behaviour.next_items_U.tolist() == [later[user][0] for user in users]


def test_behaviour_comes_from_validation_rows_and_never_from_test_rows(load_rows: Loader) -> None:
    checked = load_rows(
        [
            (1, 0, 1, "train", True),
            (1, 1, 2, "train", True),
            (1, 2, 3, "valid", True),
            (1, 3, 4, "test", True),
            (2, 0, 1, "train", True),
            (2, 2, 2, "valid", True),
            (2, 3, 3, "valid", False),
            (3, 3, 1, "test", True),
        ]
    )

    behaviour = read_behaviour(checked)

    # Item 2 shares two users with item 0 and one with item 1.
    assert behaviour.query_items_Q.tolist() == [2]
    assert behaviour.neighbor_items_QK.tolist() == [[0, 1, -1, -1, -1]]
    # Item-CF divides by sqrt(users): 2 / sqrt(2) of item 0 beats 1 / sqrt(1) of item 1.
    assert behaviour.cf_items_Q.tolist() == [0]
    assert behaviour.history_UM.toarray().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert behaviour.next_items_U.tolist() == [2, 2]
    # Item 3 has a validation row (of no positive) and test rows, but no train row.
    assert behaviour.is_cold_M.tolist() == [False, False, True, True]


def test_a_user_with_very_many_positives_brings_the_latest_of_them(
    load_rows: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later_behaviour, "MAX_ITEMS_PER_USER", 2)
    rows = [(1, item, item + 1, "train", True) for item in range(4)]
    rows += [(1, item, item + 1, "valid", True) for item in (4, 5, 6)]

    behaviour = read_behaviour(load_rows(rows))

    assert behaviour.query_items_Q.tolist() == [5, 6]
    assert behaviour.neighbor_items_QK[:, :3].tolist() == [[2, 3, 6], [2, 3, 5]]
    # What comes next is the first later positive all the same.
    assert behaviour.next_items_U.tolist() == [4]


def test_of_many_queries_and_users_a_repeatable_part_is_drawn(load_rows: Loader) -> None:
    checked = load_rows(random_rows())

    first, again = (read_behaviour(checked, max_queries=6) for _ in range(2))

    assert len(first.query_items_Q) == len(first.next_items_U) == 6
    assert first.query_items_Q.tolist() == again.query_items_Q.tolist()
    assert (first.history_UM != again.history_UM).nnz == 0
    whole = read_behaviour(checked)
    assert set(first.query_items_Q) < set(whole.query_items_Q)


@pytest.fixture
def behaviour(load_rows: Loader) -> LaterBehaviour:
    return read_behaviour(load_rows(random_rows()))


@pytest.fixture(params=["distinct", "tied"])
def unit_vectors(request: pytest.FixtureRequest) -> np.ndarray:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(25, 4)).astype(np.float32)
    if request.param == "tied":
        vectors = vectors[generator.integers(0, 5, size=25)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def chance_of_top(cosines: list[float], wanted: float, k: int) -> float:
    """Return how many of all orders of equal cosines put the wanted one among the first k."""
    nearer = sum(cosine > wanted + 1e-6 for cosine in cosines)
    tied = sum(abs(cosine - wanted) <= 1e-6 for cosine in cosines)
    return sum(nearer + place < k for place in range(tied + 1)) / (tied + 1)


def test_neighbor_auc_is_the_share_of_pairs_in_the_right_order(
    behaviour: LaterBehaviour, unit_vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of three queries, so that the last one is not full.
    monkeypatch.setattr(protocols, "_SCORES_PER_BLOCK", 75)

    aucs_Q = neighbor_auc(behaviour, unit_vectors)

    cosines_MM = unit_vectors @ unit_vectors.T
    for query, padded, auc in zip(
        behaviour.query_items_Q, behaviour.neighbor_items_QK, aucs_Q, strict=True
    ):
        neighbors = [item for item in padded if item >= 0]
        others = [item for item in range(25) if item != query and item not in neighbors]
        gaps = [cosines_MM[query, n] - cosines_MM[query, o] for n in neighbors for o in others]
        wins = [1.0 if gap > 1e-6 else 0.5 if gap >= -1e-6 else 0.0 for gap in gaps]
        assert auc == pytest.approx(np.mean(wins))


def test_neighbor_auc_can_draw_the_other_items_by_weight(
    behaviour: LaterBehaviour, unit_vectors: np.ndarray
) -> None:
    copies_M = np.random.default_rng(1).integers(1, 4, size=25)

    aucs_Q = neighbor_auc(behaviour, unit_vectors, copies_M.astype(np.float32))

    cosines_MM = unit_vectors @ unit_vectors.T
    for query, padded, auc in zip(
        behaviour.query_items_Q, behaviour.neighbor_items_QK, aucs_Q, strict=True
    ):
        near = [item for item in padded if item >= 0]
        others = [item for item in range(25) if item != query and item not in near]
        drawn = [item for item in others for _ in range(copies_M[item])]
        gaps = [cosines_MM[query, n] - cosines_MM[query, o] for n in near for o in drawn]
        wins = [1.0 if gap > 1e-6 else 0.5 if gap >= -1e-6 else 0.0 for gap in gaps]
        assert auc == pytest.approx(np.mean(wins), abs=1e-6)


def test_zero_shot_ranks_the_next_item_among_items_outside_the_history(
    behaviour: LaterBehaviour, unit_vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "_SCORES_PER_BLOCK", 75)

    hits_U = zero_shot_hits(behaviour, unit_vectors, k=4)

    histories = [np.flatnonzero(row) for row in behaviour.history_UM.toarray()]
    for history, wanted, hit in zip(histories, behaviour.next_items_U, hits_U, strict=True):
        mean_D = unit_vectors[history].mean(axis=0)
        others = [item for item in range(25) if item != wanted and item not in history]
        cosines = [float(unit_vectors[item] @ mean_D) for item in others]
        assert hit == pytest.approx(chance_of_top(cosines, float(unit_vectors[wanted] @ mean_D), 4))
    assert 0 < hits_U.mean() < 1


def test_item_cf_ranks_the_best_neighbor_among_all_other_items(
    behaviour: LaterBehaviour, unit_vectors: np.ndarray
) -> None:
    hits_Q = item_cf_hits(behaviour, unit_vectors, k=6)

    cosines_MM = unit_vectors @ unit_vectors.T
    for query, wanted, hit in zip(
        behaviour.query_items_Q, behaviour.cf_items_Q, hits_Q, strict=True
    ):
        others = [item for item in range(25) if item not in (query, wanted)]
        cosines = cosines_MM[query, others].tolist()
        assert hit == pytest.approx(chance_of_top(cosines, cosines_MM[query, wanted], 6))
    assert 0 < hits_Q.mean() < 1


def test_report_slices_by_cold_items(clustered: InputData) -> None:
    clusters = np.arange(40) // 10
    perfect = np.eye(4, dtype=np.float32)[clusters]
    blind = np.ones((40, 1), dtype=np.float32)

    report = evaluate_vectors(clustered, {"raw": blind, "perfect": perfect})

    # Of the 34 items that are no neighbours, 30 are farther and 4 of the same cluster tie.
    assert report["perfect"]["neighbor_auc_warm"] == pytest.approx(32 / 34)
    assert report["perfect"]["neighbor_auc_cold"] == pytest.approx(32 / 34)
    assert report["raw"]["neighbor_auc_all"] == 0.5
    # Ten places for 39 tied items, and for the 9 others of the item's own cluster.
    assert report["raw"]["item_cf_recall_at_10_all"] == pytest.approx(10 / 39)
    assert report["perfect"]["item_cf_recall_at_10_all"] == 1.0
    assert report["counts"]["num_queries_cold"] == 4
    text = format_report(report)
    assert "neighbor_auc_cold" in text
    assert "perfect - raw neighbor_auc_all: +0.4412" in text


def test_gains_are_paired_and_their_interval_shrinks_with_samples() -> None:
    generator = np.random.default_rng(0)

    def gain(num_samples: int) -> dict[str, float]:
        raw_S = generator.random(num_samples)
        better_S = raw_S + 0.1 + 0.01 * generator.standard_normal(num_samples)
        values = {"raw": raw_S, "aligned": better_S}
        each = Measured(values, np.zeros(num_samples, dtype=bool))
        measured = {"neighbor_auc": each, "zero_shot_recall_at_10": each}
        return report_of(measured, 500)["gains"]["aligned"]["neighbor_auc_all"]

    few, many = gain(50), gain(5000)

    # Unpaired, 50 uniform values would leave an interval of more than 0.2.
    assert few["high"] - few["low"] == pytest.approx(4 * 0.01 / 50**0.5, rel=0.3)
    assert many["high"] - many["low"] == pytest.approx(4 * 0.01 / 5000**0.5, rel=0.3)
    assert few["low"] < few["gain"] < few["high"]
    assert few["num_samples"] == 50


def test_bootstrap_means_draw_as_many_samples_as_there_are() -> None:
    values_SX = np.column_stack([np.arange(4.0), 2 * np.arange(4.0)])

    draws_BX = bootstrap_means(values_SX, 300)

    assert draws_BX.shape == (300, 2)
    # A mean of four values out of 0, 1, 2, 3 is a quarter of a whole number.
    np.testing.assert_allclose(draws_BX[:, 0] * 4, np.round(draws_BX[:, 0] * 4))
    np.testing.assert_allclose(draws_BX[:, 1], 2 * draws_BX[:, 0])
    assert draws_BX[:, 0].mean() == pytest.approx(1.5, abs=0.15)


def test_without_validation_positives_nothing_is_measured(load_rows: Loader) -> None:
    checked = load_rows([(1, 0, 1, "train", True), (1, 0, 2, "test", True)])
    vectors = np.ones((1, 2), dtype=np.float32)

    report = evaluate_vectors(checked, {"raw": vectors, "aligned": vectors})

    assert set(report["counts"].values()) == {0}
    assert report["raw"] == report["aligned"] == report["gains"]["aligned"] == {}
    text = format_report(report)
    assert text.startswith("nothing was measured: no validation row is positive")
    assert "num_queries_all 0" in text

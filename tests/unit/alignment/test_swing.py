import itertools

import numpy as np
import pytest

import qarm_feast.alignment.swing as swing_module
from qarm_feast.alignment.neighbors import Neighbors, NeighborSearch
from qarm_feast.alignment.positives import Positives
from qarm_feast.alignment.swing import swing_neighbors
from tests.unit.alignment.pair_cases import positives_of, random_positives


def swing_reference(positives: Positives, alpha: float) -> dict[tuple[int, int], float]:
    items_of = [
        set(positives.items_P[positives.users_P == user].tolist())
        for user in range(positives.num_users)
    ]
    scores: dict[tuple[int, int], float] = {}
    for first, second in itertools.combinations(items_of, 2):
        shared = first & second
        if len(shared) >= 2:
            weight = 1.0 / np.sqrt(len(first) * len(second)) / (alpha + len(shared))
            for pair in itertools.permutations(shared, 2):
                scores[pair] = scores.get(pair, 0.0) + weight
    return scores


def as_dict(found: Neighbors) -> dict[tuple[int, int], float]:
    pairs = zip(found.items_R.tolist(), found.neighbors_R.tolist(), strict=True)
    return dict(zip(pairs, found.scores_R.tolist(), strict=True))


def assert_equal_bits(one: Neighbors, other: Neighbors) -> None:
    assert np.array_equal(one.items_R, other.items_R)
    assert np.array_equal(one.neighbors_R, other.neighbors_R)
    assert one.scores_R.tobytes() == other.scores_R.tobytes()
    assert one.num_scored == other.num_scored


def test_swing_of_two_users_who_share_two_items_by_hand() -> None:
    # Users 0 and 1 share items 0 and 1; user 1 has item 2 too; user 2 has item 2 only.
    positives = positives_of([(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3), (1, 2, 4), (2, 2, 5)])

    found = swing_neighbors(positives, NeighborSearch(5), alpha=1.0, max_users_per_item=10)

    assert list(zip(found.items_R, found.neighbors_R, strict=True)) == [(0, 1), (1, 0)]
    np.testing.assert_allclose(found.scores_R, 1.0 / np.sqrt(2 * 3) / (1.0 + 2), rtol=1e-9)
    assert found.num_scored == 2


@pytest.mark.parametrize(("num_users", "num_items"), [(14, 9), (120, 40)])
def test_swing_equals_the_plain_double_loop(num_users: int, num_items: int) -> None:
    # With 120 users items are crowded, and some of what they share is counted by products.
    positives = random_positives(num_users, num_items, seed=3)

    found = swing_neighbors(positives, NeighborSearch(num_items), 0.5, max_users_per_item=1000)

    expected = swing_reference(positives, alpha=0.5)
    assert as_dict(found).keys() == expected.keys()
    np.testing.assert_allclose(
        [as_dict(found)[pair] for pair in expected], list(expected.values()), rtol=1e-7
    )


def test_swing_scores_are_the_same_bits_however_shared_items_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    positives = random_positives(100, 60, seed=5, share=0.2)
    search = NeighborSearch(7)
    found = swing_neighbors(positives, search, 1.0, max_users_per_item=1000)

    monkeypatch.setattr(swing_module, "_CROWDED_USERS", 1000)
    together = swing_neighbors(positives, search, 1.0, max_users_per_item=1000)
    monkeypatch.setattr(swing_module, "_ENTRIES_PER_BATCH", 50)
    in_pieces = swing_neighbors(positives, search, 1.0, max_users_per_item=1000)
    monkeypatch.setattr(swing_module, "_CROWDED_USERS", 2)
    monkeypatch.setattr(swing_module, "_DENSE_SHARE", 0.0)
    by_products = swing_neighbors(positives, search, 1.0, max_users_per_item=1000)

    assert_equal_bits(found, together)
    assert_equal_bits(found, in_pieces)
    assert_equal_bits(found, by_products)


def test_swing_finds_the_same_bits_with_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swing_module, "_ENTRIES_PER_BLOCK", 500)
    positives = random_positives(80, 30, seed=2)

    alone = swing_neighbors(positives, NeighborSearch(5), 1.0, 1000)
    shared = swing_neighbors(positives, NeighborSearch(5, num_processes=2), 1.0, 1000)

    assert_equal_bits(alone, shared)


def test_swing_keeps_the_best_neighbors_of_each_item() -> None:
    positives = random_positives(num_users=20, num_items=8, seed=1)

    found = swing_neighbors(positives, NeighborSearch(2), alpha=1.0, max_users_per_item=100)

    reference = swing_reference(positives, alpha=1.0)
    for item in range(8):
        of_item = {other: score for (left, other), score in reference.items() if left == item}
        best = sorted(of_item.values(), reverse=True)[:2]
        np.testing.assert_allclose(found.scores_R[found.items_R == item], best, rtol=1e-7)
        assert item not in found.neighbors_R[found.items_R == item]


def test_of_equal_swing_scores_the_lower_neighbors_are_kept() -> None:
    # Two users have the same four items, so every pair of items has one score.
    positives = positives_of([(user, item, item) for user in range(2) for item in range(4)])

    found = swing_neighbors(positives, NeighborSearch(2), alpha=1.0, max_users_per_item=10)

    assert found.neighbors_R.reshape(4, 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


def test_swing_looks_at_the_latest_users_of_a_crowded_item() -> None:
    # Users 0 and 1 came last to item 0; users 2 and 3 share item 2 with it, but came first.
    positives = positives_of(
        [
            *[(0, 0, 90), (0, 1, 91), (1, 0, 92), (1, 1, 93)],
            *[(2, 0, 1), (2, 2, 2), (3, 0, 3), (3, 2, 4)],
        ]
    )

    found = swing_neighbors(positives, NeighborSearch(5), alpha=1.0, max_users_per_item=2)

    assert found.neighbors_R[found.items_R == 0].tolist() == [1]


def test_the_popularity_correction_divides_by_the_users_of_the_neighbor() -> None:
    positives = random_positives(num_users=40, num_items=12, seed=4)

    plain = as_dict(swing_neighbors(positives, NeighborSearch(12), 1.0, 100))
    corrected = as_dict(swing_neighbors(positives, NeighborSearch(12, 0.5), 1.0, 100))

    users_M = np.bincount(positives.items_P)
    assert plain.keys() == corrected.keys()
    for (item, neighbor), score in plain.items():
        expected = score / users_M[neighbor] ** 0.5
        assert corrected[item, neighbor] == pytest.approx(expected, rel=1e-12)


def test_items_without_two_users_have_no_swing_neighbors() -> None:
    positives = positives_of([(0, 0, 1), (1, 1, 1)])

    found = swing_neighbors(positives, NeighborSearch(5), alpha=1.0, max_users_per_item=10)

    assert len(found.items_R) == found.num_scored == 0

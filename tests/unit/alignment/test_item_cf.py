import numpy as np
import pytest

import qarm_feast.alignment.cooccurrence as cooccurrence_module
from qarm_feast.alignment.item_cf import item_cf_neighbors
from qarm_feast.alignment.neighbors import NeighborSearch
from qarm_feast.alignment.positives import Positives
from tests.unit.alignment.pair_cases import positives_of, random_positives, users_by_item


def item_cf_reference(
    positives: Positives, least: int, power: float
) -> dict[tuple[int, int], float]:
    users = users_by_item(positives)
    scores = {}
    for item, of_item in enumerate(users):
        for other, of_other in enumerate(users):
            shared = len(of_item & of_other)
            if item != other and shared >= least:
                cosine = shared / np.sqrt(len(of_item) * len(of_other))
                scores[item, other] = cosine / len(of_other) ** power
    return scores


@pytest.mark.parametrize(("least", "power"), [(1, 0.0), (3, 0.0), (2, 0.7)])
def test_item_cf_equals_the_plain_cosine_over_shared_users(least: int, power: float) -> None:
    positives = random_positives(num_users=30, num_items=15, seed=6)

    found = item_cf_neighbors(positives, NeighborSearch(15, power), min_shared_users=least)

    expected = item_cf_reference(positives, least, power)
    pairs = list(zip(found.items_R.tolist(), found.neighbors_R.tolist(), strict=True))
    assert set(pairs) == expected.keys()
    np.testing.assert_allclose(found.scores_R, [expected[pair] for pair in pairs], rtol=1e-12)


def test_item_cf_keeps_the_best_neighbors_ties_by_the_lower_one() -> None:
    # Items 1 and 2 share both users with item 0, item 3 one of its two.
    positives = positives_of(
        [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 1), (1, 1, 2), (1, 2, 3), (1, 3, 4), (2, 3, 1)]
    )

    found = item_cf_neighbors(positives, NeighborSearch(2), min_shared_users=1)

    assert found.neighbors_R[found.items_R == 0].tolist() == [1, 2]
    assert found.neighbors_R[found.items_R == 3].tolist() == [0, 1]


def test_item_cf_finds_the_same_in_blocks_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    positives = random_positives(num_users=40, num_items=25, seed=8)
    whole = item_cf_neighbors(positives, NeighborSearch(4), min_shared_users=2)

    monkeypatch.setattr(cooccurrence_module, "_COUNTS_PER_BLOCK", 300)
    parts = item_cf_neighbors(positives, NeighborSearch(4, num_processes=2), min_shared_users=2)

    assert whole.scores_R.tobytes() == parts.scores_R.tobytes()
    assert np.array_equal(whole.neighbors_R, parts.neighbors_R)
    assert np.array_equal(whole.items_R, parts.items_R)


def test_an_item_all_of_whose_users_were_capped_has_no_neighbors() -> None:
    # User 0 came to item 0 first, and only the two latest items of a user count.
    positives = positives_of([(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 1, 1), (1, 2, 2)]).latest(2)

    found = item_cf_neighbors(positives, NeighborSearch(5), min_shared_users=1)

    assert sorted(set(found.items_R.tolist())) == [1, 2]

import numpy as np
import pytest

import qarm_feast.alignment.behaviour_space as space_module
import qarm_feast.alignment.cooccurrence as cooccurrence_module
from qarm_feast.alignment.behaviour_space import behaviour_vectors, find_triggers
from qarm_feast.alignment.positives import Positives, read_positives
from qarm_feast.input_data import InputData
from tests.unit.alignment.pair_cases import (
    positives_of,
    random_positives,
    users_by_item,
)


def ppmi_reference(positives: Positives) -> np.ndarray:
    users = users_by_item(positives)
    shared_MM = np.array([[len(one & other) for other in users] for one in users], dtype=float)
    np.fill_diagonal(shared_MM, 0.0)
    totals_M = shared_MM.sum(axis=1)
    with np.errstate(divide="ignore"):
        pmi_MM = np.log(shared_MM * totals_M.sum() / np.outer(totals_M, totals_M))
    return np.maximum(pmi_MM, 0.0)


def trigger_reference(
    positives: Positives, vectors_MB: np.ndarray, history_length: int, power: float = 0.0
) -> list[tuple[int, float]]:
    """Return trigger and cosine of every positive by plain loops; (-1, -inf) without a history."""
    num_users = [len(users) for users in users_by_item(positives)]

    def score(pair: tuple[int, float]) -> float:
        item, cosine = pair
        if item < 0:
            return cosine
        return cosine / num_users[item] ** (power if cosine >= 0 else -power)

    rows = list(zip(positives.users_P, positives.times_P, positives.items_P, strict=True))
    found = []
    for user, time, target in rows:
        history = [item for other, when, item in rows if other == user and when < time]
        best = (-1, -np.inf)
        for item in history[-history_length:]:
            cosine = float(vectors_MB[target].astype(float) @ vectors_MB[item].astype(float))
            best = max(best, (item, cosine), key=score)
        found.append(best)
    return found


def test_behaviour_vectors_bring_items_of_the_same_users_together(clustered: InputData) -> None:
    positives = read_positives(clustered)

    vectors_MB = behaviour_vectors(positives, width=4, seed=0)

    cosines_MM = vectors_MB @ vectors_MB.T
    clusters = positives.item_ids_M // 10
    is_same_MM = clusters[:, None] == clusters[None, :]
    assert cosines_MM[is_same_MM].min() > cosines_MM[~is_same_MM].max()


def test_behaviour_vectors_are_the_truncated_svd_of_ppmi() -> None:
    positives = random_positives(num_users=60, num_items=20, seed=9)

    vectors_MB = behaviour_vectors(positives, width=5, seed=0)

    left_MM, values_M, _ = np.linalg.svd(ppmi_reference(positives))
    expected_MB = left_MM[:, :5] * np.sqrt(values_M[:5])
    expected_MB /= np.linalg.norm(expected_MB, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors_MB @ vectors_MB.T, expected_MB @ expected_MB.T, atol=1e-5)


def test_a_smaller_matrix_keeps_the_strongest_entries_of_each_item() -> None:
    positives = random_positives(num_users=60, num_items=20, seed=9)

    capped_MM = space_module._ppmi(positives, max_per_item=3, num_processes=1).toarray()

    full_MM = ppmi_reference(positives)
    # Values that differ by rounding alone tie, and ties go to the lower item.
    order_MM = np.argsort(-full_MM.round(9), axis=1, kind="stable")
    is_kept_MM = np.zeros_like(full_MM, dtype=bool)
    np.put_along_axis(is_kept_MM, order_MM[:, :3], True, axis=1)
    expected_MM = np.where(is_kept_MM | is_kept_MM.T, full_MM, 0.0)
    np.testing.assert_allclose(capped_MM, expected_MM, atol=1e-12)


def test_behaviour_vectors_are_the_same_bits_in_blocks_and_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    positives = random_positives(num_users=60, num_items=30, seed=1)
    whole_MB = behaviour_vectors(positives, 6, seed=0)

    monkeypatch.setattr(cooccurrence_module, "_COUNTS_PER_BLOCK", 700)
    parts_MB = behaviour_vectors(positives, 6, seed=0, num_processes=2)

    assert whole_MB.tobytes() == parts_MB.tobytes()


def test_triggers_are_the_most_similar_of_strictly_earlier_positives() -> None:
    vectors_MB = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.96, 0.28]], dtype=np.float32)
    positives = positives_of([(0, 0, 5), (0, 2, 6), (0, 1, 7), (1, 0, 1), (1, 3, 1)])

    triggers, scores = find_triggers(positives, vectors_MB, history_length=50)

    # Item 1 is nearer to item 0 (cosine .8) than to item 2 (.6). Both events of user 1 are of
    # one time and do not see each other.
    assert triggers[[1, 2]].tolist() == [0, 0]
    np.testing.assert_allclose(scores, [-np.inf, 0.0, 0.8, -np.inf, -np.inf], atol=1e-6)


def test_triggers_come_from_the_latest_positives_only() -> None:
    vectors_MB = np.array([[1, 0], [0, 1], [1, 0]], dtype=np.float32)
    positives = positives_of([(0, 0, 0), (0, 1, 1), (0, 2, 2)])

    triggers, scores = find_triggers(positives, vectors_MB, history_length=1)

    assert triggers[2] == 1
    assert scores[2] == 0.0


@pytest.mark.parametrize(("num_processes", "power"), [(1, 0.0), (2, 0.0), (1, 0.7)])
def test_triggers_equal_the_plain_loop_with_many_events_of_one_time(
    num_processes: int, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_module, "_ROWS_PER_PRODUCT", 4)
    monkeypatch.setattr(space_module, "_ROWS_PER_BLOCK", 30)
    generator = np.random.default_rng(0)
    vectors_MB = generator.normal(size=(60, 5)).astype(np.float32)
    vectors_MB /= np.linalg.norm(vectors_MB, axis=1, keepdims=True)
    # User 0 has ten items of one time twice, the others have time to themselves.
    rows = [(0, item, 7 if item < 10 else 9) for item in range(20)] + [(0, 20, 8), (0, 21, 10)]
    rows += [(user, int(item), when) for user in (1, 2)
             for when, item in enumerate(generator.permutation(60)[:25])]  # fmt: skip
    positives = positives_of(rows)

    triggers, scores = find_triggers(positives, vectors_MB, 6, num_processes, power)

    expected = trigger_reference(positives, vectors_MB, 6, power)
    has_history = np.isfinite(scores)
    assert has_history.tolist() == [item >= 0 for item, _ in expected]
    assert triggers[has_history].tolist() == [item for item, _ in expected if item >= 0]
    np.testing.assert_allclose(scores, [cosine for _, cosine in expected], atol=1e-6)


def test_of_equally_similar_positives_the_latest_is_the_trigger() -> None:
    vectors_MB = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=np.float32)
    positives = positives_of([(0, 0, 1), (0, 1, 2), (0, 3, 3), (0, 2, 4)])

    triggers, _ = find_triggers(positives, vectors_MB, history_length=50)

    assert triggers[3] == 1


def test_of_two_triggers_the_rarer_one_wins_where_popularity_is_corrected() -> None:
    # Item 3 is nearer to item 0 (.96), which four users have, than to item 1 (.8), which one has.
    vectors_MB = np.array([[0.96, 0.28], [0.8, -0.6], [0, 1], [1, 0]], dtype=np.float32)
    rows = [(0, 0, 1), (0, 1, 2), (0, 3, 3), (1, 0, 1), (2, 0, 1), (3, 0, 1), (3, 2, 2)]

    found = {
        power: find_triggers(positives_of(rows), vectors_MB, 50, popularity_power=power)
        for power in (0.0, 0.1, 0.5)
    }

    # .96 / 4 ** .1 = .836 is above .8, .96 / 4 ** .5 = .48 is not. The cosines stay cosines.
    assert [int(triggers[2]) for triggers, _ in found.values()] == [0, 0, 1]
    np.testing.assert_allclose([scores[2] for _, scores in found.values()], [0.96, 0.96, 0.8], 1e-6)


def test_a_rare_trigger_that_is_too_far_takes_no_pair_from_a_near_one() -> None:
    # Item 3 is at .96 of item 0, which four users have, and at .28 of item 1, which one has.
    vectors_MB = np.array([[0.96, 0.28], [0.28, -0.96], [0, 1], [1, 0]], dtype=np.float32)
    rows = [(0, 0, 1), (0, 1, 2), (0, 3, 3), (1, 0, 1), (2, 0, 1), (3, 0, 1), (3, 2, 2)]

    found = {
        least: find_triggers(
            positives_of(rows), vectors_MB, 50, popularity_power=1.0, min_similarity=least
        )
        for least in (0.2, 0.3, 0.97)
    }

    # .96 / 4 = .24 is less than .28. Where none is near enough, the order is as without a limit.
    assert [int(triggers[2]) for triggers, _ in found.values()] == [1, 0, 1]

import math
from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.schema import CODES, TIMESTAMP
from torchrec_models import pair_counts
from torchrec_models.pair_counts import (
    ABSENT_THING,
    NUM_PSEUDO_PAIRS,
    PairCounts,
    count_pairs,
    count_train_pairs,
    prefix_things,
)

Positives = list[tuple[int, int]]
"""Users and the things of their items."""


def _count(positives: Positives) -> PairCounts:
    users, things = np.array(positives, dtype=np.int64).reshape(-1, 2).T
    return count_pairs(users, things)


def _plain_lift(positives: Positives, first: int, second: int, left_out: int | None) -> float:
    """Log-lift by loops over every user's ordered pairs of items."""
    pairs: dict[tuple[int, int], float] = {}
    for user in {user for user, _ in positives} - {left_out}:
        things = [thing for other, thing in positives if other == user]
        for one, two in permutations(range(len(things)), 2):
            key = things[one], things[two]
            pairs[key] = pairs.get(key, 0) + 1 / (len(things) - 1)
    known = {thing for user, thing in positives if [u for u, _ in positives].count(user) > 1}
    if not {first, second} <= known:
        return 0.0
    starts = {thing: sum(w for (a, _), w in pairs.items() if a == thing) for thing in known}
    expected = starts[first] * starts[second] / max(sum(pairs.values()), 1)
    weight = pairs.get((first, second), 0)
    return math.log((weight + NUM_PSEUDO_PAIRS) / (expected + NUM_PSEUDO_PAIRS))


def _lift(counts: PairCounts, first: int, second: int, left_out: int | None = None) -> float:
    user = np.array([0 if left_out is None else left_out])
    found = counts.log_lifts(
        user,
        np.array([second]),
        np.array([first]),
        np.ones(1, int),
        np.array([left_out is not None]),
    )
    return float(found[0])


def test_things_that_one_user_liked_lift_each_other() -> None:
    counts = _count([(1, 10), (1, 11), (2, 12), (2, 13)])

    # Each user weighs 2, so that every thing starts 1 of 4: 1 pair where 1/4 is expected.
    assert _lift(counts, 10, 11) == pytest.approx(math.log(2 / 1.25))
    assert _lift(counts, 10, 12) == pytest.approx(math.log(1 / 1.25))
    assert _lift(counts, 11, 10) == _lift(counts, 10, 11)


def test_log_lifts_equal_loops_over_all_pairs_with_and_without_a_user() -> None:
    rng = np.random.default_rng(0)
    positives = list(zip(rng.integers(0, 8, 40).tolist(), rng.integers(0, 6, 40), strict=True))
    positives = [(user, int(thing)) for user, thing in positives] + [(99, 3), (98, 77)]
    counts = _count(positives)

    for first, second in [(a, b) for a in range(6) for b in range(6)] + [(77, 1), (1, 500)]:
        for left_out in (None, 0, 3, 99, 12345):
            expected = _plain_lift(positives, first, second, left_out)
            assert _lift(counts, first, second, left_out) == pytest.approx(expected, abs=1e-6)


def test_log_lifts_of_many_rows_are_those_of_each_row_held_in_tables_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    positives = [(user, thing) for user, thing in rng.integers(0, 9, (60, 2)).tolist()]
    lengths = np.array([3, 0, 40, 7])
    rows = np.array([2, 5, 2, 77]), np.array([4, 1, 8, 3]), rng.integers(-1, 11, lengths.sum())
    is_train = np.array([True, True, False, True])

    counts = _count(positives)
    assert counts._pair_table is not None
    found = counts.log_lifts(*rows, lengths, is_train)
    monkeypatch.setattr(pair_counts, "_MOST_TABLE_CELLS", 0)
    monkeypatch.setattr(pair_counts, "_TABLE_CELLS_PER_PAIR", 0)
    searched = _count(positives).log_lifts(*rows, lengths, is_train)

    of_row = np.repeat(np.arange(4), lengths)
    left_out = [int(user) if out else None for user, out in zip(rows[0], is_train, strict=True)]
    expected = [
        _plain_lift(positives, thing, int(rows[1][row]), left_out[row])
        for row, thing in zip(of_row.tolist(), rows[2].tolist(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found, searched)


def test_what_a_user_alone_liked_together_does_not_raise_his_own_train_row() -> None:
    others: Positives = [(user, thing) for user in (2, 3, 4) for thing in (20, 21)]
    counts = _count([*others, (1, 10), (1, 11)])

    assert _lift(counts, 10, 11) > 0
    assert _lift(counts, 10, 11, left_out=1) == 0


def test_a_train_row_sees_the_same_whatever_its_own_user_liked() -> None:
    others: Positives = [(2, 10), (2, 11), (3, 10), (3, 12), (4, 11), (4, 12)]
    alike = [_count([*others, (1, 10), (1, thing), (1, 12)]) for thing in (11, 10)]
    apart = _count([*others, (1, 11), (1, 12)])

    for first in (10, 11, 12):
        for second in (10, 11, 12):
            expected = _plain_lift(others, first, second, None)
            for counts in (*alike, apart):
                assert _lift(counts, first, second, left_out=1) == pytest.approx(expected, abs=1e-6)


def test_shuffled_labels_give_train_rows_no_signal_and_would_with_own_pairs_left_in() -> None:
    rng = np.random.default_rng(0)
    num_users, num_items, per_user = 300, 1000, 12
    users = np.repeat(np.arange(num_users), per_user)
    items = np.concatenate([rng.permutation(num_items)[:per_user] for _ in range(num_users)])
    is_liked = rng.random(len(users)) < 0.5
    counts = count_pairs(users[is_liked], items[is_liked])
    lengths = np.full(len(users), 3)
    liked = [items[(users == user) & is_liked] for user in range(num_users)]
    # A row's history holds other liked items of its user, never its own.
    history = np.concatenate(
        [
            np.resize(others, 3) if len(others := liked[u][liked[u] != i]) else np.full(3, -1)
            for u, i in zip(users, items, strict=True)
        ]
    )

    def correlation(*, is_train: bool) -> float:
        rows = np.full(len(users), is_train)
        features = counts.features(users, items, history, lengths, rows)
        return float(np.corrcoef(features[:, 0], is_liked)[0, 1])

    assert abs(correlation(is_train=True)) < 0.05
    assert correlation(is_train=False) > 0.8


def test_features_are_mean_and_largest_lift_and_zero_without_history() -> None:
    counts = _count([(1, 10), (1, 11), (2, 12), (2, 13)])
    high, low = math.log(2 / 1.25), math.log(1 / 1.25)

    features = counts.features(
        user_ids_B=np.array([5, 5, 5, 5]),
        things_B=np.array([10, 10, 12, 99]),
        history_H=np.array([11, 12, 13, 10]),
        history_lengths_B=np.array([2, 0, 1, 1]),
        is_train_B=np.zeros(4, dtype=bool),
    )

    expected = [[(high + low) / 2, high], [0, 0], [high, high], [0, 0]]
    np.testing.assert_allclose(features, expected, rtol=1e-6)


def test_an_absent_thing_counts_nowhere_and_lifts_nothing() -> None:
    counts = _count([(1, 10), (1, ABSENT_THING), (1, 11)])

    assert _lift(counts, ABSENT_THING, 10) == 0
    assert _lift(counts, 10, 11) == pytest.approx(math.log(2 / 1.5))


def test_no_positives_and_single_positives_make_no_pairs() -> None:
    for positives in ([], [(1, 10), (2, 10)]):
        counts = _count(positives)

        assert len(counts.pairs_P) == 0
        assert _lift(counts, 10, 10, left_out=1) == 0


def test_served_counts_answer_as_before_without_the_users() -> None:
    counts = _count([(1, 10), (1, 11), (2, 12), (2, 11)])

    served = counts.for_serving()

    assert len(served.user_ids_U) == len(served.own_keys_M) == 0
    assert _lift(served, 10, 11) == _lift(counts, 10, 11)


def _rows(users: list[int], items: list[int], times: list[int], likes: list[bool]) -> pa.Table:
    codes = [[item % 2, item % 3] for item in items]
    return pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event_timestamp": pa.array(times).cast(TIMESTAMP),
            "rq_code": pa.array(codes, CODES),
            "is_like": likes,
        }
    )


def test_train_pairs_are_of_positives_each_item_once_the_latest_ones() -> None:
    rows = _rows([1] * 5, [10, 11, 12, 10, 13], [1, 2, 3, 4, 5], [True] * 4 + [False])

    counts = count_train_pairs(rows, "is_like", 2, items=True, codes=False)

    # Item 10 was liked last, and item 12 before; item 13 was not liked.
    assert list(counts) == ["item"]
    assert counts["item"].things_S.tolist() == [10, 12]
    assert counts["item"].sizes_U.tolist() == [2]


def test_code_pairs_count_items_of_one_code_with_each_other() -> None:
    rows = _rows([1, 1, 1], [10, 12, 13], [1, 2, 3], [True] * 3)

    counts = count_train_pairs(rows, "is_like", 50, items=False, codes=True)

    numbers = prefix_things(np.array([[0, 1], [0, 0], [1, 1]]))
    assert list(counts) == ["c1", "c1_c2"]
    assert counts["c1"].things_S.tolist() == [0, 1]
    # Two items of code 0 make two ordered pairs, each weighing a half; with item 13 twice two.
    assert counts["c1"].pair_keys_P.tolist() == [0, 1]
    assert counts["c1"].pairs_P.tolist() == [1.0, 1.0]
    assert counts["c1"].starts_S.tolist() == [2, 1]
    assert counts["c1_c2"].things_S.tolist() == sorted(numbers["c1_c2"].tolist())


def test_prefixes_of_an_absent_code_are_no_things() -> None:
    things = prefix_things(np.array([[2, 3], [-1, -1]]))

    assert things["c1"].tolist() == [2, ABSENT_THING]
    assert things["c1_c2"][1] == ABSENT_THING
    assert list(prefix_things(np.array([[5]]))) == ["c1"]


def test_no_train_positives_make_empty_counts() -> None:
    rows = _rows([1], [10], [1], [False])

    counts = count_train_pairs(rows, "is_like", 50, items=True, codes=True)

    assert len(counts["item"].things_S) == len(counts["c1"].things_S) == 0

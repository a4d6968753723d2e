"""Behavioural neighbours: which pairs count, and what chance would give."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.behaviour import BehaviourPairs, behaviour_figures, follow_up_pairs
from qarm_feast.input_data import InputData

START = datetime(2024, 1, 1, tzinfo=UTC)


def _checked(rows: list[tuple[int, int, int, bool, str]]) -> InputData:
    """Rows of (user, item, hour, is positive, split)."""
    users, items, hours, labels, splits = zip(*rows, strict=True)
    times = [START + timedelta(hours=hour) for hour in hours]
    interactions = pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "item_id": pa.array(items, pa.int64()),
            "event_timestamp": pa.array(times, pa.timestamp("us", tz="UTC")),
            "is_like": list(labels),
            "split": list(splits),
        }
    )
    return InputData(
        directory=Path("unused"),
        items=pa.table({"item_id": pa.array(sorted(set(items)), pa.int64())}),
        interactions=interactions,
        users=None,
        task_names=("is_like",),
        positive_label="is_like",
        has_given_split=True,
    )


def test_only_positives_of_one_user_in_the_test_period_make_pairs() -> None:
    checked = _checked(
        [
            (1, 10, 3, True, "test"),
            (1, 12, 1, True, "test"),
            (1, 11, 2, False, "test"),
            (1, 13, 0, True, "train"),
            (2, 14, 4, True, "test"),
        ]
    )

    pairs = follow_up_pairs(checked)

    assert pairs.item_ids_P2.tolist() == [[10, 12]]
    assert pairs.num_users_P.tolist() == [1]


def test_a_user_counts_once_for_a_pair_in_either_order_and_an_item_after_itself_never() -> None:
    checked = _checked(
        [(1, item, hour, True, "test") for hour, item in enumerate((5, 6, 5, 5, 7))]
        + [(2, item, hour, True, "test") for hour, item in enumerate((6, 5))]
    )

    pairs = follow_up_pairs(checked)

    assert pairs.item_ids_P2.tolist() == [[5, 6], [5, 7]]
    assert pairs.num_users_P.tolist() == [2, 1]


def test_positives_of_one_moment_are_taken_by_item_id() -> None:
    checked = _checked([(1, 9, 0, True, "test"), (1, 8, 0, True, "test"), (1, 7, 1, True, "test")])

    assert follow_up_pairs(checked).item_ids_P2.tolist() == [[7, 9], [8, 9]]


def test_no_positives_give_no_pairs_and_no_levels() -> None:
    pairs = follow_up_pairs(_checked([(1, 1, 0, True, "train")]))

    figures = behaviour_figures(pairs, np.array([1]), np.array([[0, 0]]))

    assert figures == {"num_pairs": 0, "num_pairs_without_codes": 0, "levels": []}


def test_share_chance_and_lift_of_a_hand_made_set() -> None:
    pairs = BehaviourPairs(np.array([[1, 2], [2, 3], [3, 99]]), np.array([3, 1, 5]))
    item_ids_N = np.array([3, 1, 2])
    rq_NL = np.array([[1, 0], [0, 0], [0, 1]])

    figures = behaviour_figures(pairs, item_ids_N, rq_NL)

    # Ends of the kept pairs: item 1 three, item 2 four, item 3 one, of eight.
    same_item = (9 + 16 + 1) / 64
    chance = ((7 / 8) ** 2 + (1 / 8) ** 2 - same_item) / (1 - same_item)
    assert (figures["num_pairs"], figures["num_pairs_without_codes"]) == (4, 5)
    assert figures["levels"][0] == pytest.approx(
        {"share": 3 / 4, "chance": chance, "lift": 0.75 / chance}
    )
    assert figures["levels"][1] == {"share": 0.0, "chance": 0.0, "lift": None}


def test_chance_equals_drawing_two_different_items_by_popularity() -> None:
    rng = np.random.default_rng(0)
    item_ids_P2 = np.sort(np.array([rng.choice(8, 2, replace=False) for _ in range(30)]), axis=1)
    pairs = BehaviourPairs(item_ids_P2, rng.integers(1, 4, 30))
    rq_NL = rng.integers(3, size=(8, 1))
    ends = [i for pair, n in zip(item_ids_P2, pairs.num_users_P, strict=True) for i in [*pair] * n]
    drawn = [(i, j) for i in ends for j in ends if i != j]

    figures = behaviour_figures(pairs, np.arange(8), rq_NL)

    expected = np.mean([rq_NL[i, 0] == rq_NL[j, 0] for i, j in drawn])
    assert figures["levels"][0]["chance"] == pytest.approx(expected)


def test_codes_that_are_all_alike_have_no_lift() -> None:
    pairs = BehaviourPairs(np.array([[0, 1], [1, 2]]), np.array([1, 1]))

    figures = behaviour_figures(pairs, np.arange(3), np.zeros((3, 1), dtype=np.int64))

    assert figures["levels"] == [{"share": 1.0, "chance": 1.0, "lift": 1.0}]

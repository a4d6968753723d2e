import math

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.schema import TIMESTAMP
from torchrec_models.popularity import ItemPopularity, count_items, popularity_width

LABELS = ("is_like", "is_love")


def _table(
    items: list[int], times: list[int], likes: list[bool], loves: list[bool] | None = None
) -> pa.Table:
    return pa.table(
        {
            "item_id": items,
            "event_timestamp": pa.array(times).cast(TIMESTAMP),
            "is_like": likes,
            "is_love": loves or [False] * len(likes),
        }
    )


@pytest.fixture
def popularity() -> ItemPopularity:
    """Item 7 was shown at 10, 20, 20 and 30, item 3 at 15."""
    rows = _table(
        [7, 3, 7, 7, 7],
        [30, 15, 10, 20, 20],
        [True, True, False, True, False],
        [True, False, False, False, False],
    )
    return count_items(rows, LABELS)


def test_a_train_row_counts_only_what_lay_strictly_before_it(popularity: ItemPopularity) -> None:
    times = np.array([10, 20, 21, 30, 99, 15])

    counts_NC = popularity.counts(np.array([7, 7, 7, 7, 7, 3]), times, np.ones(6, dtype=bool))

    assert counts_NC.tolist() == [
        [0, 0, 0],
        [1, 0, 0],
        [3, 1, 0],
        [3, 1, 0],
        [4, 2, 1],
        [0, 0, 0],
    ]


def test_other_rows_count_all_train_rows_and_an_unseen_item_has_none(
    popularity: ItemPopularity,
) -> None:
    counts_NC = popularity.counts(
        np.array([7, 3, 99]), np.array([0, 0, 0]), np.zeros(3, dtype=bool)
    )

    assert counts_NC.tolist() == [[4, 2, 1], [1, 1, 0], [0, 0, 0]]


def test_features_are_log_counts_and_smoothed_rates_and_those_of_no_item_when_hidden(
    popularity: ItemPopularity,
) -> None:
    features = popularity.features(
        np.array([7, 99, 7]),
        np.array([0, 0, 0]),
        np.zeros(3, dtype=bool),
        ("is_like",),
        is_hidden_N=np.array([False, False, True]),
    )

    # The base rate is 3 of 5.
    expected = [[math.log(5), math.log(3), (2 + 10 * 0.6) / 14], [0, 0, 0.6], [0, 0, 0.6]]
    np.testing.assert_allclose(features, expected, rtol=1e-6)
    assert popularity_width(1) == 3


def test_what_serving_keeps_gives_the_same_totals(popularity: ItemPopularity) -> None:
    arguments = (np.array([7, 3]), np.array([0, 0]), np.zeros(2, dtype=bool))

    kept = popularity.totals_only()

    assert kept.counts(*arguments).tolist() == popularity.counts(*arguments).tolist()
    assert len(kept.times_E) == 0


def test_counts_equal_a_plain_loop_over_random_rows() -> None:
    rng = np.random.default_rng(0)
    items, times = rng.integers(0, 9, 300), rng.integers(0, 50, 300)
    likes = rng.random(300) < 0.5
    found = count_items(_table(items.tolist(), times.tolist(), likes.tolist()), ("is_like",))

    counts_NC = found.counts(items, times, np.ones(300, dtype=bool))

    for row in range(300):
        is_before = (items == items[row]) & (times < times[row])
        assert counts_NC[row].tolist() == [is_before.sum(), likes[is_before].sum()]


def test_counts_of_rows_with_random_labels_tell_a_train_row_nothing_of_its_own_label() -> None:
    # Leaving only the row itself out fails here: with few rows per item the rest tells the label.
    rng = np.random.default_rng(0)
    items, times = rng.integers(0, 2000, 6000), np.arange(6000)
    likes = rng.random(6000) < 0.5
    found = count_items(_table(items.tolist(), times.tolist(), likes.tolist()), ("is_like",))

    features = found.features(
        items, times, np.ones(6000, dtype=bool), ("is_like",), np.zeros(6000, dtype=bool)
    )

    for column in features.T:
        assert abs(np.corrcoef(column, likes)[0, 1]) < 0.04
    liked_NC = found.counts(items, times, np.zeros(6000, dtype=bool))
    left_out = (liked_NC[:, 1] - likes) / np.maximum(liked_NC[:, 0] - 1, 1)
    assert abs(np.corrcoef(left_out, likes)[0, 1]) < 0.04
    assert np.corrcoef(liked_NC[:, 1], likes)[0, 1] > 0.3


def test_no_train_rows_count_nothing() -> None:
    found = count_items(_table([], [], []), LABELS)

    counts_NC = found.counts(np.array([1]), np.array([5]), np.array([True]))

    assert counts_NC.tolist() == [[0, 0, 0]]

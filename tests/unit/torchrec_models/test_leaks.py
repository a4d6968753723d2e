from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.errors import LeakError
from qarm_feast.schema import TIMESTAMP
from torchrec_models.leaks import (
    check_code_times,
    check_history_split,
    check_history_times,
    check_learnt_rows,
    check_pool,
    to_microseconds,
)

LABEL = 1_700_000_000_000_000


def _rows(**columns: Any) -> pa.Table:
    """Two rows of users 1 and 2 with one history event each."""
    values: dict[str, Any] = {
        "user_id": [1, 2],
        "item_id": [10, 20],
        "event_timestamp": pa.array([LABEL, LABEL + 5]).cast(TIMESTAMP),
        "split": ["train", "test"],
        "history_item_ids": [[11], [12]],
        "history_timestamps": [[LABEL - 1], [LABEL]],
    }
    return pa.table(values | columns)


def _positives(users: list[int], items: list[int], times: list[int], splits: list[str]) -> pa.Table:
    return pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event_timestamp": pa.array(times).cast(TIMESTAMP),
            "split": splits,
        }
    )


def test_history_strictly_before_the_label_passes_and_is_counted() -> None:
    assert check_history_times(_rows()) == 2


def test_a_planted_same_second_positive_is_caught() -> None:
    rows = _rows(history_timestamps=[[LABEL], [LABEL]])

    with pytest.raises(LeakError, match=r"1 history events .* of user 1: event at .*\.000000\+"):
        check_history_times(rows)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_held_out_row_may_see_positives_of_any_split(split: str) -> None:
    times = [LABEL - 1, LABEL]

    check_history_split(_rows(), _positives([1, 2], [11, 12], times, ["train", split]))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_held_out_positive_in_a_train_rows_history_is_caught(split: str) -> None:
    positives = _positives([1, 2], [11, 12], [LABEL - 1, LABEL], [split, "train"])

    with pytest.raises(LeakError, match=r"1 history events are no positive .* user 1, item 11"):
        check_history_split(_rows(), positives)


@pytest.mark.parametrize(
    ("users", "items", "times"),
    [
        ([1, 2], [11, 13], [LABEL - 1, LABEL]),
        ([1, 2], [11, 12], [LABEL - 1, LABEL - 1]),
        ([1, 3], [11, 12], [LABEL - 1, LABEL]),
    ],
    ids=["other item", "other time", "other user"],
)
def test_a_history_event_that_is_no_positive_is_caught(
    users: list[int], items: list[int], times: list[int]
) -> None:
    with pytest.raises(LeakError, match=r"1 history events are no positive .* user 2, item 12"):
        check_history_split(_rows(), _positives(users, items, times, ["train", "train"]))


def test_an_item_uploaded_after_the_label_is_caught() -> None:
    check_code_times(_rows(), {10: LABEL, 20: LABEL + 5})

    with pytest.raises(LeakError, match=r"1 rows are older .* item 20"):
        check_code_times(_rows(), {10: LABEL, 20: LABEL + 6})


def test_an_item_without_codes_is_no_leak() -> None:
    check_code_times(_rows(), {99: LABEL + 100})
    check_code_times(_rows(), {})


def test_without_a_split_held_out_rows_must_lie_after_the_cutoff() -> None:
    label = datetime.fromtimestamp(LABEL // 1_000_000, UTC)
    check_learnt_rows(_rows(), has_given_split=False, cutoff=label)

    later = label.replace(microsecond=5)
    with pytest.raises(LeakError, match="1 valid or test rows lie at or before"):
        check_learnt_rows(_rows(), has_given_split=False, cutoff=later)


def test_with_a_split_refusal_goes_by_split_and_never_by_time() -> None:
    far_future = datetime(2100, 1, 1, tzinfo=UTC)
    check_learnt_rows(_rows(), has_given_split=True, cutoff=far_future)

    repeated = _rows(
        user_id=[1, 1],
        item_id=[10, 10],
        event_timestamp=pa.array([LABEL, LABEL]).cast(TIMESTAMP),
    )
    with pytest.raises(LeakError, match="1 valid or test rows are train rows as well"):
        check_learnt_rows(repeated, has_given_split=True, cutoff=far_future)


def test_a_pool_item_without_a_train_row_is_caught() -> None:
    check_pool(np.array([2, 1]), np.array([1, 2, 3]))

    with pytest.raises(LeakError, match="1 items without a train row, the first is 9"):
        check_pool(np.array([1, 9]), np.array([1, 2, 3]))


def test_microseconds_are_exact() -> None:
    assert to_microseconds(datetime(1970, 1, 2, 0, 0, 1, 7, tzinfo=UTC)) == 86_401_000_007

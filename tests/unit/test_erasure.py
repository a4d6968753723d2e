"""Erasures against a plain rule over the whole set of pairs, in every order of arrival."""

import itertools
import random
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from qarm_feast.code_log import CodeLog
from qarm_feast.erasure import outlives_erasure, read_marks, without_erased
from qarm_feast.online_stores.blobs import split_blobs
from qarm_feast.online_stores.rows import (
    ITEM_IDS,
    ITEM_TIMESTAMPS,
    ViewLayout,
    merge_recent,
    recent_items_of_table,
)
from qarm_feast.schema import (
    ERASURE_MARK,
    RECENT_ITEM_ROWS,
    TIMESTAMP,
    USER_ERASURE_LOG,
    USER_ERASURE_ROWS,
)

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
Pair = tuple[int, int]


def layout(history_length: int) -> ViewLayout:
    value_types = {ITEM_IDS: "INT64_LIST", ITEM_TIMESTAMPS: "INT64_LIST"}
    return ViewLayout("user_recent_items", ("user_id",), value_types, history_length)


def list_row(pairs: list[Pair]) -> pa.Table:
    times, items = (list(column) for column in zip(*pairs, strict=True))
    columns = [[1], [items], [times], [MOMENT], [MOMENT]]
    return pa.table(columns, schema=RECENT_ITEM_ROWS)


def stored_after(arrivals: list[list[Pair]], history_length: int) -> dict[str, bytes]:
    """Return the blobs that merging each arrival into the last ones leaves."""
    stored = {ITEM_IDS: b"", ITEM_TIMESTAMPS: b""}
    view = layout(history_length)
    for pairs in arrivals:
        written = recent_items_of_table(view, list_row(pairs))
        changed = merge_recent(view, {name: [blob] for name, blob in stored.items()}, written)
        if changed.keys:
            stored = {name: split_blobs(blobs)[0] for name, blobs in changed.values.items()}
    return stored


def reference(pairs: list[Pair], history_length: int) -> list[Pair]:
    """Return what a list must be, by the definition over all pairs at once."""
    erased = max((time for time, item in pairs if item == ERASURE_MARK), default=None)
    items = {pair for pair in pairs if pair[1] != ERASURE_MARK}
    if erased is None:
        return sorted(items, reverse=True)[:history_length]
    after = sorted((pair for pair in items if pair[0] > erased), reverse=True)
    return [*after, (erased, ERASURE_MARK)][:history_length]


def blobs_of(pairs: list[Pair], history_length: int) -> dict[str, bytes]:
    view = layout(history_length)
    nothing = {ITEM_IDS: [b""], ITEM_TIMESTAMPS: [b""]}
    changed = merge_recent(view, nothing, recent_items_of_table(view, list_row(pairs)))
    return {name: split_blobs(blobs)[0] for name, blobs in changed.values.items()}


def test_a_mark_takes_what_is_not_after_it_of_its_own_user_only() -> None:
    owners = np.array([1, 1, 1, 1, 2, 3])
    times = np.array([5, 6, 7, 6, 5, 5])
    items = np.array([10, 11, 12, ERASURE_MARK, 13, ERASURE_MARK])

    outlives = outlives_erasure(owners, times, items)

    assert outlives.tolist() == [False, False, True, True, True, True]


def test_of_two_marks_the_newest_stays_and_without_one_everything() -> None:
    marks = np.array([ERASURE_MARK, ERASURE_MARK])
    owners, times = np.array([1, 1]), np.array([8, 3])

    assert outlives_erasure(owners, times, marks).tolist() == [True, False]
    assert outlives_erasure(owners, times, np.array([7, 7])).tolist() == [True, True]
    assert outlives_erasure(*np.empty((3, 0), dtype=np.int64)).tolist() == []


def test_every_order_of_events_and_erasures_ends_in_the_same_list() -> None:
    pairs = [(1, 10), (2, 20), (3, ERASURE_MARK), (3, 30), (4, 40), (2, ERASURE_MARK)]

    for history_length in (1, 2, 3):
        expected = reference(pairs, history_length)
        assert expected == [(4, 40), (3, ERASURE_MARK)][:history_length]
        ends = {
            tuple(stored_after([[pair] for pair in order], history_length).values())
            for order in itertools.permutations(pairs)
        }
        assert ends == {tuple(blobs_of(expected, history_length).values())}


def test_random_batches_late_and_repeated_end_as_the_whole_set_says() -> None:
    for seed in range(150):
        rng = random.Random(seed)
        choices = [ERASURE_MARK, -3, 0, 1, 2, 3]
        # Few distinct times, so that marks and items meet at one.
        pairs = [(rng.randrange(9), rng.choice(choices)) for _ in range(14)]
        arrivals = rng.sample(pairs + pairs[::3], len(pairs) + len(pairs[::3]))
        batches = []
        while arrivals:
            size = rng.randint(1, 5)
            batches.append(arrivals[:size])
            arrivals = arrivals[size:]
        history_length = rng.randint(1, 5)

        found = stored_after(batches, history_length)

        assert found == blobs_of(reference(pairs, history_length), history_length), seed


def test_rows_are_erased_by_user_and_time_whatever_their_items_are(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    times = pa.array([9, 20, 21, 20], pa.int64()).cast(TIMESTAMP)
    rows = pa.table({"user_id": [1, 1, 1, 2], "item_id": [-1, 5, 6, -1], "event_timestamp": times})

    before = without_erased(rows, log)
    erased_at = pa.array([20, 10], pa.int64()).cast(TIMESTAMP)
    columns = [pa.array([1, 1]), erased_at, pa.array([MOMENT, MOMENT], TIMESTAMP)]
    log.append(USER_ERASURE_LOG, pa.table(columns, schema=USER_ERASURE_ROWS))
    after = without_erased(rows, log)

    assert before.equals(rows)
    assert after["item_id"].to_pylist() == [6, -1]
    assert [sorted(column.tolist()) for column in read_marks(log)] == [[1, 1], [10, 20], [-1, -1]]

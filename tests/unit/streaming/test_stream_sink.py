import threading
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from stream_fakes import NOW

from qarm_feast.encode import newest_per_item
from qarm_feast.schema import (
    CODE_ROWS,
    CONTENT_LOG_ROWS,
    RECENT_ITEM_ROWS,
    TIMESTAMP,
    USER_ERASURE_ROWS,
    VECTOR_ROWS,
    interaction_rows,
)
from streaming.sink import (
    BatchRows,
    FeastSink,
    recent_item_rows,
)

CREATED = datetime(2024, 1, 1, tzinfo=UTC)
NO_ERASURES = USER_ERASURE_ROWS.empty_table()


class WriteLog:
    """Both stores at once: remembers names and numbers of rows in the order of the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []

    def append(self, name: str, table: pa.Table) -> Path:
        self.calls.append(("offline", name, table.num_rows))
        return Path(name)

    def write(self, view_name: str, table: pa.Table) -> int:
        self.calls.append(("online", view_name, table.num_rows))
        return table.num_rows


def _codes(*rows: tuple[int, int, str]) -> pa.Table:
    ids, times, hashes = zip(*rows, strict=True)
    count = len(rows)
    columns = [
        pa.array(ids, pa.int64()),
        pa.array([[1, 2]] * count, pa.list_(pa.int64())),
        pa.array([[3]] * count, pa.list_(pa.int64())),
        pa.array(["e1"] * count),
        pa.array(hashes),
        pa.array([False] * count),
        pa.array(times, pa.int64()).cast(TIMESTAMP),
        pa.array([CREATED] * count, TIMESTAMP),
    ]
    return pa.table(columns, schema=CODE_ROWS)


def _positives(users: list[int], items: list[int], times: list[int]) -> pa.Table:
    count = len(users)
    columns = [
        pa.array(users, pa.int64()),
        pa.array(items, pa.int64()),
        pa.array([True] * count),
        pa.array([""] * count),
        pa.array(times, pa.int64()).cast(TIMESTAMP),
        pa.array([CREATED] * count, TIMESTAMP),
    ]
    return pa.table(columns, schema=interaction_rows(("is_like",)))


def _erasures(*rows: tuple[int, int]) -> pa.Table:
    users, times = zip(*rows, strict=True)
    columns = [
        pa.array(users, pa.int64()),
        pa.array(times, pa.int64()).cast(TIMESTAMP),
        pa.array([CREATED] * len(rows), TIMESTAMP),
    ]
    return pa.table(columns, schema=USER_ERASURE_ROWS)


def test_newest_per_item_goes_by_time_and_then_by_content_hash() -> None:
    codes = _codes((2, NOW, "a"), (1, NOW, "b"), (1, NOW + 1, "a"), (2, NOW, "c"), (1, NOW, "z"))

    newest = newest_per_item(codes)

    assert newest["item_id"].to_pylist() == [1, 2]
    assert newest["content_hash"].to_pylist() == ["a", "c"]
    assert newest["event_timestamp"].cast(pa.int64()).to_pylist() == [NOW + 1, NOW]


def test_newest_per_item_of_nothing_is_nothing() -> None:
    assert newest_per_item(CODE_ROWS.empty_table()).num_rows == 0


def test_recent_items_are_newest_first_distinct_and_cut() -> None:
    positives = _positives(
        users=[7, 7, 7, 7, 5, 7],
        items=[1, 2, 3, 3, 9, 1],
        times=[NOW, NOW + 2, NOW + 2, NOW + 2, NOW, NOW + 1],
    )

    rows = recent_item_rows(positives, NO_ERASURES, history_length=3)

    assert rows.schema == RECENT_ITEM_ROWS
    assert rows["user_id"].to_pylist() == [5, 7]
    assert rows["item_ids"].to_pylist() == [[9], [3, 2, 1]]
    assert rows["item_timestamps"].to_pylist() == [[NOW], [NOW + 2, NOW + 2, NOW + 1]]
    assert rows["event_timestamp"].cast(pa.int64()).to_pylist() == [NOW, NOW + 2]


def test_items_of_one_moment_go_down_to_the_lowest_id_that_there_is() -> None:
    items = [-(2**63), 5, 2**63 - 1, -2]
    positives = _positives(users=[7] * 4, items=items, times=[NOW] * 4)

    rows = recent_item_rows(positives, NO_ERASURES, history_length=4)

    assert rows["item_ids"].to_pylist() == [[2**63 - 1, 5, -2, -(2**63)]]


def test_recent_items_equal_a_plain_loop_on_random_events() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 6, 500).tolist()
    items = rng.integers(0, 20, 500).tolist()
    times = (NOW + rng.integers(0, 30, 500)).tolist()
    histories: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for user, item, time in zip(users, items, times, strict=True):
        histories[user].add((time, item))
    expected = {u: sorted(pairs, reverse=True)[:7] for u, pairs in histories.items()}

    positives = _positives(users, items, times)
    rows = recent_item_rows(positives, NO_ERASURES, history_length=7).to_pylist()

    found = {
        row["user_id"]: list(zip(row["item_timestamps"], row["item_ids"], strict=True))
        for row in rows
    }
    assert found == expected


def test_an_erasure_takes_the_batchs_older_positives_and_leaves_its_mark() -> None:
    positives = _positives([7, 7, 7, 5], [1, 2, 3, 4], [NOW, NOW + 1, NOW + 2, NOW])

    rows = recent_item_rows(positives, _erasures((7, NOW), (7, NOW + 1), (9, NOW)), 3)

    assert rows.schema == RECENT_ITEM_ROWS
    assert rows["user_id"].to_pylist() == [5, 7, 9]
    assert rows["item_ids"].to_pylist() == [[4], [3, -1], [-1]]
    assert rows["item_timestamps"].to_pylist() == [[NOW], [NOW + 2, NOW + 1], [NOW]]


def test_offline_keeps_every_row_and_online_the_newest() -> None:
    stores = WriteLog()
    sink = FeastSink(stores, stores, history_length=2)
    rows = BatchRows(
        codes={"v1": _codes((1, NOW, "a"), (1, NOW + 1, "b")), "v2": _codes((1, NOW, "a"))},
        content=CONTENT_LOG_ROWS.empty_table(),
        interactions=_positives([7, 7, 8], [1, 2, 3], [NOW, NOW, NOW]),
        positives=_positives([7, 7], [1, 2], [NOW, NOW]),
        erasures=_erasures((9, NOW), (9, NOW), (7, NOW)),
    )

    sink.write_offline(rows)
    sink.write_online(rows)

    assert stores.calls == [
        ("offline", "item_codes_v1", 2),
        ("offline", "item_codes_v2", 1),
        ("offline", "interaction_log", 3),
        ("offline", "user_erasure_log", 3),
        ("online", "item_codes_v1", 1),
        ("online", "item_codes_v2", 1),
        ("online", "user_recent_items", 2),
    ]


def test_vectors_are_written_to_the_view_of_their_encoder_behind_the_codes() -> None:
    stores = WriteLog()
    sink = FeastSink(stores, stores, history_length=2)
    nothing = interaction_rows(("is_like",)).empty_table()
    columns = {"item_id": [1, 1], "embedding": [b"old", b"new"], "content_hash": ["a", "b"]}
    times = pa.array([NOW, NOW + 1]).cast(TIMESTAMP)
    columns |= {"is_deleted": [False, False], "event_timestamp": times, "created": times}
    rows = BatchRows(
        {"v1": _codes((1, NOW, "a"))},
        CONTENT_LOG_ROWS.empty_table(),
        nothing,
        nothing,
        NO_ERASURES,
        vectors={"e1": pa.table(columns, schema=VECTOR_ROWS)},
    )

    sink.write_offline(rows)
    sink.write_online(rows)

    assert stores.calls == [
        ("offline", "item_codes_v1", 1),
        ("offline", "item_vectors_e1", 2),
        ("online", "item_codes_v1", 1),
        ("online", "item_vectors_e1", 1),
    ]


def test_nothing_is_written_for_an_empty_batch() -> None:
    stores = WriteLog()
    sink = FeastSink(stores, stores, history_length=2)
    nothing = interaction_rows(("is_like",)).empty_table()
    rows = BatchRows({}, CONTENT_LOG_ROWS.empty_table(), nothing, nothing, NO_ERASURES)

    sink.write_offline(rows)
    sink.write_online(rows)

    assert stores.calls == []


class MeetingLog:
    """Appends that end only once both have begun; the one to ``fails`` cannot write."""

    def __init__(self, fails: str = "") -> None:
        self.ended: set[str] = set()
        self._fails = fails
        self._both = threading.Barrier(2, timeout=30)

    def append(self, name: str, table: pa.Table) -> Path:
        self._both.wait()
        if name == self._fails:
            raise OSError(f"no room for {name}")
        self.ended.add(name)
        return Path(name)


def _content_and_codes() -> BatchRows:
    content = pa.table([pa.nulls(1, field.type) for field in CONTENT_LOG_ROWS], CONTENT_LOG_ROWS)
    nothing = _positives([], [], [])
    return BatchRows({"v1": _codes((1, NOW, "a"))}, content, nothing, nothing, NO_ERASURES)


def test_logs_are_appended_to_side_by_side() -> None:
    log = MeetingLog()

    FeastSink(log, WriteLog(), history_length=2).write_offline(_content_and_codes())

    assert log.ended == {"item_content_log", "item_codes_v1"}


def test_a_log_that_cannot_be_written_is_told_after_the_others_have_ended() -> None:
    log = MeetingLog(fails="item_content_log")

    with pytest.raises(OSError, match="no room for item_content_log"):
        FeastSink(log, WriteLog(), history_length=2).write_offline(_content_and_codes())

    assert log.ended == {"item_codes_v1"}

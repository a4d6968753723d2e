"""Histories against a loop over the events, one question at a time."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from qarm_feast import schema, view_tags
from qarm_feast.code_log import CodeLog
from qarm_feast.recent_items import PositiveEvents, histories_as_of, newest_first
from qarm_feast.source_rows import RecentItemLists


def reference(
    events: list[tuple[int, int, int]], user_id: int, time: int, history_length: int
) -> list[tuple[int, int]] | None:
    seen = sorted({(t, item) for user, t, item in events if user == user_id and t <= time})
    return seen[::-1][:history_length] or None


def ask(
    events: list[tuple[int, int, int]], questions: list[tuple[int, int]], history_length: int
) -> list[list[tuple[int, int]] | None]:
    user_ids, times, item_ids = np.array(events, dtype=np.int64).reshape(-1, 3).T
    positives = PositiveEvents.sort(user_ids, times, item_ids)
    asked = np.array(questions, dtype=np.int64)
    slices = histories_as_of(positives, asked[:, 0], asked[:, 1], history_length)
    items = newest_first(positives.item_ids_E, slices).to_pylist()
    item_times = newest_first(positives.times_E, slices).to_pylist()
    return [
        None if row is None else list(zip(at, row, strict=True))
        for at, row in zip(item_times, items, strict=True)
    ]


def test_a_history_is_newest_first_with_equal_times_by_item_and_cut_to_its_length() -> None:
    events = [(7, 10, 1), (7, 20, 3), (7, 20, 2), (7, 30, 4), (8, 5, 9)]

    assert ask(events, [(7, 30)], 3) == [[(30, 4), (20, 3), (20, 2)]]


def test_an_event_is_seen_at_its_own_time_and_not_a_microsecond_before() -> None:
    assert ask([(7, 10, 1)], [(7, 10), (7, 9)], 5) == [[(10, 1)], None]


def test_an_event_written_twice_is_listed_once() -> None:
    assert ask([(7, 10, 1), (7, 10, 1), (7, 11, 1)], [(7, 99)], 5) == [[(11, 1), (10, 1)]]


def test_unknown_users_and_an_empty_log_have_no_history() -> None:
    assert ask([(7, 10, 1)], [(6, 99), (8, 99)], 5) == [None, None]
    assert ask([], [(7, 99)], 5) == [None]


def test_histories_equal_the_loop_on_random_events() -> None:
    generator = np.random.default_rng(3)
    events = [tuple(row) for row in generator.integers(-3, 12, size=(300, 3)).tolist()]
    questions = [tuple(row) for row in generator.integers(-5, 14, size=(200, 2)).tolist()]

    found = ask(events, questions, 4)

    assert found == [reference(events, user, time, 4) for user, time in questions]


def test_a_list_expires_with_its_newest_event_and_a_null_user_has_none(tmp_path: Path) -> None:
    times = pa.array([10, 20], pa.int64()).cast(schema.TIMESTAMP)
    events = [[0, 0], [1, 2], [True, True], ["", ""], times, times]
    CodeLog(tmp_path).append("log", pa.table(events, schema=schema.interaction_rows(("is_like",))))
    rows = RecentItemLists(
        tmp_path / "log", schema.EVENT_TIMESTAMP, tags={view_tags.HISTORY_LENGTH: "5"}
    )
    labels = pa.table({"user_id": [0, 0, None], "time_us": [25, 26, 25]})

    found = rows.as_of(["user_id"], ["item_ids"], labels, ttl_us=5)

    assert found is not None
    assert found["item_ids"].to_pylist() == [[2, 1], None, None]

"""Compaction in a thread of the worker."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from qarm_feast import schema
from qarm_feast.code_log import CodeLog
from qarm_feast.compaction import CompactionConfig, Compactor
from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.observability import OFFLINE_COMPACTION_FAILED
from streaming.background import compaction_thread

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
OFTEN = CompactionConfig(interval_seconds=0.02, min_growth=1)


def append_items(log: CodeLog, *items: int) -> None:
    for item in items:
        columns = pa.schema([("item_id", pa.int64()), (schema.EVENT_TIMESTAMP, schema.TIMESTAMP)])
        log.append("codes", pa.table([[item], [NOON]], schema=columns), written_at=NOON)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_parts_are_merged_while_they_are_written_and_the_thread_ends_with_the_block(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))

    with compaction_thread(log, OFTEN, lambda: False) as thread:
        wait_for(lambda: len(log.row_parts("codes")) == 1)
        append_items(log, *range(8, 12))
        wait_for(lambda: len(log.row_parts("codes")) == 1)

    assert not thread.is_alive()
    assert sorted(log.read("codes")["item_id"].to_pylist()) == list(range(12))


def test_a_compaction_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))
    faults = iter([OSError(28, "No space left on device"), ServiceUnavailableError("locked")])
    compact = Compactor.compact
    gauge_after: list[float] = []

    def fail_twice(self: Compactor, **options: float) -> object:
        gauge_after.append(OFFLINE_COMPACTION_FAILED._value.get())
        fault = next(faults, None)
        if fault is not None:
            raise fault
        return compact(self, is_full=False)

    monkeypatch.setattr(Compactor, "compact", fail_twice)
    with caplog.at_level(logging.INFO), compaction_thread(log, OFTEN, lambda: False):
        wait_for(lambda: len(log.row_parts("codes")) == 1)
        wait_for(lambda: len(gauge_after) >= 4)

    assert gauge_after[:4] == [0, 1, 1, 0]
    assert caplog.text.count("offline_compaction_failed") == 1
    assert "num_merged_parts=8" in caplog.text


def test_a_draining_worker_starts_no_further_merge(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))
    asked = threading.Event()

    def is_draining() -> bool:
        asked.set()
        return True

    with compaction_thread(log, OFTEN, is_draining):
        wait_for(asked.is_set)

    assert len(log.row_parts("codes")) == 8

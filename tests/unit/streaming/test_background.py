"""Compaction in a process beside the worker."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from filelock import FileLock

from qarm_feast import schema
from qarm_feast.code_log import CodeLog
from qarm_feast.compaction import LOCK_NAME, CompactionConfig
from qarm_feast.observability import (
    OFFLINE_COMPACTION_FAILED,
    OFFLINE_DAMAGED_PARTS,
    OFFLINE_MERGED_PARTS,
    ObservabilityConfig,
)
from streaming import background
from streaming.background import compaction_thread
from streaming.compaction_process import CompactionRequest

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
OFTEN = CompactionConfig(interval_seconds=0.02, min_growth=1)


def append_items(log: CodeLog, *items: int) -> None:
    for item in items:
        columns = pa.schema([("item_id", pa.int64()), (schema.EVENT_TIMESTAMP, schema.TIMESTAMP)])
        log.append("codes", pa.table([[item], [NOON]], schema=columns), written_at=NOON)


def request_for(log: CodeLog, config: CompactionConfig = OFTEN) -> CompactionRequest:
    return CompactionRequest(
        root=str(log.root), compaction=config, observability=ObservabilityConfig()
    )


def start_process(request: CompactionRequest) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "streaming.compaction_process", request.model_dump_json()]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_parts_are_merged_while_they_are_written_and_the_thread_ends_with_the_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))
    merged_before = OFFLINE_MERGED_PARTS._value.get()

    with (
        caplog.at_level(logging.INFO),
        compaction_thread(request_for(log), lambda: False) as thread,
    ):
        wait_for(lambda: len(log.row_parts("codes")) == 1)
        append_items(log, *range(8, 12))
        wait_for(lambda: len(log.row_parts("codes")) == 1)
        wait_for(lambda: OFFLINE_MERGED_PARTS._value.get() - merged_before >= 13)

    assert not thread.is_alive()
    assert sorted(log.read("codes")["item_id"].to_pylist()) == list(range(12))
    assert "offline_compacted num_merged_parts=8" in caplog.text


def test_a_compaction_that_fails_is_told_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))
    obstacle = tmp_path / LOCK_NAME
    obstacle.mkdir()

    with compaction_thread(request_for(log), lambda: False):
        wait_for(lambda: OFFLINE_COMPACTION_FAILED._value.get() == 1)
        assert len(log.row_parts("codes")) == 8
        obstacle.rmdir()
        wait_for(lambda: len(log.row_parts("codes")) == 1)
        wait_for(lambda: OFFLINE_COMPACTION_FAILED._value.get() == 0)

    assert "offline_compaction_ended status=1" in caplog.text


def test_a_process_that_cannot_be_started_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))
    with monkeypatch.context() as patch:
        patch.setattr(background, "_COMMAND", (str(tmp_path / "no-such-python"),))
        with compaction_thread(request_for(log), lambda: False):
            wait_for(lambda: OFFLINE_COMPACTION_FAILED._value.get() == 1)
            patch.undo()
            wait_for(lambda: len(log.row_parts("codes")) == 1)
            wait_for(lambda: OFFLINE_COMPACTION_FAILED._value.get() == 0)

    assert "offline_compaction_not_started" in caplog.text


def test_damage_that_a_compaction_meets_is_counted(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))
    Path(log.row_parts("codes")[0]).write_bytes(b"not a part")
    damaged_before = OFFLINE_DAMAGED_PARTS._value.get()

    with compaction_thread(request_for(log), lambda: False):
        wait_for(lambda: OFFLINE_DAMAGED_PARTS._value.get() == damaged_before + 1)
        wait_for(lambda: len(log.row_parts("codes")) == 1)

    assert len(log.read("codes")) == 7


def test_work_that_another_process_does_is_left_to_it(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))

    with FileLock(tmp_path / LOCK_NAME):
        process = start_process(request_for(log))
        # Its input stays open, as a worker's does.
        assert process.wait(60) == 6

    assert process.communicate() == ("", "")
    assert len(log.row_parts("codes")) == 8


def test_an_object_store_that_is_away_is_a_compaction_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens at port 9.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "tests")
    request = request_for(CodeLog(tmp_path)).model_copy(update={"root": "s3://bucket/log"})

    with start_process(request) as process:
        _, told = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "offline_compaction_failed error=the object store of s3://bucket/log" in told
    assert "Traceback" not in told


def test_the_process_begins_no_merge_once_its_worker_is_gone(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))

    process = start_process(request_for(log))
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 0
    assert '"num_merged_parts":0' in output
    assert len(log.row_parts("codes")) == 8


def test_a_draining_worker_starts_no_further_merge(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, *range(8))
    asked = threading.Event()

    def is_draining() -> bool:
        asked.set()
        return True

    with compaction_thread(request_for(log), is_draining):
        wait_for(asked.is_set)

    assert len(log.row_parts("codes")) == 8

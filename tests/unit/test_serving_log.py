import hashlib
import struct
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import ItemCodes
from qarm_feast.errors import DataError
from qarm_feast.observability import SERVING_LOG_ROWS
from qarm_feast.schema import SERVED_CODE_LOG
from qarm_feast.serving_log import NO_CODES, ServingLog, ServingLogConfig, codes_hash

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def answer(*item_ids: int) -> ItemCodes:
    """Item i has the RQ codes [i, 1] and the VQ code [i]; items below zero have none."""
    ids = np.array(item_ids, dtype=np.int64)
    codes = np.where(ids < 0, -1, ids)
    seconds = np.where(ids < 0, -1, 1)
    return ItemCodes(ids, codes[:, None], np.stack([codes, seconds], axis=1))


def make(log: Any, **keys: Any) -> ServingLog:
    config = ServingLogConfig(**({"sample_rate": 1.0, "flush_seconds": 3600.0} | keys))
    return ServingLog(log, config, seed=0, clock=lambda: NOW)


def dropped() -> float:
    count: float = SERVING_LOG_ROWS.labels("dropped")._value.get()
    return count


class BlockedLog:
    """A disk that takes nothing until it is let go."""

    def __init__(self) -> None:
        self.is_reached, self.is_free = threading.Event(), threading.Event()
        self.num_rows = 0

    def create(self, name: str, schema: pa.Schema) -> None:
        self.is_reached.set()
        assert self.is_free.wait(30)

    def append(self, name: str, table: pa.Table) -> None:
        self.num_rows += len(table)


class BrokenLog(BlockedLog):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def create(self, name: str, schema: pa.Schema) -> None:
        raise self.error


def test_a_hash_is_blake2b_of_the_levels_and_the_codes() -> None:
    expected = hashlib.blake2b(struct.pack("<6q", 2, 3, 4, 7, 8, 9), digest_size=16).hexdigest()

    assert codes_hash([3, 4], [7, 8, 9]) == expected
    assert codes_hash([3, 4, 7], [8, 9]) != expected
    assert codes_hash([-1, -1], [-1, -1, -1]) == NO_CODES == ""


def test_what_was_served_is_in_the_log_after_closing(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    serving_log = make(log)

    serving_log.offer("v1", answer(5, -6))
    serving_log.offer("v2", answer(5))
    serving_log.close()

    rows = log.read(SERVED_CODE_LOG).to_pylist()
    assert len(log.row_parts(SERVED_CODE_LOG)) == 1
    assert [(row["codebook_version"], row["item_id"], row["codes_hash"]) for row in rows] == [
        ("v1", 5, codes_hash([5, 1], [5])),
        ("v1", -6, NO_CODES),
        ("v2", 5, codes_hash([5, 1], [5])),
    ]
    assert {row["event_timestamp"] for row in rows} == {NOW}


@pytest.mark.parametrize(
    ("rate", "least", "most"), [(0.0, 0, 0), (0.1, 900, 1100), (1.0, 1e4, 1e4)]
)
def test_about_the_given_share_is_sampled(
    tmp_path: Path, rate: float, least: int, most: int
) -> None:
    log = CodeLog(tmp_path)
    serving_log = make(log, sample_rate=rate)

    for start in range(0, 10_000, 100):
        serving_log.offer("v1", answer(*range(start, start + 100)))
    serving_log.close()

    num_rows = len(log.read(SERVED_CODE_LOG)) if log.exists(SERVED_CODE_LOG) else 0
    assert least <= num_rows <= most


def test_an_answer_that_its_owner_changes_later_is_logged_as_it_was(tmp_path: Path) -> None:
    log, codes = CodeLog(tmp_path), answer(5)
    serving_log = make(log)

    serving_log.offer("v1", codes)
    codes.rq_NL[:] = 99
    serving_log.close()

    assert log.read(SERVED_CODE_LOG)["codes_hash"].to_pylist() == [codes_hash([5, 1], [5])]


def test_a_disk_that_hangs_holds_up_no_answer_and_the_buffer_stays_bounded() -> None:
    log, before = BlockedLog(), dropped()
    serving_log = make(log, flush_seconds=0.01, max_buffered_rows=10)
    serving_log.offer("v1", answer(1, 2, 3))
    assert log.is_reached.wait(30)

    for item in range(25):
        serving_log.offer("v1", answer(item))

    assert dropped() - before == 15
    log.is_free.set()
    serving_log.close()
    assert log.num_rows == 13


@pytest.mark.parametrize("error", [OSError("no space left"), pa.ArrowInvalid("bad"), DataError("")])
def test_a_log_that_cannot_be_written_costs_the_rows_and_no_answer(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    before = dropped()
    serving_log = make(BrokenLog(error))

    serving_log.offer("v1", answer(1, 2))
    serving_log.close()

    assert dropped() - before == 2
    assert "serving_log_not_written rows=2" in caplog.text


def test_items_of_a_view_that_tells_no_width_are_logged_without_codes(tmp_path: Path) -> None:
    log, before = CodeLog(tmp_path), dropped()
    serving_log = make(log)
    no_codes = np.empty((1, 0), dtype=np.int64)

    serving_log.offer("v1", ItemCodes(np.array([9]), no_codes, no_codes))
    serving_log.offer("v1", answer(5))
    serving_log.close()

    assert dropped() == before
    assert log.read(SERVED_CODE_LOG)["codes_hash"].to_pylist() == [
        NO_CODES,
        codes_hash([5, 1], [5]),
    ]


def test_an_answer_after_closing_is_counted_as_dropped(tmp_path: Path) -> None:
    log, before = CodeLog(tmp_path), dropped()
    serving_log = make(log)
    serving_log.close()

    serving_log.offer("v1", answer(1, 2))

    assert dropped() - before == 2


def test_parts_are_written_while_answers_go_on(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    serving_log = make(log, flush_seconds=0.01)
    written = SERVING_LOG_ROWS.labels("written")._value.get

    before = written()
    serving_log.offer("v1", answer(1))
    _until(lambda: written() > before)
    serving_log.offer("v1", answer(2))
    serving_log.close()

    assert len(log.row_parts(SERVED_CODE_LOG)) == 2


def _until(is_true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_true():
            return
        threading.Event().wait(0.01)
    raise TimeoutError("nothing was written in 30 s")

"""Compaction: the same rows in few parts, whatever dies, whoever reads."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qarm_feast import compaction, log_parts, schema, view_tags
from qarm_feast.code_log import SEED_PART, CodeLog
from qarm_feast.compaction import (
    CompactionCounts,
    CompactionRules,
    Compactor,
    choose_parts,
    log_states,
    row_key,
)
from qarm_feast.errors import DataError, ServiceUnavailableError
from qarm_feast.source_rows import FeatureRows, RecentItemLists, TimeRange

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
DAY = "written_date=2026-01-31"
CODES = "item_codes_v1"
INTERACTIONS = schema.interaction_rows(("is_like",))
LATER = 10_000.0
"""Seconds after which every grace period is over."""


def code_rows(*keys: tuple[int, int, str], created: int = 0) -> pa.Table:
    """Return code rows of (item, seconds, content hash)."""
    items = [item for item, _, _ in keys]
    times = [NOON + timedelta(seconds=seconds) for _, seconds, _ in keys]
    columns = [
        items,
        [[item, item + 1] for item in items],
        [[created] for _ in items],
        ["e1"] * len(items),
        [text for _, _, text in keys],
        [False] * len(items),
        times,
        [NOON + timedelta(seconds=created)] * len(items),
    ]
    return pa.table(columns, schema=schema.CODE_ROWS)


def interactions(*rows: tuple[int, int, int, bool]) -> pa.Table:
    """Return interactions of (user, item, seconds, is_like)."""
    times = [NOON + timedelta(seconds=seconds) for _, _, seconds, _ in rows]
    columns = [
        [user for user, _, _, _ in rows],
        [item for _, item, _, _ in rows],
        [is_like for _, _, _, is_like in rows],
        [""] * len(rows),
        times,
        [NOON] * len(rows),
    ]
    return pa.table(columns, schema=INTERACTIONS)


def compact(
    log: CodeLog, *, is_full: bool = True, erasure_interval: float = 0.0, after_seconds: float = 0.0
) -> CompactionCounts:
    compactor = Compactor(log, clock=lambda: time.time() + after_seconds)
    return compactor.compact(is_full=is_full, erasure_interval_seconds=erasure_interval)


def append_items(log: CodeLog, *items: int) -> None:
    for item in items:
        log.append(CODES, code_rows((item, item, "a")), written_at=NOON)


def items_of(log: CodeLog) -> list[int]:
    return sorted(log.read(CODES, ["item_id"])["item_id"].to_pylist())


def file_names(log: CodeLog, name: str = CODES) -> list[str]:
    return sorted(path.name for path in (log.root / name / DAY).iterdir())


def test_the_parts_of_a_day_become_one_sorted_part_with_the_same_rows(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    for item in (3, 1, 2):
        log.append(CODES, code_rows((item, 2, "a"), (item, 1, "b")), written_at=NOON)

    counts = compact(log)

    (part,) = log.row_parts(CODES)
    assert Path(part).name.startswith("merged-")
    assert pq.read_table(part)["item_id"].to_pylist() == [1, 1, 2, 2, 3, 3]
    assert log.read(CODES)["content_hash"].to_pylist() == ["b", "a"] * 3
    assert pq.ParquetFile(part).metadata.row_group(0).column(0).statistics.max == 3
    assert (counts.num_merged_parts, counts.num_new_parts) == (3, 1)


def test_days_are_compacted_each_for_itself_and_a_second_run_finds_nothing(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2)
    for item in (3, 4):
        log.append(CODES, code_rows((item, 0, "a")), written_at=NOON + timedelta(days=1))

    compact(log)
    again = compact(log)

    assert [Path(part).parent.name for part in log.row_parts(CODES)] == [
        DAY,
        "written_date=2026-02-01",
    ]
    assert items_of(log) == [1, 2, 3, 4]
    assert again.num_merged_parts == 0


def test_of_rows_equal_in_the_key_the_last_created_stays(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    for created in (5, 9, 7):
        log.append(CODES, code_rows((1, 0, "a"), created=created), written_at=NOON)
    log.append(CODES, code_rows((1, 0, "b"), (1, 1, "a")), written_at=NOON)

    counts = compact(log)

    kept = log.read(CODES).to_pylist()
    found = {(row["content_hash"], row["event_timestamp"], row["vq_code"][0]) for row in kept}
    assert found == {("a", NOON, 9), ("b", NOON, 0), ("a", NOON + timedelta(seconds=1), 0)}
    assert len(kept) == 3
    assert counts.num_dropped_duplicates == 2


def test_interactions_that_differ_in_a_flag_are_two_and_unknown_logs_keep_all(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)
    for is_like in (True, False, True):
        log.append(schema.INTERACTION_LOG, interactions((1, 2, 3, is_like)), written_at=NOON)
    for _ in range(2):
        log.append("pushed_by_others", code_rows((1, 0, "a")), written_at=NOON)

    compact(log)

    assert sorted(log.read(schema.INTERACTION_LOG)["is_like"].to_pylist()) == [False, True]
    assert log.read("pushed_by_others").num_rows == 2


def test_a_log_without_ids_and_times_is_compacted_as_well(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    for text in ("a", "b"):
        log.append("notes", pa.table({"text": [text]}), written_at=NOON)

    compact(log)

    assert len(log.row_parts("notes")) == 1
    assert sorted(log.read("notes")["text"].to_pylist()) == ["a", "b"]


def test_keys_name_columns_that_the_logs_have() -> None:
    logs = {
        CODES: schema.CODE_ROWS,
        schema.CONTENT_LOG: schema.CONTENT_LOG_ROWS,
        schema.INTERACTION_LOG: INTERACTIONS,
        schema.USER_ERASURE_LOG: schema.USER_ERASURE_ROWS,
    }

    for name, columns in logs.items():
        key = row_key(name, columns)
        assert key
        assert set(key) <= set(columns.names) - {schema.CREATED}


def test_joins_and_pulls_are_the_same_before_and_after(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    generator = random.Random(0)
    events = []
    for created in range(30):
        keys = [(generator.randrange(5), generator.randrange(6), "ab"[generator.randrange(2)])]
        log.append(CODES, code_rows(*keys, created=created), written_at=NOON)
        events = [(*(generator.randrange(4) for _ in range(3)), generator.random() < 0.6)]
        log.append(schema.INTERACTION_LOG, interactions(*events), written_at=NOON)
    codes = FeatureRows(
        tmp_path / CODES,
        "event_timestamp",
        "created",
        {view_tags.DEDUP_KEY: "item_id,event_timestamp,content_hash"},
    )
    lists = RecentItemLists(
        tmp_path / schema.INTERACTION_LOG,
        "event_timestamp",
        None,
        {view_tags.HISTORY_LENGTH: "3", view_tags.POSITIVE_LABEL: "is_like"},
    )
    start = int(NOON.timestamp()) * 1_000_000
    labels = pa.table(
        {
            "item_id": np.repeat(np.arange(6), 8),
            "user_id": np.repeat(np.arange(6), 8),
            "time_us": np.tile(start + np.arange(-1, 7) * 1_000_000, 6),
        }
    )

    def answers() -> list[list[dict[str, object]]]:
        joined = [
            codes.as_of(["item_id"], ["rq_code", "vq_code"], labels, 0),
            lists.as_of(["user_id"], ["item_ids", "item_timestamps"], labels, 0),
        ]
        pulled = [
            codes.latest(["item_id"], ["rq_code", "vq_code"], TimeRange()),
            codes.all(["item_id", "content_hash", "vq_code"], TimeRange()),
            lists.latest(["user_id"], ["user_id", "item_ids"], TimeRange()),
        ]
        ordered = [sorted(table.to_pylist(), key=str) for table in pulled]
        return [table.to_pylist() for table in joined if table is not None] + ordered

    before = answers()
    compact(log, is_full=False)
    between = answers()
    compact(log, after_seconds=LATER)

    assert between == before
    assert answers() == before


def test_replaced_parts_are_out_of_sight_at_once_and_deleted_after_the_grace_period(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2, 3)
    appended = file_names(log)

    compact(log)
    kept = file_names(log)
    counts = compact(log, after_seconds=599)
    kept_still = file_names(log)
    later = compact(log, after_seconds=601)

    assert set(appended) < set(kept)
    assert kept_still == kept
    assert counts.num_deleted_parts == 0
    assert later.num_deleted_parts == 3
    assert [name[:7] for name in file_names(log)] == ["merged-"]
    assert items_of(log) == [1, 2, 3]


def test_a_part_that_is_replaced_in_turn_stays_out_of_sight_until_both_are_gone(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2)
    compact(log)
    append_items(log, 3)
    compact(log)

    twice_merged = items_of(log)
    (state,) = log_states(log)
    compact(log, after_seconds=LATER)

    assert twice_merged == [1, 2, 3]
    assert (state.num_parts, state.num_replaced_parts) == (1, 4)
    assert len(file_names(log)) == 1
    assert items_of(log) == [1, 2, 3]


STEPS: list[tuple[object, str, int]] = [
    (log_parts, "_write_parquet", 0),
    (log_parts, "_check_parquet", 0),
    (log_parts, "replace_file", 0),
    (log_parts.os, "replace", 0),
    (log_parts.os, "replace", 1),
    (log_parts, "sync_folder", 0),
    (compaction, "_unlink_if_there", 0),
    (compaction, "_unlink_if_there", 1),
    (compaction, "_unlink_if_there", 3),
]
"""Where a compaction of three parts dies: before the call of a function after so many calls."""


class _KilledError(BaseException):
    """Stands for a kill: no handler of errors sees it, and nothing is tidied up."""


@pytest.mark.parametrize(("place", "name", "num_calls"), STEPS)
def test_a_kill_between_two_steps_loses_no_row_and_shows_none_twice(
    tmp_path: Path, place: object, name: str, num_calls: int
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2, 3)
    calls = itertools.count()
    step: Callable[..., object] = getattr(place, name)

    def die(*given: object, **options: object) -> object:
        if next(calls) == num_calls:
            raise _KilledError
        return step(*given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, die)
        # A killed process does not get to remove its temporary file.
        patch.setattr(Path, "unlink", lambda *_, **__: None) if place is not compaction else None
        with pytest.raises(_KilledError):
            compact(log, after_seconds=LATER)
    after_kill = items_of(log)
    compact(log, after_seconds=LATER)

    assert after_kill == [1, 2, 3]
    assert items_of(log) == [1, 2, 3]
    assert [name[:7] for name in file_names(log)] == ["merged-"]


COMPACT_FOREVER = """
import sys
from qarm_feast.code_log import CodeLog
from qarm_feast.compaction import CompactionRules, Compactor

log = CodeLog(sys.argv[1])
compactor = Compactor(log, CompactionRules(min_growth=2.0, grace_seconds=0.3))
print("ready", flush=True)
while True:
    compactor.compact(is_full=False, wait_seconds=30)
"""


def start_compactor(root: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", COMPACT_FOREVER, str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_compactors_killed_at_random_under_a_writer_and_a_reader_lose_and_double_nothing(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)
    generator = random.Random(1)
    num_appended = 0
    for _ in range(5):
        append_items(log, *range(num_appended, num_appended + 20))
        num_appended += 20
        process = start_compactor(tmp_path)
        die_at = time.monotonic() + generator.uniform(0.05, 1.2)
        while time.monotonic() < die_at:
            append_items(log, num_appended)
            num_appended += 1
            assert items_of(log) == list(range(num_appended))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()

        assert items_of(log) == list(range(num_appended))
    assert any("merged-" in part for part in log.row_parts(CODES))
    compact(log)
    compact(log, after_seconds=LATER)

    assert items_of(log) == list(range(num_appended))
    days = [path for path in (tmp_path / CODES).iterdir() if "1970" not in path.name]
    assert [len(list(day.iterdir())) for day in days] == [1] * len(days)


def test_two_compactors_at_once_are_excluded(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2)
    inner = Compactor(log)

    def compact_too() -> bool:
        with pytest.raises(ServiceUnavailableError, match="another process"):
            inner.compact(is_full=True)
        return True

    Compactor(log, should_stop=compact_too).compact(is_full=True)

    assert len(log.row_parts(CODES)) == 2


def test_a_merge_takes_small_parts_that_together_outweigh_the_largest() -> None:
    sizes = {"a": 1, "b": 1, "c": 2, "d": 9, "e": 60}

    assert choose_parts(sizes, 100, 4.0) == []
    assert choose_parts(sizes, 100, 2.0) == ["a", "b", "c"]
    assert choose_parts(sizes, 100, 1.0) == ["a", "b", "c", "d"]
    assert choose_parts({"a": 30, "b": 45}, 100, 4.0) == ["a", "b"]
    assert choose_parts({"a": 45, "b": 45, "c": 45}, 100, 1.0) == ["a", "b"]
    assert choose_parts({"a": 1}, 100, 1.0) == []
    assert choose_parts({"a": 0, "b": 0}, 100, 4.0) == ["a", "b"]


@pytest.mark.parametrize(("growth", "most_rewrites"), [(2.0, 13), (4.0, 7), (8.0, 5)])
def test_no_row_is_rewritten_more_often_than_the_growth_allows(
    growth: float, most_rewrites: int
) -> None:
    # log2(4096) + 1, log4(4096) + 1 and log8(4096) + 1 merges of appends of one byte.
    sizes: dict[str, int] = {}
    num_rewrites: Counter[str] = Counter()
    names = (f"{number:06d}" for number in itertools.count())
    most_parts = 0
    for _ in range(20_000):
        sizes[next(names)] = 1
        while chosen := choose_parts(sizes, 4096, growth):
            merged = next(names)
            num_rewrites[merged] = 1 + max(num_rewrites[part] for part in chosen)
            sizes[merged] = sum(sizes.pop(part) for part in chosen)
        most_parts = max(most_parts, sum(size < 2048 for size in sizes.values()))

    assert sum(sizes.values()) == 20_000
    assert max(num_rewrites.values()) <= most_rewrites
    assert most_parts <= 60


def test_a_reader_that_meets_a_vanished_part_lists_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2)
    listings = iter([log.parts(CODES), None])
    list_now = log.parts
    compact(log)
    compact(log, after_seconds=LATER)
    monkeypatch.setattr(log, "parts", lambda name: next(listings) or list_now(name))

    assert items_of(log) == [1, 2]


def test_a_part_of_an_earlier_release_that_vanished_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    (tmp_path / CODES / DAY).mkdir(parents=True)
    append_items(log, 1)
    gone = str(tmp_path / CODES / DAY / f"part-{'a' * 32}.parquet")
    listings = iter([[gone, *log.parts(CODES)], None])
    list_now = log.parts
    monkeypatch.setattr(log, "parts", lambda name: next(listings) or list_now(name))

    assert items_of(log) == [1]


def test_a_day_folder_that_is_taken_away_during_a_listing_has_no_parts(tmp_path: Path) -> None:
    assert log_parts.list_day(tmp_path / DAY) == []


def merged_twice(log: CodeLog) -> tuple[Path, Path]:
    """Return a merged part that was replaced in turn, and what replaced it."""
    append_items(log, 1, 2)
    compact(log)
    (first,) = log.row_parts(CODES)
    append_items(log, 3)
    compact(log)
    (second,) = log.row_parts(CODES)
    return Path(first), Path(second)


def test_deletion_does_not_depend_on_the_order_of_file_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    first, _ = merged_twice(log)
    # The clock was set back between the two merges.
    monkeypatch.setattr(compaction, "_visible_since", lambda part: float(part == first))

    compact(log)

    assert len(file_names(log)) == 1
    assert items_of(log) == [1, 2, 3]


@pytest.mark.parametrize("log_name", [CODES, "pushed_by_others"])
def test_damage_in_a_part_that_was_replaced_brings_no_row_back(
    tmp_path: Path, log_name: str
) -> None:
    log = CodeLog(tmp_path)
    for item in (1, 2):
        log.append(log_name, code_rows((item, 0, "a")), written_at=NOON)
    compact(log)
    (first,) = map(Path, log.row_parts(log_name))
    log.append(log_name, code_rows((3, 0, "a")), written_at=NOON)
    compact(log)
    first.write_bytes(first.read_bytes()[:-20])

    for _ in range(2):
        compact(log, after_seconds=LATER)

        assert sorted(log.read(log_name)["item_id"].to_pylist()) == [1, 2, 3]
    assert len(file_names(log, log_name)) == 1


@pytest.mark.parametrize("seconds_ahead", [0.0, 1e7])
def test_a_clock_that_was_ahead_for_a_while_holds_up_neither_deletion_nor_erasure(
    tmp_path: Path, seconds_ahead: float
) -> None:
    log = CodeLog(tmp_path)
    log.append(schema.INTERACTION_LOG, interactions((1, 7, 5, True)), written_at=NOON)
    compact(log, after_seconds=seconds_ahead)
    erase(log, user=1, seconds=5)

    counts = compact(log, is_full=False, erasure_interval=3600, after_seconds=4000)
    compact(log, is_full=False, erasure_interval=3600, after_seconds=-seconds_ahead + 8000)

    assert counts.num_erased_rows == 1
    assert pairs_in_all_files(log) == set()


def test_a_log_that_cannot_be_compacted_is_told_and_the_others_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2)
    log.create("a_log_without_rows", INTERACTIONS)
    (log.root / "a_log_without_rows" / SEED_PART).write_bytes(b"")

    with pytest.raises(DataError, match="part-seed"):
        compact(log)

    assert len(log.row_parts(CODES)) == 1
    assert "offline_log_not_compacted log=a_log_without_rows" in caplog.text


def test_a_log_that_lacks_a_column_of_its_key_keeps_all_rows(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    rows = code_rows((1, 0, "a")).drop_columns(["content_hash"])
    for _ in range(2):
        log.append("item_codes_by_others", rows, written_at=NOON)

    compact(log)

    assert len(log.row_parts("item_codes_by_others")) == 1
    assert log.read("item_codes_by_others").num_rows == 2


def test_an_erasure_takes_the_rows_of_that_user_only_whatever_the_ids(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    # Neighbours that are one number as float64, which a null among int64 leads to in NumPy.
    erased, neighbour = 2**53, 2**53 + 1
    rows = interactions((erased, 7, 5, True), (neighbour, 8, 5, True))
    users = pa.array([None], type=pa.int64())
    orphan = interactions((0, 9, 5, True)).set_column(0, INTERACTIONS.field(0), users)
    for table in (rows, orphan):
        log.append(schema.INTERACTION_LOG, table, written_at=NOON)
    for user in (erased, None):
        erase(log, user=user, seconds=6)

    compact(log)

    left = log.read(schema.INTERACTION_LOG)
    assert dict(zip(left["user_id"].to_pylist(), left["item_id"].to_pylist(), strict=True)) == {
        neighbour: 8,
        None: 9,
    }


def test_a_merge_is_bounded_by_what_its_rows_take_in_memory(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    text = "a" * log_parts.LARGE_TABLE_BYTES
    for number in range(3):
        log.append("notes", pa.table({"text": [text, str(number)]}), written_at=NOON)
    num_bytes = sum(os.stat(part).st_size for part in log.row_parts("notes"))
    rules = CompactionRules(target_part_bytes=log_parts.LARGE_TABLE_BYTES * 5 // 8)

    Compactor(log, rules).compact(is_full=True)

    # Four bytes of rows count as one of a file: two of the parts fit, all three do not.
    assert num_bytes < log_parts.LARGE_TABLE_BYTES // 100
    assert len(log.row_parts("notes")) == 2


def test_what_killed_processes_left_is_removed_and_what_is_being_written_stays(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2)
    folder = tmp_path / CODES / DAY
    leftovers = [
        f".merged-{'a' * 32}.tmp",
        f".merged-{'b' * 32}-{'0' * 8}.parquet.replaces",
        f"..merged-{'b' * 32}-{'0' * 8}.parquet.replaces.x1y2",
        f".part-{'c' * 32}.tmp",
    ]
    for name in leftovers:
        (folder / name).write_bytes(b"half")
    os.utime(folder / leftovers[3], (time.time() - 4000, time.time() - 4000))
    (folder / f".part-{'d' * 32}.tmp").write_bytes(b"now")

    compact(log)
    compact(log, after_seconds=1000)

    assert [name[:7] for name in file_names(log)] == [".part-d", "merged-"]


def erase(log: CodeLog, user: int | None, seconds: int) -> None:
    columns = [[user], [NOON + timedelta(seconds=seconds)], [NOON]]
    rows = pa.table(columns, schema=schema.USER_ERASURE_ROWS)
    log.append(schema.USER_ERASURE_LOG, rows, written_at=NOON)


def pairs_in_all_files(log: CodeLog) -> set[tuple[int, int]]:
    """Return user and item of every raw row that any file of the log holds."""
    found = set()
    for path in (log.root / schema.INTERACTION_LOG / DAY).iterdir():
        assert path.suffix in (".parquet", ".arrow")
        table = log_parts.read_parts([str(path)], INTERACTIONS)
        found |= set(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))
    return found


@pytest.mark.parametrize("is_compacted_before", [False, True])
def test_rows_of_an_erased_user_are_in_no_file_after_one_compaction_and_the_grace_period(
    tmp_path: Path, is_compacted_before: bool
) -> None:
    log = CodeLog(tmp_path)
    for user in (1, 2):
        log.append(schema.INTERACTION_LOG, interactions((user, 7, 5, True)), written_at=NOON)
        log.append(schema.INTERACTION_LOG, interactions((user, 8, 6, True)), written_at=NOON)
    if is_compacted_before:
        compact(log)
    erase(log, user=1, seconds=5)

    counts = compact(log)
    compact(log, after_seconds=601)

    assert counts.num_erased_rows == 1
    assert pairs_in_all_files(log) == {(1, 8), (2, 7), (2, 8)}
    assert log.read(schema.USER_ERASURE_LOG)["user_id"].to_pylist() == [1]


def test_parts_that_need_no_merge_are_searched_for_erased_rows_at_intervals(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    log.append(schema.INTERACTION_LOG, interactions((1, 7, 5, True)), written_at=NOON)
    compact(log)
    erase(log, user=1, seconds=5)

    counts = [
        compact(log, is_full=False, erasure_interval=3600, after_seconds=seconds)
        for seconds in (0, 3500, 3700, 8000)
    ]

    assert [count.num_erased_rows for count in counts] == [0, 0, 1, 0]
    assert log.read(schema.INTERACTION_LOG).num_rows == 0


def test_a_compaction_that_is_told_to_stop_leaves_the_rest_for_the_next(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 1, 2)

    counts = Compactor(log, CompactionRules(), should_stop=lambda: True).compact(is_full=True)

    assert counts.num_merged_parts == 0
    assert items_of(log) == [1, 2]


def test_a_join_takes_repeated_and_missing_rows_out_of_any_number_of_parts(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    append_items(log, 4, 2, 6)
    log.append(CODES, code_rows((1, 0, "a"), (5, 0, "a")), written_at=NOON + timedelta(days=1))
    rows = FeatureRows(tmp_path / CODES, "event_timestamp", "created")
    asked = [6, 9, 1, 6, 2, 5]
    late = int(NOON.timestamp() + 60) * 1_000_000
    labels = pa.table({"item_id": asked, "time_us": [late] * len(asked)})

    found = rows.as_of(["item_id"], ["rq_code", "content_hash"], labels, 0)

    assert found is not None
    expected = [None if item == 9 else [item, item + 1] for item in asked]
    assert found["rq_code"].to_pylist() == expected

"""Damaged files of the offline log: set aside, told, never silently a part of the answer."""

import errno
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from qarm_feast import code_log, log_parts, schema
from qarm_feast.cli import qarm
from qarm_feast.code_log import SEED_PART, CodeLog
from qarm_feast.compaction import Compactor, log_states
from qarm_feast.errors import DataError
from qarm_feast.log_parts import (
    LARGE_TABLE_BYTES,
    QUARANTINE_PREFIX,
    DamagedPartError,
    find_damage,
)

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
PLAIN = pa.schema([("item_id", pa.int64()), (schema.EVENT_TIMESTAMP, schema.TIMESTAMP)])


def rows(first: int, num_rows: int) -> pa.Table:
    items = pa.array(range(first, first + num_rows))
    return pa.table([items, [NOON] * num_rows], schema=PLAIN)


SMALL = 10
LARGE = LARGE_TABLE_BYTES // 16 + 1


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    return b""


def flip_in_footer(content: bytes) -> bytes:
    place = len(content) - 40
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def flip_in_rows(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def overwrite_with_zeros(content: bytes) -> bytes:
    return bytes(len(content))


DAMAGES = [cut, empty, flip_in_footer, flip_in_rows, overwrite_with_zeros]


def damage(part: Path, change: Callable[[bytes], bytes]) -> None:
    part.write_bytes(change(part.read_bytes()))


@pytest.mark.parametrize("change", DAMAGES)
@pytest.mark.parametrize("num_rows", [SMALL, LARGE])
def test_a_reader_sets_a_damaged_part_aside_says_so_and_serves_the_rest(
    tmp_path: Path,
    change: Callable[[bytes], bytes],
    num_rows: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = CodeLog(tmp_path)
    log.append("codes", rows(0, 3), written_at=NOON)
    part = log.append("codes", rows(3, num_rows), written_at=NOON)
    damage(part, change)

    with caplog.at_level(logging.WARNING):
        table = log.read("codes")

    assert sorted(table["item_id"].to_pylist()) == [0, 1, 2]
    moved = part.with_name(f"{QUARANTINE_PREFIX}{part.name}")
    assert moved.is_file()
    assert not part.exists()
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == [
        "offline_part_quarantined"
    ]
    assert str(moved) in caplog.text
    (state,) = log_states(log)
    assert list(state.quarantined) == [str(moved)]
    assert state.quarantined[str(moved)] in caplog.text


def test_each_bit_of_a_small_part_and_each_byte_of_a_footer_is_watched(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    small = log.append("codes", rows(0, SMALL), written_at=NOON)
    large = log.append("codes", rows(0, LARGE), written_at=NOON)

    for part, start in ((small, 0), (large, -600)):
        content = part.read_bytes()
        for place in range(start % len(content), len(content), 7):
            flipped = bytes([content[place] ^ (1 << place % 8)])
            part.write_bytes(content[:place] + flipped + content[place + 1 :])
            assert find_damage(part) is not None, place
        part.write_bytes(content)
        assert find_damage(part) is None


@pytest.mark.parametrize("change", DAMAGES)
def test_a_compactor_sets_a_damaged_part_aside_and_merges_the_rest(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    log = CodeLog(tmp_path)
    parts = [log.append("codes", rows(3 * n, 3), written_at=NOON) for n in range(3)]
    damage(parts[1], change)

    Compactor(log).compact(is_full=True)

    assert len(log.row_parts("codes")) == 1
    assert sorted(log.read("codes")["item_id"].to_pylist()) == [0, 1, 2, 6, 7, 8]
    assert parts[1].with_name(f"{QUARANTINE_PREFIX}{parts[1].name}").is_file()


def test_a_merged_part_that_is_damaged_in_its_grace_period_gives_way_to_its_sources(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)
    for n in range(3):
        log.append("codes", rows(n, 1), written_at=NOON)
    Compactor(log).compact(is_full=True)
    damage(Path(log.row_parts("codes")[0]), flip_in_rows)

    read = log.read("codes")
    Compactor(log).compact(is_full=True)

    assert sorted(read["item_id"].to_pylist()) == [0, 1, 2]
    assert sorted(log.read("codes")["item_id"].to_pylist()) == [0, 1, 2]
    (state,) = log_states(log)
    assert len(state.quarantined) == 1


def test_sources_are_not_deleted_for_a_merged_part_that_cannot_be_read(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    for n in range(3):
        log.append("codes", rows(n, 1), written_at=NOON)
    Compactor(log).compact(is_full=True)
    damage(Path(log.row_parts("codes")[0]), flip_in_rows)

    Compactor(log, clock=lambda: 1e12).compact(is_full=True)

    assert sorted(log.read("codes")["item_id"].to_pylist()) == [0, 1, 2]


def test_a_merged_part_that_reads_back_wrong_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    for n in range(3):
        log.append("codes", rows(n, 1), written_at=NOON)
    write = log_parts._write_parquet

    def write_badly(path: Path, table: pa.Table) -> int:
        checksum = write(path, table)
        damage(path, flip_in_rows)
        return checksum

    monkeypatch.setattr(log_parts, "_write_parquet", write_badly)
    with pytest.raises(DataError, match="reads back wrong"):
        Compactor(log).compact(is_full=True)

    assert len(log.row_parts("codes")) == 3
    assert sorted(log.read("codes")["item_id"].to_pylist()) == [0, 1, 2]


def test_a_damaged_list_of_replaced_parts_loses_no_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    for n in range(2):
        log.append("codes", rows(n, 1), written_at=NOON)
    Compactor(log).compact(is_full=True)
    damage(log_parts.replaces_path(Path(log.row_parts("codes")[0])), flip_in_rows)

    items = log.read("codes")["item_id"].to_pylist()

    assert set(items) == {0, 1}
    assert "offline_replaces_damaged" in caplog.text


def test_a_reader_that_may_not_write_leaves_a_damaged_part_out_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    log.append("codes", rows(0, 3), written_at=NOON)
    part = log.append("codes", rows(3, 3), written_at=NOON)
    damage(part, cut)

    def refuse(source: str, target: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", source)

    monkeypatch.setattr(log_parts.os, "rename", refuse)
    reads = [log.read("codes").num_rows for _ in range(2)]
    counts = Compactor(log).compact(is_full=True)

    assert reads == [3, 3]
    assert part.is_file()
    assert caplog.text.count("offline_part_left_out") == 3
    assert counts.num_merged_parts == 0


def test_a_system_that_cannot_read_is_an_error_and_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    part = log.append("codes", rows(0, 3), written_at=NOON)

    def fail(path: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(log_parts, "_read_verified", fail)
    with pytest.raises(OSError, match="Input/output error"):
        log.read("codes")

    assert part.is_file()


@pytest.mark.parametrize("is_compacting", [False, True])
def test_a_damaged_part_that_another_process_sets_aside_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_compacting: bool
) -> None:
    log = CodeLog(tmp_path)
    parts = [log.append("codes", rows(3 * n, 3), written_at=NOON) for n in range(3)]
    damage(parts[1], cut)

    def find_late(path: str) -> str | None:
        if path == str(parts[1]) and parts[1].exists():
            log_parts.quarantine(path, "found by another process")
        return find_damage(path)

    monkeypatch.setattr(log_parts, "find_damage", find_late)
    if is_compacting:
        Compactor(log).compact(is_full=True)

    assert sorted(log.read("codes")["item_id"].to_pylist()) == [0, 1, 2, 6, 7, 8]


def test_a_part_that_reads_wrong_once_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    part = log.append("codes", rows(0, 3), written_at=NOON)
    faults = iter([DamagedPartError("a bit flipped in memory")])
    read = log_parts._read_verified

    def read_wrong_once(path: str) -> bytes:
        fault = next(faults, None)
        if fault is not None:
            raise fault
        return read(path)

    monkeypatch.setattr(log_parts, "_read_verified", read_wrong_once)

    assert log.read("codes").num_rows == 3
    assert part.is_file()


def test_a_filter_that_does_not_fit_is_an_error_and_no_damage(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    part = log.append("codes", rows(0, 3), written_at=NOON)

    with pytest.raises((pa.ArrowInvalid, pa.ArrowNotImplementedError)):
        log.read("codes", where=pc.field("item_id") == "seven")

    assert part.is_file()


def test_a_damaged_seed_is_made_good_from_a_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = CodeLog(tmp_path)
    log.append("codes", rows(0, 3), written_at=NOON)
    damage(tmp_path / "codes" / SEED_PART, cut)

    assert log.read("codes").num_rows == 3
    assert CodeLog(tmp_path).schema("codes") == PLAIN
    assert caplog.text.count("offline_seed_damaged") == 1


def test_a_damaged_seed_on_a_read_only_mount_does_not_end_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    log.append("codes", rows(0, 3), written_at=NOON)
    damage(tmp_path / "codes" / SEED_PART, cut)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(code_log, "replace_file", refuse)

    assert log.read("codes").num_rows == 3


def test_a_damaged_seed_of_a_log_without_rows_is_an_error_that_names_it(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    log.create("codes", PLAIN)
    damage(tmp_path / "codes" / SEED_PART, empty)

    with pytest.raises(DataError, match=r"part-seed\.parquet is damaged"):
        log.read("codes")


def test_a_quarantined_part_stays_when_its_log_is_compacted_again(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    part = log.append("codes", rows(0, 3), written_at=NOON)
    damage(part, cut)
    log.read("codes")

    Compactor(log, clock=lambda: 1e12).compact(is_full=True)

    assert os.listdir(part.parent) == [f"{QUARANTINE_PREFIX}{part.name}"]


def test_the_command_line_compacts_and_lists_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qarm.yaml").write_text("compaction: {grace_seconds: 30}\n")
    (tmp_path / "feature_store.yaml").write_text(
        "project: p\nprovider: local\nregistry: registry.db\nentity_key_serialization_version: 3\n"
        "offline_store:\n  type: qarm_feast.offline_store.CodeLogOfflineStore\n  uri: offline\n"
    )
    log = CodeLog(tmp_path / "offline")
    parts = [log.append("codes", rows(n, 1), written_at=NOON) for n in range(4)]
    damage(parts[2], cut)
    options = ["--config", str(tmp_path / "qarm.yaml")]

    qarm.main(["offline", "compact", *options], standalone_mode=False)
    compacted = capsys.readouterr().out
    qarm.main(["offline", "status", *options], standalone_mode=False)
    shown = capsys.readouterr().out
    qarm.main(["offline", "compact", "--grace-seconds", "0", *options], standalone_mode=False)

    moved = parts[2].with_name(f"{QUARANTINE_PREFIX}{parts[2].name}")
    assert "num_merged_parts=3" in compacted
    assert shown.splitlines()[1].split()[:2] == ["codes", "1"]
    assert shown.splitlines()[1].split()[3] == "3"
    assert f"quarantined {moved}: CRC-32" in shown
    assert compacted.endswith(shown)
    assert "num_deleted_parts=3" in capsys.readouterr().out

import errno
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qarm_feast import schema
from qarm_feast.code_log import SEED_PART, CodeLog
from qarm_feast.compaction import CompactionRules, Compactor
from qarm_feast.errors import ConfigError, DataError

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
PLAIN = pa.schema(
    [
        ("item_id", pa.int64()),
        ("rq_code", schema.CODES),
        (schema.EVENT_TIMESTAMP, schema.TIMESTAMP),
    ]
)


def rows(*item_ids: int, time: datetime = NOON) -> pa.Table:
    columns = [list(item_ids), [[i, i + 1] for i in item_ids], [time] * len(item_ids)]
    return pa.table(columns, schema=PLAIN)


def test_an_appended_part_lies_under_the_day_of_writing_and_reads_back(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)

    part = log.append("codes", rows(1, 2), written_at=datetime(2026, 2, 1, 0, 30, tzinfo=UTC))

    assert part.parent == tmp_path / "codes" / "written_date=2026-02-01"
    assert log.read("codes").equals(rows(1, 2))


def test_a_created_log_without_appends_reads_as_an_empty_table_with_its_schema(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)

    log.create("codes", schema.CODE_ROWS)

    assert log.read("codes").num_rows == 0
    assert log.read("codes").schema == schema.CODE_ROWS


@pytest.mark.parametrize("num_rows", [1, 300_000])
def test_a_part_that_does_not_fit_on_the_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    log = CodeLog(tmp_path)
    log.append("codes", rows(1), written_at=NOON)

    def refuse(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qarm_feast.log_parts.os.write", refuse)
    monkeypatch.setattr(pq, "write_table", refuse)
    with pytest.raises(OSError, match="No space left"):
        log.append("codes", rows(*range(num_rows)), written_at=NOON)

    names = [path.name for path in (tmp_path / "codes" / "written_date=2026-01-31").iterdir()]
    assert len(names) == 1
    assert names[0].startswith("part-")


def test_reading_a_log_that_was_never_created_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no log at .*codes"):
        CodeLog(tmp_path).read("codes")


def test_rows_come_back_by_column_and_filter(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    log.append("codes", rows(1, 2))
    log.append("codes", rows(3))

    table = log.read("codes", columns=["item_id"], where=pc.field("item_id") > 1)

    assert table.column_names == ["item_id"]
    assert sorted(table["item_id"].to_pylist()) == [2, 3]


def test_an_append_that_dies_before_its_rename_leaves_nothing_for_any_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = CodeLog(tmp_path)
    log.append("codes", rows(1))

    def die(source: object, target: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr("qarm_feast.log_parts.os.replace", die)
    with pytest.raises(OSError, match="killed"):
        log.append("codes", rows(2))

    assert log.read("codes")["item_id"].to_pylist() == [1]
    assert len(log.parts("codes")) == 2


def test_nanosecond_times_are_kept_to_the_microsecond(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    log.create("codes", PLAIN)
    exact = NOON.replace(microsecond=123457)
    in_ns = rows(1, time=exact).cast(
        PLAIN.set(2, pa.field("event_timestamp", pa.timestamp("ns", "UTC")))
    )

    log.append("codes", in_ns)

    assert log.read("codes")["event_timestamp"].to_pylist() == [exact]
    assert log.read("codes").schema == PLAIN


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (rows(1).drop_columns(["rq_code"]), r"lack the columns \['rq_code'\]"),
        (rows(1).append_column("extra", pa.array([1])), r"unknown \['extra'\]"),
        (rows(1).set_column(0, "item_id", pa.array(["a"])), "item_id is string"),
        (rows(1).set_column(0, "item_id", pa.array([1.5])), "item_id is double"),
        (
            rows(1).set_column(2, "event_timestamp", pa.array([datetime(2026, 1, 1)])),
            "no time zone",
        ),
        (
            rows(1).set_column(2, "event_timestamp", pa.nulls(1, schema.TIMESTAMP)),
            "event_timestamp is null in 1 of 1",
        ),
    ],
)
def test_rows_that_do_not_fit_the_log_are_refused_whole(
    tmp_path: Path, table: pa.Table, message: str
) -> None:
    log = CodeLog(tmp_path)
    log.create("codes", PLAIN)

    with pytest.raises(DataError, match=message):
        log.append("codes", table)

    assert log.read("codes").num_rows == 0


def test_creating_a_log_again_with_other_columns_is_refused(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    log.create("codes", PLAIN)

    log.create("codes", PLAIN)
    with pytest.raises(DataError, match="move the folder away"):
        log.create("codes", schema.CODE_ROWS)


def test_many_writers_at_once_lose_no_row(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: CodeLog(tmp_path).append("codes", rows(i)), range(32)))

    log = CodeLog(tmp_path)
    assert sorted(log.read("codes")["item_id"].to_pylist()) == list(range(32))
    assert len(log.parts("codes")) == 33


def test_a_small_part_is_an_arrow_stream_and_a_large_one_parquet_that_other_tools_read(
    tmp_path: Path,
) -> None:
    log = CodeLog(tmp_path)

    small = log.append("codes", rows(1))
    large = log.append("codes", rows(*range(300_000)))

    with small.open("rb") as file:
        assert pa.ipc.open_stream(file).read_all().equals(rows(1))
    assert pq.read_table(large).num_rows == 300_000


def test_an_append_without_rows_and_one_of_many_chunks_read_back(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)

    log.append("codes", rows())
    log.append("codes", pa.concat_tables([rows(1), rows(2, 3), rows()]))

    assert log.read("codes")["item_id"].to_pylist() == [1, 2, 3]


def test_a_stream_whose_schema_is_spelt_otherwise_is_read(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    part = log.append("codes", rows(1))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, PLAIN.with_metadata({"written_by": "another"})) as writer:
        writer.write_table(rows(2).replace_schema_metadata({"written_by": "another"}))
    content = sink.getvalue().to_pybytes()
    name = f"part-{'a' * 32}-{zlib.crc32(content):08x}.arrow"
    part.with_name(name).write_bytes(content)

    assert sorted(log.read("codes")["item_id"].to_pylist()) == [1, 2]


def test_parts_of_older_releases_without_a_checksum_in_their_name_are_read(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    folder = log.append("codes", rows(1)).parent
    pq.write_table(rows(2), folder / f"part-{'a' * 32}.parquet")

    assert sorted(log.read("codes")["item_id"].to_pylist()) == [1, 2]


def test_the_seed_is_a_plain_parquet_file_that_other_tools_read(tmp_path: Path) -> None:
    CodeLog(tmp_path).create("codes", PLAIN)

    assert pq.read_schema(tmp_path / "codes" / SEED_PART) == PLAIN


def test_a_root_of_an_unknown_kind_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"scheme 's4'; write s3://BUCKET/PREFIX, or a path"):
        CodeLog("s4://bucket/offline")


def test_columns_with_a_dictionary_are_read_back(tmp_path: Path) -> None:
    log = CodeLog(tmp_path)
    for texts in (["x", "y", "x"], ["z"]):
        colors = pa.array(texts).dictionary_encode()
        log.append("codes", pa.table({"color": colors}), written_at=NOON)

    assert sorted(log.read("codes")["color"].to_pylist()) == ["x", "x", "y", "z"]


def test_a_log_read_some_parts_at_a_time_gives_every_row_and_leaves_damaged_parts_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qarm_feast.code_log._PARTS_PER_TABLE", 2)
    log = CodeLog(tmp_path)
    parts = [log.append("codes", rows(number)) for number in range(5)]
    parts[3].write_bytes(b"x")

    tables = list(log.tables("codes", ["item_id"]))

    assert sorted(pa.concat_tables(tables)["item_id"].to_pylist()) == [0, 1, 2, 4]
    assert max(table.num_rows for table in tables) == 2
    assert tables[0].column_names == ["item_id"]


def test_a_part_that_is_merged_while_others_are_read_is_read_in_the_merged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qarm_feast.code_log._PARTS_PER_TABLE", 1)
    log = CodeLog(tmp_path)
    for number in range(3):
        log.append("codes", rows(number))
    found: set[int] = set()

    for table in log.tables("codes", ["item_id"]):
        found |= set(table["item_id"].to_pylist())
        compactor = Compactor(log, CompactionRules(grace_seconds=0))
        compactor.compact(is_full=True)

    assert found == {0, 1, 2}

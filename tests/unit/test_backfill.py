"""Backfill against what the stream made of the same events."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from filelock import FileLock

from qarm_feast import backfill, backfill_parts, backfill_writer
from qarm_feast.backfill import backfill_codes
from qarm_feast.backfill_progress import progress_path
from qarm_feast.backfill_writer import BackfillCounts, PieceWriter
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook
from qarm_feast.codebook_cli import codebook_group
from qarm_feast.compaction import CompactionRules, Compactor
from qarm_feast.encode import content_hashes
from qarm_feast.errors import (
    CodebookError,
    CodebookNotFoundError,
    ConfigError,
    ContractError,
    DataError,
    ServiceUnavailableError,
)
from qarm_feast.registry import VersionState
from qarm_feast.schema import CODE_ROWS, CONTENT_LOG
from streaming.messages import ItemEvent
from tests.backfill_repo import (
    TOPIC,
    WRITTEN,
    LoggedStream,
    TitleEncoder,
    code_log,
    newest,
    offline_rows,
    online_codes,
    save_vector_encoder,
    takedown,
    upload,
    write_catalogue,
    write_online,
)
from tests.stream_repo import EMBEDDING_DIM, START, StreamRepo, build_repo, publish_codebook

VIEW = "item_codes_v2"
LATER = START + 60_000_000


class KilledError(Exception):
    """Stands for a SIGKILL at one place."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> StreamRepo:
    """Codebooks v1 and v2 of encoder e1 and v3 of e2, views applied."""
    directory = tmp_path_factory.mktemp("backfill") / "repo"
    repo = build_repo(directory, {"data": {"input_dir": "data/input"}})
    publish_codebook(directory, "v2", seed=1)
    publish_codebook(directory, "v3", seed=2, encoder_version="e2")
    repo.apply()
    return repo


@pytest.fixture
def repo(template: StreamRepo, tmp_path: Path) -> StreamRepo:
    shutil.copytree(template.directory, tmp_path / "repo")
    return StreamRepo(tmp_path / "repo", template.codebook)


@pytest.fixture
def stream(repo: StreamRepo) -> LoggedStream:
    uri = str(repo.directory / "data" / "codebooks")
    return LoggedStream(repo, {name: Codebook.load(uri, name) for name in ("v1", "v2")})


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece per part of the log."""
    monkeypatch.setattr(backfill_parts, "SMALL_PARTS_BYTES", 1)


def _log_three_parts(stream: LoggedStream) -> None:
    """Uploads, an edit, a replay of an upload, a takedown."""
    stream.log(upload(1), upload(2), upload(3))
    stream.log(upload(2, minute=5), upload(1), partition=1)
    stream.log(takedown(3, minute=7), upload(4, minute=1))


def _num_parts(repo: StreamRepo) -> int:
    log = code_log(repo)
    return len(log.row_parts(VIEW)) if log.exists(VIEW) else 0


def test_backfilled_rows_are_those_of_the_stream_bit_for_bit_at_the_events_own_times(
    stream: LoggedStream,
) -> None:
    _log_three_parts(stream)

    counts = backfill_codes(stream.repo.config_path, "v2")

    expected = stream.rows("v2")
    assert offline_rows(stream.repo, "v2") == expected
    assert len(expected) == 6
    assert online_codes(stream.repo, "v2", 1, 2, 3, 4) == newest(expected)
    assert (counts.num_requantized, counts.num_deleted, counts.num_reencoded) == (5, 1, 0)


def test_a_takedown_is_carried_over_as_a_deleted_row_that_keeps_older_rows_out(
    stream: LoggedStream,
) -> None:
    stream.log(upload(3))
    stream.log(takedown(3, minute=7))

    backfill_codes(stream.repo.config_path, "v2")
    late = pc.equal(stream.codes["v2"][0]["item_id"], 3)
    write_online(stream.repo, "v2", stream.codes["v2"][0].filter(late))

    assert online_codes(stream.repo, "v2", 3) == {3: None}
    deleted = [row for row in offline_rows(stream.repo, "v2").values() if row["is_deleted"]]
    assert [row["rq_code"] for row in deleted] == [[-1, -1]]


@pytest.mark.parametrize("streamed_first", [True, False])
def test_a_newer_streamed_row_wins_online_whoever_writes_first(
    stream: LoggedStream, streamed_first: bool
) -> None:
    stream.log(upload(1))
    newer = LoggedStream(stream.repo, stream.codebooks, next_offsets={0: 1})
    newer.log(upload(1, minute=9))
    steps: list[Callable[[], object]] = [
        lambda: write_online(stream.repo, "v2", newer.codes["v2"][0]),
        lambda: backfill_codes(stream.repo.config_path, "v2", up_to={(TOPIC, 0): 1}),
    ]

    for step in steps if streamed_first else reversed(steps):
        step()

    assert online_codes(stream.repo, "v2", 1) == newest(newer.rows("v2"))
    assert newest(newer.rows("v2")) != newest(stream.rows("v2"))


def test_events_without_a_vector_of_the_encoder_are_encoded_from_content_or_told_by_reason(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        backfill_writer, "load_encoder", lambda uri, version, media_dir: TitleEncoder()
    )
    stream.log(upload(1, title="mug"), upload(2), upload(3), takedown(4, minute=1))
    both = LoggedStream(stream.repo, {"v3": _codebook(stream.repo, "v3")})
    both.next_offsets[0] = 4
    both.log(ItemEvent(5, START, {"title": "lamp"}))

    with caplog.at_level("WARNING"):
        counts = backfill_codes(stream.repo.config_path, "v3")

    rows = offline_rows(stream.repo, "v3")
    assert sorted(key[0] for key in rows) == [1, 4, 5]
    assert {row["encoder_version"] for row in rows.values()} == {"e2"}
    assert {k: v for k, v in rows.items() if k[0] == 5} == both.rows("v3")
    assert (counts.num_reencoded, counts.num_requantized, counts.num_deleted) == (1, 1, 1)
    assert counts.num_refused == {"encoder_mismatch": 2}
    assert "reason=encoder_mismatch count=2 first_item_id=2" in caplog.text


def test_up_to_is_exclusive_and_a_source_that_it_does_not_name_is_read_to_its_end(
    stream: LoggedStream,
) -> None:
    stream.log(upload(1), upload(2), upload(3))
    stream.log(upload(4), partition=1)

    backfill_codes(stream.repo.config_path, "v2", up_to={(TOPIC, 0): 2, (TOPIC, 7): 0})
    first = sorted(key[0] for key in offline_rows(stream.repo, "v2"))
    counts = backfill_codes(stream.repo.config_path, "v2")

    assert first == [1, 2, 4]
    assert counts.num_log_rows == counts.num_requantized == 1
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_rows_of_unknown_source_are_filled_whenever_they_are_logged(stream: LoggedStream) -> None:
    """A part that no worker has written, like one of an import, names no topic."""
    log = code_log(stream.repo)
    for number in (1, 2):
        part = stream.log(upload(number))
        rows = log.read(CONTENT_LOG, where=pc.field("item_id") == number)
        for name in ("topic", "partition", "offset"):
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, name, pa.nulls(rows.num_rows, rows.schema.types[place]))
        part.unlink()
        log.append(CONTENT_LOG, rows, written_at=WRITTEN)
        backfill_codes(stream.repo.config_path, "v2")

    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_a_finished_backfill_writes_nothing_again_and_loads_no_codebook(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log_three_parts(stream)
    write_catalogue(stream.repo, item_id=[1], title=["mug"])
    backfill_codes(stream.repo.config_path, "v2", up_to={(TOPIC, 1): 1})
    backfill_codes(stream.repo.config_path, "v2")
    num_parts = _num_parts(stream.repo)
    Compactor(code_log(stream.repo)).compact(is_full=True)
    merged = _num_parts(stream.repo)
    monkeypatch.delattr(Codebook, "load")

    counts = backfill_codes(stream.repo.config_path, "v2")

    assert counts == BackfillCounts()
    assert _num_parts(stream.repo) == merged < num_parts


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("place", ["read", "offline", "online", "note"])
def test_a_killed_backfill_goes_on_behind_the_last_noted_piece_and_gives_the_same(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    _log_three_parts(stream)
    with monkeypatch.context() as patched:
        _kill_at_second_call(patched, place)
        with pytest.raises(KilledError):
            backfill_codes(stream.repo.config_path, "v2")
    noted = json.loads(progress_path(code_log(stream.repo).root, "v2").read_text())["done"]

    counts = backfill_codes(stream.repo.config_path, "v2")

    assert len(noted) == 1
    assert counts.num_pieces == 2
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")
    assert online_codes(stream.repo, "v2", 1, 2, 3, 4) == newest(stream.rows("v2"))


@pytest.mark.usefixtures("small_pieces")
def test_a_compaction_between_a_kill_and_its_resumption_loses_nothing(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log_three_parts(stream)
    with monkeypatch.context() as patched:
        _kill_at_second_call(patched, "read")
        with pytest.raises(KilledError):
            backfill_codes(stream.repo.config_path, "v2")
    Compactor(code_log(stream.repo)).compact(is_full=True)

    counts = backfill_codes(stream.repo.config_path, "v2")

    assert counts.num_pieces == 1
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


@pytest.mark.usefixtures("small_pieces")
def test_parts_that_a_compaction_takes_away_during_a_backfill_are_read_where_they_are_now(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log_three_parts(stream)
    write, log = PieceWriter.write, code_log(stream.repo)
    rules = CompactionRules(grace_seconds=0)

    def write_and_compact(writer: PieceWriter, piece: backfill_writer.Piece) -> object:
        result = write(writer, piece)
        Compactor(log, rules).compact(is_full=True)
        Compactor(log, rules).compact(is_full=True)
        return result

    monkeypatch.setattr(PieceWriter, "write", write_and_compact)

    backfill_codes(stream.repo.config_path, "v2")

    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


@pytest.mark.usefixtures("small_pieces")
def test_a_row_is_created_when_its_piece_is_written_not_when_the_backfill_began(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    _log_three_parts(stream)
    write, starts = PieceWriter.write, []

    def write_and_note(writer: PieceWriter, piece: backfill_writer.Piece) -> object:
        starts.append(datetime.now(UTC))
        return write(writer, piece)

    monkeypatch.setattr(PieceWriter, "write", write_and_note)

    backfill_codes(stream.repo.config_path, "v2")

    created = sorted(set(code_log(stream.repo).read(VIEW)["created"].to_pylist()))
    assert len(created) == len(starts) == 3
    assert all(start <= time for start, time in zip(starts, created, strict=True))
    assert all(time <= start for start, time in zip(starts[1:], created, strict=False))


def test_progress_of_rows_that_are_gone_does_not_count(stream: LoggedStream) -> None:
    stream.log(upload(1))
    backfill_codes(stream.repo.config_path, "v2")
    shutil.rmtree(code_log(stream.repo).root / VIEW)

    backfill_codes(stream.repo.config_path, "v2")

    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_progress_of_rows_that_are_gone_does_not_count_after_a_kill_either(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.log(upload(1))
    backfill_codes(stream.repo.config_path, "v2")
    shutil.rmtree(code_log(stream.repo).root / VIEW)

    def kill(writer: PieceWriter, piece: backfill_writer.Piece) -> object:
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(PieceWriter, "write", kill)
        with pytest.raises(KilledError):
            backfill_codes(stream.repo.config_path, "v2")
    backfill_codes(stream.repo.config_path, "v2")

    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_a_part_that_a_listing_missed_while_it_was_written_is_filled_nevertheless(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan of a folder may show the second of two parts that are written meanwhile only."""
    missed = str(stream.log(upload(1)))
    stream.log(upload(2))
    row_parts, listings = CodeLog.row_parts, []

    def miss_once(log: CodeLog, name: str) -> list[str]:
        listings.append(name)
        found = row_parts(log, name)
        return [path for path in found if path != missed] if len(listings) == 1 else found

    monkeypatch.setattr(CodeLog, "row_parts", miss_once)

    backfill_codes(stream.repo.config_path, "v2")
    backfill_codes(stream.repo.config_path, "v2")

    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_a_damaged_part_is_quarantined_the_rest_is_filled_and_a_mended_one_is_filled_later(
    stream: LoggedStream,
) -> None:
    stream.log(upload(1))
    part = stream.log(upload(2))
    sound = part.read_bytes()
    part.write_bytes(sound[:-20] + b"x" * 20)

    counts = backfill_codes(stream.repo.config_path, "v2")
    filled = sorted(key[0] for key in offline_rows(stream.repo, "v2"))
    part.write_bytes(sound)
    backfill_codes(stream.repo.config_path, "v2")

    assert counts.num_damaged_parts == 1
    assert filled == [1]
    assert (part.parent / f".quarantined-{part.name}").is_file()
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_a_part_that_was_put_into_quarantine_before_a_backfill_is_told_and_filled_later(
    stream: LoggedStream,
) -> None:
    part = stream.log(upload(1))
    stream.log(upload(2))
    part.rename(part.parent / f".quarantined-{part.name}")

    counts = backfill_codes(stream.repo.config_path, "v2")
    (part.parent / f".quarantined-{part.name}").rename(part)
    mended = backfill_codes(stream.repo.config_path, "v2")
    again = backfill_codes(stream.repo.config_path, "v2")

    assert counts.num_damaged_parts == 1
    assert mended.num_damaged_parts == 0
    assert again == BackfillCounts()
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_of_a_large_part_that_comes_back_mended_the_damaged_row_group_is_filled(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qarm_feast.log_parts.LARGE_TABLE_BYTES", 1000)
    monkeypatch.setattr("qarm_feast.log_parts.ROWS_PER_GROUP", 4)
    part = stream.log(*[upload(number) for number in range(8)])
    sound = part.read_bytes()
    second = pq.read_metadata(part).row_group(1)
    columns = {second.column(n).path_in_schema: second.column(n) for n in range(11)}
    place = columns["content_hash"].data_page_offset + 60
    part.write_bytes(sound[:place] + b"xxxx" + sound[place + 4 :])

    backfill_codes(stream.repo.config_path, "v2")
    filled = sorted(key[0] for key in offline_rows(stream.repo, "v2"))
    part.write_bytes(sound)
    counts = backfill_codes(stream.repo.config_path, "v2")

    assert filled == [0, 1, 2, 3]
    assert (counts.num_pieces, counts.num_log_rows) == (1, 4)
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_large_parts_are_cut_by_row_group_and_small_ones_are_read_together(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qarm_feast.log_parts.LARGE_TABLE_BYTES", 1000)
    monkeypatch.setattr("qarm_feast.log_parts.ROWS_PER_GROUP", 4)
    stream.log(upload(100))
    stream.log(*[upload(number) for number in range(10)])
    stream.log(upload(101))

    counts = backfill_codes(stream.repo.config_path, "v2")

    # 4 + 4 + 2 rows of the large part, and both small ones.
    assert counts.num_pieces == 4
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_catalogue_items_get_a_row_at_their_upload_unless_an_event_of_that_time_has_one(
    repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        backfill_writer, "load_encoder", lambda uri, version, media_dir: TitleEncoder()
    )
    monkeypatch.setattr(backfill_parts, "CATALOGUE_ROWS", 2)
    streamed = LoggedStream(repo, {"v3": _codebook(repo, "v3")})
    streamed.log(ItemEvent(1, START, {"title": "as streamed"}))
    streamed.log(ItemEvent(2, LATER, {"title": "edited"}))
    write_catalogue(
        repo, item_id=[5, 4, 3, 2, 1], title=["cup", "", None, "first", "in the catalogue"]
    )

    counts = backfill_codes(repo.config_path, "v3")

    rows = offline_rows(repo, "v3")
    assert sorted((item, time) for item, time, _ in rows) == [
        (1, START), (2, START), (2, LATER), (4, START), (5, START),
    ]  # fmt: skip
    streamed_rows = streamed.rows("v3")
    assert {key: rows[key] for key in streamed_rows} == streamed_rows
    assert online_codes(repo, "v3", 1, 2) == newest(streamed_rows)
    assert (counts.num_catalogue_rows, counts.num_reencoded, counts.num_requantized) == (4, 3, 2)
    assert counts.num_refused == {"encoder_mismatch": 1}


def test_an_item_of_the_catalogue_that_was_taken_down_stays_away(
    repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its upload is written offline, where joins as of that time find it."""
    monkeypatch.setattr(
        backfill_writer, "load_encoder", lambda uri, version, media_dir: TitleEncoder()
    )
    streamed = LoggedStream(repo, {"v3": _codebook(repo, "v3")})
    streamed.log(takedown(1, minute=7), takedown(2, minute=7))
    [codes] = streamed.codes["v3"]
    write_online(repo, "v3", codes.slice(1))
    write_catalogue(repo, item_id=[1, 2, 3], title=["mug", "cup", "jar"])

    # The takedown of item 2 is left to the worker, which has written it by now.
    backfill_codes(repo.config_path, "v3", up_to={(TOPIC, 0): 1})

    written = sorted((item, time) for item, time, _ in offline_rows(repo, "v3"))
    assert written == [(1, START), (1, START + 7 * 60_000_000), (2, START), (3, START)]
    codes_of = online_codes(repo, "v3", 1, 2, 3)
    assert (codes_of[1], codes_of[2]) == (None, None)
    assert codes_of[3] is not None


def test_catalogue_rows_are_those_that_the_stream_makes_of_the_same_content(
    repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        backfill_writer, "load_encoder", lambda uri, version, media_dir: TitleEncoder()
    )
    titles = ["cup", "lamp", "tablecloth"]
    write_catalogue(repo, item_id=[1, 2, 3], title=pa.array(titles).dictionary_encode())

    backfill_codes(repo.config_path, "v3")

    streamed = LoggedStream(repo, {"v3": _codebook(repo, "v3")})
    streamed.log(*[ItemEvent(n, START, {"title": t}) for n, t in enumerate(titles, start=1)])
    assert offline_rows(repo, "v3") == streamed.rows("v3")


def test_an_encoder_of_ready_vectors_reads_those_of_the_catalogue(repo: StreamRepo) -> None:
    encoder = save_vector_encoder(repo.directory / "data" / "encoders")
    x_NW = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x_NW.ravel()), 5)
    write_catalogue(repo, item_id=[7, 8, 9], embedding=embedding)

    counts = backfill_codes(repo.config_path, "v3")

    items = pa.table({"embedding": embedding})
    codes = _codebook(repo, "v3").encode(
        np.array([7, 8, 9]), content_hashes(items), encoder.encode(items)
    )
    assert online_codes(repo, "v3", 7, 8, 9) == dict(
        zip([7, 8, 9], codes.rq_NL.tolist(), strict=True)
    )
    assert (counts.num_catalogue_rows, counts.num_reencoded) == (3, 3)


def test_wrong_types_in_the_catalogue_are_refused_before_anything_is_written(
    stream: LoggedStream,
) -> None:
    stream.log(upload(1))
    write_catalogue(stream.repo, item_id=pa.array([1], pa.int32()), title=pa.array([7]))

    with pytest.raises(ContractError, match=r"item_id.*int32.*int64[\s\S]*title.*int64.*string"):
        backfill_codes(stream.repo.config_path, "v2")

    assert _num_parts(stream.repo) == 0


def test_a_catalogue_whose_pages_are_damaged_is_named_with_the_row_group(
    repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("Couldn't deserialize thrift")

    write_catalogue(repo, item_id=[1], title=["mug"])
    monkeypatch.setattr(backfill_writer, "read_catalogue_piece", fail)

    with pytest.raises(DataError, match=r"row group 0 of .*items\.parquet cannot be read.*thrift"):
        backfill_codes(repo.config_path, "v3")


def test_vectors_of_the_catalogue_that_are_no_numbers_are_refused(
    repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = np.arange(3 * EMBEDDING_DIM, dtype=np.float32)
    flat[EMBEDDING_DIM] = np.nan
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), EMBEDDING_DIM)
    path = write_catalogue(repo, item_id=[1, 2, 3], embedding=embedding)

    with pytest.raises(DataError, match=rf"{path}.*1 vector.*row group 0.*item 2.*check-data"):
        backfill_codes(repo.config_path, "v3")


def test_a_missing_encoder_is_told_with_what_needs_it(stream: LoggedStream) -> None:
    stream.log(upload(1, title="mug"))

    with pytest.raises(
        DataError, match=r"codebook 'v3'.*no encoder at .*e2; run `qarm align train`"
    ):
        backfill_codes(stream.repo.config_path, "v3")


@pytest.mark.parametrize(
    ("up_to", "words"),
    [
        ({("clicks", 0): 5}, r"--up-to clicks:0:5: no such topic.*'item-events'.*item-events:0"),
        ({(TOPIC, 0): -1}, r"--up-to item-events:0:-1: an offset is 0 or more"),
    ],
)
def test_bounds_that_can_mean_nothing_are_refused(
    stream: LoggedStream, up_to: dict[tuple[str, int], int], words: str
) -> None:
    stream.log(upload(1))

    with pytest.raises(ConfigError, match=words):
        backfill_codes(stream.repo.config_path, "v2", up_to=up_to)


@pytest.mark.parametrize("source", [f"{TOPIC}:3", "clicks:0"])
def test_the_command_refuses_topics_and_partitions_of_which_nothing_is_logged(
    stream: LoggedStream, source: str
) -> None:
    stream.log(upload(1))
    options = ["--config", str(stream.repo.config_path), "--codebook-version", "v2"]

    result = CliRunner().invoke(codebook_group, ["backfill", *options, "--up-to", f"{source}:5"])

    assert isinstance(result.exception, ConfigError)
    assert f"--up-to {source}: no event of that topic" in str(result.exception)
    assert "holds those of item-events:0" in str(result.exception)
    assert _num_parts(stream.repo) == 0


def test_a_bound_of_a_partition_whose_events_were_all_refused_is_told_and_not_needed(
    stream: LoggedStream, caplog: pytest.LogCaptureFixture
) -> None:
    stream.log(upload(1))

    with caplog.at_level("WARNING"):
        backfill_codes(stream.repo.config_path, "v2", up_to={(TOPIC, 7): 5})

    assert "backfill_bound_unused up_to=item-events:7:5" in caplog.text
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")


def test_a_log_with_other_columns_is_refused(stream: LoggedStream) -> None:
    code_log(stream.repo).create(CONTENT_LOG, CODE_ROWS)

    with pytest.raises(DataError, match="has the columns item_id int64, rq_code"):
        backfill_codes(stream.repo.config_path, "v2")


def test_versions_that_nothing_reads_are_refused(stream: LoggedStream) -> None:
    stream.log(upload(1))
    stream.repo.registry.set_state("v2", VersionState.RETIRED)

    with pytest.raises(CodebookNotFoundError, match="'v9'"):
        backfill_codes(stream.repo.config_path, "v9")
    with pytest.raises(CodebookError, match=r"'v2' is retired.*v1, v3.*qarm codebook list"):
        backfill_codes(stream.repo.config_path, "v2")


def test_a_view_that_is_not_applied_is_refused(stream: LoggedStream) -> None:
    stream.log(upload(1))
    publish_codebook(stream.repo.directory, "v4")

    with pytest.raises(ConfigError, match=r"item_codes_v4.*apply"):
        backfill_codes(stream.repo.config_path, "v4")


def test_nothing_to_read_is_an_error_that_names_both_places(repo: StreamRepo) -> None:
    with pytest.raises(DataError, match=r"item_content_log nor .*items\.parquet is there"):
        backfill_codes(repo.config_path, "v2")


def test_a_version_that_is_retired_and_dropped_meanwhile_keeps_no_rows_online(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream.log(upload(1))
    write = PieceWriter.write

    def write_then_drop(writer: PieceWriter, piece: backfill_writer.Piece) -> object:
        result = write(writer, piece)
        stream.repo.registry.set_state("v2", VersionState.RETIRED)
        stream.repo.apply()
        return result

    monkeypatch.setattr(PieceWriter, "write", write_then_drop)

    with caplog.at_level("WARNING"), pytest.raises(CodebookError, match="'v2' is retired"):
        backfill_codes(stream.repo.config_path, "v2")

    assert f"rows_taken_back view={VIEW}" in caplog.text


def test_two_backfills_of_one_version_do_not_run_at_once(stream: LoggedStream) -> None:
    stream.log(upload(1))
    path = progress_path(code_log(stream.repo).root, "v2")
    path.parent.mkdir()

    with (
        FileLock(path.with_suffix(".lock")),
        pytest.raises(ServiceUnavailableError, match="another process is filling item_codes_v2"),
    ):
        backfill_codes(stream.repo.config_path, "v2")


def test_damaged_progress_is_an_error_that_says_what_to_do(stream: LoggedStream) -> None:
    stream.log(upload(1))
    path = progress_path(code_log(stream.repo).root, "v2")
    path.parent.mkdir()
    path.write_text('{"done": 7}')

    with pytest.raises(DataError, match=rf"{path} is no progress[\s\S]*remove it and run"):
        backfill_codes(stream.repo.config_path, "v2")


def test_progress_lines_tell_share_and_speed(
    stream: LoggedStream, caplog: pytest.LogCaptureFixture
) -> None:
    stream.log(upload(1), upload(2))

    with caplog.at_level("INFO"):
        backfill_codes(stream.repo.config_path, "v2")

    assert "source=log share_done=1.000 items=2 items_per_second=" in caplog.text
    assert "backfill_done codebook_version=v2" in caplog.text


def test_the_command_fills_a_version_and_prints_what_it_did(stream: LoggedStream) -> None:
    _log_three_parts(stream)
    options = ["--config", str(stream.repo.config_path), "--codebook-version", "v2"]

    result = CliRunner().invoke(
        codebook_group,
        ["backfill", *options, "--up-to", f"{TOPIC}:0:3", "--up-to", f"{TOPIC}:1:1"],
        catch_exceptions=False,
    )

    assert result.output.splitlines()[-1] == (
        "backfilled v2: 4 rows of codes (4 from stored vectors, 0 from content, 0 takedowns), "
        "3 newer than what was online"
    )


@pytest.mark.parametrize("text", ["items", "items:x:1", "items:1", ":0:1", "items:0:-1"])
def test_a_bound_of_another_form_is_a_usage_error(repo: StreamRepo, text: str) -> None:
    options = ["--config", str(repo.config_path), "--codebook-version", "v2", "--up-to", text]

    result = CliRunner().invoke(codebook_group, ["backfill", *options])

    assert result.exit_code == 2
    assert f"'{text}' is not TOPIC:PARTITION:OFFSET" in result.output


def _codebook(repo: StreamRepo, version: str) -> Codebook:
    return Codebook.load(str(repo.directory / "data" / "codebooks"), version)


def _kill_at_second_call(patched: pytest.MonkeyPatch, place: str) -> None:
    """End the process, as it were, in front of the second read, write or note."""
    owner, name = {
        "read": (backfill_writer, "read_log_piece"),
        "offline": (backfill_writer.open_code_log.__globals__["CodeLog"], "append"),
        "online": (backfill_writer.FeastOnlineTables, "write"),
        "note": (backfill.BackfillProgress, "add"),
    }[place]
    original, calls = getattr(owner, name), []

    def die_at_second(*args: object, **options: object) -> object:
        calls.append(place)
        if len(calls) == 2:
            raise KilledError
        return original(*args, **options)

    patched.setattr(owner, name, die_at_second)

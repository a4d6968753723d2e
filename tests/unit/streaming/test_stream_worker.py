import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from kafka.structs import TopicPartition
from stream_fakes import (
    NOW,
    FakeRecord,
    FixedCodebooks,
    SignCodebook,
    TitleEncoder,
    record_of,
)

from qarm_feast.codebook import ItemCodes
from qarm_feast.errors import ConfigError, GpuLostError, ServiceUnavailableError
from qarm_feast.item_vectors import decode_vectors
from qarm_feast.observability import STREAM_EVENTS
from streaming.columns import DeadLetter
from streaming.health import WorkerHealth
from streaming.limits import EventLimits
from streaming.messages import (
    InteractionEvent,
    ItemEvent,
    Record,
    UserErasure,
    encode_interaction_event,
    encode_item_event,
    encode_user_erasure,
)
from streaming.pieces import JSON_GROWTH
from streaming.rows import LiveCodebooks
from streaming.sink import BatchRows
from streaming.source import Batch, BatchRevokedError
from streaming.worker import (
    Drain,
    DrainTimeoutError,
    Pipeline,
    StreamWorker,
    WorkerSettings,
)

SETTINGS = WorkerSettings("items", ("is_like", "is_love"), "is_love", max_retry_wait_seconds=0.001)
PARTITION = TopicPartition("items", 0)


class KilledError(Exception):
    """Stands for a SIGKILL at one place."""


class FakeParts:
    """Source, sink and dead letters that write down every call, and fail where they are told."""

    is_joined = True

    def __init__(self, records: Sequence[Record], faults: dict[str, list[Exception]]) -> None:
        self.batch = Batch(records, {PARTITION: len(records)}, assignment_number=1)
        self.faults = faults
        self.calls: list[str] = []
        self.rows: BatchRows | None = None
        self.letters: list[DeadLetter] = []
        self.announced: list[list[str]] = []

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.faults.get(call):
            raise self.faults[call].pop(0)

    def read(self) -> Batch:
        self._note("read")
        return self.batch

    def keep_alive(self, batch: Batch) -> None:
        if self.faults.get("keep_alive"):
            raise self.faults["keep_alive"].pop(0)

    def acknowledged(self) -> frozenset[str]:
        if self.faults.get("acknowledged"):
            raise self.faults["acknowledged"].pop(0)
        return frozenset()

    def announce(self, batch: Batch, versions: Iterable[str]) -> None:
        self.announced.append(list(versions))

    def commit(self, batch: Batch) -> None:
        self._note("commit")

    def write_offline(self, rows: BatchRows) -> None:
        self._note("write_offline")
        self.rows = rows

    def write_online(self, rows: BatchRows) -> None:
        self._note("write_online")

    def take_back(self, versions: Iterable[str], encoder_versions: Iterable[str]) -> None:
        self._note(f"take_back {','.join([*versions, *encoder_versions])}")

    def send(self, letters: Sequence[DeadLetter]) -> None:
        self._note("send")
        self.letters += letters


def _codebooks(*versions: str) -> FixedCodebooks:
    codebooks = {version: SignCodebook("e1") for version in versions}
    return FixedCodebooks(LiveCodebooks(codebooks, lambda version: TitleEncoder()))


def _worker(
    parts: FakeParts,
    drain: Drain | None = None,
    codebooks: FixedCodebooks | None = None,
    limits: EventLimits = SETTINGS.limits,
) -> StreamWorker:
    return StreamWorker(
        Pipeline(parts, parts, parts, codebooks or _codebooks("v1")),
        replace(SETTINGS, limits=limits),
        WorkerHealth(),
        drain or Drain(timeout_seconds=0.0),
        clock=lambda: datetime(2024, 1, 1, tzinfo=UTC),
    )


def _records() -> list[FakeRecord]:
    liked = InteractionEvent(7, 1, NOW, (True, False))
    loved = InteractionEvent(7, 2, NOW, (True, True))
    return [
        record_of(encode_item_event(ItemEvent(1, NOW, {"title": "Mug"}))),
        FakeRecord(b"2", b"{"),
        *[
            record_of(encode_interaction_event(event, SETTINGS.task_names), topic="interactions")
            for event in (liked, loved)
        ],
    ]


def test_steps_run_in_the_order_of_the_docstring() -> None:
    parts = FakeParts(_records(), {})

    _worker(parts).handle(parts.batch)

    assert parts.calls == ["write_offline", "write_online", "send", "commit"]
    assert parts.rows is not None
    assert parts.rows.codes["v1"]["rq_code"].to_pylist() == [[1, 0]]
    assert parts.rows.content["item_id"].to_pylist() == [1]
    assert parts.rows.interactions["item_id"].to_pylist() == [1, 2]
    assert parts.rows.positives["item_id"].to_pylist() == [2]
    assert [letter.reason for letter in parts.letters] == ["undecodable"]


def test_vectors_are_written_where_a_ranker_reads_them_once_per_encoder() -> None:
    parts = FakeParts(_records(), {})
    worker = StreamWorker(
        Pipeline(parts, parts, parts, _codebooks("v1", "v2")),
        replace(SETTINGS, enable_vectors=True),
        WorkerHealth(),
        Drain(timeout_seconds=0.0),
    )

    worker.handle(parts.batch)

    assert parts.rows is not None
    assert list(parts.rows.vectors) == ["e1"]
    assert parts.rows.vectors["e1"]["item_id"].to_pylist() == [1]
    # The vector of "Mug" is (3, -1).
    (stored,) = parts.rows.vectors["e1"]["embedding"].to_pylist()
    assert decode_vectors([stored], 2, "x").tolist() == [
        pytest.approx([3 / 10**0.5, -1 / 10**0.5], abs=2**-11)
    ]


def test_an_encoders_vectors_are_left_out_with_its_last_codebook() -> None:
    codebooks = _codebooks("v1", "v2")
    parts = FakeParts(_records(), {})
    worker = StreamWorker(
        Pipeline(parts, parts, parts, codebooks),
        replace(SETTINGS, enable_vectors=True),
        WorkerHealth(),
        Drain(timeout_seconds=0.0),
    )
    kept = []
    for stopped in ({"v1"}, {"v1", "v2"}):
        codebooks.stopped_versions = stopped
        worker.handle(parts.batch)
        assert parts.rows is not None
        kept.append((list(parts.rows.codes), list(parts.rows.vectors)))

    assert kept == [(["v2"], ["e1"]), ([], [])]


def test_a_batch_that_unpacks_to_too_much_is_stored_in_pieces_and_committed_once() -> None:
    records = [
        record_of(encode_item_event(ItemEvent(item_id, NOW, {"title": "a" * 1000})))
        for item_id in (1, 2, 3)
    ]
    size = JSON_GROWTH * len(records[0].value or b"")
    parts = FakeParts([*records, FakeRecord(b"4", b"{")], {})
    worker = _worker(parts, limits=EventLimits(max_decoded_bytes=2 * size))
    counted = STREAM_EVENTS.labels("item")._value.get()

    worker.handle(parts.batch)

    writes = ["write_offline", "write_online"]
    assert parts.calls == [*writes, *writes, "send", "commit"]
    assert parts.rows is not None
    assert parts.rows.content["item_id"].to_pylist() == [3]
    assert STREAM_EVENTS.labels("item")._value.get() == counted + 3


def test_a_batch_that_is_revoked_between_two_pieces_is_not_committed() -> None:
    records = _records()
    parts = FakeParts(records, {"write_online": [BatchRevokedError("revoked")]})
    worker = _worker(parts, limits=EventLimits(max_decoded_bytes=1))
    counted = STREAM_EVENTS.labels("item")._value.get()

    worker.handle(parts.batch)

    assert parts.calls == ["write_offline", "write_online"]
    assert STREAM_EVENTS.labels("item")._value.get() == counted


def test_an_erasure_goes_to_the_stores_with_its_batch_and_is_counted() -> None:
    erasure = record_of(encode_user_erasure(UserErasure(8, NOW)), topic="interactions")
    parts = FakeParts([*_records(), erasure], {})
    counted = STREAM_EVENTS.labels("erasure")._value.get()

    _worker(parts).handle(parts.batch)

    assert parts.rows is not None
    assert parts.rows.erasures["user_id"].to_pylist() == [8]
    assert parts.rows.erasures["event_timestamp"].cast(pa.int64()).to_pylist() == [NOW]
    assert parts.rows.interactions.num_rows == 2
    assert STREAM_EVENTS.labels("erasure")._value.get() == counted + 1


@pytest.mark.parametrize("step", ["write_offline", "write_online", "send"])
def test_a_worker_killed_in_a_step_has_not_committed_and_a_replay_completes(step: str) -> None:
    parts = FakeParts(_records(), {step: [KilledError()]})

    with pytest.raises(KilledError):
        _worker(parts).handle(parts.batch)
    assert "commit" not in parts.calls
    first = parts.rows
    _worker(parts).handle(parts.batch)

    assert parts.calls[-4:] == ["write_offline", "write_online", "send", "commit"]
    if first is not None:
        assert parts.rows is not None
        assert parts.rows.codes["v1"].equals(first.codes["v1"])


@pytest.mark.parametrize("step", ["write_offline", "write_online", "send"])
def test_a_store_that_is_away_is_tried_again_until_it_is_back(step: str) -> None:
    faults = [ServiceUnavailableError("away"), OSError(28, "disk full")]
    parts = FakeParts(_records(), {step: faults})

    _worker(parts).handle(parts.batch)

    assert parts.calls.count(step) == 3
    assert parts.calls[-1] == "commit"


def test_a_lost_gpu_turns_readiness_off_and_nothing_is_written_or_committed() -> None:
    class LostCodebook(SignCodebook):
        def encode(self, *_: object) -> ItemCodes:
            raise GpuLostError("GPU 0 failed")

    live = LiveCodebooks({"v1": LostCodebook("e1")}, lambda version: TitleEncoder())
    parts, health = FakeParts(_records(), {}), WorkerHealth()
    pipeline = Pipeline(parts, parts, parts, FixedCodebooks(live))
    worker = StreamWorker(pipeline, SETTINGS, health, Drain(timeout_seconds=0.0))
    health.set_ready()

    with pytest.raises(GpuLostError):
        worker.handle(parts.batch)

    assert health.not_ready_reason() == "GPU 0 failed"
    assert parts.calls == []


def test_a_batch_revoked_during_an_outage_is_dropped_without_a_commit() -> None:
    parts = FakeParts(_records(), {"write_online": [ServiceUnavailableError("away")] * 9})
    # The two calls between the compute steps pass, the one that follows the outage does not.
    parts.faults["keep_alive"] = []
    worker = _worker(parts)
    original = parts.write_online

    def revoke_after_fault(rows: BatchRows) -> None:
        parts.faults["keep_alive"] = [BatchRevokedError("gone")]
        original(rows)

    parts.write_online = revoke_after_fault  # type: ignore[method-assign]  # one call is watched

    worker.handle(parts.batch)

    assert parts.calls == ["write_offline", "write_online"]


def test_draining_finishes_the_batch_in_hand_and_reads_no_other() -> None:
    drain = Drain(timeout_seconds=60)
    parts = FakeParts(_records(), {})
    original = parts.write_online

    def request_drain(rows: BatchRows) -> None:
        drain.requested.set()
        original(rows)

    parts.write_online = request_drain  # type: ignore[method-assign]  # one call is watched

    _worker(parts, drain).run()

    assert parts.calls == ["read", "write_offline", "write_online", "send", "commit"]


def test_draining_gives_up_on_a_store_that_stays_away() -> None:
    drain = Drain(timeout_seconds=0.0)
    drain.requested.set()
    parts = FakeParts(_records(), {"write_online": [ServiceUnavailableError("away")] * 9})

    with pytest.raises(DrainTimeoutError, match="4 records are not committed"):
        _worker(parts, drain).handle(parts.batch)

    assert "commit" not in parts.calls


def test_a_batch_is_encoded_by_one_set_and_the_next_one_by_the_new_set() -> None:
    parts = FakeParts(_records(), {})
    codebooks = _codebooks("v1")
    worker = _worker(parts, codebooks=codebooks)
    original = parts.write_offline

    def change_set(rows: BatchRows) -> None:
        codebooks.live = _codebooks("v2", "v1").live
        original(rows)

    parts.write_offline = change_set  # type: ignore[method-assign]  # one call is watched

    worker.handle(parts.batch)
    first = parts.rows
    worker.handle(parts.batch)

    assert first is not None
    assert parts.rows is not None
    assert [list(first.codes), list(parts.rows.codes)] == [["v1"], ["v2", "v1"]]
    assert parts.announced == [["v1"], ["v2", "v1"]]


def test_an_idle_worker_announces_a_new_version_and_touches_no_store() -> None:
    parts = FakeParts([], {})

    _worker(parts, codebooks=_codebooks("v1", "v2")).handle(parts.batch)

    assert parts.announced == [["v1", "v2"]]
    assert parts.calls == []


def test_a_batch_waits_for_a_version_that_an_owner_before_has_acknowledged() -> None:
    parts = FakeParts(_records(), {"acknowledged": [ServiceUnavailableError("broker is away")]})
    codebooks = _codebooks("v1")
    codebooks.lagging_versions = [["v2"], ["v2"], []]

    _worker(parts, codebooks=codebooks).handle(parts.batch)

    assert codebooks.lagging_versions == []
    assert parts.calls[-1] == "commit"


def test_a_worker_that_drains_does_not_wait_for_a_version_and_commits_nothing() -> None:
    drain = Drain(timeout_seconds=60)
    drain.requested.set()
    parts = FakeParts(_records(), {})
    codebooks = _codebooks("v1")
    codebooks.lagging_versions = [["v2"]]

    _worker(parts, drain, codebooks).handle(parts.batch)

    assert parts.calls == []
    assert parts.announced == []


def test_rows_of_a_version_that_is_retired_during_an_outage_are_left_out() -> None:
    parts = FakeParts(_records(), {"write_online": [ServiceUnavailableError("away")]})
    codebooks = _codebooks("v1", "v2")
    written: list[list[str]] = []
    original = parts.write_online

    def retire(rows: BatchRows) -> None:
        codebooks.stopped_versions = {"v1"}
        written.append(list(rows.codes))
        original(rows)

    parts.write_online = retire  # type: ignore[method-assign]  # one call is watched

    _worker(parts, codebooks=codebooks).handle(parts.batch)

    assert written == [["v1", "v2"], ["v2"]]
    assert parts.announced == [["v1", "v2"], ["v2"]]
    assert parts.calls[-1] == "commit"


def test_a_version_that_is_retired_between_the_look_and_the_write_is_taken_back() -> None:
    parts = FakeParts(_records(), {})
    codebooks = _codebooks("v1", "v2")
    original = parts.write_online

    def write_late(rows: BatchRows) -> None:
        # The process was stopped behind its look at the registry, and wakes here.
        codebooks.stopped_versions = {"v1"}
        original(rows)

    parts.write_online = write_late  # type: ignore[method-assign]  # one call is watched

    _worker(parts, codebooks=codebooks).handle(parts.batch)

    assert parts.calls == ["write_offline", "write_online", "take_back v1", "send", "commit"]


def test_vectors_are_taken_back_with_the_codes_of_a_version_that_is_retired_meanwhile() -> None:
    parts = FakeParts(_records(), {})
    codebooks = _codebooks("v1")
    original = parts.write_online

    def write_late(rows: BatchRows) -> None:
        codebooks.stopped_versions = {"v1"}
        original(rows)

    parts.write_online = write_late  # type: ignore[method-assign]  # one call is watched

    StreamWorker(
        Pipeline(parts, parts, parts, codebooks),
        replace(SETTINGS, enable_vectors=True),
        WorkerHealth(),
        Drain(timeout_seconds=0.0),
    ).handle(parts.batch)

    assert parts.calls == ["write_offline", "write_online", "take_back v1,e1", "send", "commit"]


def test_what_is_to_be_taken_back_is_tried_again_until_the_store_is_back() -> None:
    parts = FakeParts(_records(), {"take_back v1": [ServiceUnavailableError("away")] * 2})
    codebooks = _codebooks("v1", "v2")
    original = parts.write_online

    def write_late(rows: BatchRows) -> None:
        codebooks.stopped_versions = {"v1"}
        original(rows)

    parts.write_online = write_late  # type: ignore[method-assign]  # one call is watched

    _worker(parts, codebooks=codebooks).handle(parts.batch)

    assert parts.calls[1:] == ["write_online", *["take_back v1"] * 3, "send", "commit"]


def test_a_version_that_was_left_out_has_nothing_to_be_taken_back() -> None:
    parts = FakeParts(_records(), {})
    codebooks = _codebooks("v1", "v2")
    codebooks.stopped_versions = {"v1"}

    _worker(parts, codebooks=codebooks).handle(parts.batch)

    assert parts.calls == ["write_offline", "write_online", "send", "commit"]


def test_a_view_that_goes_with_its_version_stops_no_worker_and_a_missing_one_does() -> None:
    codebooks = _codebooks("v1", "v2")
    parts = FakeParts(_records(), {"write_online": [ConfigError("no view")]})
    original = parts.write_online

    def retire(rows: BatchRows) -> None:
        codebooks.stopped_versions = {"v1"}
        original(rows)

    parts.write_online = retire  # type: ignore[method-assign]  # one call is watched
    _worker(parts, codebooks=codebooks).handle(parts.batch)
    bare = FakeParts(_records(), {"write_online": [ConfigError("no view")]})

    assert parts.calls[-1] == "commit"
    with pytest.raises(ConfigError):
        _worker(bare).handle(bare.batch)


def test_an_empty_read_touches_no_store() -> None:
    drain = Drain(timeout_seconds=60)
    parts = FakeParts([], {})
    reads = iter([None, None])
    original = parts.read

    def stop_after_two() -> Batch:
        if next(reads, threading) is threading:
            drain.requested.set()
        return original()

    parts.read = stop_after_two  # type: ignore[method-assign]  # ends the loop

    _worker(parts, drain).run()

    assert parts.calls == ["read", "read", "read"]


def test_no_log_line_holds_a_payload(caplog: pytest.LogCaptureFixture) -> None:
    marker = "my-private-title"
    event = encode_item_event(ItemEvent(1, NOW, {"title": marker}))
    records = [
        record_of(event),
        FakeRecord(marker.encode(), marker.encode()),
        record_of(event._replace(key=marker.encode())),
        record_of(event._replace(headers=[("schema_version", marker.encode())])),
    ]
    away = [ServiceUnavailableError("away")]
    parts = FakeParts(records, {"write_online": away, "send": [OSError(28, "full")]})

    with caplog.at_level("DEBUG"):
        _worker(parts).handle(parts.batch)

    assert [letter.reason for letter in parts.letters]
    assert "batch_stored records=4 dead_letters=3" in caplog.text
    assert "write_failed store=online" in caplog.text
    assert marker not in caplog.text

from collections.abc import Mapping
from types import SimpleNamespace
from typing import ClassVar

import pytest
from kafka import ConsumerRebalanceListener
from kafka.consumer.fetcher import Fetcher
from kafka.errors import (
    CorruptRecordError,
    KafkaError,
    KafkaTimeoutError,
    TopicAuthorizationFailedError,
)
from kafka.record import MemoryRecords
from kafka.structs import OffsetAndMetadata, OffsetAndTimestamp, TopicPartition
from prometheus_client import REGISTRY
from stream_fakes import FakeRecord

from qarm_feast.errors import ServiceUnavailableError
from streaming.acknowledgements import Acknowledgement, decode_acknowledgement
from streaming.config import StreamConfig
from streaming.source import KafkaSource, WaitingRecords

P0, P1 = TopicPartition("items", 0), TopicPartition("items", 1)


def _records(partition: int, *offsets: int) -> list[FakeRecord]:
    return [FakeRecord(b"1", b"ab", partition=partition, offset=offset) for offset in offsets]


def test_batch_holds_what_waited_and_the_offsets_behind_it() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5, 6), P1: _records(1, 9)}, now=1.0)
    waiting.add({P0: _records(0, 8)}, now=2.0)

    batch = waiting.take()

    assert [record.offset for record in batch.records] == [5, 6, 9, 8]
    assert batch.offsets == {P0: 9, P1: 10}
    assert waiting.num_records == 0
    assert waiting.take().records == []


def test_age_and_bytes_are_those_of_the_waiting_records() -> None:
    waiting = WaitingRecords()
    waiting.add({}, now=1.0)
    waiting.add({P0: _records(0, 5)}, now=2.0)
    waiting.add({P0: _records(0, 6)}, now=3.0)

    assert (waiting.oldest, waiting.num_bytes) == (2.0, 6)

    waiting.take()

    assert (waiting.oldest, waiting.num_bytes) == (None, 0)


def test_partition_that_comes_back_goes_on_behind_what_is_stored() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5, 6), P1: _records(1, 9)}, now=1.0)
    stored = waiting.take()
    waiting.mark_stored({P0: stored.offsets[P0]})
    waiting.add({P0: _records(0, 7)}, now=2.0)

    waiting.revoke()
    resumed = waiting.assign([P0, P1])

    # P0: 5 and 6 are stored, 7 was dropped. P1: 9 is in a batch that is not stored yet.
    assert resumed == {P0: 7, P1: 9}
    assert waiting.num_records == 0


def test_partition_that_went_away_starts_from_the_committed_offset_later() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5)}, now=1.0)

    waiting.revoke()
    assert waiting.assign([P1]) == {}
    waiting.revoke()

    assert waiting.assign([P0]) == {}


def test_lost_partition_forgets_where_it_was() -> None:
    waiting = WaitingRecords()
    waiting.add({P0: _records(0, 5)}, now=1.0)

    waiting.lose()

    assert waiting.assign([P0]) == {}


def test_each_revocation_makes_older_batches_foreign() -> None:
    waiting = WaitingRecords()
    before = waiting.take()

    waiting.revoke()
    waiting.assign([P0])

    assert waiting.take().assignment_number != before.assignment_number


class LaggingConsumer:
    """One record on each partition of the items, with nine more behind it."""

    config: ClassVar[dict[str, int]] = {"max_poll_interval_ms": 300_000}

    def __init__(self) -> None:
        self.partitions = {P0, P1}
        self._fetcher = SimpleNamespace(
            _next_partition_records=None, _next_in_line_exception_metadata=None
        )

    def subscribe(self, topics: object, listener: object) -> None:
        pass

    def assignment(self) -> set[TopicPartition]:
        return self.partitions

    def highwater(self, partition: TopicPartition) -> int:
        return 10

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[FakeRecord]]:
        return {partition: _records(partition.partition, 0) for partition in self.partitions}


def test_a_partition_that_another_worker_took_has_no_lag_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = LaggingConsumer()
    monkeypatch.setattr("streaming.source.connect_consumer", lambda config, timeout: consumer)
    source = KafkaSource(StreamConfig(max_batch_size=1))

    def lags() -> list[float | None]:
        source.read()
        labels = [{"topic": "items", "partition": number} for number in "01"]
        return [
            REGISTRY.get_sample_value("qarm_stream_consumer_lag_messages", each) for each in labels
        ]

    before = lags()
    consumer.partitions = {P0}

    assert before == [10, 10]
    assert lags() == [10, 0]


@pytest.mark.parametrize("fault", [KafkaTimeoutError(), KeyError(P1)])
def test_the_lag_grows_while_a_batch_waits_for_a_store(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WaitingConsumer(LaggingConsumer):
        """The topic grows by 5 records with each look; once the client does not tell."""

        end = 10
        faults: ClassVar[list[Exception]] = []

        def end_offsets(
            self, partitions: list[TopicPartition], timeout_ms: int
        ) -> dict[TopicPartition, int]:
            if self.faults:
                raise self.faults.pop()
            self.end += 5
            return dict.fromkeys(partitions, self.end)

    def lag() -> float | None:
        labels = {"topic": "items", "partition": "0"}
        return REGISTRY.get_sample_value("qarm_stream_consumer_lag_messages", labels)

    consumer = WaitingConsumer()
    source = _source_of(consumer, monkeypatch)
    batch = source.read()
    source.keep_alive(batch)
    before = lag()

    monkeypatch.setattr("streaming.source._LAG_SECONDS", 0.0)
    source.keep_alive(batch)
    after = lag()
    consumer.faults.append(fault)
    source.keep_alive(batch)
    unknown = lag()
    source.keep_alive(batch)

    assert (before, after, unknown, lag()) == (10, 15, 15, 20)


class DamagedConsumer(LaggingConsumer):
    """Each poll fails on a damaged record or answer; ``reading`` is what the client looks at."""

    def __init__(self, reading: object) -> None:
        super().__init__()
        self._fetcher._next_partition_records = reading
        self.positions = {P0: 5, P1: 9}
        self.fault: KafkaError = CorruptRecordError()

    def position(self, partition: TopicPartition) -> int:
        return self.positions[partition]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.positions[partition] = offset

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[FakeRecord]]:
        raise self.fault


def _part(partition: TopicPartition, *, is_drained: bool) -> Fetcher.PartitionRecords:
    """The client's own class, because its truth tells whether it is read to the end."""
    part = Fetcher.PartitionRecords(0, partition, MemoryRecords(b""))
    if is_drained:
        part.drain()
    return part


def _source_of(
    consumer: object, monkeypatch: pytest.MonkeyPatch, item_topic: str = "item-events"
) -> KafkaSource:
    monkeypatch.setattr("streaming.source.connect_consumer", lambda config, timeout: consumer)
    monkeypatch.setattr("streaming.source._POLL_SECONDS", 0.01)
    return KafkaSource(StreamConfig(max_batch_size=1, item_topic=item_topic))


def test_a_record_that_the_client_cannot_read_is_stepped_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = DamagedConsumer(_part(P1, is_drained=False))

    batch = _source_of(consumer, monkeypatch).read()

    assert [(r.partition, r.offset) for r in batch.records] == [(1, 9)]
    assert batch.offsets == {P1: 10}
    assert consumer.positions == {P0: 5, P1: 10}


@pytest.mark.parametrize("reading", [None, _part(P1, is_drained=True)])
def test_a_damaged_answer_costs_no_record_of_the_partition_that_was_read_before(
    reading: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = DamagedConsumer(reading)

    batch = _source_of(consumer, monkeypatch).read()

    assert batch.records == []
    assert consumer.positions == {P0: 5, P1: 9}


class ForgetfulConsumer(LaggingConsumer):
    """Serves one record of partition 1, and fails the first commit."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = {P0: 0, P1: 0}
        self.listener: ConsumerRebalanceListener
        self.polled = [{P1: _records(1, 0)}]
        self.stored: dict[TopicPartition, OffsetAndMetadata] = {}
        self.faults: list[KafkaError] = []

    def subscribe(self, topics: object, listener: ConsumerRebalanceListener) -> None:
        self.listener = listener

    def group_metadata(self) -> SimpleNamespace:
        return SimpleNamespace(generation_id=1)

    def position(self, partition: TopicPartition, timeout_ms: int) -> int:
        return self.positions[partition]

    def poll(self, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[FakeRecord]]:
        found = self.polled.pop() if self.polled else {}
        self.positions |= {partition: 1 for partition in found}
        return found

    def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata], timeout_ms: int) -> None:
        if self.faults:
            raise self.faults.pop()
        self.stored |= offsets


def test_a_commit_that_failed_is_made_good_when_nothing_follows_on_its_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = ForgetfulConsumer()
    source = _source_of(consumer, monkeypatch, item_topic="items")
    consumer.listener.on_partitions_assigned([P0, P1])
    batch = source.read()
    source.announce(batch, ["v1"])
    consumer.faults = [KafkaTimeoutError()]

    source.commit(batch)
    before = dict(consumer.stored)
    source.announce(source.read(), ["v1"])

    assert set(before) == {P0}
    assert consumer.stored[P1].offset == 1
    found = decode_acknowledgement(consumer.stored[P1].metadata)
    assert found == Acknowledgement({"v1": 1}, owner_epoch=1)


def test_a_broker_that_refuses_this_member_ends_the_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = DamagedConsumer(None)
    consumer.fault = TopicAuthorizationFailedError()

    with pytest.raises(ServiceUnavailableError, match="run `qarm-stream check`"):
        _source_of(consumer, monkeypatch).read()


def test_the_client_still_stumbles_over_a_partition_without_a_leader() -> None:
    """What ``KafkaSource`` catches the KeyError for; when this fails, it need not any more."""
    fetcher = Fetcher.__new__(Fetcher)
    fetcher._net = SimpleNamespace(run=lambda *_: {P0: OffsetAndTimestamp(7, -1, -1)})

    with pytest.raises(KeyError):
        fetcher.end_offsets([P0, P1], timeout_ms=1)

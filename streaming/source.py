"""Batches of records from Kafka, with offsets committed by hand.

How a batch stays safe over a rebalance (``kafka-python`` sends heartbeats on its own thread, and
gives partitions up only inside ``poll``):

1. Records wait here until a batch is full or its oldest record is old enough.
2. Partitions revoked while records wait: the records are dropped. Their next owner reads them
   from the committed offset; if that is this worker again, it rewinds, because the client keeps
   the read position of a partition that comes back in the same rebalance.
3. While a batch is worked on nothing polls, so the group waits for this member up to
   ``max_poll_interval_ms``: the batch is finished, committed, and only then let go.
4. Slow work calls :meth:`KafkaSource.keep_alive`, which polls with everything paused once a third
   of that interval is gone. If the partitions are revoked there, :class:`BatchRevokedError` tells
   the worker to drop its batch; nothing of it is committed, so it is replayed.

A record that the client cannot take apart (its checksum is wrong, a header's name is not UTF-8)
comes out as an :class:`streaming.messages.UnreadableRecord`, and so do those behind it in its
producer's batch: the client reads a batch from its beginning.

May import: kafka-python.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kafka import ConsumerRebalanceListener, KafkaConsumer
from kafka.errors import CorruptRecordError, KafkaError
from kafka.structs import TopicPartition

from qarm_feast.errors import QarmError, ServiceUnavailableError
from qarm_feast.observability import STREAM_CONSUMER_LAG
from streaming.acknowledgements import AcknowledgedVersions
from streaming.clients import connect_consumer
from streaming.config import StreamConfig
from streaming.messages import Record, UnreadableRecord

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_CONNECT_TIMEOUT_MS = 30_000
_COMMIT_TIMEOUT_MS = 10_000
_CLOSE_TIMEOUT_MS = 5_000
_END_TIMEOUT_MS = 1_000
_LAG_SECONDS = 5.0


class BatchRevokedError(QarmError):
    """The partitions of the batch in hand were taken away; the batch will be replayed."""


@dataclass(frozen=True)
class Batch:
    """Records in partition order, and per partition the offset to commit once they are stored."""

    records: Sequence[Record]
    offsets: Mapping[TopicPartition, int]
    assignment_number: int


class KafkaSource:
    """Reads both input topics as a member of the consumer group; use from one thread.

    Args:
        config: Section ``stream``.

    Raises:
        ServiceUnavailableError: If no broker answers.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._config = config
        self._consumer: KafkaConsumer = connect_consumer(config, _CONNECT_TIMEOUT_MS)
        self._keep_alive_seconds = self._consumer.config["max_poll_interval_ms"] / 1000 / 3
        self._waiting = WaitingRecords()
        self._last_poll = self._last_report = time.monotonic()
        self._reported: set[TopicPartition] = set()
        self._acknowledged = AcknowledgedVersions(self._consumer, config.item_topic, self._waiting)
        listener = _Listener(self._waiting, self._consumer)
        self._consumer.subscribe(config.topics, listener=listener)

    @property
    def is_joined(self) -> bool:
        """Whether this member has an assignment; it may be an empty one."""
        return self._waiting.is_assigned

    def read(self) -> Batch:
        """Return the next batch; it is empty if nothing came within a tenth of a second.

        Returns:
            Records in partition order with the offsets to commit.

        Raises:
            ServiceUnavailableError: If the broker refuses to serve this member.
        """
        deadline = time.monotonic() + _POLL_SECONDS
        while True:
            now = time.monotonic()
            seconds_left = self._seconds_left(now)
            if seconds_left <= 0 or (self._waiting.oldest is None and now >= deadline):
                break
            self._poll(min(seconds_left, _POLL_SECONDS))
        consumer = self._consumer
        self._report_lag({each: consumer.highwater(each) for each in consumer.assignment()})
        return self._waiting.take()

    def keep_alive(self, batch: Batch) -> None:
        """Stay in the group during slow work on ``batch``; cheap, so call it often.

        Args:
            batch: The batch in hand.

        Raises:
            BatchRevokedError: If the group took the partitions away meanwhile.
            ServiceUnavailableError: If the broker refuses to serve this member.
        """
        if time.monotonic() - self._last_poll > self._keep_alive_seconds:
            with self._paused():
                # Records that a new assignment brings here wait for the next read.
                self._poll(_POLL_SECONDS)
        if time.monotonic() - self._last_report > _LAG_SECONDS:
            self._ask_for_lag()
        if batch.assignment_number != self._waiting.assignment_number:
            raise BatchRevokedError(f"{len(batch.records)} records will be replayed")

    def acknowledged(self) -> frozenset[str]:
        """Return the codebook versions that the owners before have acknowledged.

        Returns:
            Versions, retired ones among them.

        Raises:
            ServiceUnavailableError: If the broker does not tell.
        """
        return self._acknowledged.earlier()

    def announce(self, batch: Batch, versions: Iterable[str]) -> None:
        """Acknowledge that ``batch`` and everything after it is written in these versions.

        Args:
            batch: What the last read returned.
            versions: All codebook versions that are written.
        """
        if batch.assignment_number == self._waiting.assignment_number:
            self._acknowledged.announce(batch.offsets, versions)

    def commit(self, batch: Batch) -> None:
        """Commit the batch's offsets; without success the batch is replayed, which is harmless."""
        if not batch.offsets or batch.assignment_number != self._waiting.assignment_number:
            return
        self._waiting.mark_stored(batch.offsets)
        offsets = self._acknowledged.with_metadata(batch.offsets)
        try:
            self._consumer.commit(offsets, timeout_ms=_COMMIT_TIMEOUT_MS)
        except KafkaError as error:
            # A later batch commits past this one, or its next owner replays it. A partition of
            # items that is idle by then is acknowledged by its position.
            self._acknowledged.forget(batch.offsets)
            logger.warning("commit_failed records=%d error=%r", len(batch.records), error)

    def close(self) -> None:
        """Leave the group, so that the others take over at once. What waits is dropped."""
        try:
            self._consumer.close(autocommit=False, timeout_ms=_CLOSE_TIMEOUT_MS)
        except KafkaError as error:
            logger.warning("leave_failed error=%r", error)

    def _seconds_left(self, now: float) -> float:
        """Return how long the waiting records may still wait for company."""
        waiting, config = self._waiting, self._config
        if waiting.num_records >= config.max_batch_size:
            return 0.0
        if waiting.num_bytes >= config.max_batch_bytes:
            return 0.0
        if waiting.oldest is None:
            return _POLL_SECONDS
        return waiting.oldest + config.max_batch_wait_seconds - now

    def _poll(self, wait_seconds: float) -> None:
        room = max(1, self._config.max_batch_size - self._waiting.num_records)
        polled: dict[TopicPartition, list[Record]] = {}
        try:
            polled = self._consumer.poll(timeout_ms=round(wait_seconds * 1000), max_records=room)
            fault = self._fault_kept_back()
        except KafkaError as error:
            fault = error
        place = self._unreadable_place(fault)
        if fault is not None and place is not None:
            polled.setdefault(place, []).append(self._step_over(place, fault))
        elif fault is not None and not polled:
            self._try_later(fault)
            return
        self._last_poll = time.monotonic()
        self._waiting.add(polled, self._last_poll)

    def _fault_kept_back(self) -> KafkaError | None:
        """Return what the client found behind the records of this poll and keeps for the next one.

        A poll with everything paused would drop it, and then the client (kafka-python 3.0.12) goes
        round in that record for ever.
        """
        kept = self._consumer._fetcher._next_in_line_exception_metadata
        return None if kept is None else kept.exception

    def _unreadable_place(self, fault: KafkaError | None) -> TopicPartition | None:
        """Return the partition whose next record the client cannot take apart, if it is that."""
        if not isinstance(fault, CorruptRecordError):
            return None
        # Only the client's own state tells which partition it was: the one that it is reading.
        # None, or one that is read to its end, means that the broker's whole answer is damaged;
        # that may be another partition's, and a step there would lose a good record.
        part = self._consumer._fetcher._next_partition_records
        return part.topic_partition if part else None

    def _try_later(self, error: KafkaError) -> None:
        # A damaged answer holds up its own partition only; the broker may have a good copy later.
        if not (error.retriable or isinstance(error, CorruptRecordError)):
            raise self._away(error) from error
        logger.warning("poll_failed error=%r", error)
        time.sleep(_POLL_SECONDS)

    def _step_over(self, place: TopicPartition, fault: KafkaError) -> UnreadableRecord:
        """Return a stand-in for the record that cannot be read, and go on behind it."""
        offset = self._consumer.position(place)
        self._consumer.seek(place, offset + 1)
        kind = type(fault).__name__
        logger.warning(
            "record_unreadable topic=%s partition=%d offset=%d error=%s",
            *(place.topic, place.partition, offset, kind),
        )
        return UnreadableRecord(
            place.topic, place.partition, offset, round(time.time() * 1000), kind
        )

    def _away(self, error: KafkaError) -> ServiceUnavailableError:
        return ServiceUnavailableError(
            f"reading {', '.join(self._config.topics)} from {self._config.bootstrap_servers} "
            f"failed: {error!r}; run `qarm-stream check`"
        )

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._consumer.pause(*self._consumer.assignment())
        try:
            yield
        finally:
            self._consumer.resume(*self._consumer.assignment())

    def _ask_for_lag(self) -> None:
        """Report the lag although nothing is read, as while a store is away."""
        partitions = list(self._consumer.assignment())
        try:
            # What was fetched tells of the ends as they were then.
            ends = self._consumer.end_offsets(partitions, timeout_ms=_END_TIMEOUT_MS)
        # The client (kafka-python 3.0.12) asks for no partition that is without a leader, and then
        # misses it in the answers.
        except (KafkaError, KeyError) as error:
            logger.warning("lag_unknown error=%r", error)
            ends = {}
        self._report_lag(ends)

    def _report_lag(self, ends: Mapping[TopicPartition, int | None]) -> None:
        """Report how far each partition is stored behind its end, where that is known."""
        self._last_report = time.monotonic()
        assignment = set(self._consumer.assignment())
        for partition in self._reported - assignment:
            # Another worker reports it now; both would add up to a lag that nobody has.
            STREAM_CONSUMER_LAG.labels(partition.topic, str(partition.partition)).set(0)
        self._reported = assignment
        for partition in assignment:
            end = ends.get(partition)
            stored = self._waiting.first_unstored.get(partition)
            if end is not None and stored is not None:
                gauge = STREAM_CONSUMER_LAG.labels(partition.topic, str(partition.partition))
                gauge.set(max(0, end - stored))


class WaitingRecords:
    """Records that are read but in no batch yet, and how far each partition is stored.

    The listener changes this only inside ``poll`` and ``close``, while the calling thread waits
    there, so there is no lock.
    """

    def __init__(self) -> None:
        self.is_assigned = False
        # Counted up by every revocation; a batch carries the number under which it was read.
        self.assignment_number = 0
        # The next owner starts here; so does this worker if a partition comes back.
        self.first_unstored: dict[TopicPartition, int] = {}
        self.oldest: float | None = None
        self.num_bytes = 0
        self._records: list[Record] = []
        self._offsets: dict[TopicPartition, int] = {}

    @property
    def num_records(self) -> int:
        """Records that wait."""
        return len(self._records)

    def add(self, polled: Mapping[TopicPartition, Sequence[Record]], now: float) -> None:
        """Take the records of one poll."""
        for partition, records in polled.items():
            self.first_unstored.setdefault(partition, records[0].offset)
            self._records += records
            self._offsets[partition] = records[-1].offset + 1
            self.num_bytes += sum(len(r.value or b"") + len(r.key or b"") for r in records)
        if polled and self.oldest is None:
            self.oldest = now

    def take(self) -> Batch:
        """Hand out everything that waits."""
        batch = Batch(self._records, self._offsets, self.assignment_number)
        self._drop()
        return batch

    def mark_stored(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Note that both stores hold everything before these offsets."""
        self.first_unstored |= offsets

    def revoke(self) -> None:
        """Drop what waits: the partitions may go to another worker."""
        self.assignment_number += 1
        self.is_assigned = False
        self._drop()

    def lose(self) -> None:
        """Drop what waits, and where it began: others have gone on from there."""
        self.revoke()
        self.first_unstored.clear()

    def assign(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the partitions that came back, with the offset to go on from."""
        self.is_assigned = True
        kept = {tp: self.first_unstored[tp] for tp in partitions if tp in self.first_unstored}
        self.first_unstored = dict(kept)
        return kept

    def _drop(self) -> None:
        self._records, self._offsets = [], {}
        self.oldest, self.num_bytes = None, 0


class _Listener(ConsumerRebalanceListener):
    """Runs on the client's IO thread, so it only moves marks and never blocks."""

    def __init__(self, waiting: WaitingRecords, consumer: KafkaConsumer) -> None:
        self._waiting = waiting
        self._consumer = consumer

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._waiting.revoke()

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self._waiting.lose()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        for partition, offset in self._waiting.assign(assigned).items():
            # kafka-python keeps the position of a partition that comes back: without this,
            # records that were read and dropped would never be read again.
            self._consumer.seek(partition, offset)

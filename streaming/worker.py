"""The streaming worker: one member of the consumer group, one batch at a time.

:class:`StreamWorker` knows the order of the steps and what waits for what; the parts stand behind
Protocols, and ``streaming.daemon`` puts the real ones in. May import: pyarrow.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import ConfigError, GpuLostError, ServiceUnavailableError
from qarm_feast.item_vectors import EncodedItems, vector_rows
from qarm_feast.observability import (
    ITEM_FRESHNESS_SECONDS,
    STREAM_BATCH_ITEMS,
    STREAM_DEAD_LETTERS,
    STREAM_DECODE_SECONDS,
    STREAM_DRIFT_SECONDS,
    STREAM_ENCODE_SECONDS,
    STREAM_EVENTS,
    STREAM_QUANTIZE_SECONDS,
    STREAM_RETRIES,
    STREAM_WRITE_SECONDS,
)
from streaming.columns import (
    DeadLetter,
    DecodedInteractions,
    DecodedItems,
    decode_interactions,
    decode_items,
)
from streaming.drift import DriftMonitor
from streaming.event_columns import IS_DELETED
from streaming.health import WorkerHealth
from streaming.limits import DEFAULT_LIMITS, EventLimits
from streaming.messages import ENCODER_VERSION, Record
from streaming.pieces import pieces
from streaming.rows import (
    LiveCodebooks,
    content_log_rows,
    encode_rows,
    erasure_log_rows,
    hash_rows,
    interaction_log_rows,
    quantize_rows,
)
from streaming.sink import BatchRows
from streaming.source import Batch, BatchRevokedError

logger = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.1
_CODEBOOK_WAIT_SECONDS = 0.2


class Source(Protocol):
    """Where batches come from; ``streaming.source.KafkaSource``."""

    @property
    def is_joined(self) -> bool:
        """Whether the group has given this member its share."""
        ...

    def read(self) -> Batch:
        """Return the next batch, empty if there is none yet."""
        ...

    def keep_alive(self, batch: Batch) -> None:
        """Stay in the group; raise ``BatchRevokedError`` if the batch is another's now."""
        ...

    def acknowledged(self) -> frozenset[str]:
        """Return the codebook versions that earlier owners of the partitions have acknowledged."""
        ...

    def announce(self, batch: Batch, versions: Iterable[str]) -> None:
        """Acknowledge that ``batch`` and all that follows is written in these versions."""
        ...

    def commit(self, batch: Batch) -> None:
        """Mark the batch as stored."""
        ...


class Codebooks(Protocol):
    """Which codebooks to write; ``streaming.codebook_watch.CodebookWatch``."""

    def current(self) -> LiveCodebooks:
        """Return the set to encode the next batch with; it may be empty."""
        ...

    def lagging(self, acknowledged: Iterable[str]) -> list[str]:
        """Return the acknowledged versions that are to be written and are not in the set."""
        ...

    def stopped(self, versions: Iterable[str]) -> set[str]:
        """Return which of the versions are not to be written any more."""
        ...


class Sink(Protocol):
    """Where rows go; ``streaming.sink.FeastSink``."""

    def write_offline(self, rows: BatchRows) -> None:
        """Append to the offline logs."""
        ...

    def write_online(self, rows: BatchRows) -> None:
        """Update the online store."""
        ...

    def take_back(self, versions: Iterable[str], encoder_versions: Iterable[str]) -> None:
        """Remove online what was written of versions and encoders whose view is gone."""
        ...


class DeadLetters(Protocol):
    """Where refused records go; ``streaming.sink.DeadLetterTopic``."""

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Store the letters for good."""
        ...


class DrainTimeoutError(ServiceUnavailableError):
    """A store stayed away for longer than the worker had to drain."""


class Drain:
    """Whether the worker shall stop, and how long it may still take."""

    def __init__(self, timeout_seconds: float) -> None:
        self.requested = threading.Event()
        self.timeout_seconds = timeout_seconds
        self._deadline: float | None = None

    def check(self, store: str, num_records: int, fault: Exception) -> None:
        """Raise if a store is still away when the time to drain is over.

        Args:
            store: The store's name.
            num_records: Records in hand.
            fault: Why the store is away.

        Raises:
            DrainTimeoutError: The records in hand are left to the next owner.
        """
        if not self.requested.is_set():
            return
        if self._deadline is None:
            self._deadline = time.monotonic() + self.timeout_seconds
        elif time.monotonic() >= self._deadline:
            raise DrainTimeoutError(
                f"{store} stayed away while draining; {num_records} records are not committed "
                f"and will be replayed ({fault})"
            ) from fault


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker must know to read events and to wait.

    Attributes:
        item_topic: Topic of item events; everything else is an interaction.
        task_names: Task flags of interactions.
        positive_label: The flag that brings an item into the user's recent items.
        limits: Bounds that records must keep.
        max_retry_wait_seconds: Longest pause between two tries at a store that is down.
        drift_window_items: Latest uploads that are held against a codebook's training set.
        enable_vectors: Write ``item_vectors_<encoder_version>``, because the ranker reads it.
    """

    item_topic: str
    task_names: tuple[str, ...]
    positive_label: str
    limits: EventLimits = DEFAULT_LIMITS
    max_retry_wait_seconds: float = 5.0
    drift_window_items: int = 10_000
    enable_vectors: bool = False


@dataclass(frozen=True)
class Pipeline:
    """The parts that a batch goes through."""

    source: Source
    sink: Sink
    dead_letters: DeadLetters
    codebooks: Codebooks


class StreamWorker:
    """Takes batches from the source to both stores, in eight steps.

    1. Read a batch.
    2. Decode its records; what breaks the contract becomes a dead letter.
    3. Encode items to vectors.
    4. Quantize vectors to the codes of every live codebook version.
    5. Write offline.
    6. Write online.
    7. Send the dead letters.
    8. Commit the offsets.

    A batch that unpacks to more than ``stream.max_decoded_bytes`` goes through 2 to 7 piece by
    piece. A crash anywhere before 8 replays the batch: offline duplicates collapse on reading, the
    online stores' guards ignore what they have, and dead letters may come twice.

    Between 1 and 2 the codebooks of the batch are taken and acknowledged, see
    ``streaming.acknowledgements``. Before each try of 5 and 6, rows of versions that were retired
    meanwhile are left out. That look at the registry and the write are two steps: a process that
    was stopped between them writes late. So after 6 there is one more look, and what a version
    got whose view `feast apply` has dropped since is removed; what was dropped after that look,
    `feast apply` removes itself. Killed between the write and that look, at most one piece's rows
    stay in the store, under a name that no view has and none will have again.

    Args:
        pipeline: Source, sink, dead letters, codebooks.
        settings: How events are read.
        health: Told of progress and of waiting.
        drain: Says when to stop.
        clock: Current time, aware UTC.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        settings: WorkerSettings,
        health: WorkerHealth,
        drain: Drain,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._health = health
        self._drain = drain
        self._clock = clock
        self._drift = DriftMonitor(settings.drift_window_items)

    def run(self) -> None:
        """Handle batches until draining is requested; the batch in hand is finished first.

        Raises:
            DrainTimeoutError: If a store stays away while the worker drains.
        """
        while not self._drain.requested.is_set():
            # 1. Read.
            batch = self._pipeline.source.read()
            self._health.step()
            self._report_readiness()
            self.handle(batch)

    def handle(self, batch: Batch) -> None:
        """Take one batch through steps 2 to 8; if it is revoked on the way, it is dropped.

        Args:
            batch: What :meth:`Source.read` gave.

        Raises:
            GpuLostError: If the GPU fails and the processor may not take over; not ready any more.
        """
        try:
            live = self._codebooks_for(batch)
            if live is None:
                return
            self._pipeline.source.announce(batch, live.codebooks)
            if batch.records:
                self._store(batch, live)
        except BatchRevokedError as error:
            logger.warning("batch_revoked %s", error)
        except GpuLostError as error:
            # No process gets a lost GPU back: nothing is committed, and the next owner replays.
            self._health.set_not_ready(str(error))
            raise

    def _codebooks_for(self, batch: Batch) -> LiveCodebooks | None:
        """Wait for every version that is acknowledged already; None if draining comes first."""
        told = ""
        while fault := self._codebook_fault():
            if self._drain.requested.is_set():
                return None
            if fault != told:
                logger.warning("batch_waits records=%d for=%s", len(batch.records), fault)
            told = fault
            self._health.set_not_ready(fault)
            self._wait(batch, _CODEBOOK_WAIT_SECONDS)
        return self._pipeline.codebooks.current()

    def _codebook_fault(self) -> str:
        codebooks = self._pipeline.codebooks
        try:
            lagging = codebooks.lagging(self._pipeline.source.acknowledged())
        except ServiceUnavailableError as error:
            return str(error)
        if lagging:
            return f"codebook version {', '.join(lagging)} is acknowledged, but not loaded here yet"
        return "" if codebooks.current().codebooks else "no codebook version can be loaded"

    def _store(self, batch: Batch, live: LiveCodebooks) -> None:
        STREAM_BATCH_ITEMS.observe(len(batch.records))
        start = time.monotonic()
        outcomes = _Outcomes()
        for piece in pieces(batch.records, self._settings.limits):
            self._store_piece(batch, piece, live, outcomes)
        # 8. Commit last: a crash before this line replays the batch, and writing is idempotent.
        self._pipeline.source.commit(batch)
        outcomes.report()
        oldest = min(record.timestamp for record in batch.records)
        ITEM_FRESHNESS_SECONDS.observe(max(0.0, self._clock().timestamp() - oldest / 1000))
        logger.info(
            "batch_stored records=%d dead_letters=%d seconds=%.3f",
            len(batch.records),
            outcomes.events["dead_letter"],
            time.monotonic() - start,
        )

    def _store_piece(
        self, batch: Batch, piece: Sequence[Record], live: LiveCodebooks, outcomes: "_Outcomes"
    ) -> None:
        rows, dead_letters = self._make_rows(batch, piece, live)
        # 5. Offline first: what is lost online can be materialized again.
        self._write_rows("offline", batch, rows, self._pipeline.sink.write_offline)
        # 6. Online.
        tried = self._write_rows("online", batch, rows, self._pipeline.sink.write_online)
        if stopped := self._pipeline.codebooks.stopped(tried):
            self._write(
                "online", batch, lambda: self._pipeline.sink.take_back(stopped, rows.vectors)
            )
        # 7. Dead letters.
        if dead_letters:
            send = self._pipeline.dead_letters.send
            self._write("dead_letters", batch, lambda: send(dead_letters))
        outcomes.add(rows, dead_letters)

    def _make_rows(
        self, batch: Batch, piece: Sequence[Record], live: LiveCodebooks
    ) -> tuple[BatchRows, list[DeadLetter]]:
        created = self._clock()
        # 2. Decode.
        with STREAM_DECODE_SECONDS.time():
            item_records, items, interactions = self._decode(piece)
            item_rows = hash_rows(items.rows)
        # 3. Encode.
        with STREAM_ENCODE_SECONDS.time():
            encoded, refused = encode_rows(item_records, item_rows, live)
        self._pipeline.source.keep_alive(batch)
        # 4. Quantize.
        with STREAM_QUANTIZE_SECONDS.time():
            codes = quantize_rows(item_rows, encoded, live, created)
        with STREAM_DRIFT_SECONDS.time():
            self._drift.observe(live, encoded, codes)
        self._pipeline.source.keep_alive(batch)
        log_rows = interaction_log_rows(interactions.rows, self._settings.task_names, created)
        rows = BatchRows(
            codes=codes,
            content=content_log_rows(item_records, item_rows, encoded, created),
            interactions=log_rows,
            positives=log_rows.filter(log_rows[self._settings.positive_label]),
            erasures=erasure_log_rows(interactions.erasures, created),
            vectors=self._vectors(item_rows, encoded, created),
        )
        return rows, [*items.dead_letters, *interactions.dead_letters, *refused]

    def _vectors(
        self, rows: pa.Table, encoded: Sequence[EncodedItems], created: datetime
    ) -> dict[str, pa.Table]:
        if not self._settings.enable_vectors:
            return {}
        return {group.encoder_version: vector_rows(rows, group, created) for group in encoded}

    def _decode(
        self, records: Sequence[Record]
    ) -> tuple[list[Record], DecodedItems, DecodedInteractions]:
        settings = self._settings
        item_records = [record for record in records if record.topic == settings.item_topic]
        others = [record for record in records if record.topic != settings.item_topic]
        items = decode_items(item_records, settings.limits)
        interactions = decode_interactions(others, settings.task_names, settings.limits)
        return item_records, items, interactions

    def _write_rows(
        self, store: str, batch: Batch, rows: BatchRows, write: Callable[[BatchRows], None]
    ) -> set[str]:
        """Write what is still to be written at each try; return the versions of all tries."""
        tried: set[str] = set()

        def write_unstopped() -> None:
            unstopped = self._without_stopped(rows)
            tried.update(unstopped.codes)
            if unstopped is not rows:
                # Withdrawn: should the version be made live again, this batch is a hole in it.
                self._pipeline.source.announce(batch, unstopped.codes)
            try:
                write(unstopped)
            except ConfigError as error:
                if self._without_stopped(unstopped) is unstopped:
                    raise
                # Its view went right after the look at the registry; the next try leaves it out.
                raise ServiceUnavailableError(str(error)) from error

        self._write(store, batch, write_unstopped)
        return tried

    def _without_stopped(self, rows: BatchRows) -> BatchRows:
        stopped = self._pipeline.codebooks.stopped(rows.codes)
        if not stopped:
            return rows
        logger.info("rows_left_out versions=%s because=retired", ",".join(sorted(stopped)))
        kept = {version: codes for version, codes in rows.codes.items() if version not in stopped}
        # An encoder's vectors go with the last codebook of it, and so does their view.
        encoders = {
            encoder for codes in kept.values() for encoder in codes[ENCODER_VERSION].to_pylist()
        }
        vectors = {encoder: rows.vectors[encoder] for encoder in encoders & rows.vectors.keys()}
        return replace(rows, codes=kept, vectors=vectors)

    def _write(self, store: str, batch: Batch, write: Callable[[], None]) -> None:
        """Write, again and again while the store is away, without leaving the group."""
        wait_seconds = _FIRST_RETRY_SECONDS
        while True:
            try:
                with STREAM_WRITE_SECONDS.labels(store).time():
                    write()
                return
            except (ServiceUnavailableError, OSError) as error:
                fault = error
            STREAM_RETRIES.labels(store).inc()
            self._health.set_not_ready(f"{store} is away")
            logger.warning(
                "write_failed store=%s retry_seconds=%.1f error=%s", store, wait_seconds, fault
            )
            self._drain.check(store, len(batch.records), fault)
            self._wait(batch, random.uniform(0.5, 1.0) * wait_seconds)
            wait_seconds = min(2 * wait_seconds, self._settings.max_retry_wait_seconds)

    def _wait(self, batch: Batch, seconds: float) -> None:
        # While it drains the worker waits as well, so not on the event, which is set by then.
        time.sleep(seconds)
        self._health.step()
        self._pipeline.source.keep_alive(batch)

    def _report_readiness(self) -> None:
        if self._pipeline.source.is_joined:
            self._health.set_ready()
        else:
            self._health.set_not_ready("the consumer group has not given this member its share yet")


class _Outcomes:
    """What became of a batch's events; counted once the batch is stored."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def add(self, rows: BatchRows, dead_letters: Sequence[DeadLetter]) -> None:
        """Add the events of one piece."""
        num_takedowns = pc.sum(rows.content[IS_DELETED]).as_py() or 0
        self.events["item"] += rows.content.num_rows - num_takedowns
        self.events["takedown"] += num_takedowns
        self.events["interaction"] += rows.interactions.num_rows
        self.events["erasure"] += rows.erasures.num_rows
        self.events["dead_letter"] += len(dead_letters)
        self._reasons.update(letter.reason for letter in dead_letters)

    def report(self) -> None:
        """Pass the numbers on to the metrics."""
        for outcome, count in self.events.items():
            STREAM_EVENTS.labels(outcome).inc(count)
        for reason, count in self._reasons.items():
            STREAM_DEAD_LETTERS.labels(reason).inc(count)

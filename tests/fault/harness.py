"""One scenario's run: a repository, traffic, workers, and how long each recovery took."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from examples.quickstart.broker import KafkaBroker
from qarm_feast.errors import QarmError
from streaming.clients import connect_admin, connect_consumer
from streaming.config import StreamConfig
from tests.fault.services import RedisServer, Worker
from tests.fault.traffic import Parcel, SeededEvents, Sender
from tests.fault.truth import Verdict, check_stores, make_truth
from tests.stream_repo import StreamRepo, build_stream_repo

REDIS_TYPE = "qarm_feast.online_stores.redis.CodeRedisOnlineStore"
EVENTS_PER_SECOND = 150.0
_WATCH_SECONDS = 0.2
_CONNECT_TIMEOUT_MS = 60_000
_DRAIN_SECONDS = 120.0
_LOG_TAIL_LINES = 15
_BRISK_COMPACTION = "compaction: {interval_seconds: 0.5, min_growth: 1.5, grace_seconds: 10}\n"
"""So that workers die in the middle of compactions as well."""


class FaultRunError(QarmError):
    """A scenario could not go on; the message says what it waited for."""


@dataclass(frozen=True)
class Bench:
    """What all scenarios of one run share."""

    directory: Path
    broker: KafkaBroker
    seed: int

    @contextmanager
    def scenario(
        self,
        name: str,
        *,
        on_redis: bool = False,
        rate: float = EVENTS_PER_SECOND,
        stores: dict[str, Any] | None = None,
        **stream: Any,
    ) -> Iterator["ScenarioRun"]:
        """Yield a run of its own; whatever happens, none of its processes is left.

        Args:
            name: Name of the scenario and of its folder.
            on_redis: Use a redis server of its own as online store instead of a sqlite file.
            rate: Messages per second.
            stores: Sections of ``feature_store.yaml`` that differ from the repository's.
            stream: Keys of section ``stream`` that differ from the tests' own.
        """
        click.echo(f"{name} ...", err=True)
        directory = self.directory / name
        with ExitStack() as stack:
            server = None
            stores = dict(stores or {})
            if on_redis:
                server = stack.enter_context(RedisServer(directory / "redis"))
                place = {"type": REDIS_TYPE, "connection_string": f"127.0.0.1:{server.port}"}
                stores["online_store"] = place
            servers = self.broker.bootstrap_servers
            repo = build_stream_repo(directory / "feature_repo", servers, stream, stores)
            with repo.config_path.open("a", encoding="utf-8") as file:
                file.write(_BRISK_COMPACTION)
            progress = stack.enter_context(Progress(repo.stream_config))
            # Each scenario draws from a stream of its own, whichever others run.
            rng = np.random.default_rng([self.seed, *name.encode()])
            events = SeededEvents(int(rng.integers(2**32)))
            sender = stack.enter_context(Sender(repo.stream_config, events, rate))
            run = ScenarioRun(name, repo, server, rng, progress, sender)
            stack.callback(run.kill_all)
            yield run


@dataclass
class Outcome:
    """One line of the table."""

    name: str
    store: str
    num_faults: int
    num_events: int
    verdict: Verdict
    recoveries_seconds: list[float]
    note: str = ""
    problems: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        """Return what is not as it must be; examples stand for the rows that differ."""
        return [*self.problems, *self.verdict.examples, *self._duplicates()]

    def cells(self) -> list[str]:
        """Return the line's cells, see ``HEADINGS``."""
        verdict, times = self.verdict, self.recoveries_seconds
        counts = (self.num_faults, self.num_events, verdict.rows_expected)
        faults = (verdict.lost, verdict.stale, verdict.wrong, verdict.duplicated)
        waits = [f"{median(times):.1f}", f"{max(times):.1f}"] if times else ["-", "-"]
        numbers = [f"{number:,}" for number in (*counts, *faults, verdict.repeated)]
        return [self.name, self.store, *numbers, *waits, self.note]

    def _duplicates(self) -> list[str]:
        count = self.verdict.duplicated
        return [f"{count} offline rows are there twice after de-duplication"] if count else []


HEADINGS = [
    *("fault", "online", "faults", "events", "rows expected", "lost", "stale", "wrong"),
    *("duplicated", "repeated", "recover s", "max s", "note"),
]


class Progress:
    """Watches the group's committed offsets from a thread of its own.

    Args:
        config: Section ``stream``.
    """

    def __init__(self, config: StreamConfig) -> None:
        quick = {"reconnect_backoff_max_ms": 500, "request_timeout_ms": 3000}
        self._config = config.model_copy(
            update={"kafka_options": {**config.kafka_options, **quick}}
        )
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._ends: dict[TopicPartition, int] = {}
        self._committed: dict[TopicPartition, int] = {}
        self._watched = 0
        self._marks: list[tuple[float, dict[TopicPartition, int] | None]] = []
        self.recoveries_seconds: list[float] = []
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def mark(self) -> None:
        """A fault has ended now: note when all that was sent before is stored."""
        with self._lock:
            self._marks.append((time.monotonic(), None))

    @property
    def num_open(self) -> int:
        """Faults that the group has not recovered from yet."""
        with self._lock:
            return len(self._marks)

    def looks(self) -> int:
        """Return how often the offsets were read; it grows while the broker answers."""
        return self._watched

    def is_drained(self) -> bool:
        """Whether everything that was sent is stored, as far as was seen last."""
        with self._lock:
            return bool(self._ends) and _covers(self._committed, self._ends)

    def num_stored(self) -> int:
        """Return how many records the group has committed."""
        with self._lock:
            return sum(self._committed.values())

    def _watch(self) -> None:
        while not self._ended.is_set():
            # A broker that is down answers later.
            with contextlib.suppress(QarmError, KafkaError, OSError):
                self._watch_connected()
            self._ended.wait(_WATCH_SECONDS)

    def _watch_connected(self) -> None:
        with (
            closing(connect_admin(self._config)) as admin,
            closing(connect_consumer(self._config, _CONNECT_TIMEOUT_MS)) as reader,
        ):
            reader.topics()
            while not self._ended.wait(_WATCH_SECONDS):
                ends = _end_offsets(reader, self._config)
                committed = admin.list_group_offsets([self._config.consumer_group])
                offsets = committed[self._config.consumer_group].items()
                self._note(ends, {partition: entry.offset for partition, entry in offsets})

    def _note(self, ends: dict[TopicPartition, int], committed: dict[TopicPartition, int]) -> None:
        now = time.monotonic()
        with self._lock:
            self._ends, self._committed = ends, committed
            self._watched += 1
            still_open = []
            for started, goal in self._marks:
                # Taken after the fault's end: a little more than what was sent before it.
                goal = goal or ends
                if _covers(committed, goal):
                    self.recoveries_seconds.append(now - started)
                else:
                    still_open.append((started, goal))
            self._marks = still_open


class ScenarioRun:
    """The parts of one scenario, and what scenarios do with them."""

    def __init__(
        self,
        name: str,
        repo: StreamRepo,
        redis_server: RedisServer | None,
        rng: np.random.Generator,
        progress: Progress,
        sender: Sender,
    ) -> None:
        self.name = name
        self.repo = repo
        self.rng = rng
        self.progress = progress
        self._sender = sender
        self._redis_server = redis_server
        self._started: list[Worker] = []
        self.workers: list[Worker] = []
        self.problems: list[str] = []
        self.num_faults = 0
        self.note = ""

    @property
    def redis_server(self) -> RedisServer:
        """The scenario's own server."""
        assert self._redis_server is not None
        return self._redis_server

    def start_worker(self) -> Worker:
        """Start one more worker."""
        path = self.repo.directory / f"worker-{len(self._started)}.log"
        worker = Worker(self.repo.config_path, path)
        self._started.append(worker)
        self.workers.append(worker)
        return worker

    def start_workers(self, count: int) -> None:
        """Start workers, and return when the group stores events."""
        for _ in range(count):
            self.start_worker()
        self.wait_for(lambda: self.progress.num_stored() > 0, "the first stored batch")

    def kill_worker(self, worker: Worker) -> None:
        """Kill a worker; it no longer belongs to the run."""
        worker.kill()
        self.workers.remove(worker)

    def stop_worker(self, worker: Worker) -> None:
        """Let a worker drain; anything but status 0 is a problem."""
        # SIGTERM ends a process that has not come to handle it, as any that is still importing.
        self.wait_for(worker.has_started, f"the start of {worker.log_path.name}")
        status = worker.stop()
        self.workers.remove(worker)
        if status != 0:
            self.problems.append(f"{worker.log_path.name} ended with status {status} on SIGTERM")

    def fault_ended(self, is_timed: bool = True) -> None:
        """Count a fault, and measure the recovery from now on."""
        self.num_faults += 1
        if is_timed:
            self.progress.mark()

    def busy_worker(self) -> Worker:
        """Return the worker that is the first to store a batch from now on."""
        before = {worker: worker.num_batches() for worker in self.workers}
        busy: list[Worker] = []

        def look() -> bool:
            busy.extend(w for w, count in before.items() if w.num_batches() > count)
            return bool(busy)

        self.wait_for(look, "any worker to store a batch")
        return busy[int(self.rng.integers(len(busy)))]

    def pause(self, most_seconds: float) -> None:
        """Wait a random time."""
        time.sleep(self.rng.uniform(0, most_seconds))

    def sleep(self, seconds: float) -> None:
        """Let the fault last, while every worker lives."""
        time.sleep(seconds)
        self.check_workers()

    def wait_for(
        self, is_reached: Callable[[], bool], what: str, seconds: float = _DRAIN_SECONDS
    ) -> None:
        """Wait until something is so, while every worker lives.

        Raises:
            FaultRunError: If it takes too long, or a worker ends by itself.
        """
        deadline = time.monotonic() + seconds
        while not is_reached():
            self.check_workers()
            if time.monotonic() > deadline:
                raise FaultRunError(
                    f"{self.name}: waited {seconds:.0f} s for {what}\n{self._log_tails()}"
                )
            time.sleep(0.05)

    def check_workers(self) -> None:
        """Raise a ``FaultRunError`` if a worker has ended by itself."""
        for worker in self.workers:
            if worker.exit_code is not None:
                raise FaultRunError(
                    f"{self.name}: {worker.log_path.name} ended by itself with status "
                    f"{worker.exit_code}\n{_tail(worker)}"
                )

    def wait_until_recovered(self) -> None:
        """Wait until all that was sent before the last fault's end is stored."""
        self.wait_for(lambda: self.progress.num_open == 0, "recovery")

    def drain(self) -> list[Parcel]:
        """End the traffic, wait until everything is stored, end the workers; return all parcels."""
        parcels = self._sender.stop()
        looks = self.progress.looks()
        # Two more looks: the first one may have begun before the last record was sent.
        self.wait_for(lambda: self.progress.looks() >= looks + 2, "the broker")
        self.wait_for(self.progress.is_drained, "all records to be stored")
        self.wait_until_recovered()
        for worker in list(self.workers):
            self.stop_worker(worker)
        return parcels

    def finish(self) -> Outcome:
        """Drain, check both stores, and return the table's line."""
        parcels = self.drain()
        items = [item for parcel in parcels for item in parcel.items]
        interactions = [event for parcel in parcels for event in parcel.interactions]
        verdict = check_stores(self.repo, make_truth(self.repo, items, interactions))
        return self.outcome(sum(parcel.num_events for parcel in parcels), verdict)

    def outcome(self, num_events: int, verdict: Verdict) -> Outcome:
        """Return the table's line."""
        store = "sqlite" if self._redis_server is None else "redis"
        recoveries = self.progress.recoveries_seconds
        counts = (self.num_faults, num_events, verdict, recoveries, self.note, self.problems)
        return Outcome(self.name, store, *counts)

    def kill_all(self) -> None:
        """Leave no worker behind."""
        for worker in self._started:
            worker.kill()

    def _log_tails(self) -> str:
        return "\n".join(f"{worker.log_path.name}:\n{_tail(worker)}" for worker in self.workers)


def _tail(worker: Worker) -> str:
    return "\n".join(worker.log().splitlines()[-_LOG_TAIL_LINES:])


def _end_offsets(reader: KafkaConsumer, config: StreamConfig) -> dict[TopicPartition, int]:
    partitions = [
        TopicPartition(topic, partition)
        for topic in config.topics
        for partition in reader.partitions_for_topic(topic) or ()
    ]
    ends: dict[TopicPartition, int] = reader.end_offsets(partitions)
    return ends


def _covers(committed: dict[TopicPartition, int], goal: dict[TopicPartition, int]) -> bool:
    return all(committed.get(partition, 0) >= end for partition, end in goal.items())

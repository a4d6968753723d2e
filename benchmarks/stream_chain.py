"""The sections of ``stream.py`` that run a real worker: processor time, freshness, memory.

Shape letters in this file: N items.
"""

import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.stream_bench import (
    CODEBOOK_VERSION,
    ROWS_PER_ARROW_RECORD,
    START,
    Bench,
    cpu_seconds,
    resident_mib,
)
from benchmarks.stream_waits import Probe, online_presence, run_probes
from benchmarks.stream_write import TASK_NAMES, OurWriter
from streaming.messages import (
    InteractionEvent,
    ItemEvent,
    Message,
    Record,
    UserErasure,
    encode_interaction_event,
    encode_item_event,
    encode_user_erasure,
)
from streaming.rows import quantize_rows
from streaming.source import KafkaSource
from tests.fault.services import Worker

ROWS_PER_RECORD = {"json": 1, "arrow": ROWS_PER_ARROW_RECORD}
_WARM_ITEMS = 4_000
_LOAD_SHARE = 0.1
_REMOVALS_PER_SECOND = 20.0
"""Takedowns, and as many erasures; in a minute fewer than there are warm items."""
_READ_SECONDS = 300.0

Work = Callable[..., tuple[Any, ...]]


class Chain:
    """Sends items to a worker and takes times; item ids go up over all sections.

    Args:
        bench: Services.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._next_id = 0

    def cpu_figures(self, form: str) -> dict[str, float]:
        """Return processor microseconds per item: of the whole chain, and of each stage alone.

        Args:
            form: ``json`` or ``arrow``.

        Returns:
            ``cpu_per_item_vs_stages_<form>`` and what it is made of.
        """
        num_records = {
            items: items // ROWS_PER_RECORD[form]
            for items in (_WARM_ITEMS, self._bench.scale.num_items)
        }
        with ExitStack() as stack:
            worker = stack.enter_context(self._bench.worker(f"worker-{form}"))
            # One source takes the time of reading, the other one keeps what was read.
            timed, kept = (stack.enter_context(self._source(name)) for name in ("timed", "kept"))
            self._send(form, _WARM_ITEMS)
            self._bench.drain()
            for source in (timed, kept):
                _read(source, num_records[_WARM_ITEMS])
            figures = self._whole(form, worker)
            consume_seconds = _read(timed, num_records[self._bench.scale.num_items])[1]
            batches, _ = _read(kept, num_records[self._bench.scale.num_items])
        stages = {"consume": 1e6 * consume_seconds / self._bench.scale.num_items}
        stages |= self._stages(batches)
        figures |= {f"{stage}_cpu_us_{form}": us for stage, us in stages.items()}
        alone = sum(stages.values())
        return {
            f"cpu_per_item_vs_stages_{form}": figures[f"worker_cpu_us_{form}"] / alone,
            f"stages_cpu_us_{form}": alone,
            **figures,
        }

    def freshness_figures(self, items_per_second: float) -> dict[str, float]:
        """Return how long events take until a reader sees what they do, at a part of the peak load.

        The load is uploads; takedowns of older items and erasures of users run beside it.

        Args:
            items_per_second: What one worker stores at its best.

        Returns:
            Median, 99th percentile and worst in seconds of uploads (``freshness``), takedowns and
            erasures, and the load.
        """
        rate, seconds = _LOAD_SHARE * items_per_second, self._bench.scale.freshness_seconds
        with self._bench.worker("worker-freshness"):
            first_item = self._next_id
            self._send("json", _WARM_ITEMS)
            count = round(_REMOVALS_PER_SECOND * seconds)
            users_N = np.arange(count)
            self._bench.send(map(_click, users_N.tolist()), is_item=False)
            self._bench.drain()
            probes = [
                self._upload_probe(round(rate * seconds), rate),
                *self._removal_probes(np.arange(first_item, first_item + count), users_N),
            ]
            figures = run_probes(self._bench, probes)
        return {**figures, "freshness_items_per_second": rate}

    def memory_figures(self) -> dict[str, float]:
        """Return a worker's resident memory after a tenth of the items and after all of them."""
        num_items = self._bench.scale.num_memory_items
        resident = {}
        with self._bench.worker("worker-memory") as worker:
            for part in (num_items // 10, num_items - num_items // 10):
                self._send("json", part)
                self._bench.drain()
                resident[part] = resident_mib(worker.pid)
        first, last = resident.values()
        return {"rss_growth": last / first, "rss_first_mib": first, "rss_last_mib": last}

    def _send(self, form: str, num_items: int) -> None:
        make = {
            "json": self._bench.items.json_messages,
            "arrow": self._bench.items.arrow_messages,
        }[form]
        self._bench.send(make(self._next_id, num_items))
        self._next_id += num_items

    def _whole(self, form: str, worker: Worker) -> dict[str, float]:
        bench, num_items = self._bench, self._bench.scale.num_items
        assert bench.broker.pid is not None
        pids = {
            "worker": worker.pid,
            "broker": bench.broker.pid,
            "redis": bench.redis_server.pid,
        }
        with _held(worker):
            # It will find everything waiting, so its batches are full.
            self._send(form, num_items)
            before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            start = time.perf_counter()
        bench.drain()
        figures = {f"whole_us_{form}": 1e6 * (time.perf_counter() - start) / num_items}
        for name, pid in pids.items():
            figures[f"{name}_cpu_us_{form}"] = 1e6 * (cpu_seconds(pid) - before[name]) / num_items
        return figures

    @contextmanager
    def _source(self, name: str) -> Iterator[KafkaSource]:
        """Yield a source in a group of its own that begins behind what was sent so far."""
        config = self._bench.repo.stream_config
        group = {
            "consumer_group": f"{config.consumer_group}-{name}-{self._next_id}",
            "auto_offset_reset": "latest",
        }
        with closing(KafkaSource(config.model_copy(update=group))) as source:
            while not source.is_joined:
                source.read()
            # One more: only a poll asks the broker for the topic's end.
            source.read()
            yield source

    def _stages(self, batches: list[Sequence[Record]]) -> dict[str, float]:
        """Return processor microseconds per item of each stage after reading."""
        writer = OurWriter(self._bench.repo)
        num_items = self._bench.scale.num_items
        stages: dict[str, float] = {}
        inputs: list[tuple[Any, ...]] = [(batch,) for batch in batches]
        for stage, work in _stage_works(writer).items():
            work(*inputs[0])
            self._bench.empty_redis()
            gc.collect()
            gc.freeze()
            start = time.process_time()
            inputs = [work(*each) for each in inputs]
            stages[stage] = 1e6 * (time.process_time() - start) / num_items
            gc.unfreeze()
        return stages

    def _upload_probe(self, count: int, rate: float) -> Probe:
        ids_N = np.arange(self._next_id, self._next_id + count)
        self._next_id += count
        topic = self._bench.repo.stream_config.item_topic
        is_item, _ = online_presence(self._bench)
        return Probe("freshness", topic, ids_N, rate, self._bench.items.json_message, is_item)

    def _removal_probes(self, items_N: np.ndarray, users_N: np.ndarray) -> list[Probe]:
        """Return the probes of takedowns and of erasures; the items and users are online."""
        config = self._bench.repo.stream_config
        is_item, is_user = online_presence(self._bench)
        return [
            Probe(name, topic, ids_N, _REMOVALS_PER_SECOND, make, lambda ids, tell=tell: ~tell(ids))
            for name, topic, ids_N, make, tell in (
                ("takedown", config.item_topic, items_N, _takedown, is_item),
                ("erasure", config.interaction_topic, users_N, _erasure, is_user),
            )
        ]


def _takedown(item_id: int, time_us: int) -> Message:
    return encode_item_event(ItemEvent(item_id, time_us, {}, is_deleted=True))


def _click(user_id: int) -> Message:
    return encode_interaction_event(InteractionEvent(user_id, 1, START, (True, True)), TASK_NAMES)


def _erasure(user_id: int, time_us: int) -> Message:
    return encode_user_erasure(UserErasure(user_id, time_us))


def _stage_works(writer: OurWriter) -> dict[str, Work]:
    """Return the worker's stages after reading; each takes what the one before returned."""

    def quantize(records: Any, rows: pa.Table, encoded: Any) -> tuple[Any, ...]:
        codes = quantize_rows(rows, encoded, writer.live, writer.created)
        return records, rows, encoded, codes[CODEBOOK_VERSION]

    def write_offline(*laid_out: Any) -> tuple[Any, ...]:
        rows = writer.lay_out(*laid_out)
        writer.sink.write_offline(rows)
        return (rows,)

    def write_online(rows: Any) -> tuple[Any, ...]:
        writer.sink.write_online(rows)
        return ()

    return {
        "decode": lambda records: (records, *writer.decode(records)),
        "quantize": quantize,
        "write_offline": write_offline,
        "write_online": write_online,
    }


def _read(source: KafkaSource, num_records: int) -> tuple[list[Sequence[Record]], float]:
    """Return the next records, batch by batch, committed, and this process's seconds."""
    batches: list[Sequence[Record]] = []
    missing = num_records
    deadline = time.monotonic() + _READ_SECONDS
    start = time.process_time()
    while missing > 0:
        assert time.monotonic() < deadline, f"{missing} of {num_records} records did not come"
        batch = source.read()
        source.commit(batch)
        batches.append(batch.records)
        missing -= len(batch.records)
    assert missing == 0, f"{-missing} records more than were sent"
    return [batch for batch in batches if batch], time.process_time() - start


@contextmanager
def _held(worker: Worker) -> Iterator[None]:
    """Let a process stand still."""
    worker.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.signal(signal.SIGCONT)

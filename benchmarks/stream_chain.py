"""The sections of ``stream.py`` that run a real worker: processor time, freshness, memory.

Shape letters in this file: N items.
"""

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.stream_bench import (
    CODEBOOK_VERSION,
    ROWS_PER_ARROW_RECORD,
    Bench,
    cpu_seconds,
    resident_mib,
)
from benchmarks.stream_write import OurWriter
from qarm_feast.online_stores import code_online_store
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import code_view_name
from streaming.clients import connect_producer
from streaming.messages import Record
from streaming.rows import quantize_rows
from streaming.source import KafkaSource
from tests.fault.services import Worker

ROWS_PER_RECORD = {"json": 1, "arrow": ROWS_PER_ARROW_RECORD}
_WARM_ITEMS = 4_000
_TICK_SECONDS = 0.01
_LOAD_SHARE = 0.1
_UNSEEN_SECONDS = 30.0
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
        """Return the time from sending an event to reading it online, at a part of the peak load.

        Args:
            items_per_second: What one worker stores at its best.

        Returns:
            Median, 99th percentile and worst in seconds, and the load.
        """
        rate = _LOAD_SHARE * items_per_second
        count = round(rate * self._bench.scale.freshness_seconds)
        with self._bench.worker("worker-freshness"):
            self._send("json", _WARM_ITEMS)
            self._bench.drain()
            waits_N = self._waits(count, rate)
        return {
            "freshness_p50_seconds": float(np.quantile(waits_N, 0.5)),
            "freshness_p99_seconds": float(np.quantile(waits_N, 0.99)),
            "freshness_max_seconds": float(waits_N.max()),
            "freshness_items_per_second": rate,
        }

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

    def _waits(self, count: int, rate: float) -> np.ndarray:
        """Return the seconds from sending to being readable of each of ``count`` items."""
        store = open_feature_store(self._bench.repo.directory)
        view = store.get_feature_view(code_view_name(CODEBOOK_VERSION))
        online = code_online_store(store)
        ids_N = np.arange(self._next_id, self._next_id + count)
        self._next_id += count
        sent_N, seen_N = np.full(count, np.inf), np.full(count, np.nan)
        sender = threading.Thread(target=self._send_steadily, args=(ids_N, rate, sent_N))
        sender.start()
        deadline = time.monotonic() + count / rate + _UNSEEN_SECONDS
        while np.isnan(seen_N).any() and time.monotonic() < deadline:
            waiting = np.flatnonzero(np.isnan(seen_N) & (sent_N <= time.monotonic()))
            found = online.read_columns(store.config, view, ids_N[waiting], ["rq_code"])
            seen_N[waiting[found.present_N]] = time.monotonic()
            time.sleep(_TICK_SECONDS)
        sender.join()
        # What was never seen counts as seen at the end: the figure then misses its target.
        return np.where(np.isnan(seen_N), time.monotonic(), seen_N) - sent_N

    def _send_steadily(self, ids_N: np.ndarray, rate: float, sent_N: np.ndarray) -> None:
        topic = self._bench.repo.stream_config.item_topic
        start = time.monotonic()
        with closing(connect_producer(self._bench.repo.stream_config)) as producer:
            for place, item_id in enumerate(ids_N.tolist()):
                time.sleep(max(0.0, start + place / rate - time.monotonic()))
                now_us = round(time.time() * 1e6)
                message = self._bench.items.json_message(item_id, now_us)
                sent_N[place] = time.monotonic()
                producer.send(topic, key=message.key, value=message.value, headers=message.headers)
            producer.flush()


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

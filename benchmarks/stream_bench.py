"""What the sections of ``stream.py`` share: real services, made-up items, processes watched.

Shape letters in this file: N items, V vectors that items share, D embedding width.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import redis

from benchmarks.generators import low_rank
from examples.quickstart.broker import KafkaBroker
from examples.quickstart.kafka_admin import wait_until_drained
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.registry import CodebookRegistry
from qarm_feast.schema import TIMESTAMP
from streaming.clients import connect_producer, send_all
from streaming.messages import (
    SCHEMA_VERSION,
    SCHEMA_VERSION_HEADER,
    Message,
    encode_arrow,
)
from tests.fault.services import RedisServer, Worker
from tests.stream_repo import StreamRepo, build_stream_repo

EMBEDDING_DIM = 128
NUM_LEVELS = 3
NUM_NEIGHBORS = 25
ENCODER_VERSION = "e1"
CODEBOOK_VERSION = "v1"
START = 1_700_000_000_000_000
"""Event time of item 0; each item's is a microsecond later than the one before."""
ROWS_PER_ARROW_RECORD = 100
REDIS_TYPE = "qarm_feast.online_stores.redis.CodeRedisOnlineStore"
_BATCH_BYTES = 6_000_000
"""2048 JSON records fit; Arrow records make batches of 11,000 items."""
_MESSAGES_PER_ROUND = 5_000
_DRAIN_SECONDS = 3_600.0
_POINTS_PER_CENTROID = 3
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_CREATED = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    num_items: int = 100_000
    num_memory_items: int = 1_000_000
    pool_size: int = 50_000
    codebook_size: int = 4096
    num_vectors: int = 10_000
    freshness_seconds: float = 60.0
    num_rounds: int = 4


QUICK = Scale(
    num_items=12_000,
    num_memory_items=24_000,
    pool_size=5_000,
    codebook_size=256,
    num_vectors=2_000,
    freshness_seconds=5.0,
    num_rounds=2,
)


class MadeItems:
    """Uploads with ready vectors; item ``n`` has id ``n`` and one of ``num_vectors`` vectors.

    Args:
        num_vectors: Different vectors.
    """

    def __init__(self, num_vectors: int) -> None:
        self._x_VD = low_rank(num_vectors, EMBEDDING_DIM, seed=1)
        # Written once: otherwise most of a run would go into printing numbers.
        self._texts = [json.dumps(x_D, separators=(",", ":")) for x_D in self._x_VD.tolist()]

    def json_message(self, item_id: int, event_timestamp: int) -> Message:
        """Return what ``encode_item_event`` makes of the item; a test keeps the two equal."""
        text = (
            f'{{"item_id":{item_id},"event_timestamp":{event_timestamp},'
            f'"embedding":{self._texts[item_id % len(self._texts)]},'
            f'"encoder_version":"{ENCODER_VERSION}"}}'
        )
        headers = [(SCHEMA_VERSION_HEADER, SCHEMA_VERSION)]
        return Message(b"%d" % item_id, text.encode(), headers)

    def json_messages(self, first: int, num_items: int) -> Iterator[Message]:
        """Return one message per item."""
        for item_id in range(first, first + num_items):
            yield self.json_message(item_id, START + item_id)

    def arrow_messages(self, first: int, num_items: int) -> Iterator[Message]:
        """Return messages of ``ROWS_PER_ARROW_RECORD`` items."""
        for start in range(first, first + num_items, ROWS_PER_ARROW_RECORD):
            stop = min(start + ROWS_PER_ARROW_RECORD, first + num_items)
            yield encode_arrow(self._table(np.arange(start, stop)))

    def _table(self, item_ids_N: np.ndarray) -> pa.Table:
        x_ND = self._x_VD[item_ids_N % len(self._x_VD)]
        flat = pa.array(x_ND.reshape(-1))
        return pa.table(
            {
                "item_id": pa.array(item_ids_N),
                "event_timestamp": pa.array(START + item_ids_N).cast(TIMESTAMP),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, EMBEDDING_DIM),
                "encoder_version": pa.repeat(ENCODER_VERSION, len(item_ids_N)),
            }
        )


@dataclass(frozen=True)
class Bench:
    """One broker, one redis and one feature repository on both, for all sections."""

    scale: Scale
    directory: Path
    broker: KafkaBroker
    redis_server: RedisServer
    repo: StreamRepo
    items: MadeItems

    @contextmanager
    def worker(self, name: str) -> Iterator[Worker]:
        """Yield a real worker; it is stopped in order, or killed after a fault."""
        worker = Worker(self.repo.config_path, self.directory / f"{name}.log")
        try:
            yield worker
            worker.stop()
        finally:
            worker.kill()

    def send(self, messages: Iterator[Message], is_item: bool = True) -> None:
        """Send messages to one of the two topics; the broker has them when this returns."""
        config = self.repo.stream_config
        topic = config.item_topic if is_item else config.interaction_topic
        with closing(connect_producer(config)) as producer:
            pending: list[tuple[str, Message]] = []
            for message in messages:
                pending.append((topic, message))
                if len(pending) == _MESSAGES_PER_ROUND:
                    send_all(producer, pending)
                    pending = []
            send_all(producer, pending)

    def empty_redis(self) -> None:
        """Forget every row of the online store."""
        with redis.Redis(port=self.redis_server.port) as client:
            client.flushall()

    def drain(self) -> None:
        """Wait until the worker has stored everything."""
        wait_until_drained(self.repo.stream_config, _DRAIN_SECONDS)


@contextmanager
def open_bench(directory: Path, scale: Scale) -> Iterator[Bench]:
    """Yield the services; none of their processes outlives the block.

    Args:
        directory: An empty folder for everything that they write.
        scale: Sizes of the codebook.

    Yields:
        The services.
    """
    with ExitStack() as stack:
        broker = stack.enter_context(KafkaBroker(directory / "broker"))
        redis_server = stack.enter_context(RedisServer(directory / "redis", is_durable=False))
        place = f"127.0.0.1:{redis_server.port}"
        repo = build_stream_repo(
            directory / "feature_repo",
            broker.bootstrap_servers,
            {
                "max_batch_size": 2048,
                "max_batch_bytes": _BATCH_BYTES,
                # A worker that is held while its topic is filled must stay in its group.
                "kafka_options": {"session_timeout_ms": 60_000},
            },
            {"online_store": {"type": REDIS_TYPE, "connection_string": place}},
            lambda folder, version: publish_rough_codebook(folder, version, scale),
        )
        items = MadeItems(scale.num_vectors)
        yield Bench(scale, directory, broker, redis_server, repo, items)


def publish_rough_codebook(directory: Path, version: str, scale: Scale) -> Codebook:
    """Publish a codebook of full size that took one iteration: its speed is that of a good one."""
    uri = str(directory / "data" / "codebooks")
    rq = RqConfig(
        num_levels=NUM_LEVELS,
        codebook_size=scale.codebook_size,
        num_iterations=1,
        train_sample_size=_POINTS_PER_CENTROID * scale.codebook_size,
    )
    codebook = Codebook.train(
        version,
        # Ids that no upload has.
        np.arange(-scale.pool_size, 0),
        low_rank(scale.pool_size, EMBEDDING_DIM, seed=0),
        config=QuantizerConfig(rq=rq, vq=VqConfig(num_neighbors=NUM_NEIGHBORS)),
        encoder=EncoderFacts(ENCODER_VERSION, "0" * 64, None),
        created=_CREATED,
    )
    codebook.save(uri)
    CodebookRegistry(uri).publish(version)
    return codebook


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds, user and system, of all threads of a process so far."""
    # The second field is the program's name, in parentheses; it may hold spaces.
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

"""The write section of ``stream.py``: our write path against ``FeatureStore.push``.

Ours takes Kafka records with the codes given: decode, offline parts, redis with its guard. Stock
Feast gets the same rows as data frames of 1000, made beforehand, and pushes them to stock redis and
to its duckdb file store (without ``ibis``, which that store needs and this environment may lack: to
its default file store, which also reads, extends and rewrites one file; ``is_duckdb`` tells). Both
arms go forward in turns, on one server, with everything that exists frozen for the collector.

Shape letters in this file: N rows, L levels, V neighbours.
"""

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_source import PushMode
from feast.repo_config import RepoConfig
from feast.types import Array, Bool, Int64, String

from benchmarks.stream_bench import (
    CODEBOOK_VERSION,
    ENCODER_VERSION,
    NUM_LEVELS,
    NUM_NEIGHBORS,
    START,
    Bench,
    cpu_seconds,
)
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    CODE_ROWS,
    CODES,
    EVENT_TIMESTAMP,
    ITEM_ID,
    TIMESTAMP,
    USER_ERASURE_ROWS,
)
from streaming.assembly import history_length, load_codebooks
from streaming.columns import decode_interactions, decode_items
from streaming.messages import Message, Record
from streaming.rows import (
    EncodedItems,
    Encoder,
    LiveCodebooks,
    content_log_rows,
    encode_rows,
    hash_rows,
    interaction_log_rows,
)
from streaming.sink import BatchRows, FeastSink
from tests.stream_repo import StreamRepo

BATCH_SIZE = 2048
ROWS_PER_PUSH = 1000
TASK_NAMES = ("is_click", "is_like")
SQLITE_TYPE = "qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore"
SOURCE_FILE = "codes.parquet"
_PUSH_SOURCE = "codes_push"
_VIEW = "codes"


class FakeRecord(NamedTuple):
    """A consumed record, made without a broker."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


@dataclass
class Stopwatch:
    """Seconds on the clock and of this process, by part."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    def run(self, part: str, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Do some work and add its time to a part's."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work(*args, **options)
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - cpu
        return result


class TimedFeatureStore(FeatureStore):
    """Stock Feast that tells the time of the two halves of a push."""

    def __init__(self, config: RepoConfig) -> None:
        super().__init__(config=config)
        self.stopwatch = Stopwatch()

    def write_to_online_store(self, *args: Any, **options: Any) -> None:
        """Write as stock does, timed."""
        write = super().write_to_online_store
        self.stopwatch.run("online", write, *args, **options)

    def write_to_offline_store(self, *args: Any, **options: Any) -> None:
        """Write as stock does, timed."""
        write = super().write_to_offline_store
        self.stopwatch.run("offline", write, *args, **options)


class OurWriter:
    """Decode and both stores of a worker, one step at a time."""

    def __init__(self, repo: StreamRepo) -> None:
        feature_store = open_feature_store(repo.directory)
        log = open_code_log(feature_store.config)
        online = FeastOnlineTables(feature_store)
        self.sink = FeastSink(log, online, history_length(feature_store))
        self.created = datetime.now(UTC)
        self.live = LiveCodebooks(load_codebooks(str(repo.config_path)), _no_encoder)

    def decode(self, records: Sequence[Record]) -> tuple[pa.Table, list[EncodedItems]]:
        """Return hashed rows and their ready vectors."""
        rows = hash_rows(decode_items(records).rows)
        encoded, letters = encode_rows(records, rows, self.live)
        assert not letters, letters
        return rows, encoded

    def lay_out(
        self,
        records: Sequence[Record],
        rows: pa.Table,
        encoded: Sequence[EncodedItems],
        codes: pa.Table,
    ) -> BatchRows:
        """Return the rows of both stores."""
        none = decode_interactions([], TASK_NAMES).rows
        interactions = interaction_log_rows(none, TASK_NAMES, self.created)
        content = content_log_rows(records, rows, encoded, self.created)
        no_erasures = USER_ERASURE_ROWS.empty_table()
        return BatchRows(
            {CODEBOOK_VERSION: codes}, content, interactions, interactions, no_erasures
        )


def write_figures(bench: Bench) -> dict[str, float]:
    """Return how many times as fast as ``FeatureStore.push`` our write path is, by form of record.

    Args:
        bench: Services; its redis is emptied.

    Returns:
        ``write_path_vs_feast_push_<form>`` (clock), ``write_path_cpu_vs_feast_push_<form>``
        (processor time of the client), the same of each part, and microseconds per item.
    """
    num_items, scale = bench.scale.num_items, bench.scale
    codes = given_codes(num_items, scale.codebook_size, scale.pool_size)
    messages = {
        "json": list(bench.items.json_messages(0, num_items)),
        "arrow": list(bench.items.arrow_messages(0, num_items)),
    }
    place = f"127.0.0.1:{bench.redis_server.port}"
    stock = applied_store(bench.directory / "stock", {"type": "redis", "connection_string": place})
    writer = OurWriter(bench.repo)
    watches = {"push": stock.stopwatch, **{form: Stopwatch() for form in messages}}
    server_seconds = dict.fromkeys(watches, 0.0)

    def step(arm: str, part: slice) -> None:
        rows = codes.slice(part.start, part.stop - part.start)
        if arm == "push":
            _push(stock, rows, PushMode.ONLINE_AND_OFFLINE)
        else:
            _write_ours(writer, records_of(messages[arm], part, num_items), rows, watches[arm])

    with frozen():
        for part in _parts(num_items, scale.num_rounds):
            for arm in watches:
                bench.empty_redis()
                before = cpu_seconds(bench.redis_server.pid)
                step(arm, part)
                server_seconds[arm] += cpu_seconds(bench.redis_server.pid) - before
    figures = _ratios({form: watches[form] for form in messages}, stock.stopwatch, num_items)
    return figures | {
        f"redis_server_us_{arm}": 1e6 * seconds / num_items
        for arm, seconds in server_seconds.items()
    }


def sqlite_figures(bench: Bench) -> dict[str, float]:
    """Return how many times as fast as an online push to stock's our sqlite store takes codes.

    Args:
        bench: Its directory takes both files.

    Returns:
        ``sqlite_vs_feast`` (clock), and microseconds per item of both.
    """
    num_items, scale = bench.scale.num_items, bench.scale
    codes = given_codes(num_items, scale.codebook_size, scale.pool_size)
    stock, ours = (
        applied_store(bench.directory / kind, {"type": kind, "path": f"{kind}.db"})
        for kind in ("sqlite", SQLITE_TYPE)
    )
    view, online, watch = ours.get_feature_view(_VIEW), code_online_store(ours), Stopwatch()
    with frozen():
        for part in _parts(num_items, scale.num_rounds):
            rows = codes.slice(part.start, part.stop - part.start)
            for start in range(0, rows.num_rows, BATCH_SIZE):
                batch = rows.slice(start, BATCH_SIZE)
                watch.run("sqlite", online.write_table, ours.config, view, batch)
            _push(stock, rows, PushMode.ONLINE)
    seconds, stock_seconds = watch.wall["sqlite"], stock.stopwatch.wall["push"]
    return {
        "sqlite_vs_feast": stock_seconds / seconds,
        "sqlite_us": 1e6 * seconds / num_items,
        "push_sqlite_us": 1e6 * stock_seconds / num_items,
    }


def given_codes(
    num_rows: int, codebook_size: int, pool_size: int, num_levels: int = NUM_LEVELS
) -> pa.Table:
    """Return made-up code rows of items 0, 1, ...; their hashes have the right length."""
    rng = np.random.default_rng(0)
    rq_NL = rng.integers(codebook_size, size=(num_rows, num_levels))
    vq_NV = rng.integers(pool_size, size=(num_rows, NUM_NEIGHBORS))
    item_ids_N = np.arange(num_rows)
    columns = [
        pa.array(item_ids_N),
        _lists(rq_NL),
        _lists(vq_NV),
        pa.repeat(ENCODER_VERSION, num_rows),
        pa.array([f"{item_id:032x}" for item_id in item_ids_N.tolist()]),
        pa.repeat(False, num_rows),
        pa.array(START + item_ids_N).cast(TIMESTAMP),
        pa.repeat(pa.scalar(datetime.now(UTC), TIMESTAMP), num_rows),
    ]
    return pa.table(columns, schema=CODE_ROWS)


def records_of(messages: list[Message], part: slice, num_items: int) -> list[FakeRecord]:
    """Return the records of some of the items."""
    rows_per_record = -(-num_items // len(messages))
    chosen = messages[part.start // rows_per_record : part.stop // rows_per_record]
    now_ms = round(time.time() * 1000)
    return [FakeRecord("items", 0, i, now_ms, *message) for i, message in enumerate(chosen)]


def applied_store(
    directory: Path,
    online: dict[str, str],
    view_name: str = _VIEW,
    offline_type: str | None = None,
) -> TimedFeatureStore:
    """Return an applied repository over one parquet file, empty at first.

    Args:
        directory: Made here; takes the file, :data:`SOURCE_FILE`.
        online: Its online store.
        view_name: Name of its only view.
        offline_type: Feast's name of its offline store; None: duckdb, or ``file`` without ``ibis``.

    Returns:
        The repository.
    """
    directory.mkdir(parents=True)
    config = RepoConfig(
        project="stock",
        provider="local",
        registry=str(directory / "registry.db"),
        online_store=online,
        offline_store={"type": offline_type or ("duckdb" if is_duckdb() else "file")},
        entity_key_serialization_version=3,
        repo_path=directory,
    )
    store = TimedFeatureStore(config)
    path = str(directory / SOURCE_FILE)
    pq.write_table(CODE_ROWS.empty_table(), path)
    files = FileSource(
        name="codes_file",
        path=path,
        timestamp_field=EVENT_TIMESTAMP,
        created_timestamp_column="created",
    )
    item = Entity(name="item", join_keys=[ITEM_ID], value_type=ValueType.INT64)
    types = {CODES: Array(Int64), pa.string(): String, pa.bool_(): Bool}
    view = FeatureView(
        name=view_name,
        entities=[item],
        ttl=timedelta(0),
        schema=[
            Field(name=column.name, dtype=types[column.type])
            for column in CODE_ROWS
            if column.type in types
        ],
        source=PushSource(name=_PUSH_SOURCE, batch_source=files),
    )
    store.apply([item, view])
    return store


def is_duckdb() -> bool:
    """Return whether Feast's duckdb store can be used here: it needs ibis."""
    return importlib.util.find_spec("ibis") is not None


def _write_ours(
    writer: OurWriter, records: list[FakeRecord], codes: pa.Table, watch: Stopwatch
) -> None:
    done = 0
    rows_per_record = -(-codes.num_rows // len(records))
    step = max(1, BATCH_SIZE // rows_per_record)
    for start in range(0, len(records), step):
        batch = records[start : start + step]
        rows, encoded = watch.run("decode", writer.decode, batch)
        given = codes.slice(done, rows.num_rows)
        done += rows.num_rows
        laid_out = watch.run("offline", writer.lay_out, batch, rows, encoded, given)
        watch.run("offline", writer.sink.write_offline, laid_out)
        watch.run("online", writer.sink.write_online, laid_out)
    assert done == codes.num_rows


def _push(store: TimedFeatureStore, codes: pa.Table, to: PushMode) -> None:
    for start in range(0, codes.num_rows, ROWS_PER_PUSH):
        frame: pd.DataFrame = codes.slice(start, ROWS_PER_PUSH).to_pandas()
        store.stopwatch.run("push", store.push, _PUSH_SOURCE, frame, to=to)


def _ratios(ours: dict[str, Stopwatch], stock: Stopwatch, num_items: int) -> dict[str, float]:
    figures = {"push_us": 1e6 * stock.wall["push"] / num_items}
    for part in ("online", "offline"):
        figures[f"push_{part}_us"] = 1e6 * stock.wall[part] / num_items
    for form, watch in ours.items():
        figures[f"write_path_{form}_us"] = 1e6 * sum(watch.wall.values()) / num_items
        figures[f"write_path_vs_feast_push_{form}"] = stock.wall["push"] / sum(watch.wall.values())
        figures[f"write_path_cpu_vs_feast_push_{form}"] = stock.cpu["push"] / sum(
            watch.cpu.values()
        )
        for part, seconds in watch.wall.items():
            figures[f"{part}_{form}_us"] = 1e6 * seconds / num_items
            if part in stock.wall:
                figures[f"{part}_vs_feast_{form}"] = stock.wall[part] / seconds
    return figures


def _parts(num_items: int, num_rounds: int) -> Iterator[slice]:
    size = num_items // num_rounds
    for number in range(num_rounds):
        yield slice(number * size, (number + 1) * size)


@contextmanager
def frozen() -> Iterator[None]:
    """Keep what exists out of the collector's way, as a daemon does."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _lists(codes_NK: np.ndarray) -> pa.Array:
    offsets = np.arange(len(codes_NK) + 1, dtype=np.int32) * np.int32(codes_NK.shape[1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes_NK.reshape(-1)))


def _no_encoder(version: str) -> Encoder:
    raise AssertionError(f"every vector is ready, yet encoder {version!r} is asked for")

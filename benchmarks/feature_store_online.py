"""The online part of ``feature_store.py``: our two stores, Feast's two, and their bare clients.

All arms take the same rows in turns. A bare client gets the bytes that ours stored, made ready
beforehand, and neither guards nor encodes: redis-py's pipelined HSET and HMGET, and sqlite3's
``executemany`` and ``IN`` in a file like ours.

Shape letters: N items.
"""

import sqlite3
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import redis
from feast import FeatureStore

from benchmarks.stream_bench import (
    CODEBOOK_VERSION,
    REDIS_TYPE,
    cpu_seconds,
)
from benchmarks.stream_write import SQLITE_TYPE, Stopwatch, applied_store, frozen, given_codes
from qarm_feast.online_stores import code_online_store
from qarm_feast.online_stores.blobs import join_blobs, split_blobs
from qarm_feast.online_stores.codec import encode_int64_keys
from qarm_feast.reader import CodeReader
from qarm_feast.schema import ITEM_ID, code_view_name
from tests.fault.services import RedisServer

NUM_LEVELS = 6
CODEBOOK_SIZE = 4096
POOL_SIZE = 1_000_000
VIEW = code_view_name(CODEBOOK_VERSION)
FEATURES = ("vq_code", "rq_code")
_PROJECT = b"stock"
"""What :func:`applied_store` calls its project."""
_ROWS_PER_PIPELINE = 1_000
_WARM_READS = 3


@dataclass(frozen=True)
class Scale:
    """How much is written and read.

    Attributes:
        num_rows: Rows of a write in one call.
        num_batch_rows: Rows of the writes in small batches.
        num_rounds: How often each arm writes them, into an empty store.
        num_reads: How often each arm reads.
    """

    num_rows: int = 100_000
    num_batch_rows: int = 20_000
    num_rounds: int = 3
    num_reads: int = 300


QUICK = Scale(num_rows=20_000, num_batch_rows=4_000, num_rounds=2, num_reads=100)
BATCH_SIZES = (100, 1000)
READ_SIZES = (100, 1000)


class Arm(Protocol):
    """One way to write and read code rows."""

    clear: Callable[[], Any]
    """Forgets all rows."""

    def write(self, rows: slice) -> None:
        """Write some of the rows in one call."""

    def read(self, item_ids_N: np.ndarray) -> Any:
        """Return the codes of items, in this arm's own form."""


class StockArm:
    """Feast's store behind ``write_to_online_store`` and ``get_online_features``."""

    def __init__(self, store: FeatureStore, codes: pa.Table, clear: Callable[[], Any]) -> None:
        self._store = store
        self._frame: pd.DataFrame = codes.to_pandas()
        self.clear = clear

    def write(self, rows: slice) -> None:
        """Write a data frame."""
        self._store.write_to_online_store(VIEW, self._frame.iloc[rows])

    def read(self, item_ids_N: np.ndarray) -> list[np.ndarray]:
        """Return both kinds of codes as int64 matrices."""
        features = [f"{VIEW}:{name}" for name in FEATURES]
        entities = [{ITEM_ID: item_id} for item_id in item_ids_N.tolist()]
        found = self._store.get_online_features(features=features, entity_rows=entities).to_dict()
        return [np.array(found[name], dtype=np.int64) for name in FEATURES]


class OurArm:
    """Our store behind its columnar entry points."""

    def __init__(self, store: FeatureStore, codes: pa.Table, clear: Callable[[], Any]) -> None:
        self._store = store
        self._codes = codes
        self.clear = clear
        self._online = code_online_store(store)
        self._view = store.get_feature_view(VIEW)
        self._reader = CodeReader(store, CODEBOOK_VERSION)

    def write(self, rows: slice) -> None:
        """Write a slice of the table, under the guard."""
        table = self._codes.slice(rows.start, rows.stop - rows.start)
        num_changed = self._online.write_table(self._store.config, self._view, table)
        assert num_changed == table.num_rows

    def read(self, item_ids_N: np.ndarray) -> list[np.ndarray]:
        """Return both kinds of codes as int64 matrices."""
        codes, present_N = self._reader.read_codes(item_ids_N)
        assert present_N.all()
        return [codes.vq_NV, codes.rq_NL]


class BareRedisArm:
    """redis-py with ready bytes.

    Args:
        client: On a database of its own.
        filled: A client of the database that ours wrote.
        num_rows: Items 0 to this are there.
    """

    def __init__(self, client: redis.Redis, filled: redis.Redis, num_rows: int) -> None:
        self._client = client
        self.clear = client.flushdb
        self._keys = _entity_keys(num_rows, _PROJECT)
        with filled.pipeline(transaction=False) as pipe:
            for key in self._keys:
                pipe.hgetall(key)
            self._hashes = pipe.execute()
        by_size = sorted(self._hashes[0].items(), key=lambda pair: len(pair[1]))
        self._code_fields = [field for field, _ in by_size[-2:]]

    def write(self, rows: slice) -> None:
        """Send one HSET per row, a thousand per round trip."""
        for start in range(rows.start, rows.stop, _ROWS_PER_PIPELINE):
            stop = min(start + _ROWS_PER_PIPELINE, rows.stop)
            with self._client.pipeline(transaction=False) as pipe:
                for key, mapping in zip(
                    self._keys[start:stop], self._hashes[start:stop], strict=True
                ):
                    pipe.hset(key, mapping=mapping)
                pipe.execute()

    def read(self, item_ids_N: np.ndarray) -> list[Any]:
        """Return the stored bytes of two fields of each hash."""
        with self._client.pipeline(transaction=False) as pipe:
            for item_id in item_ids_N.tolist():
                pipe.hmget(self._keys[item_id], self._code_fields)
            return pipe.execute()


class BareSqliteArm:
    """sqlite3 with ready rows.

    Args:
        path: A file of its own.
        filled: The file that ours wrote.
        num_rows: Items 0 to this are there.
    """

    def __init__(self, path: Path, filled: Path, num_rows: int) -> None:
        self._table = f"stock_{VIEW}"
        self._keys = _entity_keys(num_rows)
        self._conn = sqlite3.connect(path, isolation_level=None)
        self._conn.execute("PRAGMA journal_mode = WAL")
        with closing(sqlite3.connect(filled)) as conn:
            made_by = conn.execute(
                "SELECT sql FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL ORDER BY type"
                " DESC",
                (self._table,),
            ).fetchall()
            self._statements = [statement for (statement,) in made_by]
            self._rows = conn.execute(
                f"SELECT * FROM {self._table} ORDER BY entity_key, feature_name"
            ).fetchall()
        place_of_key = {key: place for place, key in enumerate(self._keys)}
        self._rows.sort(key=lambda row: place_of_key[row[0]])
        self._rows_per_item = len(self._rows) // num_rows

    def clear(self) -> None:
        """Make the table again."""
        self._conn.execute(f"DROP TABLE IF EXISTS {self._table}")
        for statement in self._statements:
            self._conn.execute(statement)

    def write(self, rows: slice) -> None:
        """Insert or replace all rows in one transaction."""
        ready = self._rows[rows.start * self._rows_per_item : rows.stop * self._rows_per_item]
        marks = ", ".join("?" * len(ready[0]))
        self._conn.execute("BEGIN IMMEDIATE")
        self._conn.executemany(f"INSERT OR REPLACE INTO {self._table} VALUES ({marks})", ready)
        self._conn.execute("COMMIT")

    def read(self, item_ids_N: np.ndarray) -> list[Any]:
        """Return the stored bytes of two features of each item."""
        keys = [self._keys[item_id] for item_id in item_ids_N.tolist()]
        marks = ", ".join("?" * len(keys))
        return self._conn.execute(
            f"SELECT entity_key, feature_name, value FROM {self._table} "
            f"WHERE entity_key IN ({marks}) AND feature_name IN (?, ?)",
            [*keys, *FEATURES],
        ).fetchall()


def redis_figures(directory: Path, scale: Scale) -> dict[str, float]:
    """Return the figures of both redis stores.

    Args:
        directory: Takes the repositories.
        scale: How much is run.

    Returns:
        See :func:`_figures`, and the server's microseconds per row that each arm writes.
    """
    codes = _codes(scale)
    with ExitStack() as stack:
        server = stack.enter_context(RedisServer(directory / "server", is_durable=False))
        clients = [
            stack.enter_context(redis.Redis(port=server.port, db=number)) for number in range(3)
        ]

        def store(kind: str, number: int) -> FeatureStore:
            place = f"127.0.0.1:{server.port},db={number}"
            online = {"type": kind, "connection_string": place}
            return applied_store(directory / f"redis{number}", online, VIEW)

        ours = OurArm(store(REDIS_TYPE, 0), codes, clients[0].flushdb)
        stock = StockArm(store("redis", 1), codes, clients[1].flushdb)
        ours.write(slice(0, scale.num_rows))
        bare = BareRedisArm(clients[2], clients[0], scale.num_rows)
        arms: dict[str, Arm] = {"ours": ours, "feast": stock, "bare": bare}
        return _figures("redis", arms, scale, lambda: cpu_seconds(server.pid))


def sqlite_figures(directory: Path, scale: Scale) -> dict[str, float]:
    """Return the figures of both sqlite stores.

    Args:
        directory: Takes the repositories and their files.
        scale: How much is run.

    Returns:
        See :func:`_figures`.
    """
    codes = _codes(scale)
    paths = {name: directory / f"{name}.db" for name in ("ours", "feast", "bare")}

    def store(kind: str, name: str) -> FeatureStore:
        online = {"type": kind, "path": str(paths[name])}
        return applied_store(directory / f"sqlite_{name}", online, VIEW)

    stores = {"ours": store(SQLITE_TYPE, "ours"), "feast": store("sqlite", "feast")}
    clears = {name: partial(make_again, store) for name, store in stores.items()}
    ours = OurArm(stores["ours"], codes, clears["ours"])
    stock = StockArm(stores["feast"], codes, clears["feast"])
    ours.write(slice(0, scale.num_rows))
    bare = BareSqliteArm(paths["bare"], paths["ours"], scale.num_rows)
    return _figures("sqlite", {"ours": ours, "feast": stock, "bare": bare}, scale, lambda: 0.0)


def _figures(
    kind: str, arms: dict[str, Arm], scale: Scale, server_seconds: Callable[[], float]
) -> dict[str, float]:
    """Return write and read figures of one kind of store.

    ``<kind>_write_vs_feast`` and ``<kind>_write_vs_bare_client`` are other arm's time over ours,
    an ending is the batch size; ``<kind>_write_us_<arm>`` and ``<kind>_write_cpu_us_<arm>`` are
    per row, the client only. Reads are ratios of medians; times are milliseconds.
    """
    figures: dict[str, float] = {}
    with frozen():
        for batch_size in (*BATCH_SIZES, scale.num_rows):
            ending = "" if batch_size == scale.num_rows else f"_{batch_size}"
            figures |= _write_figures(kind, arms, scale, batch_size, server_seconds, ending)
        for num_items in READ_SIZES:
            ending = "" if num_items == max(READ_SIZES) else f"_{num_items}"
            figures |= _read_figures(kind, arms, scale, num_items, ending)
    return figures


def _write_figures(
    kind: str,
    arms: dict[str, Arm],
    scale: Scale,
    batch_size: int,
    server_seconds: Callable[[], float],
    ending: str,
) -> dict[str, float]:
    num_rows = scale.num_rows if not ending else scale.num_batch_rows
    watch, server = Stopwatch(), dict.fromkeys(arms, 0.0)
    for _ in range(scale.num_rounds):
        for name, arm in arms.items():
            arm.clear()
            before = server_seconds()
            for start in range(0, num_rows, batch_size):
                watch.run(name, arm.write, slice(start, min(start + batch_size, num_rows)))
            server[name] += server_seconds() - before
    us_per_second = 1e6 / (num_rows * scale.num_rounds)
    figures = {
        f"{kind}_write_vs_feast{ending}": watch.wall["feast"] / watch.wall["ours"],
        f"{kind}_write_vs_bare_client{ending}": watch.wall["bare"] / watch.wall["ours"],
    }
    for name in arms:
        figures[f"{kind}_write_us_{name}{ending}"] = watch.wall[name] * us_per_second
        figures[f"{kind}_write_cpu_us_{name}{ending}"] = watch.cpu[name] * us_per_second
        if server[name]:
            figures[f"{kind}_write_server_us_{name}{ending}"] = server[name] * us_per_second
    _say(figures)
    return figures


def _read_figures(
    kind: str, arms: dict[str, Arm], scale: Scale, num_items: int, ending: str
) -> dict[str, float]:
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(scale.num_reads + _WARM_READS):
        item_ids_N = rng.choice(scale.num_rows, size=num_items, replace=False)
        found = {}
        for name, arm in arms.items():
            watch = Stopwatch()
            found[name] = watch.run(name, arm.read, item_ids_N)
            if number >= _WARM_READS:
                seconds[name].append(watch.wall[name])
        assert all(map(np.array_equal, found["ours"], found["feast"])), "arms read other codes"
    p50, p99 = (
        {name: 1e3 * float(np.quantile(times, level)) for name, times in seconds.items()}
        for level in (0.5, 0.99)
    )
    figures = {
        f"{kind}_read_vs_feast{ending}": p50["feast"] / p50["ours"],
        f"{kind}_read_vs_bare_client{ending}": p50["bare"] / p50["ours"],
        f"{kind}_read_p99_over_p50{ending}": p99["ours"] / p50["ours"],
    }
    for name in arms:
        figures[f"{kind}_read_p50_ms_{name}{ending}"] = p50[name]
        figures[f"{kind}_read_p99_ms_{name}{ending}"] = p99[name]
    _say(figures)
    return figures


def _codes(scale: Scale) -> pa.Table:
    return given_codes(scale.num_rows, CODEBOOK_SIZE, POOL_SIZE, NUM_LEVELS)


def _entity_keys(num_rows: int, suffix: bytes = b"") -> list[bytes]:
    """Return the stored keys of items 0, 1, ..."""
    return split_blobs(join_blobs(encode_int64_keys(ITEM_ID, np.arange(num_rows)), suffix))


def make_again(store: FeatureStore) -> None:
    """Drop the view's table and create it."""
    view, online = store.get_feature_view(VIEW), store.provider.online_store
    online.update(store.config, [view], [], [], [], False)
    online.update(store.config, [], [view], [], [], False)


def _say(figures: dict[str, float]) -> None:
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(f"  {rounded}", file=sys.stderr, flush=True)

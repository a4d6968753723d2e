"""Views, rows and running stores that the online store tests and their writers share."""

import itertools
import socket
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from feast import Entity, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp
from feast.utils import _convert_arrow_to_proto

from qarm_feast.schema import CODE_ROWS, RECENT_ITEM_ROWS

SQLITE_TYPE = "qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore"
REDIS_TYPE = "qarm_feast.online_stores.redis.CodeRedisOnlineStore"
ITEM = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
EPOCH = datetime(2024, 3, 10, 12, tzinfo=UTC)


def moment(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)


def _view(
    name: str, entity: Entity, fields: dict[str, Any], tags: dict[str, str] | None = None
) -> FeatureView:
    return FeatureView(
        name=name,
        entities=[entity],
        schema=[Field(name=entity.join_key, dtype=Int64)]
        + [Field(name=field, dtype=dtype) for field, dtype in fields.items()],
        source=FileSource(
            name=f"{name}_source", path=f"{name}.parquet", timestamp_field="event_timestamp"
        ),
        ttl=timedelta(0),
        tags=tags or {},
    )


def code_view() -> FeatureView:
    fields = {
        "rq_code": Array(Int64),
        "vq_code": Array(Int64),
        "encoder_version": String,
        "content_hash": String,
        "is_deleted": Bool,
    }
    tags = {"qarm.num_levels": "2", "qarm.num_neighbors": "3"}
    return _view("item_codes_v1", ITEM, fields, tags)


def recent_view(history_length: int = 4) -> FeatureView:
    fields = {"item_ids": Array(Int64), "item_timestamps": Array(Int64)}
    tags = {"qarm.merge": "recent_items", "qarm.history_length": str(history_length)}
    return _view("user_recent_items", USER, fields, tags)


def profile_view() -> FeatureView:
    fields = {
        "age": Int64,
        "zone": Int32,
        "city": String,
        "height": Float32,
        "income": Float64,
        "is_member": Bool,
        "joined": UnixTimestamp,
        "picture": Bytes,
        "taste": Array(Float32),
    }
    return _view("user_profile", USER, fields)


def wide_view(names: Sequence[str]) -> FeatureView:
    return _view("wide", ITEM, dict.fromkeys(names, Int64))


def code_rows(
    rows: Sequence[tuple[int, int, str, list[int]]], is_deleted: bool = False
) -> pa.Table:
    """Make rows of (item, microseconds, content hash, RQ codes); VQ codes follow from them."""
    return pa.table(
        {
            "item_id": [row[0] for row in rows],
            "rq_code": [row[3] for row in rows],
            "vq_code": [[*row[3], 5] for row in rows],
            "encoder_version": ["e1" for _ in rows],
            "content_hash": [row[2] for row in rows],
            "is_deleted": [is_deleted for _ in rows],
            "event_timestamp": [moment(row[1]) for row in rows],
            "created": [moment(10**9) for _ in rows],
        },
        schema=CODE_ROWS,
    )


def recent_rows(rows: Sequence[tuple[int, list[tuple[int, int]]]]) -> pa.Table:
    """Make rows of (user, pairs of (timestamp, item))."""
    return pa.table(
        {
            "user_id": [user for user, _ in rows],
            "item_ids": [[item for _, item in pairs] for _, pairs in rows],
            "item_timestamps": [[timestamp for timestamp, _ in pairs] for _, pairs in rows],
            "event_timestamp": [moment(0) for _ in rows],
            "created": [moment(0) for _ in rows],
        },
        schema=RECENT_ITEM_ROWS,
    )


def profile_rows() -> pa.Table:
    return pa.table(
        {
            "user_id": pa.array([1, 2, -3]),
            "age": pa.array([40, -1, 2**60]),
            "zone": pa.array([7, -7, 0], pa.int32()),
            "city": ["Köln", "", "x" * 200],
            "height": pa.array([1.7, -0.0, 3e38], pa.float32()),
            "income": [1e300, 0.1, -5.0],
            "is_member": [True, False, True],
            "joined": pa.array([0, 1_700_000_000, 5], pa.timestamp("s", tz="UTC")),
            "picture": pa.array([b"\x00\x01\x00", b"", b"z" * 130], pa.binary()),
            "taste": pa.array([[0.5, -1.0], [2.0], [0.25] * 40], pa.list_(pa.float32())),
            "event_timestamp": pa.array([moment(5)] * 3, pa.timestamp("us", tz="UTC")),
        }
    )


def make_settings(directory: Path, store_type: str, place: dict[str, str]) -> dict[str, Any]:
    return {
        "project": "qarm",
        "provider": "local",
        "registry": str(directory / "registry.db"),
        "online_store": {"type": store_type, **place},
        "entity_key_serialization_version": 3,
    }


def feast_rows(view: FeatureView, table: pa.Table) -> list[Any]:
    rows: list[Any] = _convert_arrow_to_proto(
        table.combine_chunks(), view, {view.join_keys[0]: ValueType.INT64}
    )
    return rows


def item_key(item_id: int, join_key: str = "item_id") -> EntityKey:
    return EntityKey(join_keys=[join_key], entity_values=[Value(int64_val=item_id)])


_MOST_PORTS = 65_536
_CLUSTER_BUS_OFFSET = 10_000
"""A node of a Redis cluster also listens on its own port plus this."""


def _free_port(below: int) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < below:
            return port


class running_redis:  # noqa: N801  (reads as the statement it is)
    """A redis-server of our own on a free loopback port, gone at the end of the block."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = _free_port(below=_MOST_PORTS - _CLUSTER_BUS_OFFSET)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.process = subprocess.Popen(
            [*command, "--dir", str(directory), *options], stdout=subprocess.DEVNULL
        )

    def __enter__(self) -> int:
        with redis.Redis(port=self.port) as client:
            for _ in range(200):
                try:
                    client.ping()
                    return self.port
                except redis.ConnectionError:
                    time.sleep(0.05)
        raise TimeoutError(f"redis-server did not come up on port {self.port}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)


@dataclass
class Online:
    """Ours and stock Feast's store over the same data."""

    store: Any
    config: RepoConfig
    stock: Any
    stock_config: RepoConfig
    settings: dict[str, Any]
    directory: Path

    def write(self, view: FeatureView, table: pa.Table) -> int:
        applied: int = self.store.write_table(self.config, view, table)
        return applied

    def codes(self, *item_ids: int) -> list[list[int] | None]:
        batch = self.store.read_columns(self.config, code_view(), np.array(item_ids), ["rq_code"])
        values = iter(batch.columns["rq_code"].values.tolist())
        rows = [
            list(itertools.islice(values, length))
            for length in batch.columns["rq_code"].lengths_N.tolist()
        ]
        return [row if here else None for row, here in zip(rows, batch.present_N, strict=True)]

    def recent(self, user_id: int, view: FeatureView | None = None) -> list[tuple[int, int]]:
        batch = self.store.read_columns(
            self.config, view or recent_view(), np.array([user_id]), ["item_ids", "item_timestamps"]
        )
        columns = batch.columns
        pairs = zip(columns["item_timestamps"].values, columns["item_ids"].values, strict=True)
        return [(int(timestamp), int(item)) for timestamp, item in pairs]

    def stored_bytes(self, view: FeatureView) -> list[Any]:
        """Return everything that stock Feast knows of, as it lies in the store."""
        if isinstance(self.stock, RedisOnlineStore):
            client = self.stock._get_client(self.stock_config.online_store)
            return sorted((key, sorted(client.hgetall(key).items())) for key in client.keys("*"))
        with sqlite3.connect(self.config.online_store.path) as conn:
            rows = conn.execute(
                "SELECT entity_key, feature_name, value, value_text, event_ts, created_ts "
                f"FROM qarm_{view.name} ORDER BY 1, 2"
            ).fetchall()
        conn.close()
        return rows

    def clear(self) -> None:
        if isinstance(self.stock, RedisOnlineStore):
            self.stock._get_client(self.stock_config.online_store).flushdb()
            return
        with sqlite3.connect(self.config.online_store.path) as conn:
            found = conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for (name,) in found:
                conn.execute(f"DELETE FROM {name}")
        conn.close()


def close(store: Any) -> None:
    if isinstance(store, RedisOnlineStore):
        if store._client is not None:
            store._client.close()
        return
    for conn in (store._conn, getattr(store, "_read_conn", None)):
        if conn is not None:
            conn.close()

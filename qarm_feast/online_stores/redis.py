"""Feast's redis online store with an ordering guard and columnar entry points.

Rows are byte-compatible with stock Feast both ways. The guard needs no field of its own: the
compare key (event time, content hash) is what stock Feast stores anyway, the time with all its
digits in ``_ts:<view>``, and a Lua script compares and sets it in one step.

Shape letters in this file: N rows or entities. May import: feast, redis.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import redis
from feast import FeatureView
from feast.infra.online_stores.helpers import _redis_key_prefix
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.repo_config import RepoConfig

from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.online_stores.blobs import Blobs, Ints, join_blobs, list_blobs, split_blobs
from qarm_feast.online_stores.codec import decode_timestamps
from qarm_feast.online_stores.redis_scripts import (
    hash_field,
    pack_guarded,
    pack_replacement,
    run_scripts,
    time_field,
)
from qarm_feast.online_stores.redis_wire import hmget_all
from qarm_feast.online_stores.rows import (
    ITEM_IDS,
    ITEM_TIMESTAMPS,
    ColumnBatch,
    EncodedRows,
    FeastRow,
    RecentItems,
    ViewLayout,
    check_table,
    decode_batch,
    encode_feast_rows,
    encode_ids,
    is_young,
    merge_recent,
    recent_items_of_feast_rows,
    recent_items_of_table,
    stored_features,
    view_layout,
)

_ROWS_PER_ENCODING = 4_000
_KEYS_PER_SCAN = 10_000
_SOCKET_TIMEOUT_SECONDS = 5.0
_AWAY = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.RedisClusterException,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.ReadOnlyError,
    redis.OutOfMemoryError,
)
_AWAY_CODES = re.compile(r"\b(MISCONF|NOREPLICAS|OOM|READONLY) ")
"""Refusals that tell of the server and not of the command; redis-py has classes for two of them,
and Redis 6 hides those two behind the name of the script."""


class CodeRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """Keys of ``online_store`` in ``feature_store.yaml``: stock Feast's, always with the guard."""

    type: Literal["qarm_feast.online_stores.redis.CodeRedisOnlineStore"] = (
        "qarm_feast.online_stores.redis.CodeRedisOnlineStore"
    )
    skip_dedup: Literal[False] = False


class CodeRedisOnlineStore(RedisOnlineStore):
    """Online store on a redis server or cluster, safe under several writer processes."""

    def write_table(self, config: RepoConfig, view: FeatureView, table: pa.Table) -> int:
        """Write rows unless the store holds newer ones; merge them if the view says so.

        Args:
            config: Feast's repository configuration.
            view: A feature view with one int64 join key.
            table: The join key, all features, ``event_timestamp`` and optionally ``created``.

        Returns:
            How many entities changed.

        Raises:
            DataError: If the table does not fit the view.
            ServiceUnavailableError: If redis does not answer.
        """
        layout = view_layout(config, view)
        if layout.history_length is not None:
            return self._merge(config, layout, recent_items_of_table(layout, table))
        checked = check_table(layout, table)
        # The server works on one part while the next one is encoded.
        starts = range(0, len(checked), _ROWS_PER_ENCODING)
        parts = (checked.encode(start, start + _ROWS_PER_ENCODING) for start in starts)
        return self._write_rows(config, layout, parts)

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows of Feast's materialize and push through the same guard or merge."""
        layout = view_layout(config, table)
        if layout.history_length is not None:
            self._merge(config, layout, recent_items_of_feast_rows(config, data))
        else:
            self._write_rows(config, layout, encode_feast_rows(config, data))
        if progress:
            progress(len(data))

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Do the same off the event loop."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    async def close(self) -> None:
        """Close the connections of reads off the event loop, which stock Feast leaves open."""
        client: Any = self.__dict__.pop("_client_async", None)
        if client is not None:
            await client.aclose()

    def read_columns(
        self,
        config: RepoConfig,
        view: FeatureView,
        entity_ids_N: Ints,
        feature_names: list[str],
        now: datetime | None = None,
    ) -> ColumnBatch:
        """Return features as columns in one round trip; missing, taken-down and expired are absent.

        Args:
            config: Feast's repository configuration.
            view: A feature view with one int64 join key.
            entity_ids_N: Ids in any order, repeated as one likes.
            feature_names: Features of the view.
            now: The moment to judge the view's ``ttl`` by; ``None``: the system's clock.

        Returns:
            One entity per id, in the order of the ids.

        Raises:
            DataError: If the ids are not int64, or the view has no such feature.
            ServiceUnavailableError: If redis does not answer.
        """
        layout = view_layout(config, view)
        names = stored_features(layout, feature_names)
        keys = encode_ids(layout, entity_ids_N)
        fields = [hash_field(layout, name) for name in names]
        if layout.ttl_micros is not None:
            fields.append(time_field(layout))
        replies = self._read_fields(config, keys, fields)
        columns = list(zip(*replies, strict=True)) if replies else [()] * len(fields)
        is_served_N = None
        if layout.ttl_micros is not None:
            is_served_N = is_young(layout, decode_timestamps(columns.pop()), now)
        return decode_batch(
            layout, feature_names, dict(zip(names, columns, strict=True)), is_served_N
        )

    def delete_rows(self, config: RepoConfig, view: FeatureView, entity_ids_N: Ints) -> int:
        """Take one view's fields off some entities in one round trip; other views' stay.

        Redis itself removes an entity with its last field.

        Args:
            config: Feast's repository configuration.
            view: A feature view with one int64 join key; it need not be applied any more.
            entity_ids_N: Distinct ids.

        Returns:
            How many of the entities had a row.

        Raises:
            DataError: If the ids are not int64.
            ServiceUnavailableError: If redis does not answer.
        """
        layout = view_layout(config, view)
        keys = join_blobs(encode_ids(layout, entity_ids_N), config.project.encode())
        fields = _fields_of(layout)
        with self._client_of(config) as client, client.pipeline(transaction=False) as pipe:
            for key in split_blobs(keys):
                pipe.hdel(key, *fields)
            return sum(num_removed > 0 for num_removed in pipe.execute())

    def delete_table(self, config: RepoConfig, table: FeatureView) -> None:
        """Take one view's fields off every entity, and nothing else.

        Stock Feast deletes an entity whole where it saw this view alone, and with it what another
        view has written there since: an item of the next codebook version would be lost. Redis
        itself removes an entity with its last field.

        Args:
            config: Feast's repository configuration.
            table: The view.

        Raises:
            ServiceUnavailableError: If redis does not answer.
        """
        fields = _fields_of(view_layout(config, table))
        with self._client_of(config) as client:
            found = _entity_keys(client, config.project, table.join_keys)
            while keys := list(islice(found, _KEYS_PER_SCAN)):
                with client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.hdel(key, *fields)
                    pipe.execute()

    def delete_entity_values(self, config: RepoConfig, join_keys: list[str]) -> None:
        """Delete the entities of some join keys of this project, as `feast teardown` does.

        Stock Feast also takes those of a project whose name only ends with this one's.

        Args:
            config: Feast's repository configuration.
            join_keys: The entities' join keys.

        Raises:
            ServiceUnavailableError: If redis does not answer.
        """
        with self._client_of(config) as client:
            found = _entity_keys(client, config.project, join_keys)
            while keys := list(islice(found, _KEYS_PER_SCAN)):
                with client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.delete(key)
                    pipe.execute()

    @staticmethod
    def _parse_connection_string(connection_string: str) -> tuple[list[Any], dict[str, Any]]:
        """Return stock Feast's nodes and options, and a time limit unless one is given.

        Without it a server that takes a request and never answers holds its caller for ever.
        """
        nodes, options = RedisOnlineStore._parse_connection_string(connection_string)
        return nodes, {"socket_timeout": _SOCKET_TIMEOUT_SECONDS, **options}

    @contextmanager
    def _client_of(self, config: RepoConfig) -> Iterator[Any]:
        """Give the client; a server that does not answer or takes no writes becomes our error."""
        options = config.online_store
        try:
            yield self._get_client(options)
        except redis.RedisError as error:
            if not (isinstance(error, _AWAY) or _AWAY_CODES.search(str(error))):
                raise
            nodes, _ = self._parse_connection_string(options.connection_string)
            raise ServiceUnavailableError(_away_text(nodes, error)) from error

    def _read_fields(
        self, config: RepoConfig, entity_keys: Blobs, fields: list[bytes]
    ) -> list[list[bytes | None]]:
        project = config.project.encode()
        with self._client_of(config) as client:
            if not isinstance(client, redis.Redis):
                with client.pipeline(transaction=False) as pipe:
                    for key in split_blobs(join_blobs(entity_keys, project)):
                        pipe.hmget(key, fields)
                    replies: list[list[bytes | None]] = pipe.execute()
                return replies
            return hmget_all(client, entity_keys, project, fields)

    def _write_rows(
        self, config: RepoConfig, layout: ViewLayout, groups: Iterable[EncodedRows]
    ) -> int:
        with self._client_of(config) as client:
            packs = (
                pack_guarded(layout, rows, config.project.encode(), _ttl(config, layout))
                for rows in groups
            )
            return sum(reply for _, reply in run_scripts(client, packs))

    def _merge(self, config: RepoConfig, layout: ViewLayout, written: RecentItems) -> int:
        """Read, merge, and replace what nobody changed in between; repeat for the rest."""
        changed_keys: set[bytes] = set()
        fields = [hash_field(layout, ITEM_IDS), hash_field(layout, ITEM_TIMESTAMPS)]
        while written.keys:
            replies = self._read_fields(config, list_blobs(written.keys), fields)
            stored = {
                name: [reply[at] or b"" for reply in replies]
                for at, name in enumerate((ITEM_IDS, ITEM_TIMESTAMPS))
            }
            changed = merge_recent(layout, stored, written)
            refused = self._replace(config, layout, changed, written, stored)
            changed_keys.update(split_blobs(changed.keys))
            changed_keys.difference_update(refused)
            written = written.only(refused)
        return len(changed_keys)

    def _replace(
        self,
        config: RepoConfig,
        layout: ViewLayout,
        changed: EncodedRows,
        written: RecentItems,
        stored: dict[str, list[bytes]],
    ) -> set[bytes]:
        """Write the changed lists; return the keys that another writer was faster on."""
        keys = split_blobs(changed.keys)
        places = {key: place for place, key in enumerate(written.keys)}
        expected = {
            name: list_blobs([blobs[places[key]] for key in keys]) for name, blobs in stored.items()
        }
        pack = pack_replacement(
            layout, changed, expected, config.project.encode(), _ttl(config, layout)
        )
        with self._client_of(config) as client:
            return {
                keys[rows[at]] for rows, reply in run_scripts(client, iter([pack])) for at in reply
            }


def _fields_of(layout: ViewLayout) -> list[bytes]:
    """Return all fields that a view has in an entity's hash."""
    return [time_field(layout), *[hash_field(layout, name) for name in layout.value_types]]


def _entity_keys(client: Any, project: str, join_keys: list[str]) -> Iterator[bytes]:
    """Yield the keys of all entities of a project that have these join keys."""
    prefix, end = _redis_key_prefix(join_keys), project.encode()
    pattern = re.sub(rb"([*?\[\]\\])", rb"\\\1", prefix) + b"*" + end
    for key in client.scan_iter(pattern, count=_KEYS_PER_SCAN):
        # The pattern also finds the keys of a project whose name only ends alike.
        if _behind_values(key, len(prefix), len(join_keys)) == end:
            yield key


def _behind_values(key: bytes, start: int, num_values: int) -> bytes:
    """Return what follows an entity's values, each of which stands behind its type and size."""
    for _ in range(num_values):
        start += 8 + int.from_bytes(key[start + 4 : start + 8], "little")
    return key[start:]


def _away_text(nodes: list[Any], error: redis.RedisError) -> str:
    # Hosts only: the rest of the connection string may hold a password.
    ports = [node.get("port", 6379) for node in nodes]
    hosts = ", ".join(f"{node['host']}:{port}" for node, port in zip(nodes, ports, strict=True))
    if isinstance(error, redis.ResponseError):
        return (
            f"redis at {hosts} takes no writes: {error}; see `redis-cli info`, give "
            "it memory, disk or its primary back, then try again"
        )
    return (
        f"redis at {hosts} does not answer: {error}; start it (`redis-server --port "
        f"{ports[0] if ports else 6379}`) or mend online_store.connection_string in "
        "feature_store.yaml, then try again"
    )


def _ttl(config: RepoConfig, layout: ViewLayout) -> int:
    """Return how many seconds a hash must live at least after a write of this view; 0: for ever."""
    seconds: int | None = config.online_store.key_ttl_seconds
    if not seconds:
        return 0
    return max(seconds, -(-(layout.ttl_micros or 0) // 1_000_000))

"""Feast's redis online store with an ordering guard and columnar entry points.

Rows are byte-compatible with stock Feast both ways. The guard needs no field of its own: the
compare key (event time, content hash) is what stock Feast stores anyway, the time with all its
digits in ``_ts:<view>``, and a Lua script compares and sets it in one step.

Shape letters in this file: N rows or entities. May import: feast, redis.
"""

import asyncio
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import mmh3
import numpy as np
import pyarrow as pa
import redis
from feast import FeatureView
from feast.infra.online_stores.helpers import _redis_key_prefix
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.repo_config import RepoConfig

from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.online_stores.codec import Ints, encode_timestamps
from qarm_feast.online_stores.rows import (
    CONTENT_HASH,
    ITEM_IDS,
    ITEM_TIMESTAMPS,
    ColumnBatch,
    EncodedRows,
    FeastRow,
    RecentItems,
    ViewLayout,
    decode_batch,
    encode_feast_rows,
    encode_ids,
    encode_table,
    merge_recent,
    recent_items_of_feast_rows,
    recent_items_of_table,
    stored_features,
    view_layout,
)

_ROWS_PER_CALL = 200
_CALLS_PER_CHECK = 50
_CALLS_AHEAD = 8
_KEYS_PER_ROUND_TRIP = 10_000
_SOCKET_TIMEOUT_SECONDS = 5.0
_Call = tuple[list[bytes], list[Any]]
"""Keys and arguments of one script call."""

_WRITE_NEWER = b"""
local byte, sub = string.byte, string.sub
local function varint(blob, at)
  local value, unit = 0, 1
  for _ = 1, 8 do
    local b = byte(blob, at)
    at = at + 1
    if b < 128 then return value + b * unit, at end
    value, unit = value + (b - 128) * unit, unit * 128
  end
  -- Ten bytes: a negative number. Its complement is small, so a double holds it.
  at, value, unit = at - 8, 0, 1
  for _ = 1, 9 do
    value, unit, at = value + (255 - byte(blob, at)) * unit, unit * 128, at + 1
  end
  return -(value + 1), at + 1
end
local function micros_of(blob)
  local seconds, nanos, at = 0, 0, 1
  while at <= #blob do
    local tag = byte(blob, at)
    local value
    value, at = varint(blob, at + 1)
    if tag == 8 then seconds = value else nanos = value end
  end
  return seconds * 1000000 + math.floor(nanos / 1000)
end
local function text_of(blob)
  if not blob or #blob == 0 then return '' end
  local at = 2
  while byte(blob, at) >= 128 do at = at + 1 end
  return sub(blob, at + 1)
end
-- Not the operator: it compares by the server's locale.
local function is_greater(left, right)
  for at = 1, math.min(#left, #right) do
    local a, b = byte(left, at), byte(right, at)
    if a ~= b then return a > b end
  end
  return #left > #right
end
local ttl, num_fields, hash_at = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local ts_field = ARGV[4]
local at, applied = 4 + num_fields, 0
local command = {'HSET', '', ts_field, ''}
for field = 1, num_fields do command[3 + 2 * field] = ARGV[4 + field] end
for row = 1, #KEYS do
  local key, micros, stamp = KEYS[row], ARGV[at + 1], ARGV[at + 2]
  local stored = redis.call('HGET', key, ts_field)
  local is_newer = not stored
  if stored then
    local stored_micros = micros_of(stored)
    is_newer = tonumber(micros) > stored_micros
    if hash_at > 0 and tonumber(micros) == stored_micros then
      local old = redis.call('HGET', key, ARGV[4 + hash_at])
      is_newer = is_greater(text_of(ARGV[at + 2 + hash_at]), text_of(old))
    end
  end
  if is_newer then
    command[2], command[4] = key, stamp
    for field = 1, num_fields do command[4 + 2 * field] = ARGV[at + 2 + field] end
    redis.call(unpack(command))
    if ttl > 0 then redis.call('EXPIRE', key, ttl) end
    applied = applied + 1
  end
  at = at + 2 + num_fields
end
return applied
"""
"""ARGV: seconds to live (0: for ever), number of fields, place of the content hash (0: none),
field of the time, the other fields; then per key: microseconds, time, values."""

_REPLACE_EXPECTED = b"""
local ttl, ts_field, first, second = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local at, refused = 4, {}
for row = 1, #KEYS do
  local key = KEYS[row]
  local stored = redis.call('HMGET', key, first, second)
  if (stored[1] or '') == ARGV[at + 1] and (stored[2] or '') == ARGV[at + 2] then
    redis.call('HSET', key, ts_field, ARGV[at + 3], first, ARGV[at + 4], second, ARGV[at + 5])
    if ttl > 0 then redis.call('EXPIRE', key, ttl) end
  else
    refused[#refused + 1] = row - 1
  end
  at = at + 5
end
return refused
"""
"""ARGV: seconds to live, field of the time, two fields; then per key: both values as they were
read, the time, both new values. Returns the rows that another writer changed in between."""


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
        return self._write_rows(config, layout, [encode_table(layout, table)])

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

    def read_columns(
        self, config: RepoConfig, view: FeatureView, entity_ids_N: Ints, feature_names: list[str]
    ) -> ColumnBatch:
        """Return features as columns in one round trip; missing and taken-down ones are absent.

        Args:
            config: Feast's repository configuration.
            view: A feature view with one int64 join key.
            entity_ids_N: Ids in any order, repeated as one likes.
            feature_names: Features of the view.

        Returns:
            One entity per id, in the order of the ids.

        Raises:
            DataError: If the ids are not int64, or the view has no such feature.
            ServiceUnavailableError: If redis does not answer.
        """
        layout = view_layout(config, view)
        names = stored_features(layout, feature_names)
        keys = encode_ids(layout, entity_ids_N, config.project.encode())
        fields = [_field(layout, name) for name in names]
        replies = self._read_fields(config, keys, [*fields, _time_field(layout)])
        *columns, times = zip(*replies, strict=True) if replies else [()] * (len(fields) + 1)
        present_N = np.array([time is not None for time in times], dtype=np.bool_)
        blobs = dict(zip(names, map(list, columns), strict=True))
        return decode_batch(layout, feature_names, blobs, present_N)

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
        layout = view_layout(config, table)
        fields = [_time_field(layout), *[_field(layout, each.name) for each in table.features]]
        pattern = _redis_key_prefix(table.join_keys) + b"*" + config.project.encode()
        with self._client_of(config) as client:
            found = client.scan_iter(pattern, count=_KEYS_PER_ROUND_TRIP)
            while keys := list(islice(found, _KEYS_PER_ROUND_TRIP)):
                with client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.hdel(key, *fields)
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
        """Give the client; a server that does not answer becomes our error."""
        options = config.online_store
        try:
            yield self._get_client(options)
        except (redis.ConnectionError, redis.TimeoutError, redis.RedisClusterException) as error:
            # Hosts only: the rest of the connection string may hold a password.
            nodes, _ = self._parse_connection_string(options.connection_string)
            hosts = ", ".join(f"{node['host']}:{node.get('port', 6379)}" for node in nodes)
            raise ServiceUnavailableError(
                f"redis at {hosts} does not answer: {error}; start it (`redis-server --port "
                f"{nodes[0].get('port', 6379) if nodes else 6379}`) or mend "
                "online_store.connection_string in feature_store.yaml, then try again"
            ) from error

    def _read_fields(
        self, config: RepoConfig, keys: list[bytes], fields: list[bytes]
    ) -> list[list[bytes | None]]:
        with self._client_of(config) as client:
            if not isinstance(client, redis.Redis):
                with client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.hmget(key, fields)
                    replies: list[list[bytes | None]] = pipe.execute()
                return replies
            return _hmget_all(client, keys, fields)

    def _write_rows(self, config: RepoConfig, layout: ViewLayout, groups: list[EncodedRows]) -> int:
        num_applied = 0
        with self._client_of(config) as client:
            for rows in groups:
                calls = _write_calls(config, layout, rows, client)
                num_applied += sum(_run_script(client, _WRITE_NEWER, calls))
        return num_applied

    def _merge(self, config: RepoConfig, layout: ViewLayout, written: RecentItems) -> int:
        """Read, merge, and replace what nobody changed in between; repeat for the rest."""
        changed_keys: set[bytes] = set()
        fields = [_field(layout, ITEM_IDS), _field(layout, ITEM_TIMESTAMPS)]
        project = config.project.encode()
        while written.keys:
            replies = self._read_fields(config, [key + project for key in written.keys], fields)
            stored = {
                name: [reply[at] or b"" for reply in replies]
                for at, name in enumerate((ITEM_IDS, ITEM_TIMESTAMPS))
            }
            changed = merge_recent(layout, stored, written)
            refused = self._replace(config, layout, changed, written, stored)
            changed_keys.update(changed.keys)
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
        places = {key: place for place, key in enumerate(written.keys)}
        stamps = encode_timestamps(changed.event_micros_N)
        project = config.project.encode()
        refused: set[bytes] = set()
        with self._client_of(config) as client:
            batches = _batches(client, [key + project for key in changed.keys])
            head = [_ttl(config), _time_field(layout)]
            head += [_field(layout, ITEM_IDS), _field(layout, ITEM_TIMESTAMPS)]
            calls: list[_Call] = []
            for batch in batches:
                arguments = list(head)
                for row in batch:
                    place = places[changed.keys[row]]
                    arguments += [stored[ITEM_IDS][place], stored[ITEM_TIMESTAMPS][place]]
                    arguments += [stamps[row]]
                    arguments += [changed.values[ITEM_IDS][row]]
                    arguments += [changed.values[ITEM_TIMESTAMPS][row]]
                calls.append(([changed.keys[row] + project for row in batch], arguments))
            for batch, rows in zip(
                batches, _run_script(client, _REPLACE_EXPECTED, calls), strict=True
            ):
                refused.update(changed.keys[batch[row]] for row in rows)
        return refused


def _field(layout: ViewLayout, name: str) -> bytes:
    return struct.pack("<I", mmh3.hash(f"{layout.name}:{name}", signed=False))


def _time_field(layout: ViewLayout) -> bytes:
    return f"_ts:{layout.name}".encode()


def _ttl(config: RepoConfig) -> int:
    return config.online_store.key_ttl_seconds or 0


def _batches(client: Any, keys: list[bytes]) -> list[Sequence[int]]:
    """Return the rows of each script call; on a cluster all keys of one call share a slot."""
    if isinstance(client, redis.Redis):
        starts = range(0, len(keys), _ROWS_PER_CALL)
        return [range(start, min(start + _ROWS_PER_CALL, len(keys))) for start in starts]
    slots: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        slots.setdefault(client.keyslot(key), []).append(row)
    return [
        rows[start : start + _ROWS_PER_CALL]
        for rows in slots.values()
        for start in range(0, len(rows), _ROWS_PER_CALL)
    ]


def _write_calls(
    config: RepoConfig, layout: ViewLayout, rows: EncodedRows, client: Any
) -> Iterator[_Call]:
    project = config.project.encode()
    keys = [key + project for key in rows.keys]
    names = list(rows.values)
    hash_at = names.index(CONTENT_HASH) + 1 if CONTENT_HASH in names else 0
    head = [_ttl(config), len(names), hash_at, _time_field(layout)]
    head += [_field(layout, name) for name in names]
    columns = [rows.event_micros_N.tolist(), encode_timestamps(rows.event_micros_N)]
    columns += rows.values.values()
    for batch in _batches(client, keys):
        arguments = list(head)
        for row in batch:
            arguments += [column[row] for column in columns]
        yield [keys[row] for row in batch], arguments


def _run_script(client: Any, script: bytes, calls: Iterator[_Call] | list[_Call]) -> list[Any]:
    """Return the script's answer to each call, loading it where the server has forgotten it."""
    sha = hashlib.sha1(script, usedforsecurity=False).hexdigest()
    replies: list[Any] = []
    pending: list[_Call] = []
    for call in calls:
        pending.append(call)
        if len(pending) == _CALLS_PER_CHECK:
            replies += _send(client, script, sha, pending)
            pending = []
    return replies + _send(client, script, sha, pending)


def _send(client: Any, script: bytes, sha: str, calls: list[_Call]) -> list[Any]:
    replies = _evaluate(client, sha, calls)
    forgotten = [
        at for at, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)
    ]
    if forgotten:
        client.script_load(script)
        again = _evaluate(client, sha, [calls[at] for at in forgotten])
        for at, reply in zip(forgotten, again, strict=True):
            replies[at] = reply
    return _raise_first_error(replies)


def _evaluate(client: Any, sha: str, calls: list[_Call]) -> list[Any]:
    """Return the answers; where a server answers with an error, the error."""
    if not isinstance(client, redis.Redis):
        return [_evaluate_on_cluster(client, sha, *call) for call in calls]

    def send_ahead(connection: Any) -> list[Any]:
        # The server works on one call while the next ones are packed.
        replies: list[Any] = []
        for sent, (keys, arguments) in enumerate(calls):
            if sent >= _CALLS_AHEAD:
                replies.append(_read_reply(connection))
            connection.send_command("EVALSHA", sha, len(keys), *keys, *arguments)
        return replies + [_read_reply(connection) for _ in range(len(calls) - len(replies))]

    answers: list[Any] = _on_connection(client, send_ahead)
    return answers


def _evaluate_on_cluster(client: Any, sha: str, keys: list[bytes], arguments: list[Any]) -> Any:
    try:
        return client.evalsha(sha, len(keys), *keys, *arguments)
    except redis.exceptions.NoScriptError as error:
        return error


def _hmget_all(client: Any, keys: list[bytes], fields: list[bytes]) -> list[list[bytes | None]]:
    """Fetch the fields of every key; packs by itself, as redis-py takes three times as long."""
    tail = b"".join(b"\r\n$%d\r\n%b" % (len(field), field) for field in fields) + b"\r\n"
    head = b"*%d\r\n$5\r\nHMGET\r\n$" % (2 + len(fields))
    replies: list[list[bytes | None]] = []
    for start in range(0, len(keys), _KEYS_PER_ROUND_TRIP):
        part = keys[start : start + _KEYS_PER_ROUND_TRIP]
        packed = b"".join([b"%b%d\r\n%b%b" % (head, len(key), key, tail) for key in part])

        def fetch(connection: Any, packed: bytes = packed, count: int = len(part)) -> list[Any]:
            connection.send_packed_command([packed])
            return [_read_reply(connection) for _ in range(count)]

        replies += _raise_first_error(_on_connection(client, fetch))
    return replies


def _on_connection(client: Any, work: Callable[[Any], list[Any]]) -> list[Any]:
    """Run ``work`` on a connection of the pool, again after a lost one as redis-py does.

    Everything that is sent here may be sent twice: reads, and writes under a guard.
    """
    connection = client.connection_pool.get_connection()
    try:
        answers: list[Any] = connection.retry.call_with_retry(
            lambda: work(connection), lambda _: connection.disconnect()
        )
    except BaseException:
        # Replies may be under way that nobody will read.
        connection.disconnect()
        raise
    finally:
        client.connection_pool.release(connection)
    return answers


def _read_reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _raise_first_error(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies

"""Writes that redis checks by itself: rows packed for a Lua script, which compares and sets.

A call carries its keys one by one, so that a cluster finds their slot, and everything else as one
argument, which the script cuts: an argument of its own costs the server twice as much as a cut.
Calls are sent ahead of their answers. May import: redis, numpy, pyarrow.

Shape letters in this file: N rows.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from typing import Any

import mmh3
import pyarrow as pa
import redis

from qarm_feast.online_stores.blobs import (
    Blobs,
    contents,
    contents_array,
    fixed_blobs,
    join_blobs,
    sizes_of,
    split_blobs,
)
from qarm_feast.online_stores.codec import encode_timestamps
from qarm_feast.online_stores.redis_wire import (
    Replies,
    command_bytes,
    on_connection,
    raise_first_error,
    wire_keys,
)
from qarm_feast.online_stores.rows import (
    CONTENT_HASH,
    ITEM_IDS,
    ITEM_TIMESTAMPS,
    EncodedRows,
    ViewLayout,
)

_ROWS_PER_CALL = 200
_CALLS_PER_CHECK = 250
_CALLS_AHEAD = 16
_FIELDS_PER_COMMAND = 50
"""A Lua function holds at most 200 local values."""

_COMPARE_KEYS = """
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
"""

_WRITE_NEWER = """
local ttl, rows, at, applied = tonumber(ARGV[1]), ARGV[2], 1, 0
local call, cut = redis.call, struct.unpack
for row = 1, #KEYS do
  local key, {values}micros, stamp = KEYS[row]
  micros, stamp, {values}at = cut('<dI4c0{format}', rows, at)
  local stored = call('HGET', key, {time_field})
  local is_newer = not stored
  if stored then
    local stored_micros = micros_of(stored)
    is_newer = micros > stored_micros
    if micros == stored_micros then is_newer = {wins_tie} end
  end
  if is_newer then
    call('HSET', key, {pairs}{time_field}, stamp)
    applied = applied + 1
  end
  {more_fields}
  -- The hash holds all views of an entity: no view may shorten the life of another one's row.
  if is_newer and ttl > 0 and call('TTL', key) < ttl then call('EXPIRE', key, ttl) end
end
return applied
"""
"""ARGV: seconds to live at least (0: for ever), packed rows: microseconds, then time and values,
each behind its size."""

_WRITE_MORE_FIELDS = """
  do
    local {values}_
    {values}at = cut('<{format}', rows, at)
    if is_newer then call('HSET', key, {pairs}{time_field}, stamp) end
  end
"""

_REPLACE_EXPECTED = """
local ttl, ts_field, first, second, rows = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local at, refused = 1, {}
local cut = struct.unpack
for row = 1, #KEYS do
  local key, old1, old2, stamp, new1, new2 = KEYS[row]
  old1, old2, stamp, new1, new2, at = cut('<I4c0I4c0I4c0I4c0I4c0', rows, at)
  local stored = redis.call('HMGET', key, first, second)
  if (stored[1] or '') == old1 and (stored[2] or '') == old2 then
    redis.call('HSET', key, ts_field, stamp, first, new1, second, new2)
    if ttl > 0 and redis.call('TTL', key) < ttl then redis.call('EXPIRE', key, ttl) end
  else
    refused[#refused + 1] = row - 1
  end
end
return refused
"""
"""ARGV: seconds to live at least, field of the time, two fields, packed rows: both values as they
were read, the time, both new values. Returns the rows that another writer changed in between."""


@dataclass(frozen=True)
class Script:
    """A Lua script, known to the server by its digest."""

    text: bytes

    @cached_property
    def sha(self) -> bytes:
        """What EVALSHA names it by."""
        return hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


@dataclass(frozen=True)
class PackedRows:
    """Rows for one script.

    Attributes:
        script: The script.
        entity_keys: Keys without the project.
        project: What every key ends with.
        arguments: The script's arguments before the rows.
        rows: What the script cuts, one blob per key.
    """

    script: Script
    entity_keys: Blobs
    project: bytes
    arguments: tuple[bytes, ...]
    rows: Blobs


@dataclass(frozen=True)
class _Call:
    """One EVALSHA: which rows of its pack it carries, and its bytes on the wire."""

    script: Script
    places: Sequence[int]
    wire: bytes


def hash_field(layout: ViewLayout, name: str) -> bytes:
    """Return the field of an entity's hash that Feast keeps a feature in."""
    return struct.pack("<I", mmh3.hash(f"{layout.name}:{name}", signed=False))


def time_field(layout: ViewLayout) -> bytes:
    """Return the field of an entity's hash that Feast keeps the view's event time in."""
    return f"_ts:{layout.name}".encode()


def pack_guarded(layout: ViewLayout, rows: EncodedRows, project: bytes, ttl: int) -> PackedRows:
    """Return rows for the script that drops what is not newer than the stored row.

    Args:
        layout: The view's layout.
        rows: Rows to write.
        project: Feast's project, the end of every key.
        ttl: Seconds until the hash expires; 0: never.

    Returns:
        The rows; the script answers how many it wrote.
    """
    # The one that decides ties must be among the first fields.
    names = tuple(sorted(rows.values, key=lambda name: name != CONTENT_HASH))
    packed = join_blobs(
        fixed_blobs(rows.event_micros_N.astype("<f8")),
        *_sized(encode_timestamps(rows.event_micros_N)),
        *chain.from_iterable(_sized(rows.values[name]) for name in names),
    )
    fields = tuple(hash_field(layout, name) for name in names)
    script = _guarded_script(time_field(layout), fields, CONTENT_HASH in names)
    return PackedRows(script, rows.keys, project, (b"%d" % ttl,), packed)


def pack_replacement(
    layout: ViewLayout,
    rows: EncodedRows,
    expected: dict[str, Blobs],
    project: bytes,
    ttl: int,
) -> PackedRows:
    """Return list rows for the script that replaces only what is still as it was read.

    Args:
        layout: Layout of a merged view.
        rows: New lists.
        expected: Both lists as they were read.
        project: Feast's project, the end of every key.
        ttl: Seconds until the hash expires; 0: never.

    Returns:
        The rows; the script answers the places of those that it refused.
    """
    names = (ITEM_IDS, ITEM_TIMESTAMPS)
    columns = [expected[name] for name in names]
    columns += [encode_timestamps(rows.event_micros_N), *(rows.values[name] for name in names)]
    fields = [hash_field(layout, name) for name in names]
    return PackedRows(
        _REPLACEMENT_SCRIPT,
        rows.keys,
        project,
        (b"%d" % ttl, time_field(layout), *fields),
        join_blobs(*chain.from_iterable(map(_sized, columns))),
    )


def run_scripts(client: Any, packs: Iterator[PackedRows]) -> Iterator[tuple[Sequence[int], Any]]:
    """Run each pack's script over its rows, loading scripts that the server has forgotten.

    A call that may not have arrived is sent again, so a script must bear that.

    Args:
        client: Of a redis server or cluster.
        packs: Made while the server works on the ones before.

    Yields:
        For each call, which rows of its pack it carried, and the answer.
    """
    if isinstance(client, redis.Redis):
        calls = chain.from_iterable(map(_calls, packs))
        while answered := _answers(client, islice(calls, _CALLS_PER_CHECK)):
            yield from answered
    else:
        for pack in packs:
            yield from _run_on_cluster(client, pack)


def _sized(blobs: Blobs) -> tuple[Blobs, Blobs]:
    return fixed_blobs(sizes_of(blobs).astype("<u4")), blobs


@lru_cache(maxsize=256)
def _guarded_script(time_name: bytes, fields: tuple[bytes, ...], has_hash: bool) -> Script:
    """Write the script of one view: constants are what makes it fast.

    Args:
        time_name: Field of the event time.
        fields: The other fields in the order of the values; with a content hash it is the first.
        has_hash: Whether it is.

    Returns:
        The script.
    """
    groups = [
        _field_group(fields[start : start + _FIELDS_PER_COMMAND])
        for start in range(0, max(1, len(fields)), _FIELDS_PER_COMMAND)
    ]
    stored_hash = f"call('HGET', key, {_quote(fields[0])})" if has_hash else ""
    text = _COMPARE_KEYS + _WRITE_NEWER.format(
        time_field=_quote(time_name),
        wins_tie=f"is_greater(text_of(v1), text_of({stored_hash}))" if has_hash else "false",
        more_fields="".join(
            _WRITE_MORE_FIELDS.format(time_field=_quote(time_name), **group) for group in groups[1:]
        ),
        **groups[0],
    )
    return Script(text.encode())


def _field_group(fields: Sequence[bytes]) -> dict[str, str]:
    names = [f"v{number}" for number in range(1, len(fields) + 1)]
    pairs = [f"{_quote(field)}, {name}, " for field, name in zip(fields, names, strict=True)]
    return {
        "values": "".join(f"{name}, " for name in names),
        "format": "I4c0" * len(fields),
        "pairs": "".join(pairs),
    }


def _quote(text: bytes) -> str:
    """Return a Lua string, whatever the bytes are."""
    return "'" + "".join(f"\\{byte:03d}" for byte in text) + "'"


_REPLACEMENT_SCRIPT = Script(_REPLACE_EXPECTED.encode())


def _calls(pack: PackedRows) -> Iterator[_Call]:
    """Return the calls that carry all rows of a pack."""
    key_bytes, key_ends = contents_array(wire_keys(pack.entity_keys, pack.project))
    row_bytes, row_ends = contents_array(pack.rows)
    keys_view, rows_view = key_bytes.data, row_bytes.data
    head = b"*%d\r\n" + command_bytes(b"EVALSHA", pack.script.sha)
    arguments = command_bytes(*pack.arguments)
    for start in range(0, len(pack.entity_keys), _ROWS_PER_CALL):
        stop = min(start + _ROWS_PER_CALL, len(pack.entity_keys))
        rows = rows_view[row_ends[start] : row_ends[stop]]
        wire = (
            head % (4 + stop - start + len(pack.arguments)),
            command_bytes(b"%d" % (stop - start)),
            keys_view[key_ends[start] : key_ends[stop]],
            arguments,
            b"$%d\r\n" % len(rows),
            rows,
            b"\r\n",
        )
        yield _Call(pack.script, range(start, stop), b"".join(wire))


def _answers(client: redis.Redis, calls: Iterator[_Call]) -> list[tuple[Sequence[int], Any]]:
    sent: list[_Call] = []
    replies = _send(client, calls, sent)
    forgotten = [
        at for at, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)
    ]
    if forgotten:
        for text in {sent[at].script.text for at in forgotten}:
            client.script_load(text)
        again = _send(client, iter([sent[at] for at in forgotten]), [])
        for at, reply in zip(forgotten, again, strict=True):
            replies[at] = reply
    raise_first_error(replies)
    return [(call.places, reply) for call, reply in zip(sent, replies, strict=True)]


def _send(client: redis.Redis, calls: Iterator[_Call], sent: list[_Call]) -> list[Any]:
    """Send calls ahead of their answers; ``sent`` receives them, for another try."""

    def send_ahead(connection: Any) -> list[Any]:
        replies: list[Any] = []
        incoming, again = Replies(connection), list(sent)
        for number, call in enumerate(chain(again, calls)):
            if number >= len(again):
                sent.append(call)
            if number >= _CALLS_AHEAD:
                replies.append(incoming.next())
            connection.send_packed_command([call.wire], check_health=False)
        return replies + [incoming.next() for _ in range(len(sent) - len(replies))]

    return on_connection(client, send_ahead)


def _run_on_cluster(client: Any, pack: PackedRows) -> Iterator[tuple[Sequence[int], Any]]:
    """Run a script on a cluster: all keys of one call share a slot."""
    keys = split_blobs(join_blobs(pack.entity_keys, pack.project))
    slots: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        slots.setdefault(client.keyslot(key), []).append(place)
    for members in slots.values():
        for start in range(0, len(members), _ROWS_PER_CALL):
            places = members[start : start + _ROWS_PER_CALL]
            rows = contents(pack.rows.take(pa.array(places)))[0]
            arguments = [*(keys[place] for place in places), *pack.arguments, rows]
            try:
                reply = client.evalsha(pack.script.sha, len(places), *arguments)
            except redis.exceptions.NoScriptError:
                client.script_load(pack.script.text)
                reply = client.evalsha(pack.script.sha, len(places), *arguments)
            yield places, reply

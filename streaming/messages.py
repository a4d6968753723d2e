"""Kafka records to events and back: the wire format, and nothing that touches a broker.

Every record carries the header ``schema_version`` (``1``). Item events::

    key      b"42"                                 the item id, decimal ASCII
    value    {"item_id": 42, "event_timestamp": 1718000000000000, "title": "Mug", "price": 9.5}
             or {"item_id": 42, "event_timestamp": ..., "embedding": [...], "encoder_version": "e1"}
    null value = takedown of the item; header ``event_timestamp`` says when

Interaction events (all task flags are there, ``split`` is optional)::

    key      b"7"                                  the user id, decimal ASCII
    value    {"user_id": 7, "item_id": 42, "event_timestamp": ..., "is_like": true}
    null value = erasure of all that the user did up to the header ``event_timestamp``

``event_timestamp`` is an integer: microseconds since the epoch, UTC. ISO-8601 text with an
offset is read as well. Every further field of an item event is content: text, a number or a bool;
``image`` and ``audio`` are ``{"base64": "..."}`` or a URI under an allowed prefix. The header
``content-type`` tells an Arrow IPC stream of many rows (``application/vnd.apache.arrow.stream``;
null key, columns named as the JSON fields) from one JSON object (``application/json``, also when
absent).

A record that breaks this, or a bound of :class:`streaming.limits.EventLimits`, raises
:class:`qarm_feast.errors.EventError` with a :class:`streaming.limits.Reason`.
May import: numpy, pyarrow, pydantic-core.
"""

import base64
import json
import math
import struct
from array import array
from binascii import Error as Base64Error
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from pydantic_core import from_json

from qarm_feast.errors import EventError
from qarm_feast.schema import (
    CONTENT_BINARY_COLUMNS,
    CONTENT_TEXT_COLUMNS,
    ERASURE_MARK,
    EVENT_TIMESTAMP,
    ITEM_ID,
    SPLITS,
    USER_ID,
)
from streaming.arrow_size import unpacked_bytes
from streaming.limits import DEFAULT_LIMITS, EventLimits, Reason
from streaming.media import check_media

SCHEMA_VERSION = b"1"
SCHEMA_VERSION_HEADER = "schema_version"
CONTENT_TYPE_HEADER = "content-type"
JSON_TYPE = b"application/json"
ARROW_TYPE = b"application/vnd.apache.arrow.stream"
EMBEDDING = "embedding"
ENCODER_VERSION = "encoder_version"
SPLIT = "split"

MIN_EVENT_TIMESTAMP = 315_532_800_000_000
"""1980-01-01: seconds or milliseconds taken for microseconds fall before it."""
MAX_EMBEDDING_VALUE = 1e15
"""What the quantizers take; said here again so that a producer need not import torch."""

INT64_LIMIT = 2**63
_MAX_INT64_DIGITS = 20
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ITEM_FIELDS = frozenset((ITEM_ID, EVENT_TIMESTAMP, EMBEDDING, ENCODER_VERSION))

ContentValue = str | int | float | bool | bytes
_Times = TypeVar("_Times", float, np.ndarray)


class Record(Protocol):
    """What this module reads of a consumed record; ``kafka-python``'s record has this form."""

    @property
    def topic(self) -> str: ...  # noqa: D102
    @property
    def partition(self) -> int: ...  # noqa: D102
    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def timestamp(self) -> int:
        """Append time, milliseconds since the epoch."""
        ...

    @property
    def key(self) -> bytes | None: ...  # noqa: D102
    @property
    def value(self) -> bytes | None: ...  # noqa: D102
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """Names and values; Kafka allows a null value."""
        ...


class UnreadableRecord(NamedTuple):
    """Stands for a record whose bytes the Kafka client could not take apart."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    fault: str
    key: None = None
    value: None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()


class Message(NamedTuple):
    """What a producer sends."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


class ItemEvent(NamedTuple):
    """An upload or edit, or a takedown (``is_deleted``).

    ``event_timestamp`` is microseconds since the epoch; ``embedding`` is a finite, non-zero
    float32 vector of any length; ``content`` holds no null and no empty text.
    """

    item_id: int
    event_timestamp: int
    content: dict[str, ContentValue]
    embedding: np.ndarray | None = None
    encoder_version: str | None = None
    is_deleted: bool = False


class InteractionEvent(NamedTuple):
    """One user met one item; ``labels`` in the order of the task names, ``split`` may be ``""``."""

    user_id: int
    item_id: int
    event_timestamp: int
    labels: tuple[bool, ...]
    split: str = ""


class UserErasure(NamedTuple):
    """All that a user did up to ``event_timestamp``, itself included, counts no more."""

    user_id: int
    event_timestamp: int


def check_record_size(record: Record, max_bytes: int) -> None:
    """Refuse a record that is too large to be looked at.

    Args:
        record: One consumed record.
        max_bytes: Largest sum of key, value and headers.

    Raises:
        EventError: If it is larger.
    """
    num_bytes = len(record.key or b"") + len(record.value or b"")
    for name, value in record.headers:
        num_bytes += len(name) + len(value or b"")
    if num_bytes > max_bytes:
        raise EventError(
            Reason.OVERSIZED,
            f"{num_bytes} bytes of key, value and headers, stream.max_record_bytes is {max_bytes}",
        )


def content_type(record: Record) -> bytes:
    """Return the record's content type; JSON if it names none.

    Args:
        record: One consumed record.

    Returns:
        ``JSON_TYPE`` or ``ARROW_TYPE``.

    Raises:
        EventError: If the schema version or the content type is not known.
    """
    headers = dict(record.headers)
    version = headers.get(SCHEMA_VERSION_HEADER)
    if version != SCHEMA_VERSION:
        found = "none" if version is None else repr(version[:32])
        raise EventError(
            Reason.UNKNOWN_SCHEMA_VERSION,
            f"header {SCHEMA_VERSION_HEADER} is {found}, this worker reads {SCHEMA_VERSION!r}",
        )
    kind = headers.get(CONTENT_TYPE_HEADER, JSON_TYPE)
    if kind not in (JSON_TYPE, ARROW_TYPE):
        raise EventError(Reason.UNDECODABLE, f"unknown content-type {kind!r:.64}")
    return kind


def decode_item_event(record: Record, limits: EventLimits = DEFAULT_LIMITS) -> ItemEvent:
    """Return the event of a JSON record or of a tombstone.

    Args:
        record: One record whose content type is JSON.
        limits: Bounds that the event must keep.

    Returns:
        The event.

    Raises:
        EventError: If the record breaks the contract.
    """
    if record.value is None:
        item_id, timestamp = _tombstone(record, limits.max_future_seconds)
        _check_not_reserved(item_id)
        return ItemEvent(item_id, timestamp, content={}, is_deleted=True)
    return item_upload(record, json_fields(record.value), limits)


def item_upload(record: Record, fields: dict[str, Any], limits: EventLimits) -> ItemEvent:
    """Return the upload or edit that a JSON record holds.

    Args:
        record: One record whose content type is JSON.
        fields: Its value, read by :func:`json_fields`.
        limits: Bounds that the event must keep.

    Returns:
        The event.

    Raises:
        EventError: If the record breaks the contract.
    """
    item_id = _item_id(fields)
    _check_key(record, item_id)
    embedding, encoder_version = _embedding(fields)
    content = {
        name: _content_value(name, value)
        for name, value in fields.items()
        if name not in _ITEM_FIELDS and value is not None and value != ""
    }
    if embedding is None and not has_content(content):
        raise EventError(
            Reason.MISSING_FIELD, "neither an embedding nor any content field with something in it"
        )
    check_media(content, limits)
    timestamp = _timestamp(fields.get(EVENT_TIMESTAMP), record, limits.max_future_seconds)
    return ItemEvent(item_id, timestamp, content, embedding, encoder_version)


def decode_interaction_event(
    record: Record, task_names: tuple[str, ...], limits: EventLimits = DEFAULT_LIMITS
) -> InteractionEvent | UserErasure:
    """Return the event of a JSON record or of a tombstone.

    Args:
        record: One record whose content type is JSON.
        task_names: The task flags that every interaction carries.
        limits: Bounds that the event must keep.

    Returns:
        The event.

    Raises:
        EventError: If the record breaks the contract.
    """
    if record.value is None:
        return UserErasure(*_tombstone(record, limits.max_future_seconds))
    fields = json_fields(record.value)
    user_id = _integer(fields, USER_ID)
    _check_key(record, user_id)
    return InteractionEvent(
        user_id,
        _item_id(fields),
        _timestamp(fields.get(EVENT_TIMESTAMP), record, limits.max_future_seconds),
        tuple([_flag(fields, name) for name in task_names]),
        _split(fields.get(SPLIT)),
    )


def json_fields(value: bytes) -> dict[str, Any]:
    """Return the object that a record's value holds, just as the standard library reads it.

    Args:
        value: JSON text; of a field that is there twice, the last one counts.

    Returns:
        Its fields.

    Raises:
        EventError: If it is no JSON or no object.
    """
    try:
        # Some seven times as fast as json over the numbers of a vector. What it reads, json reads
        # alike, bit by bit; what it refuses, json may still take: UTF-16, half a surrogate pair.
        fields = from_json(value)
    except ValueError:
        fields = _strict_json(value)
    if not isinstance(fields, dict):
        raise EventError(Reason.WRONG_TYPE, f"a JSON {type(fields).__name__}, not an object")
    return fields


def check_unpacked_size(record: Record, max_bytes: int) -> None:
    """Refuse an Arrow record that claims to unpack to too much; nothing is unpacked for that.

    Args:
        record: One consumed record.
        max_bytes: Largest size in memory.

    Raises:
        EventError: If the stream is damaged or claims more.
    """
    try:
        num_bytes = unpacked_bytes(record.value or b"")
    except (pa.ArrowException, OSError, struct.error) as error:
        raise EventError(Reason.UNDECODABLE, f"not an Arrow IPC stream: {error}") from error
    if num_bytes > max_bytes:
        raise EventError(
            Reason.DECOMPRESSION_BOMB,
            f"{len(record.value or b'')} bytes claim to be {num_bytes} unpacked, "
            f"stream.max_decoded_bytes is {max_bytes}",
        )


def decode_arrow(record: Record) -> pa.Table:
    """Return the rows of an Arrow record, every buffer checked.

    Args:
        record: One record that :func:`check_unpacked_size` lets pass.

    Returns:
        The rows, with whatever columns they came.

    Raises:
        EventError: If the stream is damaged, two columns share a name, or the record has a key.
    """
    if record.key is not None:
        raise EventError(Reason.KEY_MISMATCH, "an Arrow record has many ids, so its key is null")
    try:
        table = pa.ipc.open_stream(record.value or b"").read_all()
        table.validate(full=True)
        names = table.column_names
    # pyarrow passes column names on unchecked: one that is no UTF-8 shows when it is read.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise EventError(Reason.UNDECODABLE, f"not an Arrow IPC stream: {error}") from error
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise EventError(Reason.WRONG_TYPE, f"more than one column named {', '.join(twice)}")
    return table


def encode_item_event(event: ItemEvent) -> Message:
    """Return the message that :func:`decode_item_event` reads back."""
    if event.is_deleted:
        return _tombstone_message(event.item_id, event.event_timestamp)
    fields: dict[str, Any] = {ITEM_ID: event.item_id, EVENT_TIMESTAMP: event.event_timestamp}
    fields |= json_content(event.content)
    if event.embedding is not None:
        fields[EMBEDDING] = event.embedding.tolist()
        fields[ENCODER_VERSION] = event.encoder_version
    value = json.dumps(fields, separators=(",", ":")).encode()
    return Message(b"%d" % event.item_id, value, [(SCHEMA_VERSION_HEADER, SCHEMA_VERSION)])


def encode_interaction_event(event: InteractionEvent, task_names: tuple[str, ...]) -> Message:
    """Return the message that :func:`decode_interaction_event` reads back."""
    fields: dict[str, Any] = {
        USER_ID: event.user_id,
        ITEM_ID: event.item_id,
        EVENT_TIMESTAMP: event.event_timestamp,
        **dict(zip(task_names, event.labels, strict=True)),
    }
    if event.split:
        fields[SPLIT] = event.split
    value = json.dumps(fields, separators=(",", ":")).encode()
    return Message(b"%d" % event.user_id, value, [(SCHEMA_VERSION_HEADER, SCHEMA_VERSION)])


def encode_user_erasure(erasure: UserErasure) -> Message:
    """Return the message that :func:`decode_interaction_event` reads back."""
    return _tombstone_message(erasure.user_id, erasure.event_timestamp)


def encode_arrow(table: pa.Table) -> Message:
    """Return one message that holds all rows of ``table``."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    headers = [(SCHEMA_VERSION_HEADER, SCHEMA_VERSION), (CONTENT_TYPE_HEADER, ARROW_TYPE)]
    return Message(None, sink.getvalue().to_pybytes(), headers)


def json_content(content: Mapping[str, ContentValue]) -> dict[str, Any]:
    """Return content as JSON can hold it: bytes as ``{"base64": text}``."""
    return {
        name: {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for name, value in content.items()
    }


def has_content(content: Mapping[str, ContentValue]) -> bool:
    """Tell whether an encoder has anything to read in ``content``."""
    return any(name in content for name in (*CONTENT_TEXT_COLUMNS, *CONTENT_BINARY_COLUMNS))


def are_finite(values_M: np.ndarray) -> np.ndarray:
    """Tell of each number whether it is finite and its square fits float32."""
    # NaN compares false, so it is caught as well.
    is_finite_M: np.ndarray = np.abs(values_M) < MAX_EMBEDDING_VALUE
    return is_finite_M


def latest_timestamp(append_ms: _Times, max_future_seconds: float) -> _Times:
    """Return the last event time that can be right, microseconds since the epoch.

    Args:
        append_ms: Append time of a record, or of each, milliseconds since the epoch.
        max_future_seconds: Tolerance for producers whose clocks run ahead.

    Returns:
        The times, themselves allowed.
    """
    return append_ms * 1000 + max_future_seconds * 1e6


def _tombstone_message(identity: int, timestamp: int) -> Message:
    headers = [(SCHEMA_VERSION_HEADER, SCHEMA_VERSION), (EVENT_TIMESTAMP, b"%d" % timestamp)]
    return Message(b"%d" % identity, None, headers)


def _tombstone(record: Record, max_future_seconds: float) -> tuple[int, int]:
    """Return the id and the time of a record without a value."""
    key = (record.key or b"")[:_MAX_INT64_DIGITS]
    try:
        identity = _integer({"key": int(key)}, "key")
    except ValueError as error:
        raise EventError(Reason.KEY_MISMATCH, f"key {key!r} is no id") from error
    _check_key(record, identity)
    text = dict(record.headers).get(EVENT_TIMESTAMP)
    if text is None:
        raise EventError(Reason.MISSING_FIELD, f"a tombstone needs the header {EVENT_TIMESTAMP}")
    is_integer = text.isdigit() and len(text) <= _MAX_INT64_DIGITS
    value = int(text) if is_integer else text.decode("ascii", "replace")
    return identity, _timestamp(value, record, max_future_seconds)


def _strict_json(value: bytes) -> Any:
    try:
        return json.loads(value)
    # ValueError covers broken JSON, broken UTF-8 and numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise EventError(Reason.UNDECODABLE, f"not JSON: {error}") from error


def _integer(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is int and -INT64_LIMIT <= value < INT64_LIMIT:
        return value
    if value is None:
        raise EventError(Reason.MISSING_FIELD, f"no {name}")
    raise EventError(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not an int64")


def _item_id(fields: dict[str, Any]) -> int:
    item_id = _integer(fields, ITEM_ID)
    _check_not_reserved(item_id)
    return item_id


def _check_not_reserved(item_id: int) -> None:
    if item_id == ERASURE_MARK:
        raise EventError(Reason.RESERVED_ID, f"{ITEM_ID} {item_id} stands for no item")


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if type(value) is bool:
        return value
    if value is None:
        raise EventError(Reason.MISSING_FIELD, f"no task flag {name}")
    raise EventError(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not a bool")


def _split(value: Any) -> str:
    if value is None:
        return ""
    if value in SPLITS:
        return str(value)
    raise EventError(Reason.WRONG_TYPE, f"split is none of {', '.join(SPLITS)}")


def _check_key(record: Record, identity: int) -> None:
    if record.key != b"%d" % identity:
        found = None if record.key is None else record.key[:32]
        raise EventError(Reason.KEY_MISMATCH, f"key {found!r} is not the id {identity}")


def _timestamp(value: Any, record: Record, max_future_seconds: float) -> int:
    if type(value) is str:
        value = _microseconds(value)
    if type(value) is not int:
        if value is None:
            raise EventError(Reason.MISSING_FIELD, f"no {EVENT_TIMESTAMP}")
        kind = type(value).__name__
        raise EventError(Reason.WRONG_TYPE, f"{EVENT_TIMESTAMP} is a {kind}, not an integer")
    is_absurd = value < MIN_EVENT_TIMESTAMP
    if is_absurd or value > latest_timestamp(record.timestamp, max_future_seconds):
        fault = Reason.ABSURD_TIMESTAMP if is_absurd else Reason.FUTURE_TIMESTAMP
        raise EventError(
            fault, f"{EVENT_TIMESTAMP} is {value}, appended at {record.timestamp * 1000}"
        )
    return value


def _microseconds(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise EventError(
            Reason.WRONG_TYPE, f"{EVENT_TIMESTAMP} {text[:40]!r} is not ISO-8601"
        ) from error
    if moment.tzinfo is None:
        raise EventError(Reason.WRONG_TYPE, f"{EVENT_TIMESTAMP} {text[:40]!r} has no UTC offset")
    return (moment - _EPOCH) // _MICROSECOND


def _embedding(fields: dict[str, Any]) -> tuple[np.ndarray | None, str | None]:
    values = fields.get(EMBEDDING)
    if values is None:
        return None, None
    version = fields.get(ENCODER_VERSION)
    if type(version) is not str or not version:
        raise EventError(Reason.MISSING_FIELD, f"an embedding needs its {ENCODER_VERSION}")
    _check_unicode(ENCODER_VERSION, version)
    if type(values) is not list:
        raise EventError(Reason.WRONG_TYPE, f"embedding is a {type(values).__name__}, not a list")
    try:
        embedding = np.frombuffer(array("f", values), dtype=np.float32)
    except (TypeError, OverflowError) as error:
        raise EventError(Reason.WRONG_TYPE, f"embedding is not all numbers: {error}") from error
    if not are_finite(embedding).all():
        raise EventError(Reason.EMBEDDING_NOT_FINITE, "embedding is NaN, infinite or out of range")
    if not embedding.any():
        raise EventError(Reason.EMBEDDING_ZERO, "embedding is empty or all zeros")
    return embedding, version


def _content_value(name: str, value: Any) -> ContentValue:
    if name in CONTENT_BINARY_COLUMNS and type(value) is dict:
        return _base64_value(name, value)
    kinds = (str,) if name in CONTENT_TEXT_COLUMNS + CONTENT_BINARY_COLUMNS else (str, int, float)
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise EventError(Reason.WRONG_TYPE, f"{name} is a {type(value).__name__}, not {wanted}")
    if isinstance(value, str) and not value.isascii():
        _check_unicode(name, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise EventError(Reason.WRONG_TYPE, f"{name} is NaN or infinite")
    return value  # type: ignore[no-any-return]  # isinstance above; mypy does not follow `kinds`


def _base64_value(name: str, value: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(value["base64"], validate=True)
    except (KeyError, TypeError, Base64Error, ValueError) as error:
        raise EventError(
            Reason.UNDECODABLE, f'{name} is neither a URI nor {{"base64": text}}'
        ) from error


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; no store can hold it.
        raise EventError(
            Reason.UNDECODABLE, f"{name} is not Unicode text: {error.reason}"
        ) from error

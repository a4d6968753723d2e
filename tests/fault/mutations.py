"""Seeded damage to valid records, and a plain reading of what is left of them.

A mutated record must end in the dead-letter topic or, if it still says something valid, be stored
as what it says; :func:`plain_items` and :func:`plain_interactions` read it without the code under
test. The records carry no text, so that a vector that is gone cannot be made up for.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qarm_feast.schema import TIMESTAMP
from streaming.messages import (
    ARROW_TYPE,
    InteractionEvent,
    ItemEvent,
    Message,
    Record,
    encode_arrow,
    encode_interaction_event,
    encode_item_event,
)
from tests.fault.traffic import TASK_NAMES, Parcel, arrow_items
from tests.stream_repo import EMBEDDING_DIM, ENCODER_VERSION, START

SEQUENCE_HEADER = "sequence"
"""Says which parcel a record is; records and letters keep foreign headers."""
_VALID_SHARE = 0.3
_FUTURE_MICROS = 4_000_000_000_000_000
_EARLIEST_MICROS = 315_532_800_000_000
_LARGEST_VALUE = 1e15
_NO_ITEM = -1
"""Stands for an erasure, and fills short lists of items."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Change = Callable[[np.random.Generator, Message], Message]


class Mutant(NamedTuple):
    """A parcel, changed or not; ``parcel`` tells the events before the change."""

    parcel: Parcel
    mutation: str


def make_mutants(rng: np.random.Generator, count: int) -> list[Mutant]:
    """Return ``count`` damaged messages with valid ones between them."""
    mutants: list[Mutant] = []
    num_damaged = 0
    while num_damaged < count:
        sequence = len(mutants)
        parcel, changes = _valid_parcel(rng, sequence)
        name, message = "", parcel.message
        if rng.random() >= _VALID_SHARE:
            num_damaged += 1
            name = sorted(changes)[int(rng.integers(len(changes)))]
            message = changes[name](rng, message)
        headers = [*message.headers, (SEQUENCE_HEADER, b"%d" % sequence)]
        mutants.append(Mutant(parcel._replace(message=message._replace(headers=headers)), name))
    return mutants


def plain_items(record: Record) -> list[ItemEvent] | None:
    """Return the events that an item record holds by a plain reading; None if it is broken."""
    headers = dict(record.headers)
    if headers.get("schema_version") != b"1":
        return None
    try:
        if record.value is None:
            return [_plain_takedown(record, headers)]
        if headers.get("content-type") == ARROW_TYPE:
            return rows_of_arrow(record.value) if record.key is None else None
        if headers.get("content-type", b"application/json") != b"application/json":
            return None
        return [_plain_upload(json.loads(record.value), record)]
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None


def plain_interactions(record: Record) -> list[InteractionEvent] | None:
    """Return the events that an interaction record holds; None if it is broken."""
    headers = dict(record.headers)
    if headers.get("schema_version") != b"1" or "content-type" in headers:
        return None
    try:
        fields = json.loads(record.value or b"")
        user_id = _whole(fields["user_id"])
        labels = tuple(fields[name] for name in TASK_NAMES)
        if record.key != b"%d" % user_id or not all(type(label) is bool for label in labels):
            return None
        if fields.get("split") not in (None, "", "train", "valid", "test"):
            return None
        time_us, item_id = _plain_time(fields["event_timestamp"]), _whole(fields["item_id"])
        return (
            None if item_id == _NO_ITEM else [InteractionEvent(user_id, item_id, time_us, labels)]
        )
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None


def rows_of_arrow(value: bytes | None) -> list[ItemEvent] | None:
    """Return every row of an Arrow value, good or bad; None if it cannot be read."""
    try:
        table = pa.ipc.open_stream(value or b"").read_all()
        table.validate(full=True)
        return _arrow_events(table)
    except (ValueError, TypeError, KeyError, OSError, pa.ArrowException):
        return None


def is_sound(event: ItemEvent) -> bool:
    """Tell whether a row keeps the contract."""
    if event.item_id == _NO_ITEM:
        return False
    if not _EARLIEST_MICROS <= event.event_timestamp < _FUTURE_MICROS:
        return False
    vector_D = event.embedding
    if vector_D is None or event.encoder_version != ENCODER_VERSION:
        return event.is_deleted
    is_finite = bool((np.abs(vector_D) < _LARGEST_VALUE).all())
    return len(vector_D) == EMBEDDING_DIM and is_finite and bool(vector_D.any())


def _valid_parcel(rng: np.random.Generator, sequence: int) -> tuple[Parcel, dict[str, Change]]:
    kind = rng.random()
    if kind < 0.25:
        labels = (bool(rng.random() < 0.7), bool(rng.random() < 0.3))
        time_us = START + sequence * 1000
        event = InteractionEvent(int(rng.integers(50)), int(rng.integers(500)), time_us, labels)
        message = encode_interaction_event(event, TASK_NAMES)
        return Parcel(message, (), (event,)), JSON_CHANGES
    if kind < 0.5:
        items = tuple(_upload(rng, sequence) for _ in range(int(rng.integers(1, 6))))
        return Parcel(encode_arrow(arrow_items(items)), items), ARROW_CHANGES
    item = _upload(rng, sequence)
    return Parcel(encode_item_event(item), (item,)), JSON_CHANGES | EMBEDDING_CHANGES


def _upload(rng: np.random.Generator, sequence: int) -> ItemEvent:
    vector_D = rng.standard_normal(EMBEDDING_DIM).astype(np.float32)
    time_us = START + int(rng.integers(sequence + 1)) * 1000
    content = {"price": float(rng.integers(100))}
    return ItemEvent(int(rng.integers(500)), time_us, content, vector_D, ENCODER_VERSION)


def _plain_takedown(record: Record, headers: dict[str, bytes | None]) -> ItemEvent:
    item_id = _whole(int(record.key or b""))
    if record.key != b"%d" % item_id:
        raise ValueError("key")
    if item_id == _NO_ITEM:
        raise ValueError("no item")
    text = (headers["event_timestamp"] or b"").decode("ascii")
    return ItemEvent(item_id, _plain_time(int(text)), content={}, is_deleted=True)


def _plain_upload(fields: Any, record: Record) -> ItemEvent:
    item_id = _whole(fields["item_id"])
    with np.errstate(over="raise"):
        vector_D = np.array([_number(value) for value in fields["embedding"]], dtype=np.float32)
    version, time_us = fields["encoder_version"], _plain_time(fields["event_timestamp"])
    event = ItemEvent(item_id, time_us, {}, vector_D, version)
    if record.key != b"%d" % item_id or not is_sound(event):
        raise ValueError("unsound")
    return event


def _arrow_events(table: pa.Table) -> list[ItemEvent]:
    if table.schema.field("event_timestamp").type != TIMESTAMP:
        raise TypeError("time unit")
    if table.schema.field("item_id").type != pa.int64():
        raise TypeError("item id")
    vectors = table["embedding"].to_pylist() if "embedding" in table.column_names else None
    versions = (
        table["encoder_version"].to_pylist() if "encoder_version" in table.column_names else None
    )
    nothing = [None] * table.num_rows
    rows = zip(
        table["item_id"].to_pylist(),
        table["event_timestamp"].cast(pa.int64()).to_pylist(),
        vectors or nothing,
        versions or nothing,
        strict=True,
    )
    return [
        ItemEvent(
            _NO_ITEM if item_id is None else item_id,
            0 if time_us is None else time_us,
            {},
            None if vector is None else np.array(vector, dtype=np.float32),
            version,
        )
        for item_id, time_us, vector, version in rows
    ]


def _whole(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError("no int64")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float, bool):
        raise TypeError("no number")
    return float(value)


def _plain_time(value: Any) -> int:
    if type(value) is str:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError("no offset")
        value = (moment - _EPOCH) // timedelta(microseconds=1)
    if not _EARLIEST_MICROS <= _whole(value) < _FUTURE_MICROS:
        raise ValueError("absurd time")
    return int(value)


# ---- What can happen to a record. ----


def _flip_bytes(rng: np.random.Generator, message: Message) -> Message:
    value = bytearray(message.value or b"")
    for _ in range(int(rng.integers(1, 8))):
        value[int(rng.integers(len(value)))] = int(rng.integers(256))
    return message._replace(value=bytes(value))


def _cut(rng: np.random.Generator, message: Message) -> Message:
    value = message.value or b""
    return message._replace(value=value[: int(rng.integers(len(value)))])


def _insert_bytes(rng: np.random.Generator, message: Message) -> Message:
    value, place = message.value or b"", int(rng.integers(len(message.value or b"")))
    return message._replace(value=value[:place] + rng.bytes(3) + value[place:])


def _replace_value(value: bytes | None) -> Change:
    return lambda rng, message: message._replace(value=value)


def _replace_key(key: bytes | None) -> Change:
    return lambda rng, message: message._replace(key=key)


def _set_header(name: str, value: bytes | None) -> Change:
    """Return the change that sets a header, or drops it (None)."""

    def change(rng: np.random.Generator, message: Message) -> Message:
        headers = [(key, text) for key, text in message.headers if key != name]
        return message._replace(headers=headers + ([(name, value)] if value is not None else []))

    return change


def _set_field(name: str, *values: Any) -> Change:
    """Return the change that puts one of the values into a field; no values: it drops it."""

    def change(rng: np.random.Generator, message: Message) -> Message:
        fields = json.loads(message.value or b"")
        # The key column of an interaction is its user.
        place = "user_id" if name == "id" and "user_id" in fields else name
        place = "item_id" if place == "id" else place
        fields.pop(place, None)
        if values:
            fields[place] = values[int(rng.integers(len(values)))]
        return message._replace(value=json.dumps(fields).encode())

    return change


def _drop_any_field(rng: np.random.Generator, message: Message) -> Message:
    fields = json.loads(message.value or b"")
    fields.pop(sorted(fields)[int(rng.integers(len(fields)))])
    return message._replace(value=json.dumps(fields).encode())


def _twice(rng: np.random.Generator, message: Message) -> Message:
    value = message.value or b""
    return message._replace(value=b'{"item_id":1,' + value[1:])


def _other_encoding(rng: np.random.Generator, message: Message) -> Message:
    codec = ("utf-16", "utf-32", "utf-8-sig")[int(rng.integers(3))]
    return message._replace(value=(message.value or b"").decode().encode(codec))


def _iso_time(rng: np.random.Generator, message: Message) -> Message:
    fields = json.loads(message.value or b"")
    moment = _EPOCH + timedelta(microseconds=fields["event_timestamp"])
    fields["event_timestamp"] = moment.isoformat()
    return message._replace(value=json.dumps(fields).encode())


def _spoil_vector(*values: Any) -> Change:
    """Return the change that puts one of the values into the embedding."""

    def change(rng: np.random.Generator, message: Message) -> Message:
        fields = json.loads(message.value or b"")
        place = int(rng.integers(EMBEDDING_DIM))
        fields["embedding"][place] = values[int(rng.integers(len(values)))]
        return message._replace(value=json.dumps(fields).encode())

    return change


def _spoil_column(name: str, make: Callable[[pa.ChunkedArray], pa.Array | None]) -> Change:
    """Return the change that replaces a column, or drops it (None)."""

    def change(rng: np.random.Generator, message: Message) -> Message:
        table = pa.ipc.open_stream(message.value).read_all()
        place = table.schema.get_field_index(name)
        column = make(table[name])
        table = (
            table.remove_column(place) if column is None else table.set_column(place, name, column)
        )
        return encode_arrow(table)

    return change


def _spoil_row(name: str, *values: Any) -> Change:
    """Return the change that puts one of the values into one row of a column."""

    def change(rng: np.random.Generator, message: Message) -> Message:
        table = pa.ipc.open_stream(message.value).read_all()
        place = table.schema.get_field_index(name)
        column, kind = table[name].to_pylist(), table.schema.field(name).type
        column[int(rng.integers(len(column)))] = values[int(rng.integers(len(values)))]
        return encode_arrow(table.set_column(place, name, pa.array(column, kind)))

    return change


def _compress(rng: np.random.Generator, message: Message) -> Message:
    table = pa.ipc.open_stream(message.value).read_all()
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=("zstd", "lz4")[int(rng.integers(2))])
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return message._replace(value=sink.getvalue().to_pybytes())


def _wide(factor: float) -> list[float]:
    return [factor] * (EMBEDDING_DIM + 3)


_FOREIGN_VALUES: Sequence[Any] = (None, "text", [], {}, [1], {"a": 1}, True, 1.5, -1, 2**63, 10**30)

_ANY_CHANGES: dict[str, Change] = {
    "flip bytes": _flip_bytes,
    "cut": _cut,
    "insert bytes": _insert_bytes,
    "empty value": _replace_value(b""),
    "no schema version": _set_header("schema_version", None),
    "schema version 2": _set_header("schema_version", b"2"),
    "content type": _set_header("content-type", b"text/html"),
    "not an id as key": _replace_key(b"not an id"),
}
JSON_CHANGES: dict[str, Change] = _ANY_CHANGES | {
    "foreign key": _replace_key(b"-77"),
    "no key": _replace_key(None),
    "said to be Arrow": _set_header("content-type", ARROW_TYPE),
    "no id": _set_field("id"),
    "foreign id": _set_field("id", *_FOREIGN_VALUES),
    "foreign time": _set_field("event_timestamp", *_FOREIGN_VALUES),
    "time in seconds": _set_field("event_timestamp", START // 1_000_000),
    "time in the future": _set_field("event_timestamp", _FUTURE_MICROS),
    "time as text": _set_field("event_timestamp", "yesterday", "2023-11-14T22:13:20", ""),
    "time in ISO": _iso_time,
    "any field gone": _drop_any_field,
    "field twice": _twice,
    "other encoding": _other_encoding,
    "nested deep": _replace_value(b"[" * 10_000),
    "nested deep objects": _replace_value(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "long number": _replace_value(b'{"item_id":' + b"9" * 10_000 + b"}"),
    "not an object": _replace_value(b'["item_id", 1]'),
    "half a surrogate": _set_field("color", "\ud800"),
    "foreign content": _set_field("color", ["red"], {"a": "b"}),
    "more content": _set_field("color", "red", 7, True),
}
EMBEDDING_CHANGES: dict[str, Change] = {
    "vector spoilt": _spoil_vector(float("nan"), float("inf"), 1e38, 1e300, "1", None, [1.0]),
    "vector foreign": _set_field("embedding", *_FOREIGN_VALUES, [0.0] * EMBEDDING_DIM, _wide(1.0)),
    "encoder foreign": _set_field("encoder_version", "e9", "", None, 7, "\ud800"),
    "tombstone without time": _replace_value(None),
    "tombstone": lambda rng, message: _set_header("event_timestamp", b"%d" % START)(
        rng, message._replace(value=None)
    ),
    "tombstone of no time": lambda rng, message: _set_header("event_timestamp", b"\xff1")(
        rng, message._replace(value=None)
    ),
}
ARROW_CHANGES: dict[str, Change] = _ANY_CHANGES | {
    "a key": _replace_key(b"1"),
    "said to be JSON": _set_header("content-type", b"application/json"),
    "no ids": _spoil_column("item_id", lambda column: None),
    "no times": _spoil_column("event_timestamp", lambda column: None),
    "no vectors": _spoil_column("embedding", lambda column: None),
    "no encoder": _spoil_column("encoder_version", lambda column: None),
    "narrow ids": _spoil_column("item_id", lambda column: column.cast(pa.int32())),
    "other times": _spoil_column(
        "event_timestamp", lambda column: column.cast(pa.timestamp("ms", tz="UTC"))
    ),
    "wide vectors": _spoil_column("embedding", lambda column: column.cast(pa.list_(pa.float64()))),
    "dictionary": _spoil_column("encoder_version", lambda column: column.dictionary_encode()),
    "row without id": _spoil_row("item_id", None),
    "row without time": _spoil_row("event_timestamp", None),
    "row in the future": _spoil_row("event_timestamp", _FUTURE_MICROS),
    "row long ago": _spoil_row("event_timestamp", 1),
    "row without vector": _spoil_row("embedding", None),
    "row's vector": _spoil_row(
        "embedding", [], [0.0] * EMBEDDING_DIM, _wide(1.0), [float("nan")] * EMBEDDING_DIM
    ),
    "row's encoder": _spoil_row("encoder_version", None, "", "e9"),
    "compressed": _compress,
}

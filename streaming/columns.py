"""The records of one batch as Arrow columns, with the dead letters beside them.

One bad record, or one bad row of an Arrow record, never sinks the others.
Shape letters in this file: N rows.
May import: numpy, pyarrow.
"""

import json
import logging
import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import EventError
from qarm_feast.schema import (
    CONTENT_BINARY_COLUMNS,
    CONTENT_TEXT_COLUMNS,
    ERASURE_MARK,
    EVENT_TIMESTAMP,
    ITEM_ID,
    SPLITS,
    TIMESTAMP,
    USER_ID,
)
from streaming.limits import DEFAULT_LIMITS, EventLimits, Reason
from streaming.media import check_media
from streaming.messages import (
    ARROW_TYPE,
    EMBEDDING,
    ENCODER_VERSION,
    SPLIT,
    ContentValue,
    InteractionEvent,
    ItemEvent,
    Record,
    UnreadableRecord,
    UserErasure,
    are_finite,
    check_record_size,
    check_unpacked_size,
    content_type,
    decode_arrow,
    decode_interaction_event,
    decode_item_event,
    encode_arrow,
    has_content,
    json_content,
    timestamp_bounds,
)

logger = logging.getLogger(__name__)

IS_DELETED = "is_deleted"
CONTENT = "content"
RECORD_INDEX = "record_index"
ROW_INDEX = "row_index"

# json.dumps makes one for each call whose options are not the default ones.
_CONTENT_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))

ITEM_EVENT_ROWS = pa.schema(
    [
        (ITEM_ID, pa.int64()),
        (EVENT_TIMESTAMP, TIMESTAMP),
        (IS_DELETED, pa.bool_()),
        *[(name, pa.string()) for name in CONTENT_TEXT_COLUMNS],
        *[(name, pa.binary()) for name in CONTENT_BINARY_COLUMNS],
        (CONTENT, pa.string()),
        (EMBEDDING, pa.list_(pa.float32())),
        (ENCODER_VERSION, pa.string()),
        (RECORD_INDEX, pa.int32()),
        (ROW_INDEX, pa.int32()),
    ]
)
"""Item events of a batch. ``content`` is the JSON text of all content fields; ``record_index``
is the position in the batch of the record that the row came from, ``row_index`` the position in
that record."""


class DeadLetter(NamedTuple):
    """A record, or some rows of it (``value``), that break the contract."""

    record: Record
    reason: str
    detail: str
    value: bytes | None
    codebook_version: str = ""


class DecodedItems(NamedTuple):
    """Good rows of ``ITEM_EVENT_ROWS`` and the dead letters of the others."""

    rows: pa.Table
    dead_letters: list[DeadLetter]


class DecodedInteractions(NamedTuple):
    """Good rows (``user_id item_id <tasks> split event_timestamp``), dead letters, erasures."""

    rows: pa.Table
    dead_letters: list[DeadLetter]
    erasures: list[UserErasure]


def decode_items(records: Sequence[Record], limits: EventLimits = DEFAULT_LIMITS) -> DecodedItems:
    """Decode the item records of a batch.

    Args:
        records: Records of the item topic; ``record_index`` counts them.
        limits: Bounds that records must keep.

    Returns:
        Rows in the order of the records, and the dead letters.
    """
    events: list[ItemEvent] = []
    places: list[tuple[int, int]] = []
    dead_letters: list[DeadLetter] = []
    for index, record in enumerate(records):
        try:
            if _is_arrow(record, limits):
                table = decode_arrow(record)
                new, faults = _item_events(table, record.timestamp, limits)
                dead_letters += _row_letters(record, table, faults)
                places += [(index, int(row)) for row in np.flatnonzero(faults.good_rows())]
                events += new
            else:
                events.append(decode_item_event(record, limits))
                places.append((index, 0))
        except Exception as error:  # noqa: BLE001  # one record must not stop the others; logged
            dead_letters.append(_refused(record, error))
    return DecodedItems(_item_table(events, places), dead_letters)


def decode_interactions(
    records: Iterable[Record],
    task_names: tuple[str, ...],
    limits: EventLimits = DEFAULT_LIMITS,
) -> DecodedInteractions:
    """Decode the interaction records of a batch.

    Args:
        records: Records of the interaction topic.
        task_names: The task flags that every event carries.
        limits: Bounds that records must keep.

    Returns:
        Rows, the dead letters, and the erasures of users.
    """
    events: list[InteractionEvent] = []
    erasures: list[UserErasure] = []
    tables: list[pa.Table] = []
    dead_letters: list[DeadLetter] = []
    for record in records:
        try:
            if _is_arrow(record, limits):
                table = _known_columns(decode_arrow(record), task_names)
                rows, faults = _interaction_rows(table, task_names, record.timestamp, limits)
                dead_letters += _row_letters(record, table, faults)
                tables.append(rows)
                continue
            event = decode_interaction_event(record, task_names, limits)
            if isinstance(event, UserErasure):
                erasures.append(event)
            else:
                events.append(event)
        except Exception as error:  # noqa: BLE001  # one record must not stop the others; logged
            dead_letters.append(_refused(record, error))
    tables.append(_interaction_table(events, task_names))
    return DecodedInteractions(pa.concat_tables(tables), dead_letters, erasures)


def letters_of_rows(
    records: Sequence[Record], rows: pa.Table, letter: tuple[str, str, str]
) -> list[DeadLetter]:
    """Return dead letters for rows that a later stage refuses, one per record.

    Args:
        records: What was given to :func:`decode_items`.
        rows: The refused rows.
        letter: Reason, detail and codebook versions.

    Returns:
        The letters, each with the refused rows only.
    """
    reason, detail, versions = letter
    letters = []
    for index in pc.unique(rows[RECORD_INDEX]).to_pylist():
        record = records[index]
        value = record.value
        if content_type(record) == ARROW_TYPE:
            row_indexes = rows.filter(pc.equal(rows[RECORD_INDEX], index))[ROW_INDEX]
            value = encode_arrow(decode_arrow(record).take(row_indexes)).value
        letters.append(DeadLetter(record, reason, detail, value, versions))
    return letters


def embedding_matrix(embeddings: pa.ChunkedArray, width: int) -> np.ndarray:
    """Return ready embeddings as float32 of shape ``[N, width]``; every row has that width."""
    flat: np.ndarray = pc.list_flatten(embeddings).to_numpy()
    return flat.reshape(-1, width)


def _is_arrow(record: Record, limits: EventLimits) -> bool:
    """Tell the form of a record that is not too large, packed or unpacked."""
    if isinstance(record, UnreadableRecord):
        raise EventError(Reason.UNDECODABLE, f"the client cannot read the record: {record.fault}")
    check_record_size(record, limits.max_record_bytes)
    is_arrow = content_type(record) == ARROW_TYPE and record.value is not None
    if is_arrow:
        check_unpacked_size(record, limits.max_decoded_bytes)
    return is_arrow


def _refused(record: Record, error: Exception) -> DeadLetter:
    if isinstance(error, EventError):
        return DeadLetter(record, error.reason, str(error), record.value)
    # Where, but not the message: it may quote the payload.
    place = traceback.extract_tb(error.__traceback__)[-1]
    kind = type(error).__name__
    logger.error(
        "decoder_fault topic=%s partition=%d offset=%d error=%s file=%s line=%d",
        *(record.topic, record.partition, record.offset, kind, place.filename, place.lineno),
    )
    detail = f"{Reason.DECODER_FAULT}: {kind} in the decoder, the worker's log has the place"
    return DeadLetter(record, Reason.DECODER_FAULT, detail, record.value)


def _item_table(events: Sequence[ItemEvent], places: Sequence[tuple[int, int]]) -> pa.Table:
    if not events:
        return ITEM_EVENT_ROWS.empty_table()
    ids, timestamps, contents, embeddings, versions, deleted = zip(*events, strict=True)
    columns = [
        pa.array(ids, pa.int64()),
        pa.array(timestamps, pa.int64()).cast(TIMESTAMP),
        pa.array(deleted, pa.bool_()),
        *[pa.array([c.get(name) for c in contents], pa.string()) for name in CONTENT_TEXT_COLUMNS],
        *[
            pa.array([_as_bytes(c.get(name)) for c in contents], pa.binary())
            for name in CONTENT_BINARY_COLUMNS
        ],
        pa.array([content_text(c) for c in contents], pa.string()),
        _embedding_array(embeddings),
        pa.array(versions, pa.string()),
        *[pa.array(indexes, pa.int32()) for indexes in zip(*places, strict=True)],
    ]
    return pa.table(columns, schema=ITEM_EVENT_ROWS)


def content_text(content: Mapping[str, ContentValue]) -> str:
    """Return the content log's JSON text: keys sorted, no spaces."""
    return _CONTENT_JSON.encode(json_content(content)) if content else "{}"


def _as_bytes(value: object) -> bytes | None:
    return value.encode() if isinstance(value, str) else value  # type: ignore[return-value]  # decode lets only text and bytes pass


def _embedding_array(embeddings: Sequence[np.ndarray | None]) -> pa.Array:
    lengths_N = np.array([0 if e is None else len(e) for e in embeddings], dtype=np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths_N, dtype=np.int32)), dtype=np.int32)
    ready = [e for e in embeddings if e is not None]
    values = np.concatenate(ready) if ready else np.empty(0, dtype=np.float32)
    is_null_N = pa.array(lengths_N == 0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=is_null_N)


def _interaction_table(events: Sequence[InteractionEvent], task_names: tuple[str, ...]) -> pa.Table:
    if not events:
        return _interaction_schema(task_names).empty_table()
    users, items, timestamps, labels, splits = zip(*events, strict=True)
    columns = [
        pa.array(users, pa.int64()),
        pa.array(items, pa.int64()),
        *[pa.array(flags, pa.bool_()) for flags in zip(*labels, strict=True)],
        pa.array(splits, pa.string()),
        pa.array(timestamps, pa.int64()).cast(TIMESTAMP),
    ]
    return pa.table(columns, schema=_interaction_schema(task_names))


def _interaction_schema(task_names: tuple[str, ...]) -> pa.Schema:
    return pa.schema(
        [
            (USER_ID, pa.int64()),
            (ITEM_ID, pa.int64()),
            *[(name, pa.bool_()) for name in task_names],
            (SPLIT, pa.string()),
            (EVENT_TIMESTAMP, TIMESTAMP),
        ]
    )


class _RowFaults:
    """First fault of each bad row of one Arrow record."""

    def __init__(self, num_rows: int) -> None:
        self.reasons_N = np.full(num_rows, "", dtype=object)

    def add(self, reason: Reason, is_bad: pa.ChunkedArray | pa.Array | np.ndarray) -> None:
        is_bad_N = np.asarray(is_bad, dtype=bool)
        self.reasons_N[is_bad_N & (self.reasons_N == "")] = reason

    def good_rows(self) -> np.ndarray:
        good_N: np.ndarray = self.reasons_N == ""
        return good_N


def _row_letters(record: Record, table: pa.Table, faults: _RowFaults) -> list[DeadLetter]:
    letters = []
    for reason in sorted(set(faults.reasons_N) - {""}):
        rows = table.filter(pa.array(faults.reasons_N == reason))
        detail = f"{reason}: {rows.num_rows} of the record's {table.num_rows} rows"
        letters.append(DeadLetter(record, reason, detail, encode_arrow(rows).value))
    return letters


def _typed_column(table: pa.Table, name: str, wanted: pa.DataType) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise EventError(Reason.MISSING_FIELD, f"no column {name}")
    column = table[name]
    if column.type != wanted:
        raise EventError(Reason.WRONG_TYPE, f"column {name} is {column.type}, not {wanted}")
    return column


def _check_ids_and_times(
    table: pa.Table, id_names: Sequence[str], append_ms: int, max_future_seconds: float
) -> _RowFaults:
    ids = [_typed_column(table, name, pa.int64()) for name in id_names]
    times = _typed_column(table, EVENT_TIMESTAMP, TIMESTAMP)
    faults = _RowFaults(table.num_rows)
    for column in ids:
        faults.add(Reason.MISSING_FIELD, pc.is_null(column))
    faults.add(Reason.MISSING_FIELD, pc.is_null(times))
    micros_N = times.cast(pa.int64()).fill_null(append_ms * 1000).to_numpy()
    earliest, latest = timestamp_bounds(append_ms, max_future_seconds)
    faults.add(Reason.ABSURD_TIMESTAMP, micros_N < earliest)
    faults.add(Reason.FUTURE_TIMESTAMP, micros_N > latest)
    return faults


def _known_columns(table: pa.Table, task_names: tuple[str, ...]) -> pa.Table:
    """Leave out what no reader asks for: rows of any other type may not even be filtered."""
    names = set(_interaction_schema(task_names).names)
    return table.select([name for name in table.column_names if name in names])


def _interaction_rows(
    table: pa.Table, task_names: tuple[str, ...], append_ms: int, limits: EventLimits
) -> tuple[pa.Table, _RowFaults]:
    names = (USER_ID, ITEM_ID)
    faults = _check_ids_and_times(table, names, append_ms, limits.max_future_seconds)
    is_mark = pc.fill_null(pc.equal(table[ITEM_ID], ERASURE_MARK), False)
    faults.add(Reason.RESERVED_ID, is_mark)
    for name in task_names:
        faults.add(Reason.MISSING_FIELD, pc.is_null(_typed_column(table, name, pa.bool_())))
    if SPLIT in table.column_names:
        split = _typed_column(table, SPLIT, pa.string()).fill_null("")
        faults.add(Reason.WRONG_TYPE, pc.invert(pc.is_in(split, pa.array(["", *SPLITS]))))
    else:
        split = pa.chunked_array([pa.repeat(pa.scalar(""), table.num_rows)])
    columns = [
        split if name == SPLIT else table[name] for name in _interaction_schema(task_names).names
    ]
    rows = pa.table(columns, schema=_interaction_schema(task_names))
    return rows.filter(pa.array(faults.good_rows())), faults


def _item_events(
    table: pa.Table, append_ms: int, limits: EventLimits
) -> tuple[list[ItemEvent], _RowFaults]:
    faults = _check_ids_and_times(table, (ITEM_ID,), append_ms, limits.max_future_seconds)
    contents = _content_rows(table)
    _add_content_faults(table, contents, limits, faults)
    embeddings = _embedding_rows(table, faults)
    versions = _encoder_versions(table, embeddings, faults)
    is_empty = [
        embedding is None and not has_content(content)
        for embedding, content in zip(embeddings, contents, strict=True)
    ]
    faults.add(Reason.MISSING_FIELD, np.array(is_empty, dtype=bool))
    ids = table[ITEM_ID].to_pylist()
    times = table[EVENT_TIMESTAMP].cast(pa.int64()).to_pylist()
    rows = zip(ids, times, contents, embeddings, versions, faults.good_rows(), strict=True)
    events = [ItemEvent(*row[:5]) for row in rows if row[5]]
    return events, faults


def _content_rows(table: pa.Table) -> list[dict[str, ContentValue]]:
    names = [
        name
        for name in table.column_names
        if name not in (ITEM_ID, EVENT_TIMESTAMP, EMBEDDING, ENCODER_VERSION)
    ]
    for name in names:
        _check_content_type(name, table.schema.field(name).type)
    columns = [table[name].to_pylist() for name in names]
    rows = zip(*columns, strict=True) if columns else ((),) * table.num_rows
    return [
        {name: value for name, value in zip(names, row, strict=True) if _is_present(value)}
        for row in rows
    ]


def _add_content_faults(
    table: pa.Table,
    contents: Sequence[Mapping[str, ContentValue]],
    limits: EventLimits,
    faults: _RowFaults,
) -> None:
    for field in table.schema:
        if pa.types.is_floating(field.type):
            is_infinite = pc.fill_null(pc.is_inf(table[field.name]), False)
            faults.add(Reason.WRONG_TYPE, is_infinite)
    if not set(CONTENT_BINARY_COLUMNS) & set(table.column_names):
        return
    bad_rows: dict[Reason, list[int]] = {}
    for row, content in enumerate(contents):
        try:
            check_media(content, limits)
        except EventError as error:
            bad_rows.setdefault(Reason(error.reason), []).append(row)
    for reason, rows in bad_rows.items():
        faults.add(reason, np.isin(np.arange(table.num_rows), rows))


def _is_present(value: object) -> bool:
    # Data frames spell a missing number as NaN.
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and value not in ("", b"")


def _check_content_type(name: str, kind: pa.DataType) -> None:
    is_text = pa.types.is_string(kind)
    if name in CONTENT_TEXT_COLUMNS:
        is_right = is_text
    elif name in CONTENT_BINARY_COLUMNS:
        is_right = is_text or pa.types.is_binary(kind)
    else:
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        is_right = is_text or is_number or pa.types.is_boolean(kind)
    if not is_right:
        raise EventError(Reason.WRONG_TYPE, f"content column {name} has type {kind}")


def _embedding_rows(table: pa.Table, faults: _RowFaults) -> list[np.ndarray | None]:
    if EMBEDDING not in table.column_names:
        return [None] * table.num_rows
    kind = table.schema.field(EMBEDDING).type
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (is_list and pa.types.is_float32(kind.value_type)):
        raise EventError(Reason.WRONG_TYPE, f"embedding is {kind}, not a list of float32")
    column = table[EMBEDDING]
    is_given_N = column.is_valid().to_numpy()
    lengths_N = pc.if_else(column.is_valid(), pc.list_value_length(column), 0).to_numpy()
    # Null elements become NaN.
    flat_M = pc.list_flatten(column).to_numpy().astype(np.float32, copy=False)
    is_bad_N = _row_counts(~are_finite(flat_M), lengths_N) > 0
    faults.add(Reason.EMBEDDING_NOT_FINITE, is_bad_N)
    is_zero_N = _row_counts(flat_M != 0, lengths_N) == 0
    faults.add(Reason.EMBEDDING_ZERO, is_given_N & is_zero_N)
    ends = np.cumsum(lengths_N).tolist()
    rows = zip([0, *ends], ends, is_given_N.tolist(), strict=False)
    return [flat_M[start:end] if is_given else None for start, end, is_given in rows]


def _row_counts(is_counted_M: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
    """Return how many elements of each row are counted; the rows lie one behind the other."""
    totals = np.append(0, np.cumsum(is_counted_M))
    ends_N = np.cumsum(lengths_N)
    counts_N: np.ndarray = totals[ends_N] - totals[ends_N - lengths_N]
    return counts_N


def _encoder_versions(
    table: pa.Table, embeddings: Sequence[np.ndarray | None], faults: _RowFaults
) -> list[str | None]:
    versions: list[str | None] = [None] * table.num_rows
    if ENCODER_VERSION in table.column_names:
        versions = _typed_column(table, ENCODER_VERSION, pa.string()).to_pylist()
    pairs = list(zip(embeddings, versions, strict=True))
    is_unnamed = [embedding is not None and not version for embedding, version in pairs]
    faults.add(Reason.MISSING_FIELD, np.array(is_unnamed, dtype=bool))
    return [version if embedding is not None else None for embedding, version in pairs]

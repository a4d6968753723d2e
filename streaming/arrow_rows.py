"""Rows of Arrow records, checked column by column over all records of one schema.

Shape letters in this file: N rows, M numbers of all rows, R records.
May import: numpy, pyarrow.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
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
from streaming.event_columns import (
    ITEM_EVENT_ROWS,
    RECORD_INDEX,
    ROW_INDEX,
    RowFaults,
    Vectors,
    content_columns,
    interaction_schema,
)
from streaming.limits import EventLimits, Reason
from streaming.media import check_media
from streaming.messages import (
    EMBEDDING,
    ENCODER_VERSION,
    MIN_EVENT_TIMESTAMP,
    SPLIT,
    ContentValue,
    Record,
    has_content,
    latest_timestamp,
)

_ITEM_COLUMNS = (ITEM_ID, EVENT_TIMESTAMP, EMBEDDING, ENCODER_VERSION)


class ArrowRecord(NamedTuple):
    """A record, its position in the batch, and its rows as they came."""

    position: int
    record: Record
    table: pa.Table


Check = Callable[[pa.Table, np.ndarray], tuple[pa.Table, RowFaults]]
"""From rows as they came and their append times (milliseconds) to all rows laid out, bad ones too,
and the faults of the bad ones; raises EventError if the columns are not what they must be."""


class CheckedRecords(NamedTuple):
    """What came out of some records of one schema.

    ``rows`` are the good ones, with ``record_index`` and ``row_index`` added; ``faults`` are of
    all rows, those of ``parts[i]`` are the rows of the ``i``-th record.
    """

    records: Sequence[ArrowRecord]
    rows: pa.Table
    faults: RowFaults
    parts: Sequence[slice]


def check_records(records: Sequence[ArrowRecord], check: Check) -> CheckedRecords:
    """Return the good rows of records that share a schema, and the faults of the others.

    Args:
        records: At least one.
        check: What to check.

    Returns:
        Rows and faults.

    Raises:
        EventError: If the columns are not what they must be.
    """
    table = pa.concat_tables([each.table for each in records])
    counts_R = np.array([each.table.num_rows for each in records])
    ends_R = np.cumsum(counts_R)
    append_ms_R = np.array([each.record.timestamp for each in records], dtype=np.float64)
    rows, faults = check(table, np.repeat(append_ms_R, counts_R))
    record_index_N = np.repeat(np.array([each.position for each in records]), counts_R)
    row_index_N = np.arange(len(table)) - np.repeat(ends_R - counts_R, counts_R)
    rows = rows.append_column(RECORD_INDEX, pa.array(record_index_N, pa.int32()))
    rows = rows.append_column(ROW_INDEX, pa.array(row_index_N, pa.int32()))
    good_N = faults.good_rows()
    parts = [slice(int(end - count), int(end)) for end, count in zip(ends_R, counts_R, strict=True)]
    good_rows = rows if good_N.all() else rows.filter(pa.array(good_N))
    return CheckedRecords(records, good_rows, faults, parts)


def same_schema_runs(records: Sequence[ArrowRecord]) -> Iterator[list[ArrowRecord]]:
    """Yield neighbours of one schema, in order."""
    for _, run in groupby(records, key=lambda each: each.table.schema):
        yield list(run)


def check_item_rows(limits: EventLimits) -> Check:
    """Return the check of item rows; what it lays out lacks the two index columns.

    Args:
        limits: Bounds that rows must keep.

    Returns:
        The check.
    """

    def check(table: pa.Table, append_ms_N: np.ndarray) -> tuple[pa.Table, RowFaults]:
        faults = _check_ids_and_times(table, (ITEM_ID,), append_ms_N, limits.max_future_seconds)
        contents = _content_rows(table)
        _add_content_faults(table, contents, limits, faults)
        vectors, is_given_N = _vectors(table)
        faults.add(Reason.EMBEDDING_NOT_FINITE, vectors.are_spoilt())
        faults.add(Reason.EMBEDDING_ZERO, is_given_N & vectors.are_zero())
        versions = _encoder_versions(table, is_given_N, faults)
        is_told_N = np.array([bool(c) and has_content(c) for c in contents], dtype=bool)
        faults.add(Reason.MISSING_FIELD, ~is_given_N & ~is_told_N)
        columns = [
            table[ITEM_ID],
            table[EVENT_TIMESTAMP],
            pa.repeat(pa.scalar(False), table.num_rows),
            *content_columns(contents),
            vectors.to_array(),
            versions,
        ]
        return pa.table(columns, schema=pa.schema(list(ITEM_EVENT_ROWS)[:-2])), faults

    return check


def check_interaction_rows(task_names: tuple[str, ...], limits: EventLimits) -> Check:
    """Return the check of interaction rows.

    Args:
        task_names: The task flags that every row carries.
        limits: Bounds that rows must keep.

    Returns:
        The check.
    """

    def check(table: pa.Table, append_ms_N: np.ndarray) -> tuple[pa.Table, RowFaults]:
        names = (USER_ID, ITEM_ID)
        faults = _check_ids_and_times(table, names, append_ms_N, limits.max_future_seconds)
        for name in task_names:
            faults.add(Reason.MISSING_FIELD, pc.is_null(_typed_column(table, name, pa.bool_())))
        split = _splits(table)
        faults.add(Reason.WRONG_TYPE, pc.invert(pc.is_in(split, pa.array(["", *SPLITS]))))
        schema = interaction_schema(task_names)
        columns = [split if name == SPLIT else table[name] for name in schema.names]
        return pa.table(columns, schema=schema), faults

    return check


def _typed_column(table: pa.Table, name: str, wanted: pa.DataType) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise EventError(Reason.MISSING_FIELD, f"no column {name}")
    column = table[name]
    if column.type != wanted:
        raise EventError(Reason.WRONG_TYPE, f"column {name} is {column.type}, not {wanted}")
    return column


def _check_ids_and_times(
    table: pa.Table, id_names: Sequence[str], append_ms_N: np.ndarray, max_future_seconds: float
) -> RowFaults:
    ids = [_typed_column(table, name, pa.int64()) for name in id_names]
    times = _typed_column(table, EVENT_TIMESTAMP, TIMESTAMP)
    faults = RowFaults(table.num_rows)
    for column in (*ids, times):
        faults.add(Reason.MISSING_FIELD, pc.is_null(column))
    micros_N = times.cast(pa.int64()).fill_null(MIN_EVENT_TIMESTAMP).to_numpy()
    faults.add(Reason.ABSURD_TIMESTAMP, micros_N < MIN_EVENT_TIMESTAMP)
    faults.add(
        Reason.FUTURE_TIMESTAMP, micros_N > latest_timestamp(append_ms_N, max_future_seconds)
    )
    is_reserved = pc.fill_null(pc.equal(table[ITEM_ID], ERASURE_MARK), False)
    faults.add(Reason.RESERVED_ID, is_reserved)
    return faults


def _splits(table: pa.Table) -> pa.ChunkedArray:
    if SPLIT in table.column_names:
        return _typed_column(table, SPLIT, pa.string()).fill_null("")
    return pa.chunked_array([pa.repeat(pa.scalar(""), table.num_rows)])


def _content_rows(table: pa.Table) -> Sequence[Mapping[str, ContentValue]]:
    names = [name for name in table.column_names if name not in _ITEM_COLUMNS]
    if not names:
        return [{}] * table.num_rows
    for name in names:
        _check_content_type(name, table.schema.field(name).type)
    rows = zip(*[table[name].to_pylist() for name in names], strict=True)
    return [
        {name: value for name, value in zip(names, row, strict=True) if _is_present(value)}
        for row in rows
    ]


def _add_content_faults(
    table: pa.Table,
    contents: Sequence[Mapping[str, ContentValue]],
    limits: EventLimits,
    faults: RowFaults,
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


def _vectors(table: pa.Table) -> tuple[Vectors, np.ndarray]:
    """Return the embeddings, and of each row whether it has one; an empty one counts."""
    if EMBEDDING not in table.column_names:
        nothing_N = np.zeros(table.num_rows, dtype=np.int32)
        return Vectors(np.empty(0, dtype=np.float32), nothing_N), nothing_N.astype(bool)
    column = table[EMBEDDING]
    is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
    if not (is_list and pa.types.is_float32(column.type.value_type)):
        raise EventError(Reason.WRONG_TYPE, f"embedding is {column.type}, not a list of float32")
    is_given = column.is_valid()
    lengths_N = pc.if_else(is_given, pc.list_value_length(column), 0).to_numpy()
    # Null elements become NaN.
    flat_M = pc.list_flatten(column).to_numpy().astype(np.float32, copy=False)
    return Vectors(flat_M, lengths_N), is_given.to_numpy()


def _encoder_versions(
    table: pa.Table, is_given_N: np.ndarray, faults: RowFaults
) -> pa.ChunkedArray | pa.Array:
    """Return the encoders of the rows with an embedding."""
    if ENCODER_VERSION not in table.column_names:
        faults.add(Reason.MISSING_FIELD, is_given_N)
        return pa.nulls(table.num_rows, pa.string())
    versions = _typed_column(table, ENCODER_VERSION, pa.string())
    is_named_N = np.asarray(pc.not_equal(versions.fill_null(""), ""), dtype=bool)
    faults.add(Reason.MISSING_FIELD, is_given_N & ~is_named_N)
    return pc.if_else(pa.array(is_given_N), versions, None)

"""The columns that item and interaction events become, and the checks that go by whole columns.

Shape letters in this file: N rows, M numbers of all rows.
May import: numpy, pyarrow.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from qarm_feast.schema import (
    CONTENT_BINARY_COLUMNS,
    CONTENT_TEXT_COLUMNS,
    EVENT_TIMESTAMP,
    ITEM_ID,
    TIMESTAMP,
    USER_ID,
)
from streaming.limits import Reason
from streaming.messages import (
    EMBEDDING,
    ENCODER_VERSION,
    SPLIT,
    ContentValue,
    InteractionEvent,
    ItemEvent,
    are_finite,
    json_content,
)

IS_DELETED = "is_deleted"
CONTENT = "content"
RECORD_INDEX = "record_index"
ROW_INDEX = "row_index"

# json.dumps makes one for each call whose options are not the default ones.
_CONTENT_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_REASONS = tuple(Reason)

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


class Vectors(NamedTuple):
    """Embeddings of rows, one behind the other: ``lengths_N`` numbers each, 0 for none."""

    flat_M: np.ndarray
    lengths_N: np.ndarray

    def are_spoilt(self) -> np.ndarray:
        """Tell of each row whether it holds a number that is NaN, infinite or out of range."""
        spoilt_N: np.ndarray = self._counts(~are_finite(self.flat_M)) > 0
        return spoilt_N

    def are_zero(self) -> np.ndarray:
        """Tell of each row whether it holds no number but zeros; so does an empty one."""
        zero_N: np.ndarray = self._counts(self.flat_M != 0) == 0
        return zero_N

    def to_array(self) -> pa.Array:
        """Return the column ``embedding``; a row without numbers is null."""
        offsets = np.append(0, np.cumsum(self.lengths_N, dtype=np.int64)).astype(np.int32)
        is_null_N = pa.array(self.lengths_N == 0)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(self.flat_M), mask=is_null_N)

    def _counts(self, is_counted_M: np.ndarray) -> np.ndarray:
        """Return how many numbers of each row are counted."""
        totals = np.append(0, np.cumsum(is_counted_M, dtype=np.int32))
        ends_N = np.cumsum(self.lengths_N)
        counts_N: np.ndarray = totals[ends_N] - totals[ends_N - self.lengths_N]
        return counts_N


class RowFaults:
    """First fault of each bad row.

    Args:
        num_rows: Rows that are checked.
    """

    def __init__(self, num_rows: int) -> None:
        # 0: none; else the position of the reason, counted from 1.
        self._codes_N = np.zeros(num_rows, dtype=np.int8)

    def add(self, reason: Reason, is_bad: pa.ChunkedArray | pa.Array | np.ndarray) -> None:
        """Note a fault of rows that have none yet."""
        is_bad_N = np.asarray(is_bad, dtype=bool)
        if is_bad_N.any():
            self._codes_N[is_bad_N & (self._codes_N == 0)] = 1 + _REASONS.index(reason)

    def good_rows(self) -> np.ndarray:
        """Tell of each row whether it has no fault."""
        good_N: np.ndarray = self._codes_N == 0
        return good_N

    def rows_by_reason(self, part: slice) -> dict[Reason, np.ndarray]:
        """Return the bad rows of a part by reason, counted from the part's first row."""
        codes = self._codes_N[part]
        found = sorted(_REASONS[code - 1] for code in np.unique(codes[codes > 0]))
        return {reason: np.flatnonzero(codes == 1 + _REASONS.index(reason)) for reason in found}


def item_table(events: Mapping[int, ItemEvent]) -> pa.Table:
    """Return rows of ``ITEM_EVENT_ROWS`` for events by the index of their record."""
    if not events:
        return ITEM_EVENT_ROWS.empty_table()
    ids, timestamps, contents, embeddings, versions, deleted = zip(*events.values(), strict=True)
    ready = [embedding for embedding in embeddings if embedding is not None]
    lengths = [0 if embedding is None else len(embedding) for embedding in embeddings]
    flat_M = np.concatenate(ready) if ready else np.empty(0, dtype=np.float32)
    columns = [
        pa.array(ids, pa.int64()),
        pa.array(timestamps, pa.int64()).cast(TIMESTAMP),
        pa.array(deleted, pa.bool_()),
        *content_columns(contents),
        Vectors(flat_M, np.array(lengths, dtype=np.int32)).to_array(),
        pa.array(versions, pa.string()),
        pa.array(list(events), pa.int32()),
        pa.repeat(pa.scalar(0, pa.int32()), len(events)),
    ]
    return pa.table(columns, schema=ITEM_EVENT_ROWS)


def content_columns(contents: Sequence[Mapping[str, ContentValue]]) -> list[pa.Array]:
    """Return the columns from ``title`` to ``content`` of ``ITEM_EVENT_ROWS``."""
    if not any(contents):
        return no_content_columns(len(contents))
    return [
        *[pa.array([c.get(name) for c in contents], pa.string()) for name in CONTENT_TEXT_COLUMNS],
        *[
            pa.array([_as_bytes(c.get(name)) for c in contents], pa.binary())
            for name in CONTENT_BINARY_COLUMNS
        ],
        pa.array([content_text(c) for c in contents], pa.string()),
    ]


def no_content_columns(num_rows: int) -> list[pa.Array]:
    """Return :func:`content_columns` of rows without content."""
    return [
        *[pa.nulls(num_rows, pa.string()) for _ in CONTENT_TEXT_COLUMNS],
        *[pa.nulls(num_rows, pa.binary()) for _ in CONTENT_BINARY_COLUMNS],
        pa.repeat(content_text({}), num_rows),
    ]


def content_text(content: Mapping[str, ContentValue]) -> str:
    """Return the content log's JSON text: keys sorted, no spaces."""
    return _CONTENT_JSON.encode(json_content(content)) if content else "{}"


def interaction_schema(task_names: tuple[str, ...]) -> pa.Schema:
    """Return the columns of decoded interactions."""
    return pa.schema(
        [
            (USER_ID, pa.int64()),
            (ITEM_ID, pa.int64()),
            *[(name, pa.bool_()) for name in task_names],
            (SPLIT, pa.string()),
            (EVENT_TIMESTAMP, TIMESTAMP),
        ]
    )


def interaction_table(events: Sequence[InteractionEvent], task_names: tuple[str, ...]) -> pa.Table:
    """Return rows of :func:`interaction_schema`."""
    if not events:
        return interaction_schema(task_names).empty_table()
    users, items, timestamps, labels, splits = zip(*events, strict=True)
    columns = [
        pa.array(users, pa.int64()),
        pa.array(items, pa.int64()),
        *[pa.array(flags, pa.bool_()) for flags in zip(*labels, strict=True)],
        pa.array(splits, pa.string()),
        pa.array(timestamps, pa.int64()).cast(TIMESTAMP),
    ]
    return pa.table(columns, schema=interaction_schema(task_names))


def _as_bytes(value: object) -> bytes | None:
    return value.encode() if isinstance(value, str) else value  # type: ignore[return-value]  # decode lets only text and bytes pass

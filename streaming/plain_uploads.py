"""The common JSON upload, column by column: an id, a time, a ready vector, and nothing else.

Whatever is not just that is left to :func:`streaming.messages.item_upload`, which alone knows why a
record is refused; a test holds the two against each other.
May import: numpy, pyarrow.
"""

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from qarm_feast.schema import ERASURE_MARK, EVENT_TIMESTAMP, ITEM_ID, TIMESTAMP
from streaming.event_columns import ITEM_EVENT_ROWS, Vectors, no_content_columns
from streaming.limits import EventLimits
from streaming.messages import (
    EMBEDDING,
    ENCODER_VERSION,
    INT64_LIMIT,
    MIN_EVENT_TIMESTAMP,
    Record,
    latest_timestamp,
)

_NUM_FIELDS = 4


class PlainUploads:
    """Collects the plain uploads of a batch.

    Args:
        limits: Bounds that records must keep.
    """

    def __init__(self, limits: EventLimits) -> None:
        self._limits = limits
        self._rows: list[tuple[int, int, int, str, int]] = []
        self._packed: list[bytes] = []

    def take(self, index: int, record: Record, fields: Mapping[str, Any]) -> bool:
        """Take an upload if it is a plain one.

        Args:
            index: Its position in the batch.
            record: The record.
            fields: Its value, read by :func:`streaming.messages.json_fields`.

        Returns:
            Whether it was taken.
        """
        item_id, time = fields.get(ITEM_ID), fields.get(EVENT_TIMESTAMP)
        values, version = fields.get(EMBEDDING), fields.get(ENCODER_VERSION)
        if not (
            len(fields) == _NUM_FIELDS
            and type(item_id) is int
            and -INT64_LIMIT <= item_id < INT64_LIMIT
            and item_id != ERASURE_MARK
            and record.key == b"%d" % item_id
            and type(time) is int
            and time >= MIN_EVENT_TIMESTAMP
            and time <= latest_timestamp(record.timestamp, self._limits.max_future_seconds)
            and type(values) is list
            and type(version) is str
            and version
            and version.isascii()
        ):
            return False
        try:
            # Half the time of array("f", values), and the same numbers.
            packed = struct.pack(f"{len(values)}f", *values)
        except (struct.error, OverflowError):
            return False
        self._packed.append(packed)
        self._rows.append((index, item_id, time, version, len(values)))
        return True

    def rows(self) -> tuple[pa.Table, list[int]]:
        """Return what was taken.

        Returns:
            Rows of ``ITEM_EVENT_ROWS``, and the positions of records that are not plain after all:
            their vector is empty, zero, or not finite.
        """
        if not self._rows:
            return ITEM_EVENT_ROWS.empty_table(), []
        indexes, ids, times, versions, lengths = zip(*self._rows, strict=True)
        flat_M = np.frombuffer(b"".join(self._packed), dtype=np.float32)
        vectors = Vectors(flat_M, np.array(lengths, dtype=np.int32))
        columns = [
            pa.array(ids, pa.int64()),
            pa.array(times, pa.int64()).cast(TIMESTAMP),
            pa.repeat(pa.scalar(False), len(ids)),
            *no_content_columns(len(ids)),
            vectors.to_array(),
            pa.array(versions, pa.string()),
            pa.array(indexes, pa.int32()),
            pa.repeat(pa.scalar(0, pa.int32()), len(ids)),
        ]
        table = pa.table(columns, schema=ITEM_EVENT_ROWS)
        bad_N = vectors.are_spoilt() | vectors.are_zero()
        if not bad_N.any():
            return table, []
        return table.filter(pa.array(~bad_N)), [indexes[row] for row in np.flatnonzero(bad_N)]

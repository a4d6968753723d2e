"""A batch in pieces, so that what is unpacked at once stays bounded.

``max_decoded_bytes`` bounds one record; a batch may hold thousands of them, and compressed ones
take little room while they wait. May import: pyarrow.
"""

import struct
from collections.abc import Iterator, Sequence

import pyarrow as pa

from qarm_feast.errors import EventError
from streaming.arrow_size import unpacked_bytes
from streaming.limits import EventLimits
from streaming.messages import ARROW_TYPE, Record, content_type

JSON_GROWTH = 4
"""Bytes of columns per byte of JSON, at most: ``1,`` is a float32, copied once."""


def pieces(records: Sequence[Record], limits: EventLimits) -> Iterator[list[Record]]:
    """Yield the records of a batch in order, in runs that together unpack to a bounded size.

    Args:
        records: Records of both topics.
        limits: ``max_decoded_bytes`` bounds a piece, unless it is a single record.

    Yields:
        At least one record each time; nothing for an empty batch.
    """
    piece: list[Record] = []
    size = 0
    for record in records:
        num_bytes = _decoded_bytes(record, limits)
        if piece and size + num_bytes > limits.max_decoded_bytes:
            yield piece
            piece, size = [], 0
        piece.append(record)
        size += num_bytes
    if piece:
        yield piece


def _decoded_bytes(record: Record, limits: EventLimits) -> int:
    """Return what a record unpacks to; 0 for one that will be refused without being unpacked."""
    value = record.value or b""
    if len(value) > limits.max_record_bytes:
        return 0
    try:
        if content_type(record) != ARROW_TYPE:
            return JSON_GROWTH * len(value)
        num_bytes = unpacked_bytes(value)
    except (EventError, pa.ArrowException, OSError, struct.error):
        # The decoder meets the same fault, and makes it a dead letter.
        return 0
    return num_bytes if num_bytes <= limits.max_decoded_bytes else 0

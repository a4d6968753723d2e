"""Columns of byte strings: one Arrow array instead of one Python object per row.

Arrow joins them row by row in compiled code, about 10 ns for each piece; bytes objects are made
only where a client library asks for them.

Shape letters in this file: N rows, W bytes of all rows together.
May import: numpy and pyarrow.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Blobs: TypeAlias = pa.LargeBinaryArray
"""One byte string per row; never null, an empty one stands for nothing."""

_NOTHING = pa.scalar(b"", pa.large_binary())


def make_blobs(content_W: npt.NDArray[Any], sizes_N: Ints) -> Blobs:
    """Return the rows that lie one after another in ``content_W``, without a copy.

    Args:
        content_W: A contiguous array; its bytes are what counts.
        sizes_N: How many bytes each row has.

    Returns:
        One blob per row.
    """
    offsets = np.zeros(len(sizes_N) + 1, dtype=np.int64)
    np.cumsum(sizes_N, out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content_W)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(sizes_N), buffers)


def fixed_blobs(rows_N: npt.NDArray[Any]) -> Blobs:
    """Return the bytes of each element of an array, without a copy."""
    return make_blobs(rows_N, np.full(len(rows_N), rows_N.dtype.itemsize))


def list_blobs(rows: list[bytes]) -> Blobs:
    """Return bytes objects as a column."""
    return pa.array(rows, pa.large_binary())


def look_up_blobs(numbers_N: Ints, make: Callable[[int], bytes]) -> Blobs:
    """Return what ``make`` gives for each number; it is asked once for equal ones."""
    distinct = np.unique(numbers_N)
    made = list_blobs([make(number) for number in distinct.tolist()])
    return made.take(pa.array(np.searchsorted(distinct, numbers_N)))


def join_blobs(*columns: Blobs | bytes) -> Blobs:
    """Return, row by row, the row's bytes of each column one after another.

    Args:
        *columns: Columns of equal length, or bytes that every row has; at least one column.

    Returns:
        One blob per row, contiguous.
    """
    widths = [common_width(column) for column in columns]
    known = [width for width in widths if width is not None]
    if len(known) == len(widths):
        return _join_fixed(columns, known)
    parts = [
        pa.scalar(column, pa.large_binary()) if isinstance(column, bytes) else column
        for column in columns
    ]
    return pc.binary_join_element_wise(*parts, _NOTHING)


def common_width(column: Blobs | bytes) -> int | None:
    """Return how many bytes each row has, if all have equally many."""
    if isinstance(column, bytes):
        return len(column)
    sizes_N = sizes_of(column)
    return int(sizes_N[0]) if len(sizes_N) and (sizes_N == sizes_N[0]).all() else None


def _join_fixed(columns: Sequence[Blobs | bytes], widths: Sequence[int]) -> Blobs:
    """Join rows of one size as the fields of records, faster than row by row."""
    num_rows = next(len(column) for column in columns if not isinstance(column, bytes))
    kept = [(column, width) for column, width in zip(columns, widths, strict=True) if width]
    rows_N = np.empty(num_rows, [(str(at), f"V{width}") for at, (_, width) in enumerate(kept)])
    for at, (column, width) in enumerate(kept):
        is_constant = isinstance(column, bytes)
        content = np.void(column) if is_constant else contents_array(column)[0].view(f"V{width}")
        rows_N[str(at)] = content
    return fixed_blobs(rows_N)


def split_blobs(blobs: Blobs) -> list[bytes]:
    """Return one bytes object per row."""
    content, offsets = contents(blobs)
    return [content[start:end] for start, end in pairwise(offsets.tolist())]


def contents(blobs: Blobs) -> tuple[bytes, Ints]:
    """Return the bytes of all rows, and the N + 1 places where rows start and the last ends."""
    content_W, offsets = contents_array(blobs)
    return content_W.tobytes(), offsets


def contents_array(blobs: Blobs) -> tuple[Bytes, Ints]:
    """Return the same with the bytes as an array, without a copy."""
    _, offsets_buffer, content_buffer = blobs.buffers()
    if offsets_buffer is None or not len(blobs):
        return np.empty(0, dtype=np.uint8), np.zeros(1, dtype=np.int64)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)
    offsets = offsets[blobs.offset : blobs.offset + len(blobs) + 1]
    content_W = np.frombuffer(content_buffer or b"", dtype=np.uint8)
    return content_W[offsets[0] : offsets[-1]], offsets - offsets[0]


def sizes_of(blobs: Blobs) -> Ints:
    """Return how many bytes each row has."""
    return np.diff(contents_array(blobs)[1])

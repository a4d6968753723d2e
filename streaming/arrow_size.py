"""How much an Arrow IPC stream unpacks to, read from its metadata before anything is unpacked.

A buffer of a compressed batch states its unpacked length, and Arrow reserves that much before it
looks at the content; a column without buffers may claim any number of rows. Both are a few bytes
on the wire. pyarrow has no limit for either, so the record batches' flatbuffers are read here
(``Message.fbs`` of the Arrow format): fields are counted from 0 in the order of that file.
May import: pyarrow.
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

_MIN_CELL_BYTES = 16
"""What a cell costs at least once it is a Python object."""
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_LENGTH_PREFIX_BYTES = 8
_NOT_COMPRESSED = -1


def unpacked_bytes(stream: bytes) -> int:
    """Return what the stream's batches take in memory, by their own account.

    Args:
        stream: An Arrow IPC stream.

    Returns:
        Bytes of all buffers unpacked, or 16 per cell where that is more.

    Raises:
        pa.ArrowException: If the stream is damaged.
        OSError: If the stream is damaged.
        struct.error: If its metadata point outside of themselves or name a negative length.
    """
    num_bytes = num_cells = 0
    for message in pa.ipc.MessageReader.open_stream(stream):
        for batch in _record_batches(message.metadata.to_pybytes()):
            num_cells += _sum([batch.integer(0), *[length for length, _ in batch.pairs(1)]])
            num_bytes += _sum(_buffer_bytes(batch, message.body))
    return max(num_bytes, _MIN_CELL_BYTES * num_cells)


class _Table:
    """One table of a flatbuffer."""

    def __init__(self, metadata: bytes, position: int) -> None:
        self._metadata = metadata
        self._position = position

    def integer(self, field: int, layout: str = "<q") -> int:
        """Return a number; 0 if it is not there."""
        place = self._place(field)
        return self._read(layout, place) if place else 0

    def table(self, field: int) -> "_Table | None":
        """Return a table within this one, if it is there."""
        place = self._place(field)
        return _Table(self._metadata, place + self._read("<I", place)) if place else None

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Return a vector of structs of two int64."""
        place = self._place(field)
        if not place:
            return
        start = place + self._read("<I", place)
        for number in range(self._read("<I", start)):
            yield struct.unpack_from("<qq", self._metadata, start + 4 + 16 * number)

    def _place(self, field: int) -> int:
        vtable = self._position - self._read("<i", self._position)
        entry = 4 + 2 * field
        if entry >= self._read("<H", vtable):
            return 0
        offset = self._read("<H", vtable + entry)
        return self._position + offset if offset else 0

    def _read(self, layout: str, position: int) -> int:
        if position < 0:
            # struct counts a negative position from the end.
            raise struct.error("a table lies before the metadata")
        value: int = struct.unpack_from(layout, self._metadata, position)[0]
        return value


def _record_batches(metadata: bytes) -> Iterator[_Table]:
    message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    kind, header = message.integer(1, "<B"), message.table(2)
    batch = header.table(1) if header and kind == _DICTIONARY_BATCH else header
    if batch and kind in (_DICTIONARY_BATCH, _RECORD_BATCH):
        yield batch


def _sum(lengths: list[int]) -> int:
    """Add lengths up; a negative one would hide a bomb behind it."""
    if min(lengths, default=0) < 0:
        raise struct.error("a length is negative")
    return sum(lengths)


def _buffer_bytes(batch: _Table, body: pa.Buffer) -> list[int]:
    if batch.table(3) is None:
        return [length for _, length in batch.pairs(2)]
    return [_declared_bytes(body, offset, length) for offset, length in batch.pairs(2)]


def _declared_bytes(body: pa.Buffer, offset: int, length: int) -> int:
    if offset < 0:
        raise struct.error("a buffer lies before the body")
    if length < _LENGTH_PREFIX_BYTES:
        return length
    declared: int = struct.unpack_from("<q", body, offset)[0]
    return length if declared == _NOT_COMPRESSED else declared

"""Columns to the bytes that Feast stores, and back, without a proto object per row.

Two byte formats are written, both exactly as Feast writes them: entity keys (serialization
version 3) and serialized ``feast.types.Value`` messages. An empty blob is a null.

Shape letters in this file: N rows, P rows that are present, F rows that hold a filled list,
M values of all rows together, W parts or bytes of one row or value.
May import: numpy and pyarrow (Feast's protos only for values that nothing here reads fast).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import DataError

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

_FIELD_NUMBERS = {
    "BYTES": 1,
    "STRING": 2,
    "INT32": 3,
    "INT64": 4,
    "DOUBLE": 5,
    "FLOAT": 6,
    "BOOL": 7,
    "UNIX_TIMESTAMP": 8,
    "BYTES_LIST": 11,
    "STRING_LIST": 12,
    "INT32_LIST": 13,
    "INT64_LIST": 14,
    "DOUBLE_LIST": 15,
    "FLOAT_LIST": 16,
    "BOOL_LIST": 17,
    "UNIX_TIMESTAMP_LIST": 18,
}
"""Field of ``feast.types.Value`` for each of Feast's value types that is stored here."""

_ARROW_TYPES = {
    "BYTES": pa.large_binary(),
    "STRING": pa.large_string(),
    "INT32": pa.int32(),
    "INT64": pa.int64(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "BOOL": pa.bool_(),
    "UNIX_TIMESTAMP": pa.timestamp("s", tz="UTC"),
}
_NUMPY_TYPES: dict[str, npt.DTypeLike] = {
    "BYTES": np.object_,
    "STRING": np.object_,
    "INT32": np.int32,
    "INT64": np.int64,
    "DOUBLE": np.float64,
    "FLOAT": np.float32,
    "BOOL": np.bool_,
    "UNIX_TIMESTAMP": np.int64,
}
_VARINT_TYPES = ("INT32", "INT64", "BOOL", "UNIX_TIMESTAMP")
_VARINT_PIECE = 32_768
_REPEATED_TAG = 0x0A
"""Field 1, length-delimited: the ``val`` of every list message."""


@dataclass(frozen=True)
class Column:
    """One feature of N entities.

    Attributes:
        values: All values one after another, in the order of the entities; int64 for integers
            and timestamps (seconds), float32, float64, bool, or objects (str, bytes).
        lengths_N: How many of them belong to each entity; a scalar has one, a missing or null
            value none.
    """

    values: npt.NDArray[Any]
    lengths_N: Ints


def encode_int64_keys(join_key: str, ids_N: Ints, suffix: bytes = b"") -> list[bytes]:
    """Return the serialized entity key of each id, as ``serialize_entity_key`` version 3 does.

    Args:
        join_key: Name of the entity's one join key.
        ids_N: Entity ids.
        suffix: Appended to each key (redis appends the project).

    Returns:
        One key per id.
    """
    name = join_key.encode()
    head = np.array([1, 2, len(name)], dtype="<u4").tobytes() + name
    head += np.array([4, 8], dtype="<u4").tobytes()
    layout = np.dtype(
        [("head", f"V{len(head)}"), ("id", "<i8"), ("suffix", f"V{max(1, len(suffix))}")]
    )
    rows = np.zeros(len(ids_N), dtype=layout)
    rows["head"] = np.void(head)
    rows["id"] = ids_N
    if suffix:
        rows["suffix"] = np.void(suffix)
    width = len(head) + 8 + len(suffix)
    blob = rows.tobytes()
    return [blob[at : at + width] for at in range(0, len(blob), layout.itemsize)]


def encode_values(value_type: str, column: pa.Array | pa.ChunkedArray) -> list[bytes]:
    """Return one serialized ``feast.types.Value`` per row; a null becomes an empty blob.

    Args:
        value_type: Name in Feast's ``ValueType``, for example ``"INT64_LIST"``.
        column: The values; cast to the type without loss.

    Returns:
        The blobs, in the order of the rows.

    Raises:
        DataError: If the type has no columnar form, or the column cannot be cast to it, or a
            list holds a null.
    """
    tag = _tag(value_type)
    if value_type.endswith("_LIST"):
        return _encode_lists(tag, value_type.removesuffix("_LIST"), column)
    values = _cast(column, _ARROW_TYPES[value_type], value_type)
    is_valid_N = _to_numpy(values.is_valid())
    if value_type in ("BYTES", "STRING"):
        return _encode_binaries(tag, values, is_valid_N)
    flat_N = _fill_nulls(value_type, values)
    if value_type in _VARINT_TYPES:
        stream_N2 = np.stack([np.full(len(flat_N), tag), flat_N.astype(np.int64)], axis=1)
        encoded, sizes_M = encode_varints(stream_N2.reshape(-1))
        return _mask(_split(encoded, sizes_M.reshape(-1, 2).sum(axis=1)), is_valid_N)
    layout = np.dtype([("tag", "u1"), ("value", flat_N.dtype.newbyteorder("<"))])
    rows = np.empty(len(flat_N), dtype=layout)
    rows["tag"] = tag
    rows["value"] = flat_N
    return _mask(rows.view(f"V{layout.itemsize}").tolist(), is_valid_N)


def decode_values(value_type: str, blobs: Sequence[bytes | None]) -> Column:
    """Return the column that the serialized values hold; ``None`` and empty blobs are missing.

    Args:
        value_type: Name in Feast's ``ValueType``.
        blobs: One serialized value per entity.

    Returns:
        The values and how many of them each entity has.

    Raises:
        DataError: If a blob holds a value of another type or is cut off.
    """
    tag = _tag(value_type)
    filled = [blob or b"" for blob in blobs]
    sizes_N = np.fromiter(map(len, filled), dtype=np.int64, count=len(filled))
    # Nine zeros behind the last byte let a varint be read without looking at the end.
    buffer = np.frombuffer(b"".join(filled) + bytes(9), dtype=np.uint8)
    ends_N = np.cumsum(sizes_N)
    present_N = sizes_N > 0
    starts_P = (ends_N - sizes_N)[present_N]
    found_P, starts_P = _read_varints(buffer, starts_P)
    if (found_P != tag).any():
        wrong = int(found_P[found_P != tag][0])
        raise DataError(
            f"a stored value has the wire tag {wrong}, {value_type} has {tag}: the view's schema "
            "is not the one that the rows were written with; run `feast apply` and write again"
        )
    spans = _Spans(buffer, starts_P, ends_N[present_N], present_N)
    if value_type in ("BYTES_LIST", "STRING_LIST"):
        return _decode_protos(value_type, filled)
    if value_type.endswith("_LIST"):
        return _decode_lists(value_type.removesuffix("_LIST"), spans, filled)
    return _decode_scalars(value_type, spans)


def encode_varints(values_M: Ints) -> tuple[Bytes, Ints]:
    """Return the base-128 varints of all values in one buffer, and the size of each.

    A negative value takes ten bytes, as protobuf writes it.
    """
    unsigned_M = values_M.astype(np.int64, copy=False).view(np.uint64)
    # In pieces that stay in the processor's cache; also bounds the memory of the byte grid.
    pieces = [
        _encode_varint_piece(unsigned_M[start : start + _VARINT_PIECE])
        for start in range(0, max(1, len(unsigned_M)), _VARINT_PIECE)
    ]
    encoded, sizes_M = zip(*pieces, strict=True)
    return np.concatenate(encoded), np.concatenate(sizes_M)


def split_micros(micros_N: Ints) -> tuple[Ints, Ints]:
    """Return whole seconds (rounded down) and the microseconds within them."""
    return np.floor_divide(micros_N, 1_000_000), np.mod(micros_N, 1_000_000)


def encode_timestamps(micros_N: Ints) -> list[bytes]:
    """Return one serialized ``google.protobuf.Timestamp`` per microsecond count."""
    seconds_N, rest_N = split_micros(micros_N)
    parts_N4 = np.stack(
        [np.full_like(seconds_N, 8), seconds_N, np.full_like(seconds_N, 16), rest_N * 1000], axis=1
    )
    # A zero field is not written at all.
    keep_N4 = np.repeat(np.stack([seconds_N != 0, rest_N != 0], axis=1), 2, axis=1)
    return _split(*_encode_parts(parts_N4, keep_N4))


@dataclass(frozen=True)
class _Spans:
    """Where the bodies of the present values lie; P of the N values are present."""

    buffer: Bytes
    starts_P: Ints
    ends_P: Ints
    present_N: Bools

    def lengths(self, lengths_P: Ints) -> Ints:
        lengths_N = np.zeros(len(self.present_N), dtype=np.int64)
        lengths_N[self.present_N] = lengths_P
        return lengths_N


def _encode_varint_piece(values_M: npt.NDArray[np.uint64]) -> tuple[Bytes, Ints]:
    """Fill a grid of W bytes per value, then keep the bytes that each value has."""
    widest = int(values_M.max(initial=0))
    num_bytes = max(1, -(-widest.bit_length() // 7))
    rest_M = values_M.astype(np.uint32) if widest < 1 << 32 else values_M
    grid_MW = np.empty((len(values_M), num_bytes), dtype=np.uint8)
    keep_MW = np.ones(grid_MW.shape, dtype=np.bool_)
    for at in range(num_bytes):
        if at:
            keep_MW[:, at] = rest_M != 0
            grid_MW[:, at - 1] |= keep_MW[:, at].view(np.uint8) << np.uint8(7)
        grid_MW[:, at] = rest_M.astype(np.uint8) & np.uint8(0x7F)
        rest_M = rest_M >> rest_M.dtype.type(7)
    return grid_MW[keep_MW], np.asarray(keep_MW.sum(axis=1), dtype=np.int64)


def _tag(value_type: str) -> int:
    if value_type not in _FIELD_NUMBERS:
        raise DataError(
            f"features of Feast type {value_type} have no columnar form here; "
            f"use one of {', '.join(_FIELD_NUMBERS)}"
        )
    wire_types = {"DOUBLE": 1, "FLOAT": 5, **dict.fromkeys(_VARINT_TYPES, 0)}
    return _FIELD_NUMBERS[value_type] << 3 | wire_types.get(value_type, 2)


def _cast(column: pa.Array | pa.ChunkedArray, target: pa.DataType, value_type: str) -> pa.Array:
    try:
        if pa.types.is_timestamp(target) and pa.types.is_timestamp(column.type):
            # Feast stores whole seconds; the fraction is cut on purpose.
            column = pc.floor_temporal(column, unit="second")
        cast = column.cast(target)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"a column of {column.type} cannot be {value_type}: {error}") from error
    return cast.combine_chunks() if isinstance(cast, pa.ChunkedArray) else cast


def _to_numpy(array: pa.Array) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def _fill_nulls(element_type: str, values: pa.Array) -> npt.NDArray[Any]:
    if element_type == "UNIX_TIMESTAMP":
        values = values.cast(pa.int64())
    return _to_numpy(values.fill_null(False if element_type == "BOOL" else 0))


def _split(buffer: Bytes, sizes_N: Ints) -> list[bytes]:
    blob = buffer.tobytes()
    return [blob[start:end] for start, end in pairwise([0, *np.cumsum(sizes_N).tolist()])]


def _mask(blobs: list[bytes], is_valid_N: Bools) -> list[bytes]:
    for row in np.flatnonzero(~is_valid_N).tolist():
        blobs[row] = b""
    return blobs


def _encode_parts(parts_NW: Ints, keep_NW: Bools) -> tuple[Bytes, Ints]:
    """Return the varints of the kept parts of each row, and the bytes that each row takes."""
    encoded, sizes_M = encode_varints(parts_NW[keep_NW])
    sizes_NW = np.zeros(parts_NW.shape, dtype=np.int64)
    sizes_NW[keep_NW] = sizes_M
    totals_N: Ints = np.sum(sizes_NW, axis=1)
    return encoded, totals_N


def _interleave(*streams: tuple[Bytes, Ints]) -> tuple[Bytes, Ints]:
    """Return, row by row, the row's bytes of each stream one after another."""
    totals_N: Ints = np.sum([sizes_N for _, sizes_N in streams], axis=0, dtype=np.int64)
    woven = np.empty(int(totals_N.sum()), dtype=np.uint8)
    starts_N = np.cumsum(totals_N) - totals_N
    for source, sizes_N in streams:
        shifts_N = starts_N - (np.cumsum(sizes_N) - sizes_N)
        woven[np.repeat(shifts_N, sizes_N) + np.arange(len(source))] = source
        starts_N = starts_N + sizes_N
    return woven, totals_N


def _binary_bytes(values: pa.Array) -> tuple[Bytes, Ints]:
    """Return the bytes of all values and the size of each (null: none)."""
    binary = values.fill_null("" if pa.types.is_large_string(values.type) else b"")
    binary = binary.cast(pa.large_binary())
    _, offsets_buffer, content_buffer = binary.buffers()
    first, last = binary.offset, binary.offset + len(binary) + 1
    if offsets_buffer is None or not len(binary):
        return np.empty(0, dtype=np.uint8), np.zeros(len(binary), dtype=np.int64)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[first:last]
    content = np.frombuffer(content_buffer or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    return content, np.diff(offsets)


def _encode_binaries(tag: int, values: pa.Array, is_valid_N: Bools) -> list[bytes]:
    content, sizes_N = _binary_bytes(values)
    parts_N2 = np.stack([np.full_like(sizes_N, tag), sizes_N], axis=1)
    keep_N2 = np.repeat(is_valid_N[:, None], 2, axis=1)
    return _split(*_interleave(_encode_parts(parts_N2, keep_N2), (content, sizes_N)))


def _encode_lists(tag: int, element_type: str, column: pa.Array | pa.ChunkedArray) -> list[bytes]:
    list_type = pa.large_list(_ARROW_TYPES[element_type])
    lists = _cast(column, list_type, f"{element_type}_LIST")
    is_valid_N = _to_numpy(lists.is_valid())
    lengths_N = _to_numpy(pc.list_value_length(lists).fill_null(0)).astype(np.int64)
    elements = lists.flatten()
    if elements.null_count:
        raise DataError(f"{element_type}_LIST: a list holds a null; drop it or fill it")
    if element_type in ("BYTES", "STRING"):
        payload, sizes_N = _binary_payload(elements, lengths_N)
        parts_N2 = np.stack([np.full_like(sizes_N, tag), sizes_N], axis=1)
        header = _encode_parts(parts_N2, np.repeat(is_valid_N[:, None], 2, axis=1))
        return _split(*_interleave(header, (payload, sizes_N)))
    payload, sizes_N = _packed_payload(element_type, elements, lengths_N)
    return _split(*_interleave(_packed_header(tag, sizes_N, is_valid_N), (payload, sizes_N)))


def _row_sums(sizes_M: Ints, lengths_N: Ints) -> Ints:
    totals = np.concatenate([[0], np.cumsum(sizes_M)])
    ends_N = np.cumsum(lengths_N)
    sums_N: Ints = totals[ends_N] - totals[ends_N - lengths_N]
    return sums_N


def _binary_payload(elements: pa.Array, lengths_N: Ints) -> tuple[Bytes, Ints]:
    content, sizes_M = _binary_bytes(elements)
    parts_M2 = np.stack([np.full_like(sizes_M, _REPEATED_TAG), sizes_M], axis=1)
    header = _encode_parts(parts_M2, np.ones(parts_M2.shape, dtype=np.bool_))
    payload, element_sizes_M = _interleave(header, (content, sizes_M))
    return payload, _row_sums(element_sizes_M, lengths_N)


def _packed_payload(element_type: str, elements: pa.Array, lengths_N: Ints) -> tuple[Bytes, Ints]:
    flat_M = _fill_nulls(element_type, elements)
    if element_type in _VARINT_TYPES:
        payload, sizes_M = encode_varints(flat_M.astype(np.int64))
        return payload, _row_sums(sizes_M, lengths_N)
    little = np.ascontiguousarray(flat_M, dtype=flat_M.dtype.newbyteorder("<"))
    return little.view(np.uint8), lengths_N * little.itemsize


def _packed_header(tag: int, sizes_N: Ints, is_valid_N: Bools) -> tuple[Bytes, Ints]:
    """Return tag, outer size, inner tag, inner size; an empty list has no inner message."""
    inner_sizes_N = 1 + encode_varints(sizes_N)[1] + sizes_N
    is_filled_N = sizes_N > 0
    parts_N4 = np.stack(
        [
            np.full_like(sizes_N, tag),
            np.where(is_filled_N, inner_sizes_N, 0),
            np.full_like(sizes_N, _REPEATED_TAG),
            sizes_N,
        ],
        axis=1,
    )
    keep_N4 = np.stack([is_valid_N, is_valid_N, is_filled_N, is_filled_N], axis=1)
    return _encode_parts(parts_N4, keep_N4)


def _read_varints(buffer: Bytes, starts_P: Ints) -> tuple[Ints, Ints]:
    """Return the varint at each position, and the position behind it."""
    first_P = buffer[starts_P]
    values_P = (first_P & 0x7F).astype(np.uint64)
    ends_P = starts_P + 1
    open_Q = np.flatnonzero(first_P >= 0x80)
    for shift in range(7, 70, 7):
        if not len(open_Q):
            break
        at_Q = ends_P[open_Q]
        if at_Q.max() >= len(buffer):
            raise DataError("a stored value is cut off within a number; write the row again")
        bytes_Q = buffer[at_Q]
        values_P[open_Q] |= (bytes_Q & 0x7F).astype(np.uint64) << np.uint64(shift)
        ends_P[open_Q] += 1
        open_Q = open_Q[bytes_Q >= 0x80]
    return values_P.view(np.int64), ends_P


def _gather(buffer: Bytes, starts_P: Ints, sizes_P: Ints) -> Bytes:
    shifts_P = starts_P - (np.cumsum(sizes_P) - sizes_P)
    gathered: Bytes = buffer[np.repeat(shifts_P, sizes_P) + np.arange(int(sizes_P.sum()))]
    return gathered


def _check_ends(ends_P: Ints, expected_P: Ints) -> None:
    if (ends_P != expected_P).any():
        raise DataError("a stored value does not end where its size says; write the row again")


def _decode_scalars(value_type: str, spans: _Spans) -> Column:
    lengths_N = spans.lengths(np.ones(len(spans.starts_P), dtype=np.int64))
    dtype = np.dtype(_NUMPY_TYPES[value_type])
    if value_type in _VARINT_TYPES:
        values_P, ends_P = _read_varints(spans.buffer, spans.starts_P)
        _check_ends(ends_P, spans.ends_P)
        return Column(values_P.astype(dtype), lengths_N)
    if value_type in ("FLOAT", "DOUBLE"):
        sizes_P = np.full_like(spans.starts_P, dtype.itemsize)
        _check_ends(spans.starts_P + sizes_P, spans.ends_P)
        return Column(_gather(spans.buffer, spans.starts_P, sizes_P).view(dtype), lengths_N)
    sizes_P, starts_P = _read_varints(spans.buffer, spans.starts_P)
    _check_ends(starts_P + sizes_P, spans.ends_P)
    blob = spans.buffer.tobytes()
    values = np.empty(len(starts_P), dtype=np.object_)
    ranges = zip(starts_P.tolist(), spans.ends_P.tolist(), strict=True)
    parts = [blob[start:end] for start, end in ranges]
    values[:] = [part.decode() for part in parts] if value_type == "STRING" else parts
    return Column(values, lengths_N)


def _decode_lists(element_type: str, spans: _Spans, blobs: list[bytes]) -> Column:
    body_sizes_P, body_starts_P = _read_varints(spans.buffer, spans.starts_P)
    _check_ends(body_starts_P + body_sizes_P, spans.ends_P)
    is_filled_P = body_sizes_P > 0
    inner_tags_F, inner_starts_F = _read_varints(spans.buffer, body_starts_P[is_filled_P])
    sizes_F, starts_F = _read_varints(spans.buffer, inner_starts_F)
    if (inner_tags_F != _REPEATED_TAG).any() or (
        starts_F + sizes_F != spans.ends_P[is_filled_P]
    ).any():
        # Legal protobuf that no Feast client writes: not packed, or packed in several pieces.
        return _decode_protos(f"{element_type}_LIST", blobs)
    payload = _gather(spans.buffer, starts_F, sizes_F)
    values_M, lengths_F = _decode_packed(element_type, payload, sizes_F)
    lengths_P = np.zeros(len(spans.starts_P), dtype=np.int64)
    lengths_P[is_filled_P] = lengths_F
    return Column(values_M, spans.lengths(lengths_P))


def _decode_packed(
    element_type: str, payload: Bytes, sizes_F: Ints
) -> tuple[npt.NDArray[Any], Ints]:
    dtype = np.dtype(_NUMPY_TYPES[element_type])
    if element_type not in _VARINT_TYPES:
        if (sizes_F % dtype.itemsize).any():
            raise DataError(f"a stored list of {element_type} is cut off; write the row again")
        return payload.view(dtype), sizes_F // dtype.itemsize
    is_last = payload < 0x80
    ends_M = np.flatnonzero(is_last) + 1
    lengths_F = _row_sums(is_last.astype(np.int64), sizes_F)
    row_ends_F = np.cumsum(sizes_F)
    if not is_last[row_ends_F - 1].all():
        raise DataError("a stored list is cut off within a number; write the row again")
    starts_M = np.concatenate([[0], ends_M[:-1]])[: len(ends_M)]
    values_M, _ = _read_varints(payload, starts_M)
    return values_M.astype(dtype), lengths_F


def _decode_protos(value_type: str, blobs: list[bytes]) -> Column:
    from feast.protos.feast.types.Value_pb2 import Value

    field = f"{value_type.lower()}_val"
    lists = [getattr(Value.FromString(blob), field).val if blob else () for blob in blobs]
    lengths_N = np.array([len(values) for values in lists], dtype=np.int64)
    flat = np.empty(int(lengths_N.sum()), dtype=_NUMPY_TYPES[value_type.removesuffix("_LIST")])
    flat[:] = [value for values in lists for value in values]
    return Column(flat, lengths_N)

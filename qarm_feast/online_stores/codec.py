"""Columns to the bytes that Feast stores, and back, without a proto object per row.

Two byte formats are written, both exactly as Feast writes them: entity keys (serialization
version 3) and serialized ``feast.types.Value`` messages. An empty blob is a null.

Shape letters in this file: N rows, P rows that are present, F rows that hold a filled list,
M values of all rows together, W parts or bytes of one row or value.
May import: numpy and pyarrow (protobuf only for values that nothing here reads fast).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import DataError
from qarm_feast.online_stores.blobs import (
    Blobs,
    Bytes,
    Ints,
    contents,
    contents_array,
    fixed_blobs,
    join_blobs,
    look_up_blobs,
    make_blobs,
    sizes_of,
)

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
_LONGEST_VARINT = 10
_LIST_HEAD = 4
"""Varints before the values of a packed list: tag, size, inner tag, inner size."""
_HIGHEST_BITS = 0x8080808080808080
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


def encode_int64_keys(join_key: str, ids_N: Ints) -> Blobs:
    """Return the serialized entity key of each id, as ``serialize_entity_key`` version 3 does.

    Args:
        join_key: Name of the entity's one join key.
        ids_N: Entity ids.

    Returns:
        One key per id, all of one size.
    """
    name = join_key.encode()
    head = np.array([1, 2, len(name)], dtype="<u4").tobytes() + name
    head += np.array([4, 8], dtype="<u4").tobytes()
    rows_N = np.empty(len(ids_N), dtype=[("head", f"V{len(head)}"), ("id", "<i8")])
    rows_N["head"] = np.void(head)
    rows_N["id"] = ids_N
    return fixed_blobs(rows_N)


def arrow_type(value_type: str) -> pa.DataType:
    """Return the Arrow type that values of a type are encoded from.

    Args:
        value_type: Name in Feast's ``ValueType``, for example ``"INT64_LIST"``.

    Returns:
        The type.

    Raises:
        DataError: If the type has no columnar form.
    """
    _tag(value_type)
    element = _ARROW_TYPES[value_type.removesuffix("_LIST")]
    return pa.large_list(element) if value_type.endswith("_LIST") else element


def cast_values(value_type: str, column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column in the form that :func:`encode_values` takes at no cost.

    Args:
        value_type: Name in Feast's ``ValueType``.
        column: The values.

    Returns:
        The same values in one array of :func:`arrow_type`.

    Raises:
        DataError: If the type has no columnar form, or the column cannot be cast to it without
            loss, or a list holds a null.
    """
    values = _cast(column, arrow_type(value_type), value_type)
    if value_type.endswith("_LIST") and values.flatten().null_count:
        raise DataError(f"{value_type}: a list holds a null; drop it or fill it")
    return values


def encode_values(value_type: str, column: pa.Array | pa.ChunkedArray) -> Blobs:
    """Return one serialized ``feast.types.Value`` per row; a null becomes an empty blob.

    Args:
        value_type: Name in Feast's ``ValueType``, for example ``"INT64_LIST"``.
        column: The values; cast as :func:`cast_values` does.

    Returns:
        The blobs, in the order of the rows.

    Raises:
        DataError: As :func:`cast_values`.
    """
    tag, values = _tag(value_type), cast_values(value_type, column)
    if value_type.endswith("_LIST"):
        return _encode_lists(tag, value_type.removesuffix("_LIST"), values)
    if value_type in ("BYTES", "STRING"):
        return _encode_binaries(tag, values)
    flat_N = _fill_nulls(value_type, values)
    if value_type in _VARINT_TYPES:
        stream_N2 = np.stack([np.full(len(flat_N), tag), flat_N.astype(np.int64)], axis=1)
        encoded, sizes_M = encode_varints(stream_N2.reshape(-1))
        return _without_nulls(make_blobs(encoded, sizes_M.reshape(-1, 2).sum(axis=1)), values)
    rows_N = np.empty(len(flat_N), dtype=[("tag", "u1"), ("value", flat_N.dtype.newbyteorder("<"))])
    rows_N["tag"] = tag
    rows_N["value"] = flat_N
    return _without_nulls(fixed_blobs(rows_N), values)


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
    content, offsets = contents(pa.array(blobs, pa.large_binary()))
    # Zeros behind the last byte let a varint be read without looking at the end.
    buffer = np.frombuffer(content + bytes(_LONGEST_VARINT), dtype=np.uint8)
    present_N = offsets[1:] > offsets[:-1]
    spans = _Spans(buffer, offsets[:-1][present_N], offsets[1:][present_N], present_N)
    element_type = value_type.removesuffix("_LIST")
    if element_type != value_type and element_type in _VARINT_TYPES:
        column = _decode_varint_lists(element_type, tag, spans)
        if column is not None:
            return column
    found_P, starts_P = _read_varints(buffer, spans.starts_P)
    if (found_P != tag).any():
        wrong = int(found_P[found_P != tag][0])
        raise DataError(
            f"a stored value has the wire tag {wrong}, {value_type} has {tag}: the view's schema "
            "is not the one that the rows were written with; run `feast apply` and write again"
        )
    if element_type == value_type:
        return _decode_scalars(value_type, dataclasses.replace(spans, starts_P=starts_P))
    if element_type in ("FLOAT", "DOUBLE"):
        column = _decode_packed_lists(element_type, dataclasses.replace(spans, starts_P=starts_P))
        if column is not None:
            return column
    return _decode_protos(value_type, blobs)


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
    return np.concatenate(encoded), np.concatenate(sizes_M).astype(np.int64)


def split_micros(micros_N: Ints) -> tuple[Ints, Ints]:
    """Return whole seconds (rounded down) and the microseconds within them."""
    return np.floor_divide(micros_N, 1_000_000), np.mod(micros_N, 1_000_000)


def encode_timestamps(micros_N: Ints) -> Blobs:
    """Return one serialized ``google.protobuf.Timestamp`` per microsecond count."""
    seconds_N, rest_N = split_micros(micros_N)
    parts_N4 = np.stack(
        [np.full_like(seconds_N, 8), seconds_N, np.full_like(seconds_N, 16), rest_N * 1000], axis=1
    )
    # A zero field is not written at all.
    keep_N4 = np.repeat(np.stack([seconds_N != 0, rest_N != 0], axis=1), 2, axis=1)
    encoded, sizes_M = encode_varints(parts_N4[keep_N4])
    return make_blobs(encoded, _row_sums(sizes_M, keep_N4.sum(axis=1)))


def decode_timestamps(blobs: Sequence[bytes | None]) -> list[int | None]:
    """Return the microseconds that serialized ``google.protobuf.Timestamp`` messages hold."""
    from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]  # no stubs

    return [None if blob is None else Timestamp.FromString(blob).ToMicroseconds() for blob in blobs]


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


def _encode_varint_piece(
    values_M: npt.NDArray[np.uint64],
) -> tuple[Bytes, npt.NDArray[np.uint8]]:
    """Spread each value over the bytes of one number, then keep the bytes that it has."""
    num_bytes = max(1, -(-int(values_M.max(initial=0)).bit_length() // 7))
    if num_bytes > 8:
        return _encode_wide_varints(values_M, num_bytes)
    number = np.dtype("<u4" if num_bytes <= 4 else "<u8")
    values_M = values_M.astype(number)
    spread_M = values_M & number.type(0x7F)
    is_kept_M = np.ones(len(values_M), dtype=number)
    for at in range(1, num_bytes):
        has_byte_M = values_M >= number.type(1 << 7 * at)
        is_kept_M |= has_byte_M.astype(number) << number.type(8 * at)
        spread_M |= (values_M & number.type(0x7F << 7 * at)) << number.type(at)
    # A byte that another one follows has its highest bit set.
    spread_M |= is_kept_M >> number.type(1) & number.type(_HIGHEST_BITS >> 64 - 8 * number.itemsize)
    return spread_M.view(np.uint8)[is_kept_M.view(np.bool_)], np.bitwise_count(is_kept_M)


def _encode_wide_varints(
    values_M: npt.NDArray[np.uint64], num_bytes: int
) -> tuple[Bytes, npt.NDArray[np.uint8]]:
    """Fill a grid of W bytes per value, then keep the bytes that each value has."""
    grid_MW = np.empty((len(values_M), num_bytes), dtype=np.uint8)
    keep_MW = np.ones(grid_MW.shape, dtype=np.bool_)
    for at in range(num_bytes):
        if at:
            keep_MW[:, at] = values_M != 0
            grid_MW[:, at - 1] |= keep_MW[:, at].view(np.uint8) << np.uint8(7)
        grid_MW[:, at] = values_M.astype(np.uint8) & np.uint8(0x7F)
        values_M = values_M >> np.uint64(7)
    return grid_MW[keep_MW], keep_MW.sum(axis=1, dtype=np.uint8)


def _tag(value_type: str) -> int:
    if value_type not in _FIELD_NUMBERS:
        raise DataError(
            f"features of Feast type {value_type} have no columnar form here; "
            f"use one of {', '.join(_FIELD_NUMBERS)}"
        )
    wire_types = {"DOUBLE": 1, "FLOAT": 5, **dict.fromkeys(_VARINT_TYPES, 0)}
    return _FIELD_NUMBERS[value_type] << 3 | wire_types.get(value_type, 2)


def _cast(column: pa.Array | pa.ChunkedArray, target: pa.DataType, value_type: str) -> pa.Array:
    if isinstance(column, pa.ChunkedArray) and column.num_chunks == 1:
        column = column.chunk(0)
    if column.type == target and isinstance(column, pa.Array):
        return column
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
    if values.null_count:
        values = values.fill_null(False if element_type == "BOOL" else 0)
    return _to_numpy(values)


def _without_nulls(blobs: Blobs, values: pa.Array) -> Blobs:
    return pc.if_else(values.is_valid(), blobs, b"") if values.null_count else blobs


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _sized(tag: int, size: int) -> bytes:
    """Return what stands before a body of so many bytes; before that of a null, nothing."""
    return b"" if size < 0 else bytes([*_varint(tag), *_varint(size)])


def _sized_list(tag: int, size: int) -> bytes:
    """Return what stands before packed numbers; an empty list has no inner message."""
    if size <= 0:
        return _sized(tag, size)
    inner = _sized(_REPEATED_TAG, size)
    return _sized(tag, len(inner) + size) + inner


def _sizes_or_null(sizes_N: Ints, values: pa.Array) -> Ints:
    if not values.null_count:
        return sizes_N
    sizes: Ints = np.where(_to_numpy(values.is_valid()), sizes_N, -1)
    return sizes


def _as_blobs(values: pa.Array) -> Blobs:
    """Return strings or bytes as blobs; a null is empty."""
    blobs = values.cast(pa.large_binary())
    return blobs.fill_null(b"") if blobs.null_count else blobs


def _encode_binaries(tag: int, values: pa.Array) -> Blobs:
    content = _as_blobs(values)
    sizes_N = _sizes_or_null(sizes_of(content), values)
    return join_blobs(look_up_blobs(sizes_N, partial(_sized, tag)), content)


def _encode_lists(tag: int, element_type: str, lists: pa.Array) -> Blobs:
    lengths = pc.list_value_length(lists)
    lengths_N = _to_numpy(lengths.fill_null(0) if lists.null_count else lengths)
    is_packed = element_type not in ("BYTES", "STRING")
    encode = _packed_payload if is_packed else _binary_payload
    payload, payload_sizes_N = encode(element_type, lists.flatten(), lengths_N)
    sizes_N = _sizes_or_null(payload_sizes_N, lists)
    head = look_up_blobs(sizes_N, partial(_sized_list if is_packed else _sized, tag))
    return join_blobs(head, make_blobs(payload, payload_sizes_N))


def _row_sums(sizes_M: Ints, lengths_N: Ints) -> Ints:
    totals = np.zeros(len(sizes_M) + 1, dtype=np.int64)
    np.cumsum(sizes_M, out=totals[1:])
    ends_N = np.cumsum(lengths_N)
    sums_N: Ints = totals[ends_N] - totals[ends_N - lengths_N]
    return sums_N


def _binary_payload(element_type: str, elements: pa.Array, lengths_N: Ints) -> tuple[Bytes, Ints]:
    content = _as_blobs(elements)
    head = look_up_blobs(sizes_of(content), partial(_sized, _REPEATED_TAG))
    payload, offsets = contents_array(join_blobs(head, content))
    return payload, _row_sums(np.diff(offsets), lengths_N)


def _packed_payload(element_type: str, elements: pa.Array, lengths_N: Ints) -> tuple[Bytes, Ints]:
    flat_M = _fill_nulls(element_type, elements)
    if element_type in _VARINT_TYPES:
        payload, sizes_M = encode_varints(flat_M.astype(np.int64, copy=False))
        return payload, _row_sums(sizes_M, lengths_N)
    little = np.ascontiguousarray(flat_M, dtype=flat_M.dtype.newbyteorder("<"))
    return little.view(np.uint8), lengths_N * little.itemsize


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
    try:
        values[:] = [part.decode() for part in parts] if value_type == "STRING" else parts
    except UnicodeDecodeError as error:
        raise DataError(f"a stored text is damaged: {error}; write the row again") from error
    return Column(values, lengths_N)


def _decode_varint_lists(element_type: str, tag: int, spans: _Spans) -> Column | None:
    """Return lists of integers; ``None`` if a blob is not what Feast's clients write.

    A packed list is a row of varints: tag, size, inner tag, inner size, values. All of them are
    read at once.
    """
    ends_M = np.flatnonzero(spans.buffer[:-_LONGEST_VARINT] < 0x80) + 1
    stops_P = np.searchsorted(ends_M, spans.ends_P)
    # A blob that is cut off within a number, the last one behind all ends.
    if (stops_P >= len(ends_M)).any() or not np.array_equal(ends_M[stops_P], spans.ends_P):
        return None
    firsts_P = np.searchsorted(ends_M, spans.starts_P, side="right")
    is_filled_P = stops_P - firsts_P >= _LIST_HEAD
    firsts_F, ends_F = firsts_P[is_filled_P], spans.ends_P[is_filled_P]
    starts_M = np.zeros_like(ends_M)
    starts_M[1:] = ends_M[:-1]
    values_M = _varints_between(spans.buffer, starts_M, ends_M)
    is_list = (
        (values_M[firsts_P] == tag).all()
        and (values_M[firsts_P + 1] == spans.ends_P - ends_M[firsts_P + 1]).all()
        and (values_M[firsts_F + 2] == _REPEATED_TAG).all()
        and (values_M[firsts_F + 3] == ends_F - ends_M[firsts_F + 3]).all()
        and (stops_P[~is_filled_P] - firsts_P[~is_filled_P] == 1).all()
    )
    if not is_list:
        return None
    is_value_M = np.ones(len(values_M), dtype=np.bool_)
    for at in range(_LIST_HEAD):
        is_value_M[(firsts_P if at < 2 else firsts_F) + at] = False
    lengths_P = np.where(is_filled_P, stops_P + 1 - firsts_P - _LIST_HEAD, 0)
    dtype = np.dtype(_NUMPY_TYPES[element_type])
    return Column(values_M[is_value_M].astype(dtype, copy=False), spans.lengths(lengths_P))


def _varints_between(buffer: Bytes, starts_M: Ints, ends_M: Ints) -> Ints:
    """Return the varints that lie one after another, at least eight more bytes behind them."""
    sizes_M = ends_M - starts_M
    longest = int(sizes_M.max(initial=1))
    if longest > 8:
        return _read_varints(buffer, starts_M)[0]
    number = np.dtype("<u4" if longest <= 4 else "<u8")
    # A number at every byte; each value is in the one that starts where it does.
    at_byte = np.ndarray(len(buffer) - number.itemsize + 1, number, buffer, strides=(1,))
    masks = [(1 << 8 * size) - 1 for size in range(number.itemsize + 1)]
    bits_M = at_byte[starts_M] & np.array(masks, dtype=number)[sizes_M]
    values_M = bits_M & number.type(0x7F)
    for at in range(1, longest):
        values_M |= bits_M >> number.type(at) & number.type(0x7F << 7 * at)
    values: Ints = values_M.astype(np.int64)
    return values


def _decode_packed_lists(element_type: str, spans: _Spans) -> Column | None:
    """Return lists of floats; ``None`` if they are not packed in one piece."""
    body_sizes_P, body_starts_P = _read_varints(spans.buffer, spans.starts_P)
    _check_ends(body_starts_P + body_sizes_P, spans.ends_P)
    is_filled_P = body_sizes_P > 0
    inner_tags_F, inner_starts_F = _read_varints(spans.buffer, body_starts_P[is_filled_P])
    sizes_F, starts_F = _read_varints(spans.buffer, inner_starts_F)
    if (inner_tags_F != _REPEATED_TAG).any() or (
        starts_F + sizes_F != spans.ends_P[is_filled_P]
    ).any():
        return None
    dtype = np.dtype(_NUMPY_TYPES[element_type])
    if (sizes_F % dtype.itemsize).any():
        raise DataError(f"a stored list of {element_type} is cut off; write the row again")
    lengths_P = np.zeros(len(spans.starts_P), dtype=np.int64)
    lengths_P[is_filled_P] = sizes_F // dtype.itemsize
    values_M = _gather(spans.buffer, starts_F, sizes_F).view(dtype)
    return Column(values_M, spans.lengths(lengths_P))


def _decode_protos(value_type: str, blobs: Sequence[bytes | None]) -> Column:
    """Return lists through Feast's protos: strings, and packings that no Feast client writes."""
    from feast.protos.feast.types.Value_pb2 import Value
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs

    field = f"{value_type.lower()}_val"
    try:
        lists = [getattr(Value.FromString(blob), field).val if blob else () for blob in blobs]
    except DecodeError as error:
        raise DataError(f"a stored {value_type} is cut off; write the row again") from error
    lengths_N = np.array([len(values) for values in lists], dtype=np.int64)
    flat = np.empty(int(lengths_N.sum()), dtype=_NUMPY_TYPES[value_type.removesuffix("_LIST")])
    flat[:] = [value for values in lists for value in values]
    return Column(flat, lengths_N)

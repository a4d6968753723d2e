import random
import struct
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types import Value_pb2
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from google.protobuf.timestamp_pb2 import Timestamp

from qarm_feast.errors import DataError
from qarm_feast.online_stores.blobs import split_blobs
from qarm_feast.online_stores.codec import (
    decode_values,
    encode_int64_keys,
    encode_timestamps,
    encode_values,
    encode_varints,
)

INT64_EDGES = [0, 1, 127, 128, 16383, 16384, 2**31, 2**62, 2**63 - 1, -1, -128, -(2**63)]
LIST_MESSAGES = {
    "BYTES_LIST": Value_pb2.BytesList,
    "STRING_LIST": Value_pb2.StringList,
    "INT32_LIST": Value_pb2.Int32List,
    "INT64_LIST": Value_pb2.Int64List,
    "DOUBLE_LIST": Value_pb2.DoubleList,
    "FLOAT_LIST": Value_pb2.FloatList,
    "BOOL_LIST": Value_pb2.BoolList,
    "UNIX_TIMESTAMP_LIST": Value_pb2.Int64List,
}
ARROW_TYPES = {
    "BYTES": pa.binary(),
    "STRING": pa.string(),
    "INT32": pa.int32(),
    "INT64": pa.int64(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "BOOL": pa.bool_(),
    "UNIX_TIMESTAMP": pa.int64(),
}


def random_scalar(value_type: str, rng: random.Random) -> object:
    size = rng.choice([0, 1, 5, 127, 128, 300])
    wide = rng.choice([*INT64_EDGES, rng.getrandbits(rng.randint(1, 62))])
    choices: dict[str, object] = {
        "BYTES": rng.randbytes(size),
        "STRING": "".join(rng.choice("aé漢😀\x00") for _ in range(size)),
        "INT32": rng.choice([0, 1, -1, 300, 2**31 - 1, -(2**31)]),
        "INT64": wide,
        "DOUBLE": rng.choice([0.0, -0.0, rng.gauss(0, 1e10), float("inf")]),
        "FLOAT": struct.unpack("<f", struct.pack("<f", rng.gauss(0, 100)))[0],
        "BOOL": rng.random() < 0.5,
        "UNIX_TIMESTAMP": rng.randint(-(10**10), 10**10),
    }
    return choices[value_type]


def random_values(value_type: str, rng: random.Random) -> list[object]:
    element = value_type.removesuffix("_LIST")
    if element == value_type:
        values: list[object] = [random_scalar(element, rng) for _ in range(300)]
    else:
        sizes = [rng.choice([0, 1, 2, 6, 25, 200]) for _ in range(100)]
        values = [[random_scalar(element, rng) for _ in range(size)] for size in sizes]
    return [None if rng.random() < 0.1 else value for value in values]


def to_arrow(value_type: str, values: list[object]) -> pa.Array:
    element = ARROW_TYPES[value_type.removesuffix("_LIST")]
    is_list = value_type.endswith("_LIST")
    return pa.array(values, pa.list_(element) if is_list else element)


def reference(value_type: str, value: object) -> bytes:
    if value is None:
        return Value_pb2.Value().SerializeToString()
    if value_type in LIST_MESSAGES:
        value = LIST_MESSAGES[value_type](val=value)
    return Value_pb2.Value(**{f"{value_type.lower()}_val": value}).SerializeToString()


@pytest.mark.parametrize("value_type", [*ARROW_TYPES, *LIST_MESSAGES])
def test_values_are_byte_for_byte_what_protobuf_writes(value_type: str) -> None:
    values = random_values(value_type, random.Random(value_type))

    blobs = encode_values(value_type, to_arrow(value_type, values))

    assert split_blobs(blobs) == [reference(value_type, value) for value in values]


@pytest.mark.parametrize("value_type", [*ARROW_TYPES, *LIST_MESSAGES])
def test_decoding_gives_the_values_and_their_lengths_back(value_type: str) -> None:
    values = random_values(value_type, random.Random(value_type))
    blobs: list[bytes | None] = [reference(value_type, value) for value in values]

    column = decode_values(value_type, blobs)

    lists = [
        [] if value is None else value if isinstance(value, list) else [value] for value in values
    ]
    assert column.lengths_N.tolist() == [len(part) for part in lists]
    assert column.values.tolist() == [element for part in lists for element in part]


def test_an_absent_blob_is_a_value_of_length_0() -> None:
    column = decode_values("INT64_LIST", [None, reference("INT64_LIST", [3, 4]), b""])

    assert column.lengths_N.tolist() == [0, 2, 0]
    assert column.values.tolist() == [3, 4]


@pytest.mark.parametrize("value_type", ["INT64_LIST", "STRING", "FLOAT"])
def test_no_rows_give_no_blobs_and_no_values(value_type: str) -> None:
    assert split_blobs(encode_values(value_type, to_arrow(value_type, []))) == []
    assert decode_values(value_type, []).values.tolist() == []
    assert decode_values(value_type, [None, None]).lengths_N.tolist() == [0, 0]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[9, 9], [1, 2], None, [3]], pa.list_(pa.int64()))[1:],
        pa.chunked_array([[[1, 2]], [None, [3]]], pa.list_(pa.int64())),
        pa.array([[1, 2], None, [3]], pa.large_list(pa.int32())),
    ],
    ids=["slice", "chunks", "narrower"],
)
def test_the_form_of_the_arrow_column_does_not_matter(column: pa.Array) -> None:
    expected = [reference("INT64_LIST", value) for value in ([1, 2], None, [3])]

    assert split_blobs(encode_values("INT64_LIST", column)) == expected


def test_sliced_strings_and_fixed_size_lists_are_encoded_from_their_own_rows() -> None:
    strings = pa.array(["skipped", "a", None, "bcd"])[1:]
    vectors = pa.array([[9.0, 9.0], [1.0, 2.0]], pa.list_(pa.float32(), 2))[1:]

    assert split_blobs(encode_values("STRING", strings)) == [
        reference("STRING", value) for value in ("a", None, "bcd")
    ]
    assert split_blobs(encode_values("FLOAT_LIST", vectors)) == [
        reference("FLOAT_LIST", [1.0, 2.0])
    ]


def test_a_time_with_a_fraction_is_stored_as_whole_seconds_as_feast_does() -> None:
    column = pa.array([1_999_999, -1], pa.timestamp("us", tz="UTC"))

    assert split_blobs(encode_values("UNIX_TIMESTAMP", column)) == [
        reference("UNIX_TIMESTAMP", 1),
        reference("UNIX_TIMESTAMP", -1),
    ]


def test_a_list_that_is_not_packed_is_read_all_the_same() -> None:
    # Field 14 (int64_list_val), holding field 1 twice as plain varints.
    unpacked = bytes([14 << 3 | 2, 4, 8, 5, 8, 6])
    packed = reference("INT64_LIST", [7])

    column = decode_values("INT64_LIST", [packed, unpacked])

    assert column.values.tolist() == [7, 5, 6]
    assert column.lengths_N.tolist() == [1, 2]


@pytest.mark.parametrize("value_type", ["INT64_LIST", "BOOL_LIST", "UNIX_TIMESTAMP_LIST"])
def test_lists_of_one_size_and_empty_lists_beside_full_ones_are_read(value_type: str) -> None:
    full: list[object] = [1, 0, 1]
    lists = [full, [], full, full, []]

    column = decode_values(value_type, [reference(value_type, values) for values in lists])

    assert column.lengths_N.tolist() == [3, 0, 3, 3, 0]
    assert column.values.tolist() == full * 3


@pytest.mark.parametrize("bits", [7, 14, 21, 28, 29, 35, 55, 56, 57, 63])
def test_varints_at_the_ends_of_their_sizes_come_back(bits: int) -> None:
    values = [0, 1, 2**bits - 1, 2 ** (bits - 1), 127, 128]

    encoded, sizes_M = encode_varints(np.array(values))
    column = decode_values("INT64_LIST", [reference("INT64_LIST", values)])

    assert sizes_M.tolist() == [max(1, -(-value.bit_length() // 7)) for value in values]
    assert len(encoded) == sizes_M.sum()
    assert column.values.tolist() == values


def test_varints_of_negative_values_take_ten_bytes() -> None:
    encoded, sizes_M = encode_varints(np.array([1, -1, 300]))

    assert sizes_M.tolist() == [1, 10, 2]
    assert encoded.tolist() == [1, *[255] * 9, 1, 0xAC, 0x02]


@pytest.mark.parametrize("join_key", ["item_id", "k"])
def test_entity_keys_are_byte_for_byte_what_feast_writes(join_key: str) -> None:
    ids = [*INT64_EDGES, 256, 2**40 * 255]

    keys = encode_int64_keys(join_key, np.array(ids))

    for key, entity_id in zip(split_blobs(keys), ids, strict=True):
        proto = EntityKey(
            join_keys=[join_key], entity_values=[Value_pb2.Value(int64_val=entity_id)]
        )
        assert key == serialize_entity_key(proto, entity_key_serialization_version=3)


def test_a_key_keeps_trailing_zero_bytes() -> None:
    keys = split_blobs(encode_int64_keys("item_id", np.array([0, 5])))

    assert len(keys[0]) == len(keys[1]) == len("item_id") + 28
    assert keys[0].endswith(bytes(8))


def test_timestamps_are_byte_for_byte_what_protobuf_writes() -> None:
    micros = [0, 1, 10**6, -1, -(10**6), 1_700_000_000_123_456, 253_402_300_799_999_999]

    blobs = encode_timestamps(np.array(micros))

    for blob, count in zip(split_blobs(blobs), micros, strict=True):
        stamp = Timestamp()
        stamp.FromDatetime(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=count))
        assert blob == stamp.SerializeToString()


def test_a_column_that_does_not_fit_its_type_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be INT64"):
        encode_values("INT64", pa.array([1.5]))
    with pytest.raises(DataError, match="a list holds a null"):
        encode_values("INT64_LIST", pa.array([[1, None]]))
    with pytest.raises(DataError, match="MAP have no columnar form"):
        encode_values("MAP", pa.array([1]))


def test_a_blob_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match="schema is not the one"):
        decode_values("INT64", [reference("STRING", "x")])


@pytest.mark.parametrize("value_type", ["INT64_LIST", "STRING", "DOUBLE", "INT64"])
def test_a_blob_that_was_cut_off_is_refused(value_type: str) -> None:
    value: dict[str, object] = {"INT64_LIST": [1, 2], "STRING": "abc", "DOUBLE": 1.0, "INT64": 300}
    whole = reference(value_type, value[value_type])

    with pytest.raises(DataError, match="write the row again"):
        decode_values(value_type, [whole[:-1]])


@pytest.mark.parametrize(
    ("value_type", "value"), [("INT64_LIST", [1, 300]), ("STRING", "a")], ids=["number", "text"]
)
def test_a_blob_whose_last_byte_was_damaged_is_refused(value_type: str, value: object) -> None:
    damaged = reference(value_type, value)[:-1] + b"\x80"

    with pytest.raises(DataError, match="write the row again"):
        decode_values(value_type, [damaged])

"""Columns of byte strings against plain Python.

Shape letters in this file: N rows.
"""

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.online_stores.blobs import (
    contents,
    fixed_blobs,
    join_blobs,
    list_blobs,
    look_up_blobs,
    make_blobs,
    sizes_of,
    split_blobs,
)

ROWS = [b"", b"a", b"\x00\x00", b"bcd"]


def test_blobs_are_the_pieces_of_a_buffer() -> None:
    blobs = make_blobs(np.frombuffer(b"abcdef", np.uint8), np.array([2, 0, 4]))

    assert split_blobs(blobs) == [b"ab", b"", b"cdef"]
    assert sizes_of(blobs).tolist() == [2, 0, 4]


def test_a_fixed_column_keeps_zero_bytes_at_the_end() -> None:
    assert split_blobs(fixed_blobs(np.array([1, 256], "<u4"))) == [
        b"\x01\x00\x00\x00",
        b"\x00\x01\x00\x00",
    ]


@pytest.mark.parametrize(
    "columns",
    [(ROWS, b"-", ROWS[::-1]), ([b"ab", b"cd"], b"", [b"\x00", b"z"]), (b">", [b"x", b"yz"])],
    ids=["sizes differ", "one size", "a constant first"],
)
def test_joined_rows_are_pythons_concatenation(columns: tuple[list[bytes] | bytes, ...]) -> None:
    num_rows = max(len(column) for column in columns if isinstance(column, list))
    as_rows = [column if isinstance(column, list) else [column] * num_rows for column in columns]

    joined = join_blobs(
        *(list_blobs(column) if isinstance(column, list) else column for column in columns)
    )

    assert split_blobs(joined) == [b"".join(row) for row in zip(*as_rows, strict=True)]


def test_a_look_up_asks_once_for_equal_numbers() -> None:
    asked = []

    def make(number: int) -> bytes:
        asked.append(number)
        return b"n%d" % number

    blobs = look_up_blobs(np.array([3, -1, 3, 3]), make)

    assert split_blobs(blobs) == [b"n3", b"n-1", b"n3", b"n3"]
    assert sorted(asked) == [-1, 3]


def test_a_slice_has_its_own_bytes_only() -> None:
    content, offsets = contents(list_blobs(ROWS)[1:3])

    assert content == b"a\x00\x00"
    assert offsets.tolist() == [0, 1, 3]


def test_no_rows_are_no_bytes() -> None:
    nothing = pa.array([], pa.large_binary())

    assert split_blobs(nothing) == []
    assert split_blobs(join_blobs(nothing, b"x", nothing)) == []
    assert split_blobs(look_up_blobs(np.array([], np.int64), b"%d".__mod__)) == []

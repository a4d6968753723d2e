from datetime import UTC, datetime
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.errors import DataError
from qarm_feast.item_vectors import (
    EncodedItems,
    decode_vectors,
    encode_vectors,
    vector_rows,
    vectors_of,
)
from qarm_feast.schema import TIMESTAMP, VECTOR_ROWS

CREATED = datetime(2026, 1, 1, tzinfo=UTC)


def test_vectors_are_stored_as_little_endian_float16() -> None:
    stored = encode_vectors(np.array([[1.0, -0.5], [0.1, 0.0]], dtype=np.float32))

    # 1.0 is 0x3c00, -0.5 is 0xb800, 0.1 is 0x2e66.
    assert stored == [b"\x00\x3c\x00\xb8", b"\x66\x2e\x00\x00"]
    x_ND = decode_vectors(stored, 2, "view v")
    assert x_ND.dtype == np.float32
    np.testing.assert_allclose(x_ND, [[1.0, -0.5], [0.1, 0.0]], atol=2**-12)


def test_no_vectors_decode_to_no_rows() -> None:
    assert decode_vectors([], 3, "view v").shape == (0, 3)


@pytest.mark.parametrize("stored", [[b"\x00\x3c"], [b"\x00\x3c", b"\x00\x3c" * 3]])
def test_a_stored_vector_of_another_width_is_refused(stored: list[bytes]) -> None:
    with pytest.raises(DataError, match="view v holds a vector of 2 bytes, 2 numbers take 4"):
        decode_vectors(stored, 2, "view v")


def test_rows_hold_uploads_scaled_to_length_one_and_takedowns_without_a_vector() -> None:
    rows = pa.table(
        {
            "item_id": [7, 8, 9],
            "content_hash": ["a", "takedown", "refused"],
            "is_deleted": [False, True, False],
            "event_timestamp": pa.array([1, 2, 3]).cast(TIMESTAMP),
        }
    )
    encoded = EncodedItems("e1", np.array([0]), np.array([[3.0, 4.0]], dtype=np.float32))

    table = vector_rows(rows, encoded, CREATED)

    assert table.schema.equals(VECTOR_ROWS)
    assert table["item_id"].to_pylist() == [7, 8]
    assert table["is_deleted"].to_pylist() == [False, True]
    assert table["content_hash"].to_pylist() == ["a", "takedown"]
    vectors = table["embedding"].to_pylist()
    np.testing.assert_allclose(decode_vectors(vectors[:1], 2, "x"), [[0.6, 0.8]], atol=2**-12)
    assert vectors[1] == b""
    assert table["created"].to_pylist() == [CREATED] * 2


def test_no_encoder_is_loaded_for_content_of_items_that_bring_their_vector() -> None:
    def load_encoder(version: str) -> NoReturn:
        raise AssertionError(f"{version} was loaded")

    rows = pa.table(
        {
            "is_deleted": [False, False],
            "encoder_version": ["e1", "e9"],
            "embedding": pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float32())),
            "title": ["a hammer", None],
        }
    )

    encoded, refused = vectors_of(rows, "e1", 2, load_encoder)

    assert encoded.positions_N.tolist() == [0]
    assert [part.positions_N.tolist() for part in refused] == [[], [1]]

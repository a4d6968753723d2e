from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.codebook import ItemCodes
from qarm_feast.encode import content_hash, content_hashes, encode_items
from qarm_feast.errors import CodebookMismatchError, DataError
from qarm_feast.schema import CODE_ROWS, TIMESTAMP

CREATED = datetime(2024, 5, 1, tzinfo=UTC)
UPLOADED = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass
class FakeCodebook:
    """Codes are the vector's first number (RQ) and the item id (VQ)."""

    encoder_version: str = "e1"
    calls: list[tuple[list[int], list[str]]] = field(default_factory=list)

    @property
    def manifest(self) -> SimpleNamespace:
        return SimpleNamespace(encoder_version=self.encoder_version)

    def encode(
        self, item_ids_N: np.ndarray, content_hashes_N: list[str], x_ND: np.ndarray
    ) -> ItemCodes:
        self.calls.append((item_ids_N.tolist(), list(content_hashes_N)))
        rq_NL = np.repeat(x_ND[:, :1].astype(np.int64), 2, axis=1)
        return ItemCodes(item_ids_N, item_ids_N[:, None], rq_NL)


def three_items() -> pa.Table:
    return pa.table(
        {
            "item_id": [7, 8, 9],
            "event_timestamp": pa.array([UPLOADED] * 3, TIMESTAMP),
            "content_hash": ["a", "b", "c"],
        }
    )


def test_content_hash_ignores_what_the_encoder_cannot_see() -> None:
    expected = content_hash({"title": "drill"})

    assert content_hash({"title": "drill", "brand": None, "description": ""}) == expected
    assert content_hash({"title": "drill", "price": "3"}) == expected
    assert len(expected) == 32


@pytest.mark.parametrize(
    "other",
    [
        {"title": "drills"},
        {"description": "drill"},
        {"title": "drill", "image": b"x"},
        {"title": "drillbrand:1:x"},
    ],
)
def test_content_hash_tells_other_content_apart(other: dict[str, str | bytes]) -> None:
    assert content_hash(other) != content_hash({"title": "drill"})


def test_content_hash_does_not_let_text_run_over_into_the_next_column() -> None:
    first = content_hash({"title": "a", "description": "bc"})

    assert first != content_hash({"title": "ab", "description": "c"})


def test_content_hash_of_a_ready_vector_depends_on_its_encoder() -> None:
    vector = np.ones(2, dtype=np.float32).tobytes()

    assert content_hash({}, vector, "e1") != content_hash({}, vector, "e2")
    assert content_hash({}, vector, "e1") != content_hash({}, None, "e1")


def test_content_hashes_of_a_table_equal_those_of_single_items() -> None:
    vector = np.array([1.5, -2.0], dtype="<f4")
    items = pa.table(
        {
            "brand": ["x", None],
            "title": [None, "t"],
            "embedding": pa.array([None, vector], pa.list_(pa.float32(), 2)),
            "encoder_version": [None, "e1"],
        }
    )

    assert content_hashes(items) == [
        content_hash({"brand": "x"}),
        content_hash({"title": "t"}, vector.tobytes(), "e1"),
    ]


def test_content_hashes_cut_vectors_of_any_length_out_of_a_part_of_a_table() -> None:
    vectors = [[9.0], [1.0, 2.0], None, [3.0], [9.0]]
    items = pa.table(
        {
            "title": ["a", "b", "c", "d", "e"],
            "embedding": pa.array(vectors, pa.list_(pa.float32())),
            "encoder_version": ["e1"] * 5,
        }
    )

    hashes = content_hashes(pa.concat_tables([items[1:3], items[3:4]]))

    assert hashes == [
        content_hash({"title": "b"}, np.array([1, 2], dtype="<f4").tobytes(), "e1"),
        content_hash({"title": "c"}, None, "e1"),
        content_hash({"title": "d"}, np.array([3], dtype="<f4").tobytes(), "e1"),
    ]


def test_encode_items_returns_one_row_per_item_and_version() -> None:
    codebooks = {"v1": FakeCodebook(), "v2": FakeCodebook()}
    x_ND = np.array([[3.0, 0.0], [4.0, 0.0], [5.0, 0.0]], dtype=np.float32)

    tables = encode_items(three_items(), x_ND, codebooks, "e1", CREATED)

    assert list(tables) == ["v1", "v2"]
    assert tables["v1"].schema == CODE_ROWS
    assert tables["v1"].to_pylist()[1] == {
        "item_id": 8,
        "rq_code": [4, 4],
        "vq_code": [8],
        "encoder_version": "e1",
        "content_hash": "b",
        "is_deleted": False,
        "event_timestamp": UPLOADED,
        "created": CREATED,
    }
    assert codebooks["v1"].calls == [([7, 8, 9], ["a", "b", "c"])]


def test_encode_items_of_no_items_keeps_the_schema() -> None:
    codebooks = {"v1": FakeCodebook()}

    empty = three_items().slice(0, 0)
    tables = encode_items(empty, np.empty((0, 2), np.float32), codebooks, "e1", CREATED)

    assert tables["v1"].num_rows == 0
    assert tables["v1"].schema == CODE_ROWS


def test_encode_items_refuses_a_codebook_of_another_encoder() -> None:
    codebooks = {"v1": FakeCodebook(encoder_version="e0")}

    with pytest.raises(CodebookMismatchError, match=r"'e0'.*'e1'"):
        encode_items(three_items(), np.zeros((3, 2), np.float32), codebooks, "e1", CREATED)


def test_encode_items_names_the_item_of_a_vector_that_is_not_finite() -> None:
    x_ND = np.array([[0, 1], [np.inf, 0], [np.nan, 0]], dtype=np.float32)

    with pytest.raises(DataError, match=r"2 vector\(s\).*item 8"):
        encode_items(three_items(), x_ND, {}, "e1", CREATED)


def test_encode_items_refuses_a_wrong_number_of_vectors() -> None:
    with pytest.raises(DataError, match="3 items came with 2 vectors"):
        encode_items(three_items(), np.zeros((2, 2), np.float32), {}, "e1", CREATED)

"""Shape letters in this file: N items, D embedding width, M rows taken."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.errors import DataError
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.vector_files import VectorFiles
from qarm_feast.vector_source import VectorsInMemory, take_unit_rows

NUM_ITEMS = 300
DIM = 6


def _write(path: Path, item_ids_N: np.ndarray, x_ND: np.ndarray) -> None:
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), x_ND.shape[1])
    table = pa.table(
        {
            "item_id": pa.array(item_ids_N, pa.int64()),
            "embedding": embedding,
            "content_hash": [f"h{item}" for item in item_ids_N],
        }
    )
    pq.write_table(table, path, row_group_size=70)


@pytest.fixture
def items() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((NUM_ITEMS, DIM)).astype(np.float32)
    return rng.permutation(5000)[:NUM_ITEMS].astype(np.int64), x_ND


@pytest.fixture
def folder(tmp_path: Path, items: tuple[np.ndarray, np.ndarray]) -> Path:
    item_ids_N, x_ND = items
    _write(tmp_path / "part-00000.parquet", item_ids_N[:130], x_ND[:130])
    _write(tmp_path / "part-00001.parquet", item_ids_N[130:], x_ND[130:])
    return tmp_path


def test_reading_gives_every_row_in_file_order(
    folder: Path, items: tuple[np.ndarray, np.ndarray]
) -> None:
    vectors = VectorFiles.open(folder).read()

    assert vectors.item_ids_N.tolist() == items[0].tolist()
    assert vectors.x_ND.tobytes() == items[1].tobytes()
    assert list(vectors.content_hashes_N) == [f"h{item}" for item in items[0]]


def test_only_some_items_are_read_in_the_order_of_the_files(
    folder: Path, items: tuple[np.ndarray, np.ndarray]
) -> None:
    wanted = items[0][[299, 3, 131]]

    vectors = VectorFiles.open(folder).only(wanted).read()

    assert vectors.item_ids_N.tolist() == items[0][[3, 131, 299]].tolist()
    assert vectors.x_ND.tobytes() == items[1][[3, 131, 299]].tobytes()
    assert list(vectors.content_hashes_N) == [f"h{item}" for item in vectors.item_ids_N]


def test_rows_are_taken_in_the_order_asked_for(
    folder: Path, items: tuple[np.ndarray, np.ndarray]
) -> None:
    rows_M = np.array([200, 0, 131, 129])

    taken_MD = take_unit_rows(VectorFiles.open(folder), rows_M)

    wanted_MD = items[1][rows_M].astype(np.float64)
    wanted_MD /= np.linalg.norm(wanted_MD, axis=1, keepdims=True)
    np.testing.assert_allclose(taken_MD, wanted_MD, rtol=1e-6)


def test_a_codebook_of_files_equals_that_of_memory_byte_for_byte(
    folder: Path, items: tuple[np.ndarray, np.ndarray]
) -> None:
    config = QuantizerConfig(
        rq=RqConfig(num_levels=2, codebook_size=8, train_sample_size=200),
        vq=VqConfig(num_neighbors=5, pool_size=100),
    )
    created = datetime(2024, 1, 1, tzinfo=UTC)
    facts = EncoderFacts("e1", "a" * 64, created)

    of_files = Codebook.train_from(
        "v1", VectorFiles.open(folder), config=config, encoder=facts, created=created
    )
    of_memory = Codebook.train("v1", *items, config=config, encoder=facts, created=created)

    assert of_files.manifest == of_memory.manifest
    assert of_files.manifest.num_training_items == NUM_ITEMS
    assert of_files.manifest.pool_size == 100


def test_a_bad_vector_is_refused_even_if_it_is_not_sampled(
    items: tuple[np.ndarray, np.ndarray],
) -> None:
    item_ids_N, x_ND = items
    x_ND[250] = np.nan

    with pytest.raises(DataError, match=rf"1 of .*that of item {item_ids_N[250]}"):
        take_unit_rows(VectorsInMemory(item_ids_N, x_ND), np.array([0, 1]))


def test_a_null_inside_a_vector_is_refused(tmp_path: Path) -> None:
    values = pa.array([1.0, None, 2.0, 3.0], pa.float32())
    table = pa.table(
        {
            "item_id": [1, 2],
            "embedding": pa.FixedSizeListArray.from_arrays(values, 2),
            "content_hash": ["a", "b"],
        }
    )
    pq.write_table(table, tmp_path / "part.parquet")

    with pytest.raises(DataError, match=r"part\.parquet: 1 numbers inside embedding are null"):
        VectorFiles.open(tmp_path).read()

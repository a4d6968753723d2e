"""Made training rows of any size, for measuring speed: random ids, codes and labels.

Shape letters in this file: N rows, H history items, L levels, K neighbours, I items.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from qarm_feast.schema import CODES, TIMESTAMP
from torchrec_models.inputs import TrainInputs
from torchrec_models.item_columns import ItemColumns
from torchrec_models.popularity import count_items
from torchrec_models.row_columns import RowColumns
from torchrec_models.row_store import RowsManifest, SnapshotArrays, publish_rows, row_schema
from torchrec_models.side_tables import SideTables
from torchrec_models.vocabulary import build_vocabularies

LEVEL_SIZES = (256, 256, 256)
NUM_NEIGHBORS = 10
MEAN_HISTORY = 20
VECTOR_DIM = 128
LABELS = ("is_click",)
NUM_EVAL_ROWS = 64
"""Rows of valid and of test: training alone is measured."""
_START_MICROSECONDS = 1_600_000_000_000_000


def publish_made_rows(folder: Path, num_rows: int, num_items: int, seed: int = 0) -> TrainInputs:
    """Publish made rows and return what training takes; there are as many users as items.

    Args:
        folder: Where rows are kept.
        num_rows: Train rows.
        num_items: Items, and users.
        seed: Seed of every draw.
    """
    generator = np.random.default_rng(seed)
    rows = _table(generator, num_rows + 2 * NUM_EVAL_ROWS, num_items, num_rows)
    train = rows.slice(0, num_rows)
    item_ids_I = np.arange(num_items)
    snapshot = SnapshotArrays(
        item_ids_I=item_ids_I,
        event_times_I=np.zeros(num_items, dtype=np.int64),
        rq_IL=_codes(generator, num_items),
    )
    columns = ItemColumns((), item_ids_I, np.empty((num_items, 0), dtype=np.int32))
    store = publish_rows(
        str(folder),
        _manifest(num_rows, num_items),
        rows,
        build_vocabularies(train, (), num_numeric_buckets=10),
        snapshot,
        SideTables(columns, count_items(train, LABELS)),
    )
    return TrainInputs(store=store, codebook=None)


def _table(
    generator: np.random.Generator, num_rows: int, num_items: int, num_train: int
) -> pa.Table:
    made = made_columns(generator, num_rows, num_items)
    offsets = pa.array(np.concatenate([[0], np.cumsum(made.history_lengths_B)]).astype(np.int32))
    splits = ["train"] * num_train + ["valid"] * NUM_EVAL_ROWS + ["test"] * NUM_EVAL_ROWS
    columns = {
        "user_id": pa.array(made.user_ids_B),
        "item_id": pa.array(made.item_ids_B),
        "event_timestamp": pa.array(made.label_times_B, TIMESTAMP),
        "split": pa.array(splits),
        "is_click": pa.array(made.labels_BT[:, 0] > 0),
        "rq_code": _lists(made.rq_BL),
        "vq_code": _lists(made.vq_BK),
        "history_item_ids": pa.ListArray.from_arrays(offsets, pa.array(made.history_item_ids_H)),
        "history_timestamps": pa.ListArray.from_arrays(
            offsets, pa.array(np.zeros(len(made.history_item_ids_H), dtype=np.int64))
        ),
    }
    schema = row_schema(LABELS, [])
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def made_columns(generator: np.random.Generator, num_rows: int, num_items: int) -> RowColumns:
    """Return random rows as the batch builder takes them."""
    lengths_B = generator.integers(0, 2 * MEAN_HISTORY + 1, num_rows)
    return RowColumns(
        user_ids_B=generator.integers(0, num_items, num_rows),
        item_ids_B=generator.integers(0, num_items, num_rows),
        label_times_B=_START_MICROSECONDS + np.arange(num_rows),
        rq_BL=_codes(generator, num_rows),
        vq_BK=generator.integers(0, num_items, (num_rows, NUM_NEIGHBORS)),
        history_item_ids_H=generator.integers(0, num_items, int(lengths_B.sum())),
        history_lengths_B=lengths_B,
        labels_BT=(generator.random((num_rows, 1)) < 0.2).astype(np.float32),
        is_train_B=np.ones(num_rows, dtype=np.bool_),
    )


def _codes(generator: np.random.Generator, num_rows: int) -> np.ndarray:
    return np.stack([generator.integers(0, size, num_rows) for size in LEVEL_SIZES], axis=1)


def _lists(codes_NK: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(codes_NK) + 1, dtype=np.int32) * codes_NK.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes_NK.ravel()), type=CODES)


def _manifest(num_rows: int, num_items: int) -> RowsManifest:
    return RowsManifest(
        service="ranker_v1",
        codebook_version="v1",
        encoder_version="e1",
        build="build-1",
        created="2026-01-01T00:00:00+00:00",
        label_names=LABELS,
        user_columns=(),
        level_sizes=LEVEL_SIZES,
        num_neighbors=NUM_NEIGHBORS,
        pool_size=num_items,
        vector_dim=VECTOR_DIM,
        raw_vector_dim=0,
        num_rows={"train": num_rows, "valid": NUM_EVAL_ROWS, "test": NUM_EVAL_ROWS},
        counts={},
    )

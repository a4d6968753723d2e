"""A small row store with codes that carry the label, for tests without Feast.

Shape letters in this file: N rows, I items, L levels, V neighbours, D vector width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from qarm_feast.schema import CODES, TIMESTAMP
from torchrec_models.inputs import CodebookVectors, TrainInputs
from torchrec_models.item_columns import build_item_columns
from torchrec_models.pair_counts import count_train_pairs
from torchrec_models.popularity import count_items
from torchrec_models.row_store import RowsManifest, SnapshotArrays, publish_rows, row_schema
from torchrec_models.side_tables import SideTables
from torchrec_models.vocabulary import build_vocabularies

START_MICROSECONDS = 1_600_000_000_000_000
VECTOR_DIM = 16
RAW_VECTOR_DIM = 20
FIRST_ITEM = 5000
LABELS = ("is_like", "is_love")
USER_COLUMNS = ("age", "gender")


@dataclass(frozen=True)
class _Shape:
    """How much is made up."""

    num_rows: int
    num_users: int
    num_items: int
    level_sizes: tuple[int, ...]
    num_neighbors: int
    history_length: int

    @property
    def num_warm_items(self) -> int:
        """Items with a train row; the last tenth of all is cold."""
        return self.num_items - self.num_items // 10

    def splits(self) -> np.ndarray:
        splits_N = np.where(np.arange(self.num_rows) < self.num_rows * 0.8, "train", "valid")
        splits_N[int(self.num_rows * 0.9) :] = "test"
        return splits_N


class _Codes(NamedTuple):
    """Codes of all items."""

    rq_IL: np.ndarray
    vq_IV: np.ndarray


def write_synthetic_rows(
    rows_uri: Path,
    *,
    num_rows: int = 2000,
    num_users: int = 40,
    num_items: int = 60,
    level_sizes: tuple[int, ...] = (8, 8),
    num_neighbors: int = 4,
    history_length: int = 6,
    seed: int = 0,
) -> TrainInputs:
    """Write rows whose first label depends on the item's first code and the user's parity."""
    rng = np.random.default_rng(seed)
    shape = _Shape(num_rows, num_users, num_items, level_sizes, num_neighbors, history_length)
    codes, rows = _rows(rng, shape)
    vectors_ID = rng.normal(size=(num_items, VECTOR_DIM)).astype(np.float32)
    vectors_ID /= np.linalg.norm(vectors_ID, axis=1, keepdims=True)
    snapshot = SnapshotArrays(
        item_ids_I=np.arange(num_items) + FIRST_ITEM,
        event_times_I=np.full(num_items, START_MICROSECONDS - 1),
        rq_IL=codes.rq_IL,
        vectors_ID=vectors_ID,
        raw_vectors_IE=np.pad(vectors_ID, ((0, 0), (0, RAW_VECTOR_DIM - VECTOR_DIM))),
    )
    train = rows.filter(pa.array(shape.splits() == "train"))
    items = _items(shape)
    columns, column_vocabularies = build_item_columns(
        items, ("brand", "price"), train["item_id"].to_numpy(), num_numeric_buckets=4
    )
    vocabularies = build_vocabularies(train, USER_COLUMNS, num_numeric_buckets=4)
    store = publish_rows(
        str(rows_uri),
        _manifest(shape, seed),
        rows,
        replace(vocabularies, item_columns=column_vocabularies),
        snapshot,
        SideTables(
            columns,
            count_items(train, LABELS),
            count_train_pairs(train, LABELS[0], history_length, items=True, codes=True),
        ),
    )
    codebooks = [rng.normal(size=(size, VECTOR_DIM)).astype(np.float32) for size in level_sizes]
    pool_ID = vectors_ID[: shape.num_warm_items].copy()
    return TrainInputs(store=store, codebook=CodebookVectors(codebooks, pool_ID))


def _rows(rng: np.random.Generator, shape: _Shape) -> tuple[_Codes, pa.Table]:
    num_rows, splits_N = shape.num_rows, shape.splits()
    users_N = rng.integers(0, shape.num_users, num_rows)
    items_N = rng.integers(0, shape.num_items, num_rows)
    # Cold items move out of every train row.
    is_cold_train_N = (splits_N == "train") & (items_N >= shape.num_warm_items)
    items_N = np.where(is_cold_train_N, items_N % shape.num_warm_items, items_N)
    codes = _codes(rng, shape)
    liked_N = (codes.rq_IL[items_N, 0] % 2 == users_N % 2) ^ (rng.random(num_rows) < 0.1)
    loved_N = liked_N & (rng.random(num_rows) < 0.5)
    times_N = START_MICROSECONDS + np.arange(num_rows) * 1_000_000
    columns = {
        "user_id": pa.array(users_N + 1000),
        "item_id": pa.array(items_N + FIRST_ITEM),
        "event_timestamp": pa.array(times_N).cast(TIMESTAMP),
        "split": pa.array(splits_N),
        "is_like": pa.array(liked_N),
        "is_love": pa.array(loved_N),
        "rq_code": pa.array(list(codes.rq_IL[items_N]), CODES),
        "vq_code": pa.array(list(codes.vq_IV[items_N]), CODES),
        **_histories(rng, shape, times_N),
        "age": pa.array((users_N % 50).astype(np.int64)),
        "gender": pa.array(np.where(users_N % 2, "F", "M")),
    }
    user_fields = [pa.field("age", pa.int64()), pa.field("gender", pa.string())]
    schema = row_schema(LABELS, user_fields)
    return codes, pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _items(shape: _Shape) -> pa.Table:
    """Brands of ten items each, but for the last item's own; prices that rise."""
    numbers_I = np.arange(shape.num_items)
    brands = [f"brand {number // 10}" for number in numbers_I.tolist()]
    brands[-1] = "its own"
    return pa.table({"item_id": numbers_I + FIRST_ITEM, "brand": brands, "price": numbers_I * 1.5})


def _codes(rng: np.random.Generator, shape: _Shape) -> _Codes:
    levels = [rng.integers(0, size, shape.num_items) for size in shape.level_sizes]
    neighbors = (shape.num_items, shape.num_neighbors)
    return _Codes(np.stack(levels, axis=1), rng.integers(0, shape.num_warm_items, neighbors))


def _histories(
    rng: np.random.Generator, shape: _Shape, times_N: np.ndarray
) -> dict[str, pa.ListArray]:
    lengths_N = rng.integers(0, shape.history_length + 1, shape.num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    items = rng.integers(0, shape.num_warm_items, offsets[-1]) + FIRST_ITEM
    times = np.repeat(times_N, lengths_N) - 1_000_000
    return {
        "history_item_ids": pa.ListArray.from_arrays(offsets, pa.array(items)),
        "history_timestamps": pa.ListArray.from_arrays(offsets, pa.array(times)),
    }


def _manifest(shape: _Shape, seed: int) -> RowsManifest:
    splits_N = shape.splits()
    return RowsManifest(
        service="ranker_v1",
        codebook_version="v1",
        encoder_version="e1",
        build=f"build-{seed:04d}",
        created="2026-01-01T00:00:00+00:00",
        label_names=LABELS,
        user_columns=USER_COLUMNS,
        level_sizes=shape.level_sizes,
        num_neighbors=shape.num_neighbors,
        pool_size=shape.num_warm_items,
        vector_dim=VECTOR_DIM,
        raw_vector_dim=RAW_VECTOR_DIM,
        num_rows={name: int((splits_N == name).sum()) for name in ("train", "valid", "test")},
        counts={},
    )

"""A small row store with codes that carry the label, for tests without Feast."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from qarm_feast.schema import CODES, TIMESTAMP
from torchrec_models.inputs import CodebookVectors, TrainInputs
from torchrec_models.row_store import RowsManifest, SnapshotArrays, publish_rows, row_schema
from torchrec_models.vocabulary import build_vocabularies

START_MICROSECONDS = 1_600_000_000_000_000
VECTOR_DIM = 16


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
    users = rng.integers(0, num_users, num_rows)
    items = rng.integers(0, num_items, num_rows)
    splits = np.where(np.arange(num_rows) < num_rows * 0.8, "train", "valid")
    splits[int(num_rows * 0.9) :] = "test"
    # The last tenth of the items is cold: it moves out of every train row.
    warm_items = num_items - num_items // 10
    items = np.where((splits == "train") & (items >= warm_items), items % warm_items, items)
    rq_items = np.stack([rng.integers(0, size, num_items) for size in level_sizes], axis=1)
    vq_items = rng.integers(0, warm_items, (num_items, num_neighbors))
    liked = (rq_items[items, 0] % 2 == users % 2) ^ (rng.random(num_rows) < 0.1)
    loved = liked & (rng.random(num_rows) < 0.5)
    times = START_MICROSECONDS + np.arange(num_rows) * 1_000_000
    lengths = rng.integers(0, history_length + 1, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    history = rng.integers(0, warm_items, offsets[-1])
    history_times = np.repeat(times, lengths) - 1_000_000
    columns = {
        "user_id": pa.array(users + 1000),
        "item_id": pa.array(items + 5000),
        "event_timestamp": pa.array(times).cast(TIMESTAMP),
        "split": pa.array(splits),
        "is_like": pa.array(liked),
        "is_love": pa.array(loved),
        "rq_code": pa.array(list(rq_items[items]), CODES),
        "vq_code": pa.array(list(vq_items[items]), CODES),
        "history_item_ids": pa.ListArray.from_arrays(offsets, pa.array(history + 5000)),
        "history_timestamps": pa.ListArray.from_arrays(offsets, pa.array(history_times)),
        "age": pa.array((users % 50).astype(np.int64)),
        "gender": pa.array(np.where(users % 2, "F", "M")),
    }
    user_fields = [pa.field("age", pa.int64()), pa.field("gender", pa.string())]
    schema = row_schema(("is_like", "is_love"), user_fields)
    rows = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    vectors = rng.normal(size=(num_items, VECTOR_DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    manifest = RowsManifest(
        service="ranker_v1",
        codebook_version="v1",
        encoder_version="e1",
        build=f"build-{seed:04d}",
        created="2026-01-01T00:00:00+00:00",
        label_names=("is_like", "is_love"),
        user_columns=("age", "gender"),
        level_sizes=level_sizes,
        num_neighbors=num_neighbors,
        pool_size=warm_items,
        vector_dim=VECTOR_DIM,
        num_rows={name: int((splits == name).sum()) for name in ("train", "valid", "test")},
        counts={},
    )
    snapshot = SnapshotArrays(
        item_ids_I=np.arange(num_items) + 5000,
        event_times_I=np.full(num_items, START_MICROSECONDS - 1),
        rq_IL=rq_items,
        vectors_ID=vectors,
    )
    vocabularies = build_vocabularies(
        rows.filter(pa.array(splits == "train")), ("age", "gender"), num_numeric_buckets=4
    )
    store = publish_rows(str(rows_uri), manifest, rows, vocabularies, snapshot)
    codebooks = [rng.normal(size=(size, VECTOR_DIM)).astype(np.float32) for size in level_sizes]
    return TrainInputs(
        store=store, codebook=CodebookVectors(codebooks, vectors[:warm_items].copy())
    )


if __name__ == "__main__":
    write_synthetic_rows(Path(sys.argv[1]))

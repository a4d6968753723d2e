"""A data directory, an encoder and its vectors, small enough for a codebook in a second.

Shape letters in this file: N items, D embedding width.
"""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ITEMS = 240
NUM_COLD = 20
DIM = 8
START = datetime(2024, 1, 1, tzinfo=UTC)
ENCODER_CUTOFF = START + timedelta(hours=5)
NEWEST_TRAIN = START + timedelta(hours=NUM_ITEMS - NUM_COLD - 1)


def write_input(folder: Path) -> None:
    """One interaction per item, hour by hour; the last items have test rows only."""
    folder.mkdir(parents=True)
    times = pa.array(
        [START + timedelta(hours=n) for n in range(NUM_ITEMS)], pa.timestamp("us", tz="UTC")
    )
    ids = pa.array(range(NUM_ITEMS), pa.int64())
    items = pa.table(
        {"item_id": ids, "upload_timestamp": times, "title": [f"t{n}" for n in range(NUM_ITEMS)]}
    )
    interactions = pa.table(
        {
            "user_id": pa.array([n % 6 for n in range(NUM_ITEMS)], pa.int64()),
            "item_id": ids,
            "event_timestamp": times,
            "is_click": [n % 2 == 0 for n in range(NUM_ITEMS)],
            "split": ["train"] * (NUM_ITEMS - NUM_COLD) + ["test"] * NUM_COLD,
        }
    )
    pq.write_table(items, folder / "items.parquet")
    pq.write_table(interactions, folder / "interactions.parquet")


def write_vectors(folder: Path, num_edited: int = 0) -> None:
    """Vectors of all items; the contents of the first few are told as edited."""
    folder.mkdir(parents=True)
    x_ND = np.random.default_rng(0).standard_normal((NUM_ITEMS, DIM)).astype(np.float32)
    hashes = [f"{n + NUM_ITEMS * (n < num_edited):032x}" for n in range(NUM_ITEMS)]
    table = pa.table(
        {
            "item_id": pa.array(range(NUM_ITEMS), pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), DIM),
            "content_hash": hashes,
        }
    )
    pq.write_table(table.slice(0, 100), folder / "part-00000.parquet")
    pq.write_table(table.slice(100), folder / "part-00001.parquet")


def write_project(folder: Path) -> Path:
    """Write everything that `qarm codebook` reads; return the path of ``qarm.yaml``."""
    write_input(folder / "data" / "input")
    write_vectors(folder / "data" / "vectors" / "e1")
    encoder = folder / "data" / "encoders" / "e1"
    encoder.mkdir(parents=True)
    manifest = {"version": "e1", "behaviour_cutoff": ENCODER_CUTOFF.isoformat(), "files": {}}
    (encoder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / "qarm.yaml"
    path.write_text("quantizer: {rq: {num_levels: 2}, vq: {num_neighbors: 5}}\n")
    return path

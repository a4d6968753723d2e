"""Generated behaviour and ready vectors, small enough for a whole refresh in a second.

Shape letters in this file: N items, W width of a ready vector.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ITEMS = 120
NUM_GROUPS = 6
NUM_USERS = 60
WIDTH = 16
START = datetime(2024, 1, 1, tzinfo=UTC)
TIMESTAMP = pa.timestamp("us", tz="UTC")
SETTINGS = """
alignment: {embedding_dim: 16, batch_size: 256, num_epochs: 1, export_rows_per_part: 50}
quantizer: {rq: {num_levels: 2, codebook_size: 8}, vq: {num_neighbors: 5}}
"""


def write_data(folder: Path, num_days: int, num_new_items: int = 0) -> None:
    """Users stay in one of 6 groups of items, which half of each ready vector tells.

    Every user takes one item a day. New items lie in no group's reach and have no row.
    """
    generator = np.random.default_rng(0)
    groups_N = np.arange(NUM_ITEMS) % NUM_GROUPS
    x_NW = generator.normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32)
    x_NW[:, :8] = np.eye(8)[groups_N] * 2 + x_NW[:, :8] * 0.5
    days, users = np.divmod(np.arange(num_days * NUM_USERS), NUM_USERS)
    items = generator.integers(0, NUM_ITEMS // NUM_GROUPS, len(users)) * NUM_GROUPS
    times = [
        START + timedelta(days=1 + day, seconds=user)
        for day, user in zip(days.tolist(), users.tolist(), strict=True)
    ]
    interactions = pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "item_id": pa.array(items + users % NUM_GROUPS, pa.int64()),
            "event_timestamp": pa.array(times).cast(TIMESTAMP),
            "is_click": pa.repeat(pa.scalar(True), len(users)),
        }
    )
    x_NW = np.concatenate([x_NW, generator.normal(size=(num_new_items, WIDTH))]).astype(np.float32)
    catalogue = pa.table(
        {
            "item_id": pa.array(range(len(x_NW)), pa.int64()),
            "upload_timestamp": pa.repeat(pa.scalar(START, TIMESTAMP), len(x_NW)),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x_NW.reshape(-1)), WIDTH),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(interactions, folder / "interactions.parquet")
    pq.write_table(catalogue, folder / "items.parquet")


def write_repo(folder: Path, num_days: int) -> Path:
    """Write data and settings; return the path of ``qarm.yaml``."""
    write_data(folder / "data" / "input", num_days)
    path = folder / "qarm.yaml"
    path.write_text(SETTINGS)
    return path

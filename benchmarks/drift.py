"""A made catalogue of which a known part changes its meaning between two versions of the vectors.

Items belong to topics; a user likes the items of a few topics. In the second period some items
belong to another topic than before: what users like follows, and so does the item's second vector.
The second vectors are turned as a whole, too, as those of an encoder trained anew are.

Shape letters in this file: N items, D width, U users, R rows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ranking_data import Vectors
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.quantizers.base import Embeddings, unit_rows

NUM_TOPICS, WIDTH, TOPICS_PER_USER = 24, 32, 4
NOISE = 0.35
"""Of an item's vector about its topic, against the topic's length of 1."""
MOVED_SHARE = 0.25
ROWS_PER_USER = 50
TRAIN_ROWS, VALID_ROWS = 30, 10
LIKED_SHARE = 0.5
"""Of the rows, those of an item drawn from the user's topics."""
NOISY_LABELS = 0.1
_DAY = 86_400_000_000
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class Drift:
    """The data, and the vectors of its items before and after."""

    checked: InputData
    before: Vectors
    after: Vectors
    is_moved_N: np.ndarray


def planted_drift(folder: Path, num_items: int, num_users: int, seed: int = 0) -> Drift:
    """Write made data into a folder and return it with both versions of its vectors.

    Args:
        folder: Where the files go; made.
        num_items: Items.
        num_users: Users.
        seed: Seed of every draw.
    """
    generator = np.random.default_rng(seed)
    topics_TD = unit_rows(generator.normal(size=(NUM_TOPICS, WIDTH)).astype(np.float32))
    before_N = generator.integers(0, NUM_TOPICS, num_items)
    is_moved_N = generator.random(num_items) < MOVED_SHARE
    moves_N = generator.integers(1, NUM_TOPICS, num_items)
    after_N = np.where(is_moved_N, (before_N + moves_N) % NUM_TOPICS, before_N)
    noise_ND = generator.normal(size=(num_items, WIDTH)) * NOISE / np.sqrt(WIDTH)
    turn_DD = np.linalg.qr(generator.normal(size=(WIDTH, WIDTH)))[0]
    first_ND = _unit(topics_TD[before_N] + noise_ND)
    second_ND = _unit((topics_TD[after_N] + noise_ND) @ turn_DD)
    folder.mkdir(parents=True)
    pq.write_table(_items(first_ND), folder / "items.parquet")
    rows = _interactions(generator, num_users, before_N, after_N)
    pq.write_table(rows, folder / "interactions.parquet")
    checked = load_input_data(DataConfig(input_dir=str(folder)))
    return Drift(checked, Vectors(first_ND, first_ND), Vectors(second_ND, second_ND), is_moved_N)


def _unit(x_ND: np.ndarray) -> Embeddings:
    return unit_rows(x_ND.astype(np.float32))


def _items(x_ND: Embeddings) -> pa.Table:
    flat = pa.array(x_ND.ravel())
    return pa.table(
        {
            "item_id": pa.array(np.arange(len(x_ND), dtype=np.int64)),
            "upload_timestamp": pa.array(np.zeros(len(x_ND), dtype=np.int64), _TIME),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, x_ND.shape[1]),
        }
    )


def _interactions(
    generator: np.random.Generator, num_users: int, before_N: np.ndarray, after_N: np.ndarray
) -> pa.Table:
    likes_UT = np.zeros((num_users, NUM_TOPICS), dtype=np.bool_)
    for user in range(num_users):
        likes_UT[user, generator.choice(NUM_TOPICS, TOPICS_PER_USER, replace=False)] = True
    users_R = np.repeat(np.arange(num_users), ROWS_PER_USER)
    places_R = np.tile(np.arange(ROWS_PER_USER), num_users)
    is_before_R = places_R < TRAIN_ROWS
    items_R = np.empty(len(users_R), dtype=np.int64)
    for topics_N, is_now_R in ((before_N, is_before_R), (after_N, ~is_before_R)):
        items_R[is_now_R] = _shown_items(generator, users_R[is_now_R], likes_UT, topics_N)
    topics_R = np.where(is_before_R, before_N[items_R], after_N[items_R])
    is_like_R = likes_UT[users_R, topics_R] ^ (generator.random(len(users_R)) < NOISY_LABELS)
    splits = np.array(["train", "valid", "test"])
    numbers_R = (places_R >= TRAIN_ROWS).astype(int) + (places_R >= TRAIN_ROWS + VALID_ROWS)
    return pa.table(
        {
            "user_id": pa.array(users_R),
            "item_id": pa.array(items_R),
            "event_timestamp": pa.array(_DAY * (1 + places_R) + users_R, _TIME),
            "is_like": pa.array(is_like_R),
            "split": pa.array(splits[numbers_R]),
        }
    )


def _shown_items(
    generator: np.random.Generator, users_R: np.ndarray, likes_UT: np.ndarray, topics_N: np.ndarray
) -> np.ndarray:
    """Return an item per row: of one of the user's topics in half of the rows, else any."""
    items_R = generator.integers(0, len(topics_N), len(users_R))
    is_liked_R = generator.random(len(users_R)) < LIKED_SHARE
    for user in np.unique(users_R):
        own = np.flatnonzero(likes_UT[user, topics_N])
        chosen = np.flatnonzero((users_R == user) & is_liked_R)
        items_R[chosen] = generator.choice(own, len(chosen))
    return items_R

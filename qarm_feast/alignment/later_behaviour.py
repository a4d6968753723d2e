"""What users did after the train rows, as matrices: what vectors of items are held against.

A user counts once per item. For neighbours of a user with more than ``MAX_ITEMS_PER_USER``
positives only the latest are read: one with 100,000 would bring 10^10 pairs of items.

Shape letters in this file: M items (rows of ``items``), P positive rows, U users, Q queries,
K neighbours, R pairs of a query and an item that share a user.
May import: numpy, scipy, pyarrow, the input data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from qarm_feast.input_data import SPLIT, InputData
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID, USER_ID

NUM_NEIGHBORS = 5
HISTORY_LENGTH = 50
MAX_ITEMS_PER_USER = 1000
LaterSplit = Literal["valid", "test"]
_PAIRS_PER_BLOCK = 1 << 23


@dataclass(frozen=True)
class LaterBehaviour:
    """What users did in the rows of one later split, as rows of ``items``.

    Attributes:
        query_items_Q: Items with a later positive of a user who has another item, ascending.
        neighbor_items_QK: The items that share most users with the query, -1 fills up.
        cf_items_Q: The item of the highest item-CF score, see :func:`read_behaviour`.
        history_UM: 1 for each of a user's latest earlier positives; one row per user who has
            earlier and later positives, ascending by user id.
        next_items_U: The first later positive of each of these users.
        is_cold_M: Whether no train row holds the item.
    """

    query_items_Q: np.ndarray
    neighbor_items_QK: np.ndarray
    cf_items_Q: np.ndarray
    history_UM: sparse.csr_array
    next_items_U: np.ndarray
    is_cold_M: np.ndarray


def read_behaviour(
    checked: InputData, split: LaterSplit = "valid", *, max_queries: int = 10_000, seed: int = 0
) -> LaterBehaviour:
    """Return what users did in the rows of a later split.

    A user of item i in the split, who has item j there or earlier, is shared by i and j. Neighbours
    of i are the items that share most users with it; item-CF divides the number of shared users by
    ``sqrt(users of i in the split * users of j there or earlier)``, over users with a later
    positive. Ties go to the item of the lower row.

    Args:
        checked: Input data.
        split: The later rows. What chooses anything reads ``valid``; ``test`` counts train and
            valid rows as earlier ones.
        max_queries: Most query items, and most users; of more, as many are drawn.
        seed: Seed of that draw.

    Returns:
        Arrays without a row where the split has no positives, or no two items share a user.
    """
    earlier = ("train",) if split == "valid" else ("train", "valid")
    earlier_P3, later_P3 = _positive_rows(checked, earlier), _positive_rows(checked, (split,))
    generator = np.random.default_rng(seed)
    num_items = checked.items.num_rows
    queries_Q, neighbors_QK, cf_Q = _neighbors(
        earlier_P3, later_P3, num_items, max_queries, generator
    )
    history_UM, next_items_U = _histories(earlier_P3, later_P3, num_items, max_queries, generator)
    item_ids_M = checked.items[ITEM_ID].to_numpy()
    return LaterBehaviour(
        query_items_Q=queries_Q,
        neighbor_items_QK=neighbors_QK,
        cf_items_Q=cf_Q,
        history_UM=history_UM,
        next_items_U=next_items_U,
        is_cold_M=~np.isin(item_ids_M, checked.train_item_ids()),
    )


def _positive_rows(checked: InputData, splits: tuple[str, ...]) -> np.ndarray:
    """Return (user id, item row, time) of positives, sorted by user, time, item: ``[P, 3]``."""
    rows = checked.interactions
    is_wanted = pc.is_in(rows[SPLIT], pa.array(splits))
    rows = rows.filter(pc.and_(rows[checked.positive_label], is_wanted))
    item_rows = pc.index_in(rows[ITEM_ID], checked.items[ITEM_ID].combine_chunks())
    rows_P3 = np.column_stack(
        [
            rows[USER_ID].to_numpy(),
            item_rows.to_numpy().astype(np.int64),
            rows[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy(),
        ]
    )
    sorted_P3: np.ndarray = rows_P3[np.lexsort((rows_P3[:, 1], rows_P3[:, 2], rows_P3[:, 0]))]
    return sorted_P3


def _latest_of_each_user(rows_P3: np.ndarray, limit: int) -> np.ndarray:
    users_P = rows_P3[:, 0]
    # Newest last, so a rank from the end is a rank by recency.
    rank_from_end_P = np.searchsorted(users_P, users_P, side="right") - np.arange(len(users_P))
    latest_P3: np.ndarray = rows_P3[rank_from_end_P <= limit]
    return latest_P3


def _matrix(user_ids_U: np.ndarray, rows_P3: np.ndarray, num_items: int) -> sparse.csr_array:
    """Return users x items, 1 where a user took an item."""
    places = (np.searchsorted(user_ids_U, rows_P3[:, 0]), rows_P3[:, 1])
    ones_P = np.ones(len(rows_P3), dtype=np.float32)
    matrix_UM = sparse.csr_array((ones_P, places), shape=(len(user_ids_U), num_items))
    matrix_UM.data[:] = 1.0
    return matrix_UM


def _neighbors(
    earlier_P3: np.ndarray,
    later_P3: np.ndarray,
    num_items: int,
    max_queries: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query items, their neighbours by shared users, and by item-CF."""
    earlier_P3 = _latest_of_each_user(earlier_P3, MAX_ITEMS_PER_USER)
    later_P3 = _latest_of_each_user(later_P3, MAX_ITEMS_PER_USER)
    user_ids_U = np.unique(later_P3[:, 0])
    known_P3 = np.concatenate([earlier_P3, later_P3])
    known_UM = _matrix(user_ids_U, known_P3[np.isin(known_P3[:, 0], user_ids_U)], num_items)
    later_MU = _matrix(user_ids_U, later_P3, num_items).T.tocsr()
    candidates = np.unique(later_P3[:, 1])
    if len(candidates) > max_queries:
        candidates = np.sort(generator.choice(candidates, max_queries, replace=False))
    num_users_M = np.asarray(known_UM.sum(axis=0))
    queries, firsts = [candidates[:0]], [np.empty(0, dtype=np.int64)]
    neighbors = [np.empty((0, NUM_NEIGHBORS), dtype=np.int64)]
    for items_Q, rows_R, others_R, counts_R in _shared_users(later_MU, known_UM, candidates):
        # Users of the query are the same for all its pairs, so they do not change the order.
        cf_R = counts_R / np.sqrt(num_users_M[others_R])
        queries.append(items_Q)
        neighbors.append(_best(rows_R, others_R, counts_R, len(items_Q), NUM_NEIGHBORS))
        firsts.append(_best(rows_R, others_R, cf_R, len(items_Q), 1)[:, 0])
    neighbors_QK = np.concatenate(neighbors)
    has_any_Q = neighbors_QK[:, 0] >= 0
    return (
        np.concatenate(queries)[has_any_Q],
        neighbors_QK[has_any_Q],
        np.concatenate(firsts)[has_any_Q],
    )


def _shared_users(
    later_MU: sparse.csr_array, known_UM: sparse.csr_array, items: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of items, and of each pair (row of the block, other item) the shared users."""
    step = max(1, _PAIRS_PER_BLOCK // known_UM.shape[1])
    for begin in range(0, len(items), step):
        block_Q = items[begin : begin + step]
        shared = (later_MU[block_Q] @ known_UM).tocoo()
        is_other_R = shared.col != block_Q[shared.row]
        yield block_Q, shared.row[is_other_R], shared.col[is_other_R], shared.data[is_other_R]


def _best(
    rows_R: np.ndarray, others_R: np.ndarray, scores_R: np.ndarray, num_rows: int, limit: int
) -> np.ndarray:
    """Return the others of highest score of each row, ties by the lower other, -1 fills up."""
    order_R = np.lexsort((others_R, -scores_R, rows_R))
    sorted_R = rows_R[order_R]
    rank_R = np.arange(len(sorted_R)) - np.searchsorted(sorted_R, sorted_R, side="left")
    is_kept_R = rank_R < limit
    best_QK = np.full((num_rows, limit), -1, dtype=np.int64)
    best_QK[sorted_R[is_kept_R], rank_R[is_kept_R]] = others_R[order_R][is_kept_R]
    return best_QK


def _histories(
    earlier_P3: np.ndarray,
    later_P3: np.ndarray,
    num_items: int,
    max_users: int,
    generator: np.random.Generator,
) -> tuple[sparse.csr_array, np.ndarray]:
    """Return the latest earlier positives of users, and their first later positive."""
    user_ids_U, first_rows_U = np.unique(later_P3[:, 0], return_index=True)
    is_known_U = np.isin(user_ids_U, earlier_P3[:, 0])
    user_ids_U, next_items_U = user_ids_U[is_known_U], later_P3[first_rows_U[is_known_U], 1]
    if len(user_ids_U) > max_users:
        kept_U = np.sort(generator.choice(len(user_ids_U), max_users, replace=False))
        user_ids_U, next_items_U = user_ids_U[kept_U], next_items_U[kept_U]
    own_P3 = earlier_P3[np.isin(earlier_P3[:, 0], user_ids_U)]
    recent_P3 = _latest_of_each_user(own_P3, HISTORY_LENGTH)
    return _matrix(user_ids_U, recent_P3, num_items), next_items_U

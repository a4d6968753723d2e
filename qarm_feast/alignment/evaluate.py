"""Does alignment place items as users do: raw against aligned vectors on validation behaviour.

Test rows are never read here, because what this prints may choose an encoder.

Shape letters in this file: M items (rows of ``items``), D vector width, Q queries, K neighbours,
P positive rows, U users.
May import: numpy, scipy, pyarrow.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from qarm_feast.errors import DataError
from qarm_feast.input_data import SPLIT, InputData
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID, USER_ID

NUM_NEIGHBORS = 5
RECALL_AT = 10
HISTORY_LENGTH = 50
SLICES = ("all", "warm", "cold")


@dataclass(frozen=True)
class ValidationBehaviour:
    """What users did in the validation rows, as rows of ``items``.

    Attributes:
        query_items: Items with a validation positive that share a user with another item.
        neighbor_items: Per query its most often co-occurring items, ``[Q, K]``; -1 fills up.
        histories: Users x items, 1 for each of a user's latest train positives; one row per
            user that has train and validation positives.
        next_items: The first validation positive of each of these users.
        is_cold: Per item, whether no train row holds it.
    """

    query_items: np.ndarray
    neighbor_items: np.ndarray
    histories: sparse.csr_array
    next_items: np.ndarray
    is_cold: np.ndarray


def read_behaviour(checked: InputData) -> ValidationBehaviour:
    """Return the validation behaviour of the data.

    Args:
        checked: Input data.

    Returns:
        What users did in the validation rows.

    Raises:
        DataError: If no validation row is positive.
    """
    train = _positive_rows(checked, "train")
    valid = _positive_rows(checked, "valid")
    if not len(valid):
        raise DataError(f"{checked.directory} has no positive validation row to evaluate on")
    num_items = checked.items.num_rows
    query_items, neighbor_items = _cooccurring(train, valid, num_items)
    histories, next_items = _histories(train, valid, num_items)
    item_ids = checked.items[ITEM_ID].to_numpy()
    return ValidationBehaviour(
        query_items=query_items,
        neighbor_items=neighbor_items,
        histories=histories,
        next_items=next_items,
        is_cold=~np.isin(item_ids, checked.train_item_ids()),
    )


def _positive_rows(checked: InputData, split: str) -> np.ndarray:
    """Return (user id, item row, time) of the positive rows of a split, sorted: ``[P, 3]``."""
    rows = checked.interactions
    rows = rows.filter(pc.and_(rows[checked.positive_label], pc.equal(rows[SPLIT], split)))
    item_rows = pc.index_in(rows[ITEM_ID], checked.items[ITEM_ID].combine_chunks())
    table = np.column_stack(
        [
            rows[USER_ID].to_numpy(),
            item_rows.to_numpy().astype(np.int64),
            rows[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy(),
        ]
    )
    return table[np.lexsort((table[:, 1], table[:, 2], table[:, 0]))]


def _matrix(users: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    matrix = sparse.csr_array((np.ones(len(users), dtype=np.float32), (users, items)), shape=shape)
    matrix.data[:] = 1.0
    return matrix


def _cooccurring(
    train: np.ndarray, valid: np.ndarray, num_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the items of validation rows and the items that most users have beside them."""
    both = np.concatenate([train, valid])
    user_ids = np.unique(both[:, 0])
    shape = (len(user_ids), num_items)
    later = _matrix(np.searchsorted(user_ids, valid[:, 0]), valid[:, 1], shape)
    known = _matrix(np.searchsorted(user_ids, both[:, 0]), both[:, 1], shape)
    shared = (later.T @ known).tocsr()
    queries, neighbors = [], []
    for item in np.unique(valid[:, 1]):
        begin, end = shared.indptr[item], shared.indptr[item + 1]
        others, counts = shared.indices[begin:end], shared.data[begin:end]
        others, counts = others[others != item], counts[others != item]
        if len(others):
            best = others[np.lexsort((others, -counts))][:NUM_NEIGHBORS]
            queries.append(item)
            neighbors.append(np.pad(best, (0, NUM_NEIGHBORS - len(best)), constant_values=-1))
    return np.array(queries, dtype=np.int64), np.array(neighbors).reshape(-1, NUM_NEIGHBORS)


def _histories(
    train: np.ndarray, valid: np.ndarray, num_items: int
) -> tuple[sparse.csr_array, np.ndarray]:
    user_ids, first_rows = np.unique(valid[:, 0], return_index=True)
    is_known = np.isin(user_ids, train[:, 0])
    user_ids, next_items = user_ids[is_known], valid[first_rows[is_known], 1]
    # Newest last in `train`, so a rank from the end is a rank by recency.
    rank_from_end = np.searchsorted(train[:, 0], train[:, 0], side="right") - np.arange(len(train))
    recent = train[(rank_from_end <= HISTORY_LENGTH) & np.isin(train[:, 0], user_ids)]
    users = np.searchsorted(user_ids, recent[:, 0])
    return _matrix(users, recent[:, 1], (len(user_ids), num_items)), next_items


def neighbor_auc(behaviour: ValidationBehaviour, vectors_MD: np.ndarray) -> np.ndarray:
    """Return per query how often a co-occurring item is nearer than a random other item.

    Args:
        behaviour: Validation behaviour.
        vectors_MD: L2-normalised vectors, one per item.

    Returns:
        AUC per query, float64 ``[Q]``, ties count half.
    """
    aucs_Q = np.empty(len(behaviour.query_items))
    for row, item in enumerate(behaviour.query_items):
        neighbors = behaviour.neighbor_items[row]
        neighbors = neighbors[neighbors >= 0]
        cosines_M = vectors_MD @ vectors_MD[item]
        others = np.sort(np.delete(cosines_M, np.append(neighbors, item)))
        wins = np.searchsorted(others, cosines_M[neighbors], side="left")
        wins_or_ties = np.searchsorted(others, cosines_M[neighbors], side="right")
        aucs_Q[row] = (wins + wins_or_ties).mean() / (2.0 * max(len(others), 1))
    return aucs_Q


def next_item_hits(behaviour: ValidationBehaviour, vectors_MD: np.ndarray) -> np.ndarray:
    """Return per user whether the next item is among the ten nearest to the mean of the history.

    Args:
        behaviour: Validation behaviour.
        vectors_MD: L2-normalised vectors, one per item.

    Returns:
        Bool ``[U]``; items of the history are no candidates, unless the next item is one.
    """
    hits_U = np.empty(len(behaviour.next_items), dtype=bool)
    for user, next_item in enumerate(behaviour.next_items):
        begin, end = behaviour.histories.indptr[user : user + 2]
        history = behaviour.histories.indices[begin:end]
        cosines_M = vectors_MD @ vectors_MD[history].mean(axis=0)
        next_cosine = cosines_M[next_item]
        cosines_M[history] = -np.inf
        hits_U[user] = (cosines_M > next_cosine).sum() < RECALL_AT
    return hits_U


def evaluate_vectors(
    checked: InputData, vectors: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Return the neighbour measures of each kind of vector, on validation rows.

    Args:
        checked: Input data.
        vectors: L2-normalised vectors of ``checked.items`` by name (raw, aligned).

    Returns:
        Per name ``neighbor_auc_<slice>`` and ``recall_at_10_<slice>``; a slice (all, warm, cold:
        by the query, by the next item) that holds nothing is left out. ``num_queries_<slice>`` and
        ``num_users_<slice>`` stand under ``counts``.

    Raises:
        DataError: If no validation row is positive.
    """
    behaviour = read_behaviour(checked)
    is_cold_query = behaviour.is_cold[behaviour.query_items]
    is_cold_next = behaviour.is_cold[behaviour.next_items]
    report: dict[str, dict[str, float]] = {
        "counts": _slice_counts("num_queries", is_cold_query)
        | _slice_counts("num_users", is_cold_next)
    }
    for name, vectors_MD in vectors.items():
        aucs_Q = neighbor_auc(behaviour, vectors_MD)
        hits_U = next_item_hits(behaviour, vectors_MD).astype(float)
        report[name] = _slice_means("neighbor_auc", aucs_Q, is_cold_query) | _slice_means(
            f"recall_at_{RECALL_AT}", hits_U, is_cold_next
        )
    return report


def _slice_masks(is_cold: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(SLICES, (np.ones(len(is_cold), dtype=bool), ~is_cold, is_cold), strict=True))


def _slice_means(name: str, values: np.ndarray, is_cold: np.ndarray) -> dict[str, float]:
    masks = _slice_masks(is_cold)
    return {f"{name}_{key}": float(values[m].mean()) for key, m in masks.items() if m.any()}


def _slice_counts(name: str, is_cold: np.ndarray) -> dict[str, float]:
    return {f"{name}_{key}": int(mask.sum()) for key, mask in _slice_masks(is_cold).items()}


def format_report(report: Mapping[str, Mapping[str, float]]) -> str:
    """Return the report as a text table, one line per measure, one column per kind of vector."""
    names = [name for name in report if name != "counts"]
    measures = list(dict.fromkeys(key for name in names for key in report[name]))
    lines = [f"{'validation rows':<26}" + "".join(f"{name:>10}" for name in names)]
    for measure in measures:
        cells = "".join(f"{report[name].get(measure, float('nan')):>10.4f}" for name in names)
        lines.append(f"{measure:<26}{cells}")
    counts = ", ".join(f"{key} {int(value):,}" for key, value in report["counts"].items())
    return "\n".join([*lines, counts])

"""The behaviour space: item vectors learnt from who has what, and each positive's trigger in it.

A factorisation of the positive pointwise mutual information (PPMI) of items that share users, which
is what item2vec factorises implicitly (Levy and Goldberg, 2014), by scipy's eigensolver. Of the
largest catalogues only the strongest entries of each item are kept, so that the matrix stays within
a number of entries that is set.

Shape letters in this file: P positives, M items, H history length, B behaviour width, E pairs of
items, C rows of a block, W rows that one of them may choose from.
May import: numpy, scipy.
"""

from functools import partial

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import eigsh

from qarm_feast.alignment.blocks import Arrays, cut_blocks, map_blocks
from qarm_feast.alignment.cooccurrence import count_shared, counting_arrays
from qarm_feast.alignment.neighbors import best_per_row, popularity_factors
from qarm_feast.alignment.positives import Positives

_FIXED_POINT = 2.0**25
"""Unit vectors in multiples of its inverse have exact cosines in float64, in any order of sums."""
_ROWS_PER_PRODUCT = 128
_ROWS_PER_BLOCK = 2**18


def behaviour_vectors(
    positives: Positives,
    width: int,
    seed: int,
    max_cooccurrences: int | None = None,
    num_processes: int = 1,
) -> np.ndarray:
    """Return one L2-normalised float32 vector per item, near where users are shared.

    With ``n(i, j)`` the users of both items, ``n(i)`` its sum over the others j and ``n`` the sum
    of all, ``PPMI(i, j) = max(0, log(n(i, j) * n / (n(i) * n(j))))``. The vectors are its
    eigenvectors of largest absolute eigenvalue times the root of that: the truncated SVD, since the
    matrix is symmetric.

    Args:
        positives: Positive rows; what a user may bring is capped by ``Positives.latest``.
        width: Dimensions; fewer where there are not enough items.
        seed: Seed of the solver's start vector.
        max_cooccurrences: Entries of the matrix: an item keeps the ``max_cooccurrences / M`` others
            of greatest PPMI, what a factorisation misses least; an entry stays if either item
            keeps it. Up to ``sqrt(max_cooccurrences)`` items, or with None, that is all of them.
        num_processes: Most processes that count; equal results for any number.

    Returns:
        Matrix of shape ``[M, B]``; zero for an item that shares no user.
    """
    num_items = positives.num_items
    max_per_item = max((max_cooccurrences or num_items**2) // num_items, 1)
    ppmi = _ppmi(positives, max_per_item, num_processes)
    rank = min(width, num_items - 1)
    if not ppmi.nnz or rank < 1:
        return np.zeros((num_items, 1), dtype=np.float32)
    start_M = np.random.default_rng(seed).normal(size=num_items)
    values_B, vectors_MB = eigsh(ppmi, k=rank, v0=start_M)
    vectors_MB *= np.sqrt(np.abs(values_B))
    norms_M1 = np.linalg.norm(vectors_MB, axis=1, keepdims=True)
    unit_MB: np.ndarray = (vectors_MB / np.maximum(norms_M1, 1e-12)).astype(np.float32)
    return unit_MB


def _ppmi(positives: Positives, max_per_item: int, num_processes: int) -> sparse.csr_array:
    arrays, starts = counting_arrays(positives)
    # An item meets every other item of each of its users.
    others_U = np.diff(arrays["user_starts"]) - 1
    num_items = positives.num_items
    arrays["totals_M"] = np.bincount(
        positives.items_P, weights=others_U[positives.users_P], minlength=num_items
    )
    function = partial(_ppmi_block, max_per_item=max_per_item)
    parts = list(map_blocks(function, arrays, starts, num_processes))
    entries = [np.concatenate([part[axis] for part in parts]) for axis in range(3)]
    ppmi = sparse.csr_array((entries[2], (entries[0], entries[1])), shape=(num_items, num_items))
    # An entry may be among the strongest of one of its items only.
    return ppmi.maximum(ppmi.T).tocsr()


def _ppmi_block(
    arrays: Arrays, begin: int, end: int, *, max_per_item: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return item, other item and PPMI of a block's strongest entries above zero."""
    items_E, others_E, shared_E = count_shared(arrays, begin, end)
    totals_M = arrays["totals_M"]
    ppmi_E = np.log(shared_E * totals_M.sum() / (totals_M[items_E] * totals_M[others_E]))
    kept_E = np.flatnonzero(ppmi_E > 0)
    row_starts = np.searchsorted(items_E[kept_E], np.arange(begin, end + 1))
    kept_E = kept_E[best_per_row(row_starts, others_E[kept_E], ppmi_E[kept_E], max_per_item)]
    return items_E[kept_E].astype(np.int32), others_E[kept_E], ppmi_E[kept_E]


def find_triggers(
    positives: Positives,
    vectors_MB: np.ndarray,
    history_length: int,
    num_processes: int = 1,
    popularity_power: float = 0.0,
    min_similarity: float = -1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return for every positive the most similar earlier positive of its user.

    Events of one user at one time do not see each other. Of equals the latest event wins.

    Args:
        positives: Positive rows.
        vectors_MB: Behaviour vectors, L2-normalised.
        history_length: Latest earlier positives that are searched.
        num_processes: Most processes that search; equal results for any number.
        popularity_power: The most similar one is that of the greatest :func:`corrected` cosine.
        min_similarity: Least cosine of a trigger that is of use: any that has it goes before all
            that have not, however rare these are.

    Returns:
        Trigger items (dense rows, int32) and cosines (float32), ``-inf`` where nothing is earlier.
    """
    starts_P = group_starts(positives.users_P)
    # The history of a row ends where the rows of its user at its own time begin.
    ends_P = group_starts(positives.users_P, positives.times_P)
    arrays = {
        "items_P": positives.items_P,
        "starts_P": np.maximum(starts_P, ends_P - history_length),
        "ends_P": ends_P,
        "vectors_MB": np.rint(vectors_MB * _FIXED_POINT) / _FIXED_POINT,
    }
    if popularity_power:
        arrays["factors_M"] = popularity_factors(positives.users_per_item(), popularity_power)
    starts = cut_blocks(np.ones(len(starts_P), dtype=np.int64), _ROWS_PER_BLOCK)
    function = partial(_triggers_of_block, min_similarity=min_similarity)
    parts = list(map_blocks(function, arrays, starts, num_processes))
    triggers_P = np.concatenate([triggers for triggers, _ in parts])
    return triggers_P, np.concatenate([scores for _, scores in parts])


def _triggers_of_block(
    arrays: Arrays, begin: int, end: int, *, min_similarity: float
) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(begin, end)
    # Behind many events of one time a history begins far from the one before.
    is_far = np.diff(arrays["starts_P"][begin:end], prepend=0) > _ROWS_PER_PRODUCT
    firsts = rows[((rows - begin) % _ROWS_PER_PRODUCT == 0) | is_far].tolist()
    parts = [
        _triggers_of_rows(arrays, slice(first, last), min_similarity)
        for first, last in zip(firsts, [*firsts[1:], end], strict=True)
    ]
    triggers_C = np.concatenate([triggers for triggers, _ in parts])
    return triggers_C.astype(np.int32), np.concatenate([scores for _, scores in parts])


def _triggers_of_rows(
    arrays: Arrays, rows: slice, min_similarity: float
) -> tuple[np.ndarray, np.ndarray]:
    starts_C, ends_C = arrays["starts_P"][rows], arrays["ends_P"][rows]
    low = int(starts_C.min())
    # Newest first, so that the first of equal cosines is the latest.
    rows_W = np.arange(max(int(ends_C.max()), low + 1) - 1, low - 1, -1)
    items_W = arrays["items_P"][rows_W]
    vectors_MB = arrays["vectors_MB"]
    cosines_CW = vectors_MB[arrays["items_P"][rows]] @ vectors_MB[items_W].T
    is_history_CW = (rows_W >= starts_C[:, None]) & (rows_W < ends_C[:, None])
    cosines_CW[~is_history_CW] = -np.inf
    scores_CW = cosines_CW
    if "factors_M" in arrays:
        scores_CW = corrected(cosines_CW, arrays["factors_M"][items_W])
        # A rare trigger that is too far would be dropped, and with it the pair of a near one.
        is_near_CW = cosines_CW >= min_similarity
        scores_CW[~is_near_CW & is_near_CW.any(axis=1, keepdims=True)] = -np.inf
    best_C = scores_CW.argmax(axis=1)
    return items_W[best_C], cosines_CW[np.arange(len(best_C)), best_C].astype(np.float32)


def corrected(cosines: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return cosines after the popularity correction.

    Args:
        cosines: Of any shape; ``-inf`` stays.
        factors: ``popularity_factors`` of the triggers, of a shape that goes with it. A cosine
            below zero is divided by its own, so that who is popular loses there, too.

    Returns:
        float64, or what the two come to.
    """
    scores: np.ndarray = np.where(cosines < 0, cosines / factors, cosines * factors)
    return scores


def group_starts(*sorted_keys: np.ndarray) -> np.ndarray:
    """Return for every row the index of the first row with the same keys: int64."""
    num_rows = len(sorted_keys[0])
    is_start_P = np.zeros(num_rows, dtype=bool)
    is_start_P[:1] = True
    for key_P in sorted_keys:
        is_start_P[1:] |= key_P[1:] != key_P[:-1]
    return np.maximum.accumulate(np.where(is_start_P, np.arange(num_rows), 0))

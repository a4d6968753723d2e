"""How well vectors place items as users did: neighbour AUC and two retrieval protocols of AlignRec.

Vectors are compared by inner product: the cosine of vectors of length 1, the mean cosine of what
a decoded code stands for. Scores nearer than ``TIE`` are equal, because decoded codes give many
items one vector, and a matrix product need not give equal rows equal bits. Scores of all items
are made for a block of queries at a time, never for all.

Shape letters in this file: M items, D vector width, Q queries, C queries of a block, K wanted
items of a query, U users.
May import: numpy, scipy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy import sparse

from qarm_feast.alignment.later_behaviour import LaterBehaviour
from qarm_feast.quantizers.base import Embeddings

RECALL_AT = 10
TIE = 1e-6
_SCORES_PER_BLOCK = 1 << 22


class _Ranks(NamedTuple):
    """Of each wanted item the weight of candidates that are nearer to the query, or as near.

    ``candidates_Q`` is the weight of the items that are neither the query's own nor wanted.
    """

    nearer_QK: np.ndarray
    tied_QK: np.ndarray
    candidates_Q: np.ndarray


def neighbor_auc(
    behaviour: LaterBehaviour, vectors_MD: Embeddings, weights_M: np.ndarray | None = None
) -> np.ndarray:
    """Return per query how often a neighbour by behaviour is nearer than a random other item.

    Args:
        behaviour: Later behaviour.
        vectors_MD: Vectors, one per item: L2-normalised, or decoded.
        weights_M: How often an item is drawn as the other one, float32; None: all alike.

    Returns:
        AUC per query, float64 ``[Q]``: the mean over its neighbours of the share of other items
        (all but the query and its neighbours) that are farther, ties count half.
    """
    queries_Q, wanted_QK = behaviour.query_items_Q, behaviour.neighbor_items_QK
    own = _rows_of_one(queries_Q, len(vectors_MD))
    ranks = _ranks(vectors_MD[queries_Q], vectors_MD, wanted_QK, own, weights_M)
    candidates_Q1 = np.maximum(ranks.candidates_Q, 1)[:, None]
    aucs_QK = 1.0 - (ranks.nearer_QK + ranks.tied_QK / 2.0) / candidates_Q1
    return np.asarray(np.average(aucs_QK, axis=1, weights=wanted_QK >= 0))


def zero_shot_hits(
    behaviour: LaterBehaviour, vectors_MD: Embeddings, k: int = RECALL_AT
) -> np.ndarray:
    """Return per user the chance that the next item is among the k nearest to the mean of history.

    AlignRec's zero-shot protocol. Items of the history are no candidates, unless the next item is
    one of them.

    Args:
        behaviour: Later behaviour.
        vectors_MD: Vectors, one per item: L2-normalised, or decoded.
        k: Length of the list.

    Returns:
        Float64 ``[U]`` in 0 ... 1: items of one score stand in random order.
    """
    history_UM = behaviour.history_UM
    # Scores are compared within a user, so the mean need not be of length 1.
    means_UD = np.asarray(history_UM @ vectors_MD) / history_UM.sum(axis=1)[:, None]
    return _hits(
        _ranks(means_UD, vectors_MD, behaviour.next_items_U[:, None], history_UM.tocsr()), k
    )


def item_cf_hits(
    behaviour: LaterBehaviour, vectors_MD: Embeddings, k: int = RECALL_AT
) -> np.ndarray:
    """Return per query the chance that its best item by item-CF is among its k nearest items.

    AlignRec's item-CF protocol.

    Args:
        behaviour: Later behaviour.
        vectors_MD: Vectors, one per item: L2-normalised, or decoded.
        k: Length of the list.

    Returns:
        Float64 ``[Q]`` in 0 ... 1: items of one score stand in random order.
    """
    queries_Q = behaviour.query_items_Q
    own = _rows_of_one(queries_Q, len(vectors_MD))
    return _hits(_ranks(vectors_MD[queries_Q], vectors_MD, behaviour.cf_items_Q[:, None], own), k)


def _rows_of_one(items_Q: np.ndarray, num_items: int) -> sparse.csr_array:
    """Return the matrix whose row q holds a 1 for item q alone."""
    ones_Q = np.ones(len(items_Q), dtype=np.float32)
    starts = np.arange(len(items_Q) + 1)
    return sparse.csr_array((ones_Q, items_Q, starts), shape=(len(items_Q), num_items))


def _hits(ranks: _Ranks, k: int) -> np.ndarray:
    free_Q = k - ranks.nearer_QK[:, 0]
    hits_Q: np.ndarray = np.clip(free_Q / (ranks.tied_QK[:, 0] + 1.0), 0.0, 1.0)
    return hits_Q


def _ranks(
    queries_QD: Embeddings,
    vectors_MD: Embeddings,
    wanted_QK: np.ndarray,
    own: sparse.csr_array,
    weights_M: np.ndarray | None = None,
) -> _Ranks:
    """Rank wanted items (-1: none) among the items that are neither ``own`` nor wanted."""
    nearer_QK, tied_QK = np.zeros(wanted_QK.shape), np.zeros(wanted_QK.shape)
    candidates_Q = np.zeros(len(wanted_QK))
    for rows, scores_CM in _score_blocks(queries_QD, vectors_MD):
        wanted_CK = wanted_QK[rows]
        wanted_scores_CK = np.take_along_axis(scores_CM, np.maximum(wanted_CK, 0), axis=1)
        part = own[rows].tocoo()
        scores_CM[part.row, part.col] = -np.inf
        in_row_C, in_column_K = np.nonzero(wanted_CK >= 0)
        scores_CM[in_row_C, wanted_CK[in_row_C, in_column_K]] = -np.inf
        candidates_Q[rows] = _weigh(scores_CM > -np.inf, weights_M)
        for column, score_C in enumerate(wanted_scores_CK.T):
            nearer_C = _weigh(scores_CM > score_C[:, None] + TIE, weights_M)
            at_least_C = _weigh(scores_CM >= score_C[:, None] - TIE, weights_M)
            nearer_QK[rows, column] = nearer_C
            tied_QK[rows, column] = at_least_C - nearer_C
    return _Ranks(nearer_QK, tied_QK, candidates_Q)


def _weigh(is_counted_CM: np.ndarray, weights_M: np.ndarray | None) -> np.ndarray:
    if weights_M is None:
        return np.asarray(np.count_nonzero(is_counted_CM, axis=1))
    return np.asarray(is_counted_CM @ weights_M)


def _score_blocks(
    queries_QD: Embeddings, vectors_MD: Embeddings
) -> Iterator[tuple[slice, np.ndarray]]:
    step = max(1, _SCORES_PER_BLOCK // max(len(vectors_MD), 1))
    for begin in range(0, len(queries_QD), step):
        rows = slice(begin, begin + step)
        yield rows, queries_QD[rows] @ vectors_MD.T

"""VQ lists over a refresh: an old neighbour stays in an item's list while it is near enough.

A pool row's embedding is learned as a part of the lists that it stands in, and a refresh that
changes lists for nothing takes that from the items. So, in the pool whose surviving items keep
their row (:mod:`qarm_feast.continuity`):

1. An old neighbour stays while ``d2 <= (1 + hysteresis) * d2_k``, where ``d2_k`` is the squared
   distance of the k-th nearest pool item now. One whose row started anew does not stay.
2. The nearest pool items that are not in the list yet take the places that came free.
3. A list is in the order of distance, as a fresh one is. One that is not the fresh list is stored
   as an override by item id and content hash, and served as stored.

No member is ever farther than that factor, however long the chain of refreshes: there is no debt to
pay back. A new item, or one with new content, gets a fresh list.

Shape letters in this file: N items, B items of a block, D embedding width, P pool rows, V old
neighbours, k neighbours, C candidates: V old ones, then the k nearest.
May import: NumPy, the codebook and its quantizers.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qarm_feast.codebook import ItemVectors
from qarm_feast.overrides import Overrides
from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.search import squared_distances
from qarm_feast.quantizers.vq import NeighborQuantizer

NO_NEIGHBOR = -1
"""In place of a pool row: there is no old neighbour."""

_STAYS, _COMES, _IS_OUT = 0, 1, 2
_ITEMS_PER_BLOCK = 8192


@dataclass(frozen=True)
class HeldLists:
    """Lists of all items, int64 pool rows, nearest first; the nearest; what holding on did."""

    vq_Nk: Codes
    nearest_Nk: Codes
    figures: dict[str, float]

    def overrides(self, vectors: ItemVectors) -> Overrides:
        """Return the lists that are not the nearest, by item and content."""
        rows = np.flatnonzero((self.vq_Nk != self.nearest_Nk).any(axis=1))
        hashes = [vectors.content_hashes_N[row] for row in rows.tolist()]
        # There may be one for each item of the catalogue: half the bytes are worth it.
        lists_Mk = self.vq_Nk[rows].astype(np.int32)
        return Overrides.from_rows(vectors.item_ids_N[rows], hashes, lists_Mk)


def held_lists(
    vq: NeighborQuantizer,
    vectors: ItemVectors,
    old_NV: Codes,
    reset_rows: npt.NDArray[np.int64],
    hysteresis: float,
) -> HeldLists:
    """Return the list of each item: old neighbours that are near enough, then the nearest.

    Args:
        vq: The refreshed pool.
        vectors: Items with vectors of length 1.
        old_NV: The parent's lists, as rows of its pool; ``NO_NEIGHBOR`` for items that it has not
            coded with this content.
        reset_rows: Rows of the refreshed pool that hold another item than the parent's.
        hysteresis: How much farther than the k-th nearest an old neighbour may lie, as a share of
            the squared distance.

    Returns:
        The lists, and as figures ``churn`` (share of items with an old list whose set of learned
        rows is another now) beside ``naive_churn`` (that of the nearest lists),
        ``neighbor_recall`` (share of the nearest that the lists hold) and
        ``distance_over_nearest`` (squared distances of the members over those of the nearest,
        minus 1).
    """
    nearest_Nk = vq.encode(vectors.x_ND, vectors.item_ids_N)
    goes_on_P = np.ones(len(vq.pool_item_ids_P), dtype=np.bool_)
    goes_on_P[reset_rows] = False
    survivors_NV = _surviving(old_NV, goes_on_P)
    vq_Nk, distance_ratio = _chosen_lists(vq, vectors.x_ND, nearest_Nk, survivors_NV, hysteresis)
    is_known_N = (old_NV != NO_NEIGHBOR).any(axis=1)
    figures = {
        "hysteresis": hysteresis,
        "churn": _churn(survivors_NV[is_known_N], vq_Nk[is_known_N]),
        "naive_churn": _churn(survivors_NV[is_known_N], nearest_Nk[is_known_N]),
        "neighbor_recall": _recall(vq_Nk, nearest_Nk),
        "distance_over_nearest": distance_ratio - 1,
    }
    return HeldLists(vq_Nk, nearest_Nk, figures)


def _surviving(old_NV: Codes, goes_on_P: npt.NDArray[np.bool_]) -> Codes:
    """Return the old neighbours whose row goes on, ``NO_NEIGHBOR`` in place of the others."""
    is_row_NV = (old_NV != NO_NEIGHBOR) & (old_NV < len(goes_on_P))
    survives_NV = is_row_NV & goes_on_P[np.where(is_row_NV, old_NV, 0)]
    return np.where(survives_NV, old_NV, NO_NEIGHBOR)


def _chosen_lists(
    vq: NeighborQuantizer,
    x_ND: Embeddings,
    nearest_Nk: Codes,
    old_NV: Codes,
    hysteresis: float,
) -> tuple[Codes, float]:
    """Return the lists, and the sum of their squared distances over that of the nearest."""
    pool_PD = vq.pool_vectors_PD
    num_neighbors = nearest_Nk.shape[1]
    vq_Nk = np.empty_like(nearest_Nk)
    held_sum = nearest_sum = 0.0
    for start in range(0, len(vq_Nk), _ITEMS_PER_BLOCK):
        block = slice(start, start + _ITEMS_PER_BLOCK)
        rows_BC = np.hstack([old_NV[block], nearest_Nk[block]])
        d2_BC = _row_distances(x_ND[block], pool_PD, rows_BC)
        nearest_d2_Bk = d2_BC[:, -num_neighbors:]
        ranks_BC = _ranks(rows_BC, d2_BC, (1 + hysteresis) * nearest_d2_Bk[:, -1:], num_neighbors)
        places_Bk = np.lexsort((d2_BC, ranks_BC))[:, :num_neighbors]
        lists_Bk, d2_Bk = (np.take_along_axis(a, places_Bk, 1) for a in (rows_BC, d2_BC))
        vq_Nk[block] = np.take_along_axis(lists_Bk, np.lexsort((lists_Bk, d2_Bk)), 1)
        held_sum += float(d2_Bk.sum())
        nearest_sum += float(nearest_d2_Bk.sum())
    return vq_Nk, held_sum / nearest_sum if nearest_sum else 1.0


def _row_distances(
    x_BD: Embeddings, pool_PD: Embeddings, rows_BC: Codes
) -> npt.NDArray[np.float64]:
    """Return canonical squared distances to pool rows, infinite where there is no row."""
    columns = [squared_distances(x_BD, pool_PD[rows_B]) for rows_B in rows_BC.T]
    return np.where(rows_BC == NO_NEIGHBOR, np.inf, np.stack(columns, axis=1).astype(np.float64))


def _ranks(
    rows_BC: Codes, d2_BC: npt.NDArray[np.float64], limit_B1: npt.NDArray[np.float64], k: int
) -> npt.NDArray[np.int8]:
    """Return which candidates come first: old ones within the limit, then the nearest."""
    ranks_BC = np.full(rows_BC.shape, _COMES, dtype=np.int8)
    stays_BV = d2_BC[:, :-k] <= limit_B1
    ranks_BC[:, :-k] = np.where(stays_BV, _STAYS, _IS_OUT)
    staying_BV = np.where(stays_BV, rows_BC[:, :-k], NO_NEIGHBOR)
    for column in range(rows_BC.shape[1] - k, rows_BC.shape[1]):
        is_there_B = (staying_BV == rows_BC[:, column : column + 1]).any(axis=1)
        ranks_BC[is_there_B, column] = _IS_OUT
    return ranks_BC


def _churn(old_NV: Codes, lists_Nk: Codes) -> float:
    """Return the share of lists that are not the old set of rows."""
    if old_NV.shape != lists_Nk.shape:
        return float(len(lists_Nk) > 0)
    if len(lists_Nk) == 0:
        return 0.0
    return float((np.sort(old_NV, axis=1) != np.sort(lists_Nk, axis=1)).any(axis=1).mean())


def _recall(lists_Nk: Codes, nearest_Nk: Codes) -> float:
    num_found = sum(int((lists_Nk == rows_N[:, None]).sum()) for rows_N in nearest_Nk.T)
    return num_found / max(1, nearest_Nk.size)

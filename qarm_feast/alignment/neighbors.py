"""Neighbours of items by a score over shared users: what Swing and item-CF have in common.

Shape letters in this file: M items, R kept neighbours, E scored entries, N rows.
May import: numpy.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NeighborSearch:
    """How many neighbours of an item are kept, and how they are found.

    Attributes:
        num_neighbors: Neighbours kept per item.
        popularity_power: A neighbour's score is divided by the number of its users to this power.
        num_processes: Most processes that search.
    """

    num_neighbors: int
    popularity_power: float = 0.0
    num_processes: int = 1


@dataclass(frozen=True)
class Neighbors:
    """Items, their neighbours (dense rows) and scores.

    Items ascend; of one item the best neighbour comes first, ties by the lower neighbour.
    ``num_scored`` counts the item pairs that had a score, before the best were kept.
    """

    items_R: np.ndarray
    neighbors_R: np.ndarray
    scores_R: np.ndarray
    num_scored: int


def popularity_factors(users_per_item_M: np.ndarray, power: float) -> np.ndarray:
    """Return what the scores of a neighbour are multiplied by: ``|U_j| ** -power``.

    With power 0 nothing changes. Above 0, neighbours that many users hold lose places to rarer
    ones; an item's own popularity does not enter, so nothing moves between items.

    Args:
        users_per_item_M: Users of each item.
        power: Zero or more; at 1 a score is per user of the neighbour.

    Returns:
        float64 ``[M]``.
    """
    # An item without users, all of them capped away, is nobody's neighbour.
    factors_M: np.ndarray = np.maximum(users_per_item_M, 1).astype(np.float64) ** -power
    return factors_M


def best_per_row(
    starts_N: np.ndarray, columns_E: np.ndarray, scores_E: np.ndarray, limit: int
) -> np.ndarray:
    """Return the entries of each row's best scores, best first, ties by the lower column.

    Args:
        starts_N: Begin of each row's entries, and the end of the last one: ``[N + 1]``.
        columns_E: Column of each entry.
        scores_E: Score of each entry.
        limit: Most entries of a row.

    Returns:
        Entry numbers, rows in order.
    """
    counts_N = np.diff(starts_N)
    least_N = np.full(len(counts_N), -np.inf)
    for row in np.flatnonzero(counts_N > limit):
        of_row = scores_E[starts_N[row] : starts_N[row + 1]]
        least_N[row] = np.partition(of_row, -limit)[-limit]
    rows_E = np.repeat(np.arange(len(counts_N)), counts_N)
    # Entries that tie with the last kept one stay until the columns decide.
    kept_E = np.flatnonzero(scores_E >= least_N[rows_E])
    rows_E = rows_E[kept_E]
    order = np.lexsort((columns_E[kept_E], -scores_E[kept_E], rows_E))
    rank = np.arange(len(order)) - np.searchsorted(rows_E, rows_E)
    best_E: np.ndarray = kept_E[order[rank < limit]]
    return best_E


def joined(parts: Iterable[Neighbors]) -> Neighbors:
    """Return the neighbours of all parts, items ascending; each item stands in one part."""
    none = np.zeros(0, dtype=np.int64)
    found = [Neighbors(none, none, np.zeros(0), 0), *parts]
    items_R = np.concatenate([part.items_R for part in found])
    order_R = np.argsort(items_R, kind="stable")
    return Neighbors(
        items_R=items_R[order_R],
        neighbors_R=np.concatenate([part.neighbors_R for part in found])[order_R],
        scores_R=np.concatenate([part.scores_R for part in found])[order_R],
        num_scored=sum(part.num_scored for part in found),
    )

"""Swing: items are neighbours when pairs of users who share little else share both.

Items are searched in batches, each a few whole-array steps: those with few users together, crowded
ones alone. Where many users of an item share another one, sharing is counted by matrix products,
elsewhere pair by pair. Weights of user pairs are rounded to whole multiples of a power of two, so
small that sums of all pairs are exact in float64: hence neither the order of sums nor the way of
counting can change a bit.

Shape letters in this file: P positives, U users, M items, B items of a batch, S users of these
items one after the other, E their users' items, G groups of entries with one item of the batch and
one other item, T pairs of users in one group, C cells (user pairs of each item), H dense columns.
May import: numpy.
"""

from functools import partial

import numpy as np

from qarm_feast.alignment.blocks import Arrays, cut_blocks, map_blocks
from qarm_feast.alignment.neighbors import (
    Neighbors,
    NeighborSearch,
    best_per_row,
    joined,
    popularity_factors,
)
from qarm_feast.alignment.positives import Positives, starts_of

_CROWDED_USERS = 32
"""From so many users on an item is a batch of its own."""
_DENSE_SHARE = 1 / 16
"""Of a crowded item's users, how many must have another item so that it becomes a column."""
_ENTRIES_PER_BATCH = 2**17
_ENTRIES_PER_BLOCK = 2**22


def swing_neighbors(
    positives: Positives, search: NeighborSearch, alpha: float, max_users_per_item: int
) -> Neighbors:
    """Return each item's best neighbours by the Swing score.

    With ``U_i`` the users of item i, ``I_u`` the items of user u and ``w_u = 1 / sqrt(|I_u|)``,

    ``s(i, j) = sum over unordered pairs {u, v}, u != v, of users in U_i and U_j of
    w_u * w_v / (alpha + |I_u and I_v|)``.

    Two users who share few other items say more about the two they share. Of an item with more
    than ``max_users_per_item`` users only those who came to it last are ``U_i``, when its own
    neighbours are sought. (Yang et al., arXiv 2010.05525, with the user weights of later use.)

    Args:
        positives: Positive rows; what a user may bring is capped by ``Positives.latest``.
        search: Neighbours kept per item, popularity correction, processes.
        alpha: Smooths pairs of users with little in common.
        max_users_per_item: Bounds time and memory, both quadratic in the users of an item.

    Returns:
        At most ``num_neighbors`` per item, scores above zero, float64; equal to the bit for any
        number of processes.
    """
    arrays, batches_per_block = _swing_arrays(positives, max_users_per_item)
    factors_M = popularity_factors(positives.users_per_item(), search.popularity_power)
    function = partial(_swing_block, alpha=alpha, num_neighbors=search.num_neighbors)
    arrays = {**arrays, "factors_M": factors_M}
    return joined(map_blocks(function, arrays, batches_per_block, search.num_processes))


def _swing_arrays(
    positives: Positives, max_users_per_item: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the lists of items and users, batches of items, and the blocks of batches."""
    items_per_user_U = np.bincount(positives.users_P, minlength=positives.num_users)
    item_starts, users_P = _latest_users_by_item(positives, max_users_per_item)
    users_M = np.diff(item_starts)
    # Crowded items first; one with fewer than two users has no neighbour.
    order_M = np.argsort(-users_M, kind="stable")[: (users_M >= 2).sum()]
    entries_P = starts_of(items_per_user_U[users_P])
    entries_M = (entries_P[item_starts[1:]] - entries_P[item_starts[:-1]])[order_M]
    num_crowded = int((users_M >= _CROWDED_USERS).sum())
    small_batches = num_crowded + cut_blocks(entries_M[num_crowded:], _ENTRIES_PER_BATCH)
    batch_starts = np.concatenate([np.arange(num_crowded), small_batches])
    entries_of_batches = np.add.reduceat(entries_M, batch_starts[:-1])
    arrays = {
        "batch_starts": batch_starts,
        "order_M": order_M,
        "item_starts": item_starts,
        "users_P": users_P,
        "user_starts": starts_of(items_per_user_U),
        "items_P": positives.items_P,
        "weights_U": 1.0 / np.sqrt(np.maximum(items_per_user_U, 1)),
    }
    return arrays, cut_blocks(entries_of_batches, _ENTRIES_PER_BLOCK)


def _latest_users_by_item(positives: Positives, max_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the users of each item begin, and the users: of crowded items the latest."""
    counts_M = positives.users_per_item()
    order_P = np.argsort(positives.items_P, kind="stable")
    starts = starts_of(counts_M)
    is_kept_P = np.ones(len(order_P), dtype=bool)
    for item in np.flatnonzero(counts_M > max_users):
        of_item = slice(starts[item], starts[item + 1])
        rows = order_P[of_item]
        by_time = np.lexsort((positives.users_P[rows], positives.times_P[rows]))
        is_kept_P[of_item][by_time[:-max_users]] = False
    users_P = positives.users_P[order_P[is_kept_P]]
    return starts_of(np.minimum(counts_M, max_users)), users_P


def _swing_block(
    arrays: Arrays, begin: int, end: int, *, alpha: float, num_neighbors: int
) -> Neighbors:
    bounds = arrays["batch_starts"][begin : end + 1]
    batches = [arrays["order_M"][bounds[n] : bounds[n + 1]] for n in range(end - begin)]
    return joined(_swing_batch(arrays, items_B, alpha, num_neighbors) for items_B in batches)


def _swing_batch(
    arrays: Arrays, items_B: np.ndarray, alpha: float, num_neighbors: int
) -> Neighbors:
    users = _BatchUsers(arrays, items_B, alpha)
    owners_G, others_G, starts_G, rows_E = users.groups(arrays)
    scores_G = _group_scores(users, starts_G, rows_E) / users.scales_B[owners_G]
    scores_G *= arrays["factors_M"][others_G]
    row_starts = np.searchsorted(owners_G, np.arange(len(items_B) + 1))
    best_R = best_per_row(row_starts, others_G, scores_G, num_neighbors)
    return Neighbors(items_B[owners_G[best_R]], others_G[best_R], scores_G[best_R], len(scores_G))


class _BatchUsers:
    """The users of a batch's items, one row per item and user, and what pairs of them weigh."""

    def __init__(self, arrays: Arrays, items_B: np.ndarray, alpha: float) -> None:
        self.items_B = items_B
        self.users_S, sizes_B = lists_of(arrays["item_starts"], arrays["users_P"], items_B)
        self.owners_S = np.repeat(np.arange(len(items_B)), sizes_B)
        firsts_B = starts_of(sizes_B)[:-1]
        self.places_S = np.arange(len(self.users_S)) - firsts_B[self.owners_S]
        self._widths_S = sizes_B[self.owners_S]
        self.num_cells = int((sizes_B**2).sum())
        self.row_cells_S = starts_of(self._widths_S)[:-1]
        self._weights_S = arrays["weights_U"][self.users_S]
        # All users of an item share that item; the others are counted.
        self._least_shared = alpha + 1.0
        most_B = np.maximum.reduceat(self._weights_S, firsts_B) ** 2 / self._least_shared
        # All pairs of an item together stay below 2 ** 52, so their sums are exact.
        self.scales_B = np.exp2(np.floor(52 - np.log2(most_B * sizes_B**2)))

    def groups(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the other items that at least two users of an item have.

        Args:
            arrays: Items of the users.

        Returns:
            Per group its owner (place in the batch) and other item, where its entries begin (and
            the end of the last); per entry the row of its user, ascending in a group.
        """
        num_items = len(arrays["item_starts"]) - 1
        others_E, counts_S = lists_of(arrays["user_starts"], arrays["items_P"], self.users_S)
        rows_E = np.repeat(np.arange(len(self.users_S)), counts_S)
        is_other_E = others_E != self.items_B[self.owners_S[rows_E]]
        others_E, rows_E = others_E[is_other_E], rows_E[is_other_E]
        # One sort of whole numbers: item of the batch, other item, row.
        shift = max(int(len(self.users_S) - 1).bit_length(), 1)
        keys_E = np.sort(((self.owners_S[rows_E] * num_items + others_E) << shift) | rows_E)
        groups_E = keys_E >> shift
        starts = np.flatnonzero(np.diff(groups_E, prepend=-1, append=-1))
        sizes = np.diff(starts)
        is_shared = sizes >= 2
        kept_E = np.repeat(is_shared, sizes)
        owners_G, others_G = np.divmod(groups_E[starts[:-1][is_shared]], num_items)
        rows_E = keys_E[kept_E] & ((1 << shift) - 1)
        return owners_G, others_G, starts_of(sizes[is_shared]), rows_E

    def pair_weights(self, shared_C: np.ndarray) -> np.ndarray:
        """Return the scaled weight of each cell, a whole number, by how many others it shares."""
        weights_C, scales = self._products()
        weights_C /= self._least_shared + shared_C
        weights_C *= scales
        np.rint(weights_C, out=weights_C)
        return weights_C

    def _products(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the product of both users' weights of each cell, and its item's scale."""
        if len(self.items_B) == 1:
            return np.multiply.outer(self._weights_S, self._weights_S).ravel(), self.scales_B
        first_C = np.repeat(np.arange(len(self.users_S)), self._widths_S)
        firsts_S = np.arange(len(self.users_S)) - self.places_S
        second_C = np.arange(self.num_cells) + (firsts_S - self.row_cells_S)[first_C]
        weights_C = self._weights_S[first_C] * self._weights_S[second_C]
        return weights_C, self.scales_B[self.owners_S[first_C]]


def _group_scores(users: _BatchUsers, starts_G: np.ndarray, rows_E: np.ndarray) -> np.ndarray:
    """Return the scaled sums of the pair weights of each group."""
    sizes_G = np.diff(starts_G)
    is_dense_G = np.zeros(len(sizes_G), dtype=bool)
    if len(users.items_B) == 1 and len(users.users_S) >= _CROWDED_USERS:
        is_dense_G = sizes_G > len(users.users_S) * _DENSE_SHARE
    is_dense_E = np.repeat(is_dense_G, sizes_G)
    first_T, second_T, starts_T = _pairs_within(sizes_G[~is_dense_G], rows_E[~is_dense_E])
    cells_T = users.row_cells_S[first_T] + users.places_S[second_T]
    shared_C = np.bincount(cells_T, minlength=users.num_cells)
    dense_SH = _columns(sizes_G[is_dense_G], rows_E[is_dense_E], len(users.users_S))
    if is_dense_G.any():
        shared_C = shared_C + (dense_SH @ dense_SH.T).ravel()
    weights_C = users.pair_weights(shared_C)
    scores_G = np.zeros(len(sizes_G))
    if len(starts_T):
        scores_G[~is_dense_G] = np.add.reduceat(weights_C[cells_T], starts_T)
    if is_dense_G.any():
        # Counts pair by pair fill the upper triangle only, products both.
        upper_SS = np.triu(weights_C.reshape(len(dense_SH), -1), 1)
        dense_SH = dense_SH.astype(np.float64)
        scores_G[is_dense_G] = np.einsum("sh,sh->h", dense_SH, upper_SS @ dense_SH)
    return scores_G


def _pairs_within(
    sizes_G: np.ndarray, rows_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return every pair of rows of each group, the lower row first, and where groups begin."""
    ends_E = np.repeat(np.cumsum(sizes_G), sizes_G)
    entries_E = np.arange(len(rows_E))
    partners_E = ends_E - entries_E - 1
    first_T = np.repeat(entries_E, partners_E)
    starts_E = np.cumsum(partners_E) - partners_E
    second_T = first_T + 1 + np.arange(len(first_T)) - starts_E[first_T]
    starts_T = starts_of(sizes_G * (sizes_G - 1) // 2)[:-1]
    return rows_E[first_T], rows_E[second_T], starts_T


def _columns(sizes_H: np.ndarray, rows_E: np.ndarray, num_rows: int) -> np.ndarray:
    # float32 holds counts up to 2 ** 24 exactly.
    dense_SH = np.zeros((num_rows, len(sizes_H)), dtype=np.float32)
    dense_SH[rows_E, np.repeat(np.arange(len(sizes_H)), sizes_H)] = 1.0
    return dense_SH


def lists_of(
    starts_N: np.ndarray, values: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of some rows one after the other, and how many each row has."""
    counts = starts_N[rows + 1] - starts_N[rows]
    offsets = starts_N[rows] - starts_of(counts)[:-1]
    return values[np.arange(counts.sum()) + np.repeat(offsets, counts)], counts

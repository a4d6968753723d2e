"""Caps: at most so many catalogue items share one full code when a codebook is published.

Items beyond the cap move on the last level only, so their prefix keeps its meaning:

1. Items that hold a published code (the parent's) stay, whatever the cap, and count towards it.
   Of those that must leave a full code, items with a published code under the same prefix (an
   earlier cap had moved them there) go back to it first, as far as there is room.
2. Of the others on a full code the nearest to its last centroid stay; of equally near ones the
   lower item id.
3. The rest, in that same order, move each to the nearest centroid of the last level whose full
   code is still below the cap; distances by the canonical rule, the lowest index wins ties.
4. An item that finds no such centroid stays where it is, and is counted.

Only codes that are over-full are looked at: beside a few sorts the cost is that of one search for
the items that move.

Shape letters in this file: N items, D embedding width, L levels, K centroids of the last level,
O items on over-full codes, M items that must move, S slots in use, C candidates per item,
B items of a block. A slot is a full code, numbered as (prefix number) * K + (last code).
May import: NumPy, the quantizers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.rq import ResidualQuantizer
from qarm_feast.quantizers.search import NearestSearch, squared_distances

_CANDIDATES_PER_BLOCK = 1 << 20
_FEW_CANDIDATES = 32
"""Nearest centroids that an item looks at in one search."""

_Ints = npt.NDArray[np.int64]

NO_PUBLISHED_CODE = -1
"""In place of a last code: the item was never published, or under another prefix."""


@dataclass(frozen=True)
class CappedCodes:
    """Codes after the cap; ``num_without_room`` items found no free code and stayed."""

    rq_NL: Codes
    num_moved: int
    num_without_room: int


def capped_codes(
    rq: ResidualQuantizer,
    item_ids_N: _Ints,
    unit_ND: Embeddings,
    rq_NL: Codes,
    published_N: Codes,
    max_items_per_code: int,
) -> CappedCodes:
    """Return codes of which no more items share one than the cap allows, as far as there is room.

    Args:
        rq: The quantizer whose last level items move on.
        item_ids_N: Items, each once.
        unit_ND: Their vectors of length 1, float32.
        rq_NL: The codes that they are served without a cap.
        published_N: The last code that an item was published with, if it was under this prefix;
            else ``NO_PUBLISHED_CODE``.
        max_items_per_code: The cap, at least 1.

    Returns:
        Codes in the order of the items, the same for any order of them.
    """
    slot_N = _slots(rq_NL, rq.level_sizes[-1])
    over_O = _over_full(slot_N, max_items_per_code)
    residual_OD = _last_residuals(rq, unit_ND[over_O], rq_NL[over_O])
    distance_O = squared_distances(residual_OD, rq.codebooks[-1][rq_NL[over_O, -1]])
    is_held_O = published_N[over_O] == rq_NL[over_O, -1]
    ranks_O = _ranks((item_ids_N[over_O], distance_O, ~is_held_O, slot_N[over_O]))
    movers = np.flatnonzero((ranks_O >= max_items_per_code) & ~is_held_O)
    movers = movers[np.lexsort((item_ids_N[over_O[movers]], distance_O[movers]))]
    rooms = _Rooms(slot_N, over_O[movers], rq.level_sizes[-1], max_items_per_code)
    placing = _Placing(rq.codebooks[-1], residual_OD[movers], slot_N[over_O[movers]], rooms)
    served_NL = rq_NL.copy()
    served_NL[over_O[movers], -1] = placing.last_codes(published_N[over_O[movers]])
    num_moved = int((served_NL[:, -1] != rq_NL[:, -1]).sum())
    return CappedCodes(served_NL, num_moved, len(movers) - num_moved)


class _Rooms:
    """How many more items each slot takes, over the prefixes that have items to move."""

    def __init__(self, slot_N: _Ints, movers_M: _Ints, num_last: int, cap: int) -> None:
        self._cap, self._num_last = cap, num_last
        stays_N = np.isin(slot_N // num_last, slot_N[movers_M] // num_last)
        stays_N[movers_M] = False
        slots_S, counts_S = np.unique(slot_N[stays_N], return_counts=True)
        self._count_of = dict(zip(slots_S.tolist(), counts_S.tolist(), strict=True))
        self.full_prefixes_F = slots_S[counts_S >= cap] // num_last
        """The prefix of every slot that is full, once per slot."""

    def free_codes(self, prefix: int) -> _Ints:
        """Return the last codes that have room under a prefix, ascending."""
        first = prefix * self._num_last
        slots = range(first, first + self._num_last)
        free = [slot - first for slot in slots if self._count_of.get(slot, 0) < self._cap]
        return np.array(free, dtype=np.int64)

    def take(self, slots: list[int]) -> int | None:
        """Return the first of ``slots`` that has room, one place less in it; None if none has."""
        for slot in slots:
            count = self._count_of.get(slot, 0)
            if count < self._cap:
                self._count_of[slot] = count + 1
                return slot
        return None


def _slots(rq_NL: Codes, num_last: int) -> _Ints:
    prefix_N = np.zeros(len(rq_NL), dtype=np.int64)
    for codes_N in rq_NL.T[:-1]:
        # Renumbered level by level, so that many levels do not leave int64.
        prefix_N = np.unique(
            prefix_N * (codes_N.max(initial=0) + 1) + codes_N, return_inverse=True
        )[1]
    slot_N: _Ints = prefix_N * num_last + rq_NL[:, -1]
    return slot_N


def _over_full(slot_N: _Ints, cap: int) -> _Ints:
    _, number_N, counts_S = np.unique(slot_N, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts_S[number_N] > cap)


def _last_residuals(rq: ResidualQuantizer, unit_OD: Embeddings, rq_OL: Codes) -> Embeddings:
    # Subtracted in level order, as encode does it: another order rounds otherwise.
    residual_OD = np.array(unit_OD, order="C")
    for level, codebook_KD in enumerate(rq.codebooks[:-1]):
        residual_OD -= codebook_KD[rq_OL[:, level]]
    return residual_OD


def _ranks(keys: tuple[npt.NDArray[np.generic], ...]) -> _Ints:
    """Return each row's place among the rows of its last key, ordered by the keys before it."""
    order_O = np.lexsort(keys)
    group_O = keys[-1][order_O]
    is_first_O = np.ones(len(order_O), dtype=np.bool_)
    is_first_O[1:] = group_O[1:] != group_O[:-1]
    starts_O = np.maximum.accumulate(np.where(is_first_O, np.arange(len(order_O)), 0))
    ranks_O = np.empty(len(order_O), dtype=np.int64)
    ranks_O[order_O] = np.arange(len(order_O)) - starts_O
    return ranks_O


class _Placing:
    """Items that must move, in the order in which they choose."""

    def __init__(
        self, centroids_KD: Embeddings, residual_MD: Embeddings, slot_M: _Ints, rooms: _Rooms
    ) -> None:
        self._centroids_KD, self._residual_MD = centroids_KD, residual_MD
        self._rooms = rooms
        self._prefix_M, self._code_M = np.divmod(slot_M, len(centroids_KD))

    def last_codes(self, published_M: Codes) -> Codes:
        """Return each item's last code after it has taken the nearest room, if there was any.

        First of all, published codes take back their items.

        Prefixes do not touch each other. So all are searched at once for a few candidates per
        item, and only those prefixes one by one where these did not reach.
        """
        returning = np.flatnonzero(published_M != NO_PUBLISHED_CODE).tolist()
        settled = {row for row in returning if self._takes(row, [int(published_M[row])])}
        waiting: dict[int, list[int]] = {}
        search = NearestSearch(self._centroids_KD)
        for rows_B, num_wanted in self._blocks():
            num_candidates = min(num_wanted, _FEW_CANDIDATES)
            nearest_BC = search.search(self._residual_MD[rows_B], num_candidates)
            for row, codes in zip(rows_B.tolist(), nearest_BC.tolist(), strict=True):
                if row in settled:
                    continue
                prefix = int(self._prefix_M[row])
                # After one that waits everybody waits: it chooses first.
                if prefix in waiting:
                    waiting[prefix].append(row)
                elif not self._takes(row, codes) and num_candidates < num_wanted:
                    waiting[prefix] = [row]
        for prefix, rows in waiting.items():
            self._fill_prefix(prefix, np.array(rows))
        return self._code_M

    def _takes(self, row: int, codes: list[int]) -> bool:
        first = int(self._prefix_M[row]) * len(self._centroids_KD)
        slot = self._rooms.take([first + code for code in codes])
        if slot is not None:
            self._code_M[row] = slot - first
        return slot is not None

    def _fill_prefix(self, prefix: int, rows_M: _Ints) -> None:
        while len(rows_M):
            free = self._rooms.free_codes(prefix)
            if len(free) == 0:
                return
            head_B = rows_M[: 4 * _FEW_CANDIDATES]
            search = NearestSearch(self._centroids_KD[free])
            nearest_BC = search.search(self._residual_MD[head_B], min(_FEW_CANDIDATES, len(free)))
            candidates = zip(head_B.tolist(), free[nearest_BC].tolist(), strict=True)
            # The first always finds room, so every turn gets on.
            rows_M = rows_M[
                sum(1 for _ in takewhile(lambda pair: self._takes(*pair), candidates)) :
            ]

    def _blocks(self) -> Iterator[tuple[_Ints, int]]:
        """Yield rows, in order within each prefix, and how many candidates they need at most.

        An item skips what is full at first, and at most one slot per item before it.
        """
        num_last = len(self._centroids_KD)
        prefixes, number_M, num_items = np.unique(
            self._prefix_M, return_inverse=True, return_counts=True
        )
        full_F = np.searchsorted(prefixes, self._rooms.full_prefixes_F)
        wanted = num_items + np.bincount(full_F, minlength=len(prefixes))
        # Powers of two: few searches of many items instead of one per prefix.
        wanted_M = np.minimum(1 << np.ceil(np.log2(wanted)).astype(np.int64), num_last)[number_M]
        for num_wanted in np.unique(wanted_M).tolist():
            rows_M = np.flatnonzero(wanted_M == num_wanted)
            step = max(1, _CANDIDATES_PER_BLOCK // min(num_wanted, _FEW_CANDIDATES))
            for start in range(0, len(rows_M), step):
                yield rows_M[start : start + step], num_wanted

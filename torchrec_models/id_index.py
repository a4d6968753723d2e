"""A hash index over ids: where each stands in an array, many at once.

Open addressing with linear probing, at most half full, hashed by the top bits of a product
(Knuth, TAOCP 3, 6.4). A lookup takes a few gathers where a binary search of random ids takes a
cache miss per step. 8 to 16 bytes per id.
Shape letters: V ids, N looked-up ids, P pending ones.
May import: numpy.
"""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

_EMPTY = -1
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, odd."""


class IdIndex:
    """Finds ids in an array of distinct ones.

    Args:
        ids_V: Distinct int64 ids, fewer than 2^31; not copied.
    """

    def __init__(self, ids_V: Ids) -> None:
        self._ids_V = ids_V
        num_bits = max(1, (2 * len(ids_V) - 1).bit_length())
        self._shift = np.uint64(64 - num_bits)
        self._last_slot = 2**num_bits - 1
        self._places = np.full(2**num_bits, _EMPTY, dtype=np.int32)
        pending_P = np.arange(len(ids_V), dtype=np.int32)
        slots_P = self._slots(ids_V)
        while len(pending_P):
            is_free_P = self._places[slots_P] == _EMPTY
            # Of several ids for one slot the last one stays; the others move on.
            self._places[slots_P[is_free_P]] = pending_P[is_free_P]
            moves_on_P = self._places[slots_P] != pending_P
            pending_P = pending_P[moves_on_P]
            slots_P = (slots_P[moves_on_P] + 1) & self._last_slot

    def find(self, ids_N: Ids) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Return where ids stand, and which do; place 0 for those that do not."""
        if not len(self._ids_V):
            return np.zeros(len(ids_N), dtype=np.int64), np.zeros(len(ids_N), dtype=np.bool_)
        slots_P = self._slots(ids_N)
        places_N = self._places[slots_P].astype(np.int64)
        is_known_N = (places_N != _EMPTY) & (self._ids_V[places_N] == ids_N)
        pending_P = np.flatnonzero((places_N != _EMPTY) & ~is_known_N)
        slots_P = slots_P[pending_P]
        while len(pending_P):
            slots_P = (slots_P + 1) & self._last_slot
            places_P = self._places[slots_P].astype(np.int64)
            is_taken_P = places_P != _EMPTY
            is_found_P = is_taken_P & (self._ids_V[places_P] == ids_N[pending_P])
            places_N[pending_P] = places_P
            is_known_N[pending_P] = is_found_P
            goes_on_P = is_taken_P & ~is_found_P
            pending_P, slots_P = pending_P[goes_on_P], slots_P[goes_on_P]
        places_N[~is_known_N] = 0
        return places_N, is_known_N

    def _slots(self, ids_N: Ids) -> Ids:
        unsigned_N = np.ascontiguousarray(ids_N, dtype=np.int64).view(np.uint64)
        return ((unsigned_N * _FACTOR) >> self._shift).view(np.int64)

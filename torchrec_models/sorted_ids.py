"""Lookup of ids among ascending ones. Shape letters: N ids, V ascending ids. May import: numpy."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def find_ids(sorted_ids_V: Ids, ids_N: Ids) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Return where ids stand among ascending ones, and which do; place 0 for those that do not."""
    if not len(sorted_ids_V):
        return np.zeros(len(ids_N), dtype=np.intp), np.zeros(len(ids_N), dtype=np.bool_)
    places_N = np.searchsorted(sorted_ids_V, ids_N)
    places_N[places_N == len(sorted_ids_V)] = 0
    is_known_N = sorted_ids_V[places_N] == ids_N
    return np.where(is_known_N, places_N, 0), is_known_N

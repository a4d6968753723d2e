"""Item-CF: items are neighbours when the same users have both, as a cosine.

Shape letters in this file: M items, E pairs of items in a block.
May import: numpy.
"""

from functools import partial

import numpy as np

from qarm_feast.alignment.blocks import Arrays, map_blocks
from qarm_feast.alignment.cooccurrence import count_shared, counting_arrays
from qarm_feast.alignment.neighbors import (
    Neighbors,
    NeighborSearch,
    best_per_row,
    joined,
    popularity_factors,
)
from qarm_feast.alignment.positives import Positives


def item_cf_neighbors(
    positives: Positives, search: NeighborSearch, min_shared_users: int
) -> Neighbors:
    """Return each item's best neighbours by the cosine of their users.

    With ``U_i`` the users of item i,

    ``s(i, j) = |U_i and U_j| / sqrt(|U_i| * |U_j|)``.

    Args:
        positives: Positive rows; what a user may bring is capped by ``Positives.latest``.
        search: Neighbours kept per item, popularity correction, processes.
        min_shared_users: Pairs of items that share fewer users are left out: two items with one
            user each, the same, have cosine 1.

    Returns:
        At most ``num_neighbors`` per item, float64.
    """
    users_per_item_M = positives.users_per_item()
    arrays, starts = counting_arrays(positives)
    arrays["norms_M"] = np.sqrt(users_per_item_M)
    arrays["factors_M"] = popularity_factors(users_per_item_M, search.popularity_power)
    function = partial(
        _item_cf_block, min_shared_users=min_shared_users, num_neighbors=search.num_neighbors
    )
    return joined(map_blocks(function, arrays, starts, search.num_processes))


def _item_cf_block(
    arrays: Arrays, begin: int, end: int, *, min_shared_users: int, num_neighbors: int
) -> Neighbors:
    items_E, others_E, shared_E = count_shared(arrays, begin, end)
    is_enough_E = shared_E >= min_shared_users
    items_E, others_E, shared_E = items_E[is_enough_E], others_E[is_enough_E], shared_E[is_enough_E]
    scores_E = shared_E / (arrays["norms_M"][items_E] * arrays["norms_M"][others_E])
    scores_E *= arrays["factors_M"][others_E]
    row_starts = np.searchsorted(items_E, np.arange(begin, end + 1))
    best_R = best_per_row(row_starts, others_E, scores_E, num_neighbors)
    return Neighbors(items_E[best_R], others_E[best_R], scores_E[best_R], len(scores_E))

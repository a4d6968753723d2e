"""How many users each two items share, counted over blocks of items.

Shape letters in this file: P positives, U users, M items, E pairs of items in a block.
May import: numpy, scipy.
"""

import numpy as np
from scipy import sparse

from qarm_feast.alignment.blocks import Arrays, cut_blocks
from qarm_feast.alignment.positives import Positives, starts_of

_COUNTS_PER_BLOCK = 2**22
"""Additions per block: bounds what a block holds, unless a single item needs more."""


def counting_arrays(positives: Positives) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return what :func:`count_shared` reads, and blocks of items of about equal work.

    Work is the sum, over the users of an item, of their items: so ``Positives.latest`` bounds it.

    Args:
        positives: Positive rows.

    Returns:
        Both orders of the 0/1 matrix, and the begin of each block and the end of the last.
    """
    items_per_user_U = np.bincount(positives.users_P, minlength=positives.num_users)
    order_P = np.argsort(positives.items_P, kind="stable")
    work_M = np.bincount(
        positives.items_P,
        weights=items_per_user_U[positives.users_P],
        minlength=positives.num_items,
    )
    arrays = {
        "user_starts": starts_of(items_per_user_U),
        "items_P": positives.items_P,
        "item_starts": starts_of(positives.users_per_item()),
        "users_P": positives.users_P[order_P],
        "ones_P": np.ones(len(order_P), dtype=np.float32),
    }
    return arrays, cut_blocks(work_M, _COUNTS_PER_BLOCK)


def count_shared(arrays: Arrays, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return with which other items the items of a block share users.

    Args:
        arrays: Of :func:`counting_arrays`.
        begin: First item of the block.
        end: Item behind the last one.

    Returns:
        Per pair its item and the other item, items ascending, and the number of shared users
        (float32, whole).
    """
    num_users, num_items = len(arrays["user_starts"]) - 1, len(arrays["item_starts"]) - 1
    item_starts = arrays["item_starts"][begin : end + 1]
    entries = slice(item_starts[0], item_starts[-1])
    items_users = sparse.csr_array(
        (arrays["ones_P"][entries], arrays["users_P"][entries], item_starts - item_starts[0]),
        shape=(end - begin, num_users),
    )
    users_items = sparse.csr_array(
        (arrays["ones_P"], arrays["items_P"], arrays["user_starts"]), shape=(num_users, num_items)
    )
    shared = items_users @ users_items
    items_E = np.repeat(np.arange(begin, end), np.diff(shared.indptr))
    is_other_E = items_E != shared.indices
    return items_E[is_other_E], shared.indices[is_other_E], shared.data[is_other_E]

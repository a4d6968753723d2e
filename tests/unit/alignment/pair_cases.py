"""Small positives that several test files of the pairs job share.

Shape letters in this file: P positives, M items.
"""

import numpy as np

from qarm_feast.alignment.positives import Positives


def positives_of(rows: list[tuple[int, int, int]]) -> Positives:
    """Return positives of (user, item, time) rows; users and items count from 0."""
    users, items, times = np.array(sorted(rows, key=lambda row: (row[0], row[2], row[1]))).T
    return Positives(
        users_P=users.astype(np.int32),
        items_P=items.astype(np.int32),
        times_P=times,
        item_ids_M=np.arange(items.max() + 1),
        num_users=int(users.max()) + 1,
    )


def random_positives(num_users: int, num_items: int, seed: int, share: float = 0.3) -> Positives:
    """Return positives where each user has each item with one probability."""
    generator = np.random.default_rng(seed)
    users, items = np.nonzero(generator.random((num_users, num_items)) < share)
    times = generator.permutation(len(users))
    return positives_of(list(zip(users.tolist(), items.tolist(), times.tolist(), strict=True)))


def users_by_item(positives: Positives) -> list[set[int]]:
    """Return the users of each item."""
    found: list[set[int]] = [set() for _ in range(positives.num_items)]
    for user, item in zip(positives.users_P.tolist(), positives.items_P.tolist(), strict=True):
        found[item].add(user)
    return found

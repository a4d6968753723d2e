"""Behavioural neighbours: items taken one after the other, and whether their codes agree.

Read from the test period only: codes may have learnt from the rest.

Shape letters in this file: R positive rows, P pairs of items, N items, L levels, G groups of items
that share a prefix.
May import: NumPy, pyarrow, the input data.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.input_data import SPLIT, InputData
from qarm_feast.quantizers.base import Codes
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID, USER_ID

TEST_SPLIT = "test"


@dataclass(frozen=True)
class BehaviourPairs:
    """Pairs of different items, each pair once.

    ``item_ids_P2`` holds the lower id first; ``num_users_P`` is the weight of a pair: how many
    users took its items one right after the other, in either order.
    """

    item_ids_P2: npt.NDArray[np.int64]
    num_users_P: npt.NDArray[np.int64]


def follow_up_pairs(checked: InputData, split: str = TEST_SPLIT) -> BehaviourPairs:
    """Return the pairs of items that follow each other among a user's positives in one split.

    A user counts once for a pair, however often it comes back; an item after itself is no pair.
    Of positives at one time the lower item id comes first.

    Args:
        checked: Input data.
        split: The rows to read; what chooses a setting reads ``valid``.

    Returns:
        The pairs, ascending; none if no user has two positives there.
    """
    rows = checked.interactions
    rows = rows.filter(pc.and_(rows[checked.positive_label], pc.equal(rows[SPLIT], split)))
    users_R = rows[USER_ID].to_numpy()
    items_R = rows[ITEM_ID].to_numpy()
    times_R = rows[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy()
    order_R = np.lexsort((items_R, times_R, users_R))
    users_R, items_R = users_R[order_R], items_R[order_R]
    follows_R = (users_R[1:] == users_R[:-1]) & (items_R[1:] != items_R[:-1])
    pairs_R2 = np.sort(np.column_stack([items_R[:-1], items_R[1:]])[follows_R], axis=1)
    of_users = np.unique(np.column_stack([users_R[1:][follows_R], pairs_R2]), axis=0)
    item_ids_P2, num_users_P = np.unique(of_users[:, 1:], axis=0, return_counts=True)
    return BehaviourPairs(item_ids_P2.reshape(-1, 2), num_users_P)


def behaviour_figures(
    pairs: BehaviourPairs, item_ids_N: npt.NDArray[np.int64], rq_NL: Codes
) -> dict[str, Any]:
    """Return which share of behavioural neighbours share the first levels of their codes.

    Args:
        pairs: Behavioural neighbours.
        item_ids_N: The items that have codes, each once.
        rq_NL: Their codes.

    Returns:
        ``num_pairs`` (each with its users) and ``num_pairs_without_codes`` (left out); ``levels``:
        per prefix length 1 ... L ``share`` of pairs, ``chance`` (that two different items drawn
        by how often they stand in pairs share the prefix: what codes without any sense, or only
        one code, would reach) and ``lift`` (share / chance, None where chance is 0). No pairs, no
        levels.
    """
    order_N = np.argsort(item_ids_N, kind="stable")
    sorted_ids_N = item_ids_N[order_N]
    has_codes_P = np.isin(pairs.item_ids_P2, item_ids_N).all(axis=1)
    rows_P2 = order_N[np.searchsorted(sorted_ids_N, pairs.item_ids_P2[has_codes_P])]
    weights_P = pairs.num_users_P[has_codes_P]
    num_levels = rq_NL.shape[1] if len(rows_P2) else 0
    return {
        "num_pairs": int(weights_P.sum()),
        "num_pairs_without_codes": int(pairs.num_users_P.sum() - weights_P.sum()),
        "levels": [
            _prefix_figures(rq_NL[:, :length], rows_P2, weights_P)
            for length in range(1, num_levels + 1)
        ],
    }


def _prefix_figures(
    prefix_NL: Codes, rows_P2: npt.NDArray[np.int64], weights_P: npt.NDArray[np.int64]
) -> dict[str, float | None]:
    group_N = np.unique(prefix_NL, axis=0, return_inverse=True)[1].reshape(-1)
    is_shared_P = group_N[rows_P2[:, 0]] == group_N[rows_P2[:, 1]]
    share = float(weights_P[is_shared_P].sum() / weights_P.sum())
    ends_N = np.bincount(rows_P2.ravel(), weights=np.repeat(weights_P, 2), minlength=len(group_N))
    popularity_N = ends_N / ends_N.sum()
    same_item = float(np.square(popularity_N).sum())
    same_group = float(np.square(np.bincount(group_N, weights=popularity_N)).sum())
    # Every pair has two ends, so one item has at most half of them and the divisor is not 0.
    chance = max(0.0, same_group - same_item) / (1 - same_item)
    return {"share": share, "chance": chance, "lift": share / chance if chance else None}

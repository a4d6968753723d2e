"""Item pairs as rows of the train items, and which of a batch are no negatives of each other.

Shape letters in this file: M train items, R pairs, B pairs of a batch, Q queries, U unique items
among a batch's answers.
May import: numpy, scipy, pyarrow, torch.
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy import sparse
from torch import Tensor

from qarm_feast.errors import DataError


@dataclass(frozen=True)
class PairRows:
    """Item pairs as rows of the train items: parallel arrays of length R.

    ``users`` is below zero where a pair has no user; ``weights`` are above zero. ``item_ids_M``
    are the ids behind the rows; None: the rows themselves.
    """

    triggers: np.ndarray
    targets: np.ndarray
    users: np.ndarray
    weights: np.ndarray
    item_ids_M: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.triggers)

    def take(self, rows: np.ndarray) -> "PairRows":
        """Return some of the pairs."""
        return replace(
            self,
            triggers=self.triggers[rows],
            targets=self.targets[rows],
            users=self.users[rows],
            weights=self.weights[rows],
        )

    def swapped(self) -> "PairRows":
        """Return the same pairs with triggers and targets in each other's place."""
        return replace(self, triggers=self.targets, targets=self.triggers)


def pair_rows(pairs: pa.Table, item_ids_M: np.ndarray) -> PairRows:
    """Return the pairs as rows of the given items.

    Args:
        pairs: Rows of ``pairs.PAIR_ROWS``.
        item_ids_M: Ids of the train items, any order.

    Returns:
        Parallel arrays, in the order of ``pairs``.

    Raises:
        DataError: If there are no pairs, or one names an item that is not given.
    """
    if pairs.num_rows == 0:
        raise DataError("there are no item pairs to train on; run `qarm align pairs` again")
    ids = pa.array(item_ids_M)
    triggers = pc.index_in(pairs["trigger_item_id"], ids)
    targets = pc.index_in(pairs["target_item_id"], ids)
    if triggers.null_count or targets.null_count:
        raise DataError(
            "item pairs name items without a train row; run `qarm align pairs` on this data again"
        )
    return PairRows(
        triggers=triggers.to_numpy().astype(np.int64),
        targets=targets.to_numpy().astype(np.int64),
        users=pairs["user_row"].to_numpy(),
        weights=pairs["weight"].to_numpy(),
        item_ids_M=item_ids_M,
    )


class BatchNegatives:
    """Knows all pairs, and so what the items of a batch are worth to each other as negatives.

    ``log_shares_M`` is the logarithm of each item's share of the places in pairs (one more counted
    for each): items stand in batches that often, and are negatives that often.

    Args:
        pairs: All pairs, those of every batch and those held out.
        num_items: Train items.
    """

    def __init__(self, pairs: PairRows, num_items: int) -> None:
        every_M = np.arange(num_items)
        rows = np.concatenate([pairs.triggers, pairs.targets, every_M])
        columns = np.concatenate([pairs.targets, pairs.triggers, every_M])
        ones = np.ones(len(rows), dtype=bool)
        self._is_near = sparse.csr_array((ones, (rows, columns)), shape=(num_items, num_items))
        self._answer_places_M = np.full(num_items, -1, dtype=np.int64)
        places = np.concatenate([pairs.triggers, pairs.targets])
        counts_M = np.bincount(places, minlength=num_items) + 1.0
        self.log_shares_M = torch.from_numpy(np.log(counts_M / counts_M.sum())).float()

    def blocked(self, batch: PairRows, own: slice) -> Tensor:
        """Return which (trigger of own pair q, target of pair b) is no negative.

        Blocked are a target that is the trigger itself or known as a pair with it in either order,
        and with that what stands in the batch twice; and a target that pair b has from the same
        user. A pair's own target is not blocked.

        Args:
            batch: Pairs of a batch, all of them known.
            own: The pairs whose triggers are the queries.

        Returns:
            Bool matrix ``[Q, B]``.
        """
        answers_U, places_B = np.unique(batch.targets, return_inverse=True)
        blocked_QB = np.take(self.near(batch.triggers[own], answers_U), places_B, axis=1)
        users_Q = batch.users[own, None]
        blocked_QB |= np.where(users_Q < 0, np.iinfo(users_Q.dtype).min, users_Q) == batch.users
        own_places = np.arange(len(batch))[own]
        blocked_QB[np.arange(len(own_places)), own_places] = False
        return torch.from_numpy(blocked_QB)

    def near(self, queries_Q: np.ndarray, answers_U: np.ndarray) -> np.ndarray:
        """Return which answer is the query itself or known as a pair with it in either order.

        Args:
            queries_Q: Items, any order.
            answers_U: Items, each once.

        Returns:
            Bool matrix ``[Q, U]``.
        """
        # A table of all items, only used places of which are set and cleared: no sort, no hash.
        self._answer_places_M[answers_U] = np.arange(len(answers_U))
        near_QM = self._is_near[queries_Q]
        places = self._answer_places_M[near_QM.indices]
        self._answer_places_M[answers_U] = -1
        rows = np.repeat(np.arange(len(queries_Q)), np.diff(near_QM.indptr))
        is_answer = places >= 0
        near_QU = np.zeros((len(queries_Q), len(answers_U)), dtype=bool)
        near_QU[rows[is_answer], places[is_answer]] = True
        return near_QU

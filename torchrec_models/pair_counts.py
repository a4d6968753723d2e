"""CF counts: how much more often than by chance two things are liked by one user.

A thing is an item (``item_cf``), or a code prefix, c1 or (c1, c2), of items (``code_cf``), which
smooths the counts over all items of the code. A user with m distinct liked items counts as
m (m - 1) ordered pairs, each weighing 1 / (m - 1), so that a user weighs as much as the items that
he liked. With C(a, b) the weight of pairs of things a and b, N(a) that of pairs that start at a,
T the weight of all, and s pseudo-pairs:

    log_lift(a, b) = log((C(a, b) + s) / (N(a) N(b) / T + s))

It is 0 where nothing is known. A row's features are the mean and the largest log-lift of its
history's things with the candidate's. A train row must not see what it helped to count: the pairs
of its own user are taken out of C, N and T, exactly, from that user's own counts. Other rows and
requests see all train rows.
Shape letters: S things, P pairs of things, U users, M things of users, B rows, H history items of
all rows, N log-lifts.
May import: numpy, scipy, pyarrow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse

from qarm_feast.cross_features import PREFIX_NAMES
from qarm_feast.schema import ABSENT_CODE
from torchrec_models.sorted_ids import Ids, find_ids

Floats = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]

NUM_PSEUDO_PAIRS = 1.0
FEATURES_PER_THING = 2
ABSENT_THING = -1
"""Stands for the code of an item without codes; an item may have this id, no prefix this number."""
ITEM_PAIRS = "item"
"""Name of the pairs of items; those of prefixes are named as cross features are."""
_PREFIX_RADIX = 2**31


@dataclass(frozen=True)
class PairCounts:
    """Weights of pairs of things, and what each user added to them.

    Attributes:
        things_S: Item ids or prefix numbers, ascending.
        starts_S: N, weight of the pairs that start at a thing.
        pair_keys_P: a S + b of each pair of places a <= b that occurs, ascending.
        pairs_P: C, weight of the ordered pairs (a, b).
        user_ids_U: Users, ascending; empty where only serving reads.
        sizes_U: m, distinct items that a user liked.
        own_keys_M: u S + a for each thing a among user place u's items, ascending.
        own_counts_M: How many of the user's items are that thing.
    """

    things_S: Ids
    starts_S: Weights
    pair_keys_P: Ids
    pairs_P: Floats
    user_ids_U: Ids
    sizes_U: Ids
    own_keys_M: Ids
    own_counts_M: Ids

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return what is stored, by the name of the field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def for_serving(self) -> "PairCounts":
        """Return the counts without the users' parts, which only train rows read."""
        nothing = np.empty(0, dtype=np.int64)
        return PairCounts(
            self.things_S,
            self.starts_S,
            self.pair_keys_P,
            self.pairs_P,
            user_ids_U=nothing,
            sizes_U=nothing,
            own_keys_M=nothing,
            own_counts_M=nothing,
        )

    def features(
        self,
        user_ids_B: Ids,
        things_B: Ids,
        history_H: Ids,
        history_lengths_B: Ids,
        is_train_B: npt.NDArray[np.bool_],
    ) -> Floats:
        """Return mean and largest log-lift of the history's things with the candidate's.

        Args:
            user_ids_B: Users.
            things_B: The candidates' things.
            history_H: The histories' things, row after row.
            history_lengths_B: Items of each row; their sum is H.
            is_train_B: Rows whose user's pairs are left out.

        Returns:
            Float32 ``[B, 2]``, zeros for an empty history.
        """
        rows_H = np.repeat(np.arange(len(things_B)), history_lengths_B)
        lifts_H = self.log_lifts(
            history_H, things_B[rows_H], user_ids_B[rows_H], is_train_B[rows_H]
        )
        features_B2 = np.zeros((len(things_B), FEATURES_PER_THING), dtype=np.float32)
        filled = np.flatnonzero(history_lengths_B)
        if len(filled):
            starts = (np.cumsum(history_lengths_B) - history_lengths_B)[filled]
            sums = np.add.reduceat(lifts_H, starts)
            features_B2[filled, 0] = sums / history_lengths_B[filled]
            features_B2[filled, 1] = np.maximum.reduceat(lifts_H, starts)
        return features_B2

    def log_lifts(
        self, first_N: Ids, second_N: Ids, user_ids_N: Ids, is_own_out_N: npt.NDArray[np.bool_]
    ) -> Weights:
        """Return the log-lift of pairs of things.

        Args:
            first_N: Things.
            second_N: Things, in pairs with the first ones.
            user_ids_N: Whose pairs are left out,
            is_own_out_N: where this is true.

        Returns:
            Float64 ``[N]``, 0 where one of both things is unknown.
        """
        places_N, is_first_N = find_ids(self.things_S, first_N)
        others_N, is_second_N = find_ids(self.things_S, second_N)
        known = np.flatnonzero(is_first_N & is_second_N)
        lifts_N = np.zeros(len(first_N))
        if not len(known):
            return lifts_N
        a_N, b_N = places_N[known], others_N[known]
        pairs_N, starts_N, ends_N = self._pairs(a_N, b_N), self.starts_S[a_N], self.starts_S[b_N]
        total_N = np.full(len(known), self.starts_S.sum())
        own = self._own(a_N, b_N, user_ids_N[known], is_own_out_N[known])
        # What is left of a difference of equal sums may lie a rounding error below zero.
        pairs_N = np.maximum(pairs_N - own.pairs_N, 0)
        starts_N, ends_N = starts_N - own.starts_N, ends_N - own.ends_N
        expected_N = starts_N * ends_N / np.maximum(total_N - own.total_N, 1)
        lifts_N[known] = np.log((pairs_N + NUM_PSEUDO_PAIRS) / (expected_N + NUM_PSEUDO_PAIRS))
        return lifts_N

    def _pairs(self, a_N: Ids, b_N: Ids) -> Weights:
        keys_N = np.minimum(a_N, b_N) * len(self.things_S) + np.maximum(a_N, b_N)
        return _looked_up(self.pair_keys_P, self.pairs_P, keys_N)

    def _own(
        self, a_N: Ids, b_N: Ids, user_ids_N: Ids, is_own_out_N: npt.NDArray[np.bool_]
    ) -> "_OwnPart":
        users_N, is_known_N = find_ids(self.user_ids_U, user_ids_N)
        assert len(self.user_ids_U) or not is_own_out_N.any(), "served counts have no users"
        is_out_N = is_known_N & is_own_out_N
        sizes_N = np.zeros(len(users_N))
        sizes_N[is_out_N] = self.sizes_U[users_N[is_out_N]]
        num_things = len(self.things_S)
        counts = [
            np.where(is_out_N, _looked_up(self.own_keys_M, self.own_counts_M, keys_N), 0)
            for keys_N in (users_N * num_things + a_N, users_N * num_things + b_N)
        ]
        ordered_N = counts[0] * counts[1] - np.where(a_N == b_N, counts[0], 0)
        return _OwnPart(ordered_N / np.maximum(sizes_N - 1, 1), counts[0], counts[1], sizes_N)


class _OwnPart(NamedTuple):
    """What one user added to C, N of both things, and T."""

    pairs_N: Weights
    starts_N: Weights
    ends_N: Weights
    total_N: Weights


def _looked_up(sorted_keys: Ids, values: npt.NDArray[np.generic], keys_N: Ids) -> Weights:
    places_N, is_known_N = find_ids(sorted_keys, keys_N)
    found_N = np.zeros(len(keys_N))
    found_N[is_known_N] = values[places_N[is_known_N]]
    return found_N


def prefix_things(rq_NL: Ids) -> dict[str, Ids]:
    """Return the numbers of the first prefixes of items by name: c1, and (c1, c2).

    Args:
        rq_NL: RQ codes, ``ABSENT_CODE`` for an item without codes.

    Returns:
        Int64 ``[N]`` per prefix, ``ABSENT_THING`` where there are no codes.
    """
    is_absent_N = rq_NL[:, 0] == ABSENT_CODE
    numbers_N = np.zeros(len(rq_NL), dtype=np.int64)
    things = {}
    for level, name in enumerate(PREFIX_NAMES[: rq_NL.shape[1]]):
        numbers_N = numbers_N * _PREFIX_RADIX + rq_NL[:, level]
        things[name] = np.where(is_absent_N, ABSENT_THING, numbers_N)
    return things


def count_train_pairs(
    train_rows: pa.Table, positive_label: str, max_items: int, *, items: bool, codes: bool
) -> Mapping[str, PairCounts]:
    """Count the pairs of train positives.

    Args:
        train_rows: Columns ``user_id``, ``item_id``, ``event_timestamp``, ``rq_code`` and the
            label, train rows only.
        positive_label: Bool column that makes a positive.
        max_items: Latest positives of a user that count; pairs grow with its square.
        items: Count pairs of items.
        codes: Count pairs of prefixes.

    Returns:
        Counts by name: ``item``, ``c1`` and ``c1_c2``, as far as asked for.
    """
    positives = train_rows.filter(train_rows[positive_label])
    positives = positives.take(pa.array(_latest_distinct(positives, max_items)))
    users = positives["user_id"].to_numpy()
    things: dict[str, Ids] = {}
    if items:
        things[ITEM_PAIRS] = positives["item_id"].to_numpy()
    if codes:
        things |= prefix_things(_code_matrix(train_rows, positives))
    return {name: count_pairs(users, things_M) for name, things_M in things.items()}


def _code_matrix(train_rows: pa.Table, positives: pa.Table) -> Ids:
    # All rows have equally many codes; there may be no positive to count them by.
    num_levels = pc.max(pc.list_value_length(train_rows["rq_code"])).as_py() or 1
    flat: Ids = pc.list_flatten(positives["rq_code"]).to_numpy()
    return flat.reshape(-1, num_levels)


def _latest_distinct(positives: pa.Table, max_items: int) -> npt.NDArray[np.int64]:
    """Return the rows of each user's latest items, an item's latest row only."""
    users, items = positives["user_id"].to_numpy(), positives["item_id"].to_numpy()
    times = positives["event_timestamp"].cast(pa.int64()).to_numpy()
    by_item = np.lexsort((times, items, users))
    is_last = np.ones(len(users), dtype=np.bool_)
    is_last[:-1] = (np.diff(users[by_item]) != 0) | (np.diff(items[by_item]) != 0)
    kept = by_item[is_last]
    by_time = kept[np.lexsort((-times[kept], users[kept]))]
    firsts = np.flatnonzero(np.append(True, np.diff(users[by_time]) != 0)[: len(by_time)])
    places = np.arange(len(by_time)) - np.repeat(firsts, np.diff(np.append(firsts, len(by_time))))
    return by_time[places < max_items]


def count_pairs(user_ids_M: Ids, things_M: Ids) -> PairCounts:
    """Count pairs of things that one user liked.

    Args:
        user_ids_M: Users of the positives, each user's distinct items only.
        things_M: The items' things; ``ABSENT_THING`` counts nowhere.

    Returns:
        The counts; users of one item add nothing.
    """
    present_M = things_M != ABSENT_THING
    user_ids_M, things_M = user_ids_M[present_M], things_M[present_M]
    _, places_M, sizes = np.unique(user_ids_M, return_inverse=True, return_counts=True)
    # Without a second item there is no pair.
    kept_M = sizes[places_M] > 1
    user_ids_U, users_M, sizes_U = np.unique(
        user_ids_M[kept_M], return_inverse=True, return_counts=True
    )
    things_S, places_M = np.unique(things_M[kept_M], return_inverse=True)
    shape = (len(user_ids_U), len(things_S))
    ones = np.ones(len(users_M), dtype=np.int64)
    own_US = scipy.sparse.csr_array((ones, (users_M, places_M)), shape=shape)
    own_US.sum_duplicates()
    pairs = _upper_pairs(own_US, sizes_U)
    own = own_US.tocoo()
    return PairCounts(
        things_S=things_S,
        starts_S=np.bincount(places_M, minlength=len(things_S)).astype(np.float64),
        pair_keys_P=pairs.row.astype(np.int64) * len(things_S) + pairs.col,
        pairs_P=pairs.data.astype(np.float32),
        user_ids_U=user_ids_U,
        sizes_U=sizes_U,
        own_keys_M=own.row.astype(np.int64) * len(things_S) + own.col,
        own_counts_M=own.data,
    )


def _upper_pairs(own_US: scipy.sparse.csr_array, sizes_U: Ids) -> scipy.sparse.coo_array:
    """Return the weights of pairs of places a <= b, in ascending order of (a, b)."""
    weights_UU = scipy.sparse.diags_array(1 / np.maximum(sizes_U - 1, 1))
    weighted_US = weights_UU @ own_US
    # An item makes no pair with itself, but two items of one thing do.
    itself_SS = scipy.sparse.diags_array(np.asarray(weighted_US.sum(axis=0)).ravel())
    upper = scipy.sparse.triu(own_US.T @ weighted_US - itself_SS, format="csr")
    upper.sort_indices()
    upper.eliminate_zeros()
    return upper.tocoo()

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
all rows, N those of them whose thing and whose row's thing are known, V users that rows name, O
things of these.
May import: numpy, scipy, pyarrow.
"""

import functools
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
from torchrec_models.id_index import IdIndex
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
_MOST_TABLE_CELLS = 1 << 22
"""Of a table of pairs, 16 MiB."""
_TABLE_CELLS_PER_PAIR = 32
"""A cell that is cleared costs that much less than a key that is searched."""


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
        lifts_H = self.log_lifts(user_ids_B, things_B, history_H, history_lengths_B, is_train_B)
        features_B2 = np.zeros((len(things_B), FEATURES_PER_THING), dtype=np.float32)
        filled = np.flatnonzero(history_lengths_B)
        if len(filled):
            starts = (np.cumsum(history_lengths_B) - history_lengths_B)[filled]
            sums = np.add.reduceat(lifts_H, starts)
            features_B2[filled, 0] = sums / history_lengths_B[filled]
            features_B2[filled, 1] = np.maximum.reduceat(lifts_H, starts)
        return features_B2

    def log_lifts(
        self,
        user_ids_B: Ids,
        things_B: Ids,
        history_H: Ids,
        history_lengths_B: Ids,
        is_train_B: npt.NDArray[np.bool_],
    ) -> Weights:
        """Return the log-lift of each of the histories' things with its row's candidate's.

        Args:
            user_ids_B: Users.
            things_B: The candidates' things.
            history_H: The histories' things, row after row.
            history_lengths_B: Items of each row; their sum is H.
            is_train_B: Rows whose user's pairs are left out.

        Returns:
            Float64 ``[H]``, 0 where one of both things is unknown.
        """
        rows_H = np.repeat(np.arange(len(things_B)), history_lengths_B)
        a_H, is_known_H = self._thing_index.find(history_H)
        b_B, is_known_B = self._thing_index.find(things_B)
        known = np.flatnonzero(is_known_H & is_known_B[rows_H])
        lifts_H = np.zeros(len(history_H))
        if not len(known):
            return lifts_H
        rows_N, a_N = rows_H[known], a_H[known]
        pairs_N = self._pairs(a_N, b_B[rows_N])
        own = self._own(user_ids_B, is_train_B, b_B, rows_N, a_N)
        # What is left of a difference of equal sums may lie a rounding error below zero.
        pairs_N = np.maximum(pairs_N - own.pairs_N, 0)
        starts_N = self.starts_S[a_N] - own.starts_N
        ends_B = self.starts_S[b_B] - own.ends_B
        per_total_B = ends_B / np.maximum(self.starts_S.sum() - own.total_B, 1)
        expected_N = starts_N * per_total_B[rows_N]
        lifts_H[known] = np.log((pairs_N + NUM_PSEUDO_PAIRS) / (expected_N + NUM_PSEUDO_PAIRS))
        return lifts_H

    @functools.cached_property
    def _thing_index(self) -> IdIndex:
        return IdIndex(self.things_S)

    @functools.cached_property
    def _pair_table(self) -> Floats | None:
        """C of all pairs, or None where that is too much to hold: read at once, not searched."""
        num_things = len(self.things_S)
        if num_things**2 > _MOST_TABLE_CELLS:
            return None
        table_SS = np.zeros((num_things, num_things), dtype=np.float32)
        first_P, second_P = np.divmod(self.pair_keys_P, num_things)
        table_SS[first_P, second_P] = self.pairs_P
        table_SS[second_P, first_P] = self.pairs_P
        return table_SS

    def _pairs(self, a_N: Ids, b_N: Ids) -> npt.NDArray[np.floating]:
        if self._pair_table is not None:
            return self._pair_table.take(a_N * len(self.things_S) + b_N)
        keys_N = np.minimum(a_N, b_N) * len(self.things_S) + np.maximum(a_N, b_N)
        return _looked_up(self.pair_keys_P, self.pairs_P, keys_N)

    def _own(
        self,
        user_ids_B: Ids,
        is_train_B: npt.NDArray[np.bool_],
        b_B: Ids,
        rows_N: Ids,
        a_N: Ids,
    ) -> "_OwnPart":
        users_B, is_known_B = find_ids(self.user_ids_U, user_ids_B)
        assert len(self.user_ids_U) or not is_train_B.any(), "served counts have no users"
        is_out_B = is_known_B & is_train_B
        sizes_B = np.zeros(len(users_B))
        sizes_B[is_out_B] = self.sizes_U[users_B[is_out_B]]
        keys_B = users_B * len(self.things_S) + b_B
        ends_B = np.where(is_out_B, _looked_up(self.own_keys_M, self.own_counts_M, keys_B), 0)
        starts_N = self._own_counts(users_B, is_out_B, rows_N, a_N)
        ordered_N = (starts_N - (a_N == b_B[rows_N])) * ends_B[rows_N]
        return _OwnPart(ordered_N / np.maximum(sizes_B - 1, 1)[rows_N], starts_N, ends_B, sizes_B)

    def _own_counts(
        self, users_B: Ids, is_out_B: npt.NDArray[np.bool_], rows_N: Ids, a_N: Ids
    ) -> Weights:
        """Return how many of their own user's items are the things, where those are left out."""
        num_things = len(self.things_S)
        named_V, numbers = np.unique(users_B[is_out_B], return_inverse=True)
        if len(named_V) * num_things > _TABLE_CELLS_PER_PAIR * len(a_N):
            keys_N = (users_B * num_things)[rows_N] + a_N
            found_N = _looked_up(self.own_keys_M, self.own_counts_M, keys_N)
            return np.where(is_out_B[rows_N], found_N, 0)
        # A batch names few users over and over: their counts as a table, its last row for none.
        table_VS = np.zeros((len(named_V) + 1, num_things))
        firsts_V, lasts_V = np.searchsorted(
            self.own_keys_M, [named_V * num_things, (named_V + 1) * num_things]
        )
        lengths_V = lasts_V - firsts_V
        offsets_V = firsts_V - (np.cumsum(lengths_V) - lengths_V)
        own_O = np.arange(lengths_V.sum()) + np.repeat(offsets_V, lengths_V)
        owners_O = np.repeat(np.arange(len(named_V)), lengths_V)
        table_VS[owners_O, self.own_keys_M[own_O] % num_things] = self.own_counts_M[own_O]
        places_B = np.full(len(users_B), len(named_V))
        places_B[is_out_B] = numbers
        return table_VS.take((places_B * num_things)[rows_N] + a_N)


class _OwnPart(NamedTuple):
    """What one user added to C, N of both things, and T."""

    pairs_N: Weights
    starts_N: Weights
    ends_B: Weights
    total_B: Weights


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

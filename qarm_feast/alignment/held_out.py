"""How well embeddings rank the pairs of items that no training pair names.

The pair loss cannot compare two runs: it depends on temperature and corrections. What can is how
often a held-out item is nearer to an item that it makes a pair with than to a random one.

Shape letters in this file: M train items, D embedding width, R pairs, Q queries, S random items,
P (query, answer) pairs, U items that are looked at.
May import: numpy.
"""

from dataclasses import dataclass

import numpy as np

from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows

_NUM_QUERIES = 2000
_NUM_RANDOM = 1000
_ROWS = 1024
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class PairSplit:
    """Training pairs, and those that name a held-out item.

    Where too few pairs are there to hold any out, both are all pairs and no item is held out.
    """

    train: PairRows
    valid: PairRows
    is_held_M: np.ndarray


def hold_items_out(pairs: PairRows, num_items: int, share: float, seed: int) -> PairSplit:
    """Split the pairs by items: a pair that names a held-out item is no training pair.

    A model that only learnt its training items by heart does not rank those of new ones.

    Args:
        pairs: All pairs.
        num_items: Train items.
        share: Share of the items that are held out.
        seed: Chooses them, see :func:`held_items`.

    Returns:
        The parts; where one would be empty, both are all pairs.
    """
    item_ids_M = np.arange(num_items) if pairs.item_ids_M is None else pairs.item_ids_M
    is_held_M = held_items(item_ids_M, share, seed)
    is_valid_R = is_held_M[pairs.triggers] | is_held_M[pairs.targets]
    if is_valid_R.all() or not is_valid_R.any():
        return PairSplit(pairs, pairs, np.zeros(num_items, dtype=bool))
    train, valid = (pairs.take(np.flatnonzero(rows)) for rows in (~is_valid_R, is_valid_R))
    return PairSplit(train, valid, is_held_M)


def held_items(item_ids_M: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which items are held out: as their ids say, whatever other items there are.

    A refresh that goes on from a parent holds the same items out as that did. Drawn anew, most
    would be items that the parent was trained on, and the parent could not be beaten on them.

    Args:
        item_ids_M: Ids, int64.
        share: Share to hold out, above 0 and below 1.
        seed: Another one holds other items out.

    Returns:
        Bool ``[M]``. The ids are mixed by SplitMix64's finalizer (Steele, Lea, Flood, "Fast
        Splittable Pseudorandom Number Generators", 2014).
    """
    state_M = item_ids_M.astype(np.int64).view(np.uint64) + np.uint64(_GOLDEN * (seed + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state_M = (state_M ^ (state_M >> np.uint64(shift))) * np.uint64(factor)
    state_M ^= state_M >> np.uint64(31)
    is_held_M: np.ndarray = state_M < np.uint64(share * 2**64)
    return is_held_M


class HeldOutRanking:
    """Held-out items, their pairs, and random items that they are told from.

    ``items`` are all items that are looked at, as sorted rows.

    Args:
        split: Pairs, of which the valid ones count; at least one item is held out.
        negatives: Knows all pairs.
        seed: Draws queries, where there are too many, and random items.
    """

    def __init__(self, split: PairSplit, negatives: BatchNegatives, seed: int) -> None:
        generator = np.random.default_rng(seed)
        queries_P, answers_P = _held_out_pairs(split)
        queries_Q = np.unique(queries_P)
        if len(queries_Q) > _NUM_QUERIES:
            queries_Q = np.sort(generator.choice(queries_Q, _NUM_QUERIES, replace=False))
            is_kept_P = np.isin(queries_P, queries_Q)
            queries_P, answers_P = queries_P[is_kept_P], answers_P[is_kept_P]
        random_S = generator.permutation(len(split.is_held_M))[:_NUM_RANDOM]
        self._is_other_QS = ~negatives.near(queries_Q, random_S)
        self._queries_P = np.searchsorted(queries_Q, queries_P)
        self.items = np.unique(np.concatenate([queries_Q, answers_P, random_S]))
        self._query_places_Q, self._answer_places_P, self._random_places_S = (
            np.searchsorted(self.items, rows) for rows in (queries_Q, answers_P, random_S)
        )

    def aucs(self, embeddings_UD: np.ndarray) -> np.ndarray:
        """Return per held-out item how often a pair's item is nearer than a random one.

        Args:
            embeddings_UD: L2-normalised embeddings of ``items``.

        Returns:
            AUC per query, float64 ``[Q]``, ties count half; no query is without a pair.
        """
        random_SD = embeddings_UD[self._random_places_S]
        wins_P = np.empty(len(self._queries_P))
        for begin in range(0, len(wins_P), _ROWS):
            part = slice(begin, begin + _ROWS)
            queries_P = self._queries_P[part]
            queries_PD = embeddings_UD[self._query_places_Q[queries_P]]
            own_P = (queries_PD * embeddings_UD[self._answer_places_P[part]]).sum(axis=1)
            others_PS = queries_PD @ random_SD.T
            wins_PS = (own_P[:, None] > others_PS) + 0.5 * (own_P[:, None] == others_PS)
            is_other_PS = self._is_other_QS[queries_P]
            num_others_P = np.maximum(is_other_PS.sum(axis=1), 1)
            wins_P[part] = (wins_PS * is_other_PS).sum(axis=1) / num_others_P
        counts_Q = np.bincount(self._queries_P)
        aucs_Q: np.ndarray = np.bincount(self._queries_P, wins_P) / counts_Q
        return aucs_Q


def _held_out_pairs(split: PairSplit) -> tuple[np.ndarray, np.ndarray]:
    """Return (held-out item, the other item) of the valid pairs in both directions, once each."""
    valid = split.valid
    both = np.stack([valid.triggers, valid.targets], axis=1)
    both = np.concatenate([both, both[:, ::-1]])
    both = np.unique(both[split.is_held_M[both[:, 0]]], axis=0)
    return both[:, 0], both[:, 1]

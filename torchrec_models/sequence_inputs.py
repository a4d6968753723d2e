"""Sparse features of history items that are picked for a target: all, the matching, the nearest.

A picked sequence keeps the history's order, newest first. It becomes a list of codes, L rows of the
table :data:`~torchrec_models.tables.SEQUENCE_TABLE` per item, over which the target attends, and
for picked subsets also a bag of item ids.
Shape letters: B rows, H history items of all rows together, S picked ones, L levels, N items of
the longest history.
May import: numpy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qarm_feast.cross_features import shared_prefix_places
from qarm_feast.schema import ABSENT_CODE
from torchrec_models.tables import BAG_OF_SEQUENCE, SHARED_SEQUENCES, TARGET_SEQUENCE
from torchrec_models.vocabulary import IdVocabulary

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
SparseFeature = tuple[Ints, Ints]
"""Values of all rows, and how many each row has."""


@dataclass(frozen=True)
class PickedItems:
    """History items of every row with what is known of them.

    Attributes:
        item_ids_H: Items, newest first.
        rq_HL: RQ codes, ``ABSENT_CODE`` where an item has none to use.
        lengths_B: Items of each row; their sum is H.
    """

    item_ids_H: Ints
    rq_HL: Ints
    lengths_B: Ints

    def take(self, places_S: Ints) -> "PickedItems":
        """Return the items at ascending places, row by row."""
        return PickedItems(
            item_ids_H=self.item_ids_H[places_S],
            rq_HL=self.rq_HL[places_S],
            lengths_B=picked_lengths(places_S, self.lengths_B),
        )

    def coded(self, has_target_B: Bools) -> "PickedItems":
        """Return the items that have codes, of the rows whose target has codes to ask with."""
        is_coded_H = self.rq_HL[:, 0] != ABSENT_CODE
        return self.take(np.flatnonzero(is_coded_H & np.repeat(has_target_B, self.lengths_B)))


def shared_history(rq_BL: Ints, history: PickedItems) -> dict[str, PickedItems]:
    """Return the history items that share c1, and those that share (c1, c2), with the target."""
    places = shared_prefix_places(rq_BL, history.rq_HL, history.lengths_B)
    return {
        name: history.take(places_S)
        for name, places_S in zip(SHARED_SEQUENCES, places, strict=True)
    }


def picked_lengths(places_S: Ints, lengths_B: Ints) -> Ints:
    """Return how many of each row's items stand at the given ascending places."""
    ends_B = np.cumsum(lengths_B)
    return np.searchsorted(places_S, ends_B) - np.searchsorted(places_S, ends_B - lengths_B)


def most_similar_places(
    similarities_H: npt.NDArray[np.float32], lengths_B: Ints, num_searched: int
) -> Ints:
    """Return the places of each row's most similar items; of equal ones the newest.

    Args:
        similarities_H: Similarity of each history item to its row's target; ``-inf`` is never
            picked.
        lengths_B: Items of each row, newest first.
        num_searched: Most items that are picked per row.

    Returns:
        Ascending places in the concatenated histories.
    """
    longest = int(lengths_B.max(initial=0))
    rows_H = np.repeat(np.arange(len(lengths_B)), lengths_B)
    starts_B = np.cumsum(lengths_B) - lengths_B
    is_picked_H = np.isfinite(similarities_H)
    if longest > num_searched:
        padded_BN = np.full((len(lengths_B), longest), -np.inf, dtype=np.float32)
        padded_BN[rows_H, np.arange(len(rows_H)) - starts_B[rows_H]] = similarities_H
        # A partial sort: many times cheaper than sorting what is not picked.
        least_B = -np.partition(-padded_BN, num_searched - 1, axis=1)[:, num_searched - 1]
        is_above_H, is_least_H = similarities_H > least_B[rows_H], similarities_H == least_B[rows_H]
        num_above_B = np.bincount(rows_H[is_above_H], minlength=len(lengths_B))
        ranks_H = np.cumsum(is_least_H) - is_least_H
        ranks_H -= np.append(ranks_H, 0)[starts_B][rows_H]
        is_picked_H &= is_above_H | (is_least_H & (ranks_H < (num_searched - num_above_B)[rows_H]))
    return np.flatnonzero(is_picked_H)


def sequence_features(
    picked: Mapping[str, PickedItems], rq_BL: Ints, level_sizes: Sequence[int]
) -> dict[str, SparseFeature]:
    """Return the code features of all sequences, and of the target that asks them.

    Args:
        picked: Sequences by name.
        rq_BL: RQ codes of the targets.
        level_sizes: Rows of each level in the sequence table.

    Returns:
        For the target and each sequence the codes of items as table rows, L per item. An item
        without codes is left out; so is the whole sequence of a target without codes.
    """
    has_codes_B = rq_BL[:, 0] != ABSENT_CODE
    features = {
        TARGET_SEQUENCE: _codes(rq_BL[has_codes_B], has_codes_B.astype(np.int64), level_sizes)
    }
    for name, items in picked.items():
        coded = items.coded(has_codes_B)
        features[name] = _codes(coded.rq_HL, coded.lengths_B, level_sizes)
    return features


def bag_features(
    picked: Mapping[str, PickedItems], item_ids: IdVocabulary
) -> dict[str, SparseFeature]:
    """Return the bags of items, rows of the item table, of the sequences that have one."""
    return {
        BAG_OF_SEQUENCE[name]: (item_ids.rows(items.item_ids_H), items.lengths_B)
        for name, items in picked.items()
        if name in BAG_OF_SEQUENCE
    }


def _codes(rq_SL: Ints, lengths_B: Ints, level_sizes: Sequence[int]) -> SparseFeature:
    sizes_L = np.asarray(level_sizes, dtype=np.int64)
    return (rq_SL + np.cumsum(sizes_L) - sizes_L).ravel(), lengths_B * len(level_sizes)

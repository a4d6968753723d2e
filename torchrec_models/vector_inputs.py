"""What the ranker reads of vectors: those of candidates, histories' means, and their cosines.

A batch names the same items over and over: each vector is fetched once. Where the distinct
candidates and history items make few pairs against those that the rows ask for, one matrix
product finds all their cosines; else vectors are gathered pair by pair, a part at a time. Of a
small catalogue all vectors and all cosines are held.
Shape letters: B rows, H history items of all rows, N named items, U distinct ones, P places up
to the last named one, I items of the catalogue, D vector width.
May import: numpy, torch.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

NUM_COSINES = 2
"""Mean and largest, of a candidate with its history."""
_COSINE_SCALE = 5.0
_GATHERED_PAIRS = 1 << 16
"""Pairs whose vectors are held at a time, and named items of a search."""
_PLACES_PER_NAME = 8
"""A place that is looked through costs that much less than a name that is sorted."""
_TABLE_CELLS_PER_PAIR = 32
"""A cell of a matrix product costs that much less than a pair of gathered vectors."""
_MOST_TABLE_CELLS = 1 << 24
"""Of a table of cosines, 64 MiB."""


@dataclass(frozen=True)
class HeldVectors:
    """All vectors of a small catalogue, and the cosines of every pair."""

    vectors_ID: torch.Tensor
    has_vector_I: Bools
    cosines_II: Floats

    @staticmethod
    def of(vectors_ID: torch.Tensor) -> "HeldVectors | None":
        """Return what is held of these vectors, None where their cosines exceed 64 MiB."""
        if len(vectors_ID) ** 2 > _MOST_TABLE_CELLS:
            return None
        has_vector_I = vectors_ID.any(dim=1).numpy()
        return HeldVectors(vectors_ID, has_vector_I, (vectors_ID @ vectors_ID.T).numpy())


class VectorLookup(Protocol):
    """Where vectors of items come from."""

    def find(self, item_ids_N: Ints, label_times_N: Ints) -> tuple[Ints, Bools]:
        """Return the places of items' vectors, any where there is none, and which have one then."""
        ...

    def take(self, places_U: Ints) -> torch.Tensor:
        """Return ``[U, D]`` float32 unit vectors, or zeros, of places."""
        ...

    @property
    def held(self) -> HeldVectors | None:
        """The vectors of all places where they are held."""
        ...


@dataclass(frozen=True)
class NamedVectors:
    """Vectors of named items, none twice.

    Attributes:
        vectors_UD: Distinct vectors, float32: the named ones, or all that are held.
        numbers_N: Which of them each named item has.
        is_known_N: False where an item has none at that time; its vector reads as zeros.
        cosines_UU: Their cosines where they are held.
    """

    vectors_UD: torch.Tensor
    numbers_N: Ints
    is_known_N: Bools
    cosines_UU: Floats | None

    @staticmethod
    def of(lookup: VectorLookup, item_ids_N: Ints, label_times_N: Ints) -> "NamedVectors":
        """Look up the vectors of items as known at given times, microseconds."""
        places_N, is_found_N = lookup.find(item_ids_N, label_times_N)
        if (held := lookup.held) is not None:
            is_known_N = is_found_N & held.has_vector_I[places_N]
            return NamedVectors(held.vectors_ID, places_N, is_known_N, held.cosines_II)
        places_U, numbers_N = _distinct(places_N)
        vectors_UD = lookup.take(places_U)
        has_vector_U = vectors_UD.any(dim=1).numpy()
        is_known_N = is_found_N & has_vector_U[numbers_N]
        return NamedVectors(vectors_UD, numbers_N, is_known_N, cosines_UU=None)

    def part(self, first: int, last: int) -> "NamedVectors":
        """Return the named items from one place to before another."""
        part = slice(first, last)
        return replace(self, numbers_N=self.numbers_N[part], is_known_N=self.is_known_N[part])

    def rows(self) -> torch.Tensor:
        """Return ``[N, D]``: the vector of each named item, zeros where there is none."""
        vectors_ND = self.vectors_UD.index_select(0, torch.from_numpy(self.numbers_N))
        if not self.is_known_N.all():
            vectors_ND[torch.from_numpy(~self.is_known_N)] = 0.0
        return vectors_ND

    def sums(self, lengths_B: Ints) -> torch.Tensor:
        """Return ``[B, D]``: the sums over rows of ``lengths_B`` successive items."""
        starts_B = np.cumsum(lengths_B) - lengths_B
        sums_BD: torch.Tensor = torch.nn.functional.embedding_bag(
            torch.from_numpy(self.numbers_N),
            self.vectors_UD,
            torch.from_numpy(starts_B),
            mode="sum",
            per_sample_weights=torch.from_numpy(self.is_known_N.astype(np.float32)),
        )
        return sums_BD


def _distinct(places_N: Ints) -> tuple[Ints, Ints]:
    """Return what ``np.unique`` does with its inverse, without a sort where places are low."""
    num_places = int(places_N.max(initial=-1)) + 1
    if num_places > _PLACES_PER_NAME * len(places_N):
        places_U, numbers_N = np.unique(places_N, return_inverse=True)
        return places_U, numbers_N
    is_named_P = np.zeros(num_places, dtype=np.bool_)
    is_named_P[places_N] = True
    numbers_P = np.cumsum(is_named_P) - 1
    return np.flatnonzero(is_named_P), numbers_P[places_N]


def pair_cosines(
    targets: NamedVectors, history: NamedVectors, lengths_B: Ints, absent: float = 0.0
) -> Floats:
    """Return the cosine of each history item with its row's target.

    Args:
        targets: One per row.
        history: ``lengths_B`` items per row, row after row, from the same lookup.
        lengths_B: Items of each row.
        absent: Stands where one of both vectors is absent.

    Returns:
        Float32 ``[H]``.
    """
    numbers_H = np.repeat(targets.numbers_N, lengths_B)
    num_cells = len(targets.vectors_UD) * len(history.vectors_UD)
    if targets.cosines_UU is not None:
        starts_H = numbers_H * len(targets.cosines_UU)
        cosines_H = targets.cosines_UU.take(starts_H + history.numbers_N)
    elif num_cells <= min(_MOST_TABLE_CELLS, _TABLE_CELLS_PER_PAIR * len(numbers_H)):
        cosines_UU = (targets.vectors_UD @ history.vectors_UD.T).numpy()
        cosines_H = cosines_UU[numbers_H, history.numbers_N]
    else:
        cosines_H = _gathered_cosines(targets, history, numbers_H)
    cosines_H[~(np.repeat(targets.is_known_N, lengths_B) & history.is_known_N)] = absent
    return cosines_H


def searched_cosines(
    lookup: VectorLookup,
    target_ids_B: Ints,
    label_times_B: Ints,
    item_ids_H: Ints,
    lengths_B: Ints,
) -> Floats:
    """Return what :func:`pair_cosines` does for long histories, ``-inf`` where one is absent.

    Args:
        lookup: Where vectors come from.
        target_ids_B: One per row.
        label_times_B: Times as of which vectors are known, microseconds.
        item_ids_H: ``lengths_B`` items per row, row after row.
        lengths_B: Items of each row.

    Returns:
        Float32 ``[H]``.
    """
    targets = NamedVectors.of(lookup, target_ids_B, label_times_B)
    rows_at_once = max(1, _GATHERED_PAIRS // max(1, int(lengths_B.max(initial=0))))
    ends_B = np.append(0, np.cumsum(lengths_B))
    parts = [np.empty(0, dtype=np.float32)]
    for first in range(0, len(lengths_B), rows_at_once):
        last = min(first + rows_at_once, len(lengths_B))
        part_B = lengths_B[first:last]
        times = np.repeat(label_times_B[first:last], part_B)
        history = NamedVectors.of(lookup, item_ids_H[ends_B[first] : ends_B[last]], times)
        parts.append(pair_cosines(targets.part(first, last), history, part_B, absent=-np.inf))
    return np.concatenate(parts)


def _gathered_cosines(targets: NamedVectors, history: NamedVectors, targets_H: Ints) -> Floats:
    cosines_H = np.empty(len(targets_H), dtype=np.float32)
    for start in range(0, len(targets_H), _GATHERED_PAIRS):
        part = slice(start, start + _GATHERED_PAIRS)
        vectors = [
            side.vectors_UD.index_select(0, torch.from_numpy(numbers))
            for side, numbers in (
                (targets, targets_H[part]),
                (history, history.numbers_N[part]),
            )
        ]
        cosines_H[part] = torch.linalg.vecdot(*vectors).numpy()
    return cosines_H


def vector_features(
    targets: NamedVectors, history: NamedVectors, lengths_B: Ints, *, is_one_history: bool
) -> list[torch.Tensor]:
    """Return target, mean history vector, mean and largest cosine, at about unit variance.

    The parts of a unit vector have a variance of 1 / D, and a net that learns at one rate for all
    inputs would hardly read them.

    Args:
        targets: One per row.
        history: Items of all rows, row after row; with ``is_one_history`` those of the first row,
            which every row has.
        lengths_B: Items of each row.
        is_one_history: Whether all rows share one history.

    Returns:
        Float32 ``[B, D]``, ``[B, D]`` and ``[B, 2]``, apart: the caller joins them with others.
        History's parts are zeros for an empty one.
    """
    targets_BD, means_BD, cosines_B2 = _means_and_cosines(
        targets, history, lengths_B, is_one_history=is_one_history
    )
    scale = math.sqrt(targets_BD.shape[1])
    # A mean that all rows share is one row in memory.
    return [targets_BD.mul_(scale), means_BD * scale, cosines_B2.mul_(_COSINE_SCALE)]


def cosine_features(
    targets: NamedVectors, history: NamedVectors, lengths_B: Ints, *, is_one_history: bool
) -> list[torch.Tensor]:
    """Return the last part of :func:`vector_features`, float32 ``[B, 2]``."""
    _, _, cosines_B2 = _means_and_cosines(
        targets, history, lengths_B, is_one_history=is_one_history
    )
    return [cosines_B2.mul_(_COSINE_SCALE)]


def _means_and_cosines(
    targets: NamedVectors, history: NamedVectors, lengths_B: Ints, *, is_one_history: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return targets, mean history vectors, and mean and largest cosine of both."""
    targets_BD = targets.rows()
    if is_one_history:
        history_HD = history.rows()
        means_BD = (history_HD.sum(dim=0) / max(len(history_HD), 1)).expand(len(targets_BD), -1)
        # Without items the cosine is 0.
        has_items = len(history_HD) > 0
        cosines_BH = targets_BD @ history_HD.T if has_items else torch.zeros(len(targets_BD), 1)
        largest_B = cosines_BH.amax(dim=1)
    else:
        counts_B1 = torch.from_numpy(np.maximum(lengths_B, 1))[:, None]
        means_BD = history.sums(lengths_B) / counts_B1
        cosines_H = pair_cosines(targets, history, lengths_B)
        largest_B = torch.from_numpy(_segment_maxima(cosines_H, lengths_B))
    mean_B = torch.linalg.vecdot(means_BD, targets_BD)
    return targets_BD, means_BD, torch.stack([mean_B, largest_B], dim=1)


def _segment_maxima(values_H: Floats, lengths_B: Ints) -> Floats:
    maxima_B = np.zeros(len(lengths_B), dtype=np.float32)
    filled = np.flatnonzero(lengths_B)
    if len(filled):
        starts = (np.cumsum(lengths_B) - lengths_B)[filled]
        maxima_B[filled] = np.maximum.reduceat(values_H, starts)
    return maxima_B

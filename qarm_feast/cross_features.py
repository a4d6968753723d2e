"""What a candidate's codes have in common with the codes of a user's history.

Two codes share a prefix of p levels if their first p RQ codes are equal: (c1), and (c1, c2). One
function computes it; the ranker's batch builder and Feast's on-demand view both call it.

A missing code (``ABSENT_CODE``: unknown, taken down, or a row later than the label) equals nothing,
not even another missing one; its item keeps its place in the history. An item that stands twice
counts twice. A history without items matches nothing. May import: numpy.

Shape letters in this file: B rows, H history items of all rows, L levels, P prefixes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import DataError
from qarm_feast.schema import ABSENT_CODE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

PREFIX_NAMES = ("c1", "c1_c2")
"""Prefixes by length; codes of fewer levels never share the longer ones."""
NO_POSITION = -1
CODES_INPUT = "rq_code"
HISTORY_INPUT = "history_rq_codes"
NUM_DENSE_INPUTS = 3 * len(PREFIX_NAMES)


@dataclass(frozen=True)
class CrossFeatures:
    """Matches of each row's history with its candidate, one column per prefix.

    Attributes:
        counts_BP: History items that share the prefix, int64.
        positions_BP: Place of the newest of them, 0 = the newest item of all; ``NO_POSITION``
            where there is none.
        shares_BP: ``counts_BP`` by the number of history items that have codes, float32 in [0, 1];
            0 where no item has.
    """

    counts_BP: Ints
    positions_BP: Ints
    shares_BP: Floats

    def dense_inputs(self) -> Floats:
        """Return ``[B, 3 P]`` float32 for a net: log(1 + count), 1 / (1 + position) or 0, share."""
        is_found_BP = self.positions_BP != NO_POSITION
        recency_BP = np.where(is_found_BP, 1 / (1 + np.maximum(self.positions_BP, 0)), 0)
        parts = [np.log1p(self.counts_BP), recency_BP, self.shares_BP]
        return np.concatenate(parts, axis=1).astype(np.float32)


def cross_features(codes_BL: Ints, history_HL: Ints, history_lengths_B: Ints) -> CrossFeatures:
    """Return how many history items share each prefix with the candidate, and the newest place.

    Args:
        codes_BL: RQ codes of the candidates, missing ones ``ABSENT_CODE``.
        history_HL: RQ codes of the history items, newest first, row after row.
        history_lengths_B: Items of each row; their sum is H.

    Returns:
        Counts, positions and shares per prefix.

    Raises:
        DataError: If the lengths do not add up to H, or the numbers of levels differ.
    """
    places = shared_prefix_places(codes_BL, history_HL, history_lengths_B)
    num_rows, num_prefixes = len(codes_BL), len(PREFIX_NAMES)
    rows_H = np.repeat(np.arange(num_rows), history_lengths_B)
    places_H = np.arange(len(rows_H)) - np.repeat(
        np.cumsum(history_lengths_B) - history_lengths_B, history_lengths_B
    )
    counts_BP = np.zeros((num_rows, num_prefixes), dtype=np.int64)
    positions_BP = np.full((num_rows, num_prefixes), NO_POSITION, dtype=np.int64)
    for prefix, matches_M in enumerate(places):
        counts_BP[:, prefix] = np.bincount(rows_H[matches_M], minlength=num_rows)
        found_rows, firsts = np.unique(rows_H[matches_M], return_index=True)
        positions_BP[found_rows, prefix] = places_H[matches_M[firsts]]
    num_present_B = np.bincount(rows_H[_has_codes(history_HL)], minlength=num_rows)
    shares_BP = counts_BP / np.maximum(num_present_B, 1)[:, None]
    return CrossFeatures(counts_BP, positions_BP, shares_BP.astype(np.float32))


def shared_prefix_places(
    codes_BL: Ints, history_HL: Ints, history_lengths_B: Ints
) -> tuple[Ints, ...]:
    """Return which history items share each prefix with their row's candidate.

    Args:
        codes_BL: RQ codes of the candidates, missing ones ``ABSENT_CODE``.
        history_HL: RQ codes of the history items, row after row.
        history_lengths_B: Items of each row; their sum is H.

    Returns:
        For each prefix ascending places in ``history_HL``, int64.

    Raises:
        DataError: If the lengths do not add up to H, or the numbers of levels differ.
    """
    _check_shapes(codes_BL, history_HL, history_lengths_B)
    rows_H = np.repeat(np.arange(len(codes_BL)), history_lengths_B)
    places = []
    matches_M = np.arange(len(rows_H))
    for level in range(len(PREFIX_NAMES)):
        if level >= codes_BL.shape[1]:
            matches_M = matches_M[:0]
        else:
            # What shares a prefix shares the shorter one: only its matches are looked at again.
            codes_M = history_HL[matches_M, level]
            is_equal_M = (codes_M == codes_BL[rows_H[matches_M], level]) & (codes_M != ABSENT_CODE)
            matches_M = matches_M[is_equal_M]
        places.append(matches_M)
    return tuple(places)


def on_demand_features(inputs: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return the features of Feast's on-demand view, called once for all rows of a request.

    Args:
        inputs: ``rq_code``, each candidate's codes (None: unknown item), and ``history_rq_codes``,
            the codes of the user's items, newest first, item after item in one flat list (None
            or an empty one: no history).

    Returns:
        For each prefix ``<prefix>_count`` and ``<prefix>_position`` (int) and ``<prefix>_share``
        (float), one value per row.

    Raises:
        DataError: If candidates differ in length, or a history is no multiple of it.
    """
    codes = inputs[CODES_INPUT]
    histories = [np.asarray(flat or (), dtype=np.int64) for flat in inputs[HISTORY_INPUT]]
    codes_BL = _candidate_matrix(codes)
    num_levels = codes_BL.shape[1]
    for row, flat in enumerate(histories):
        if len(flat) % num_levels:
            raise DataError(
                f"{HISTORY_INPUT} of row {row} holds {len(flat)} codes, no multiple of the "
                f"candidate's {num_levels}; pass all levels of every item, missing ones as "
                f"{ABSENT_CODE}, as `CodeReader.read_codes` returns them"
            )
    lengths_B = np.array([len(flat) // num_levels for flat in histories], dtype=np.int64)
    flat_codes = np.concatenate([*histories, np.empty(0, dtype=np.int64)])
    found = cross_features(codes_BL, flat_codes.reshape(-1, num_levels), lengths_B)
    columns: dict[str, list[Any]] = {}
    for prefix, name in enumerate(PREFIX_NAMES):
        columns[f"{name}_count"] = found.counts_BP[:, prefix].tolist()
        columns[f"{name}_position"] = found.positions_BP[:, prefix].tolist()
        columns[f"{name}_share"] = found.shares_BP[:, prefix].tolist()
    return columns


def _candidate_matrix(codes: Sequence[Sequence[int] | None]) -> Ints:
    """Return one row per candidate; unknown ones are filled with ABSENT_CODE."""
    widths = sorted({len(row) for row in codes if row})
    if len(widths) > 1:
        raise DataError(
            f"candidates have codes of {widths} levels; one request reads one codebook's view"
        )
    # Where no candidate has codes, nothing can match, whatever the width.
    width = widths[0] if widths else 1
    rows = [row if row else [ABSENT_CODE] * width for row in codes]
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _has_codes(history_HL: Ints) -> npt.NDArray[np.bool_]:
    # Without levels (nobody knew how many, as no item was known) there are no codes either.
    has_codes_H: npt.NDArray[np.bool_] = (history_HL[:, :1] != ABSENT_CODE).any(axis=1)
    return has_codes_H


def _check_shapes(codes_BL: Ints, history_HL: Ints, history_lengths_B: Ints) -> None:
    num_items = int(history_lengths_B.sum())
    if len(history_lengths_B) != len(codes_BL) or num_items != len(history_HL):
        raise DataError(
            f"{len(codes_BL)} candidates and {len(history_HL)} history items do not fit "
            f"{len(history_lengths_B)} lengths that add up to {num_items}"
        )
    if codes_BL.shape[1] != history_HL.shape[1]:
        raise DataError(
            f"candidates have codes of {codes_BL.shape[1]} levels, history items of "
            f"{history_HL.shape[1]}; read both from one codebook version"
        )

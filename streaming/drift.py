"""Drift of new uploads against a codebook's training set: the figures that call for a refresh.

Per version and level, over a sliding window of the latest uploads:

- ``qarm_codebook_quantization_error_ratio``: mean square of what the level leaves over, divided by
  the training set's. Centroids are fitted to the training set, so a little over 1 is normal.
- ``qarm_codebook_code_divergence_bits``: :func:`jensen_shannon_bits` of the shares of codes.

Up to ``_MAX_ROWS_PER_BATCH`` evenly spaced uploads of each batch enter the windows, and the figures
are taken at most once a second, which bounds the cost.

Shape letters in this file: N items, D embedding width, L levels, K codebook size of a level,
W items of the window, S sampled items.
May import: numpy, pyarrow.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qarm_feast.item_vectors import EncodedItems
from qarm_feast.observability import (
    CODEBOOK_CODE_DIVERGENCE,
    CODEBOOK_DRIFT_ITEMS,
    CODEBOOK_ERROR_RATIO,
)
from qarm_feast.quantizers.base import unit_rows
from qarm_feast.training_reference import Counts, TrainingReference, level_errors
from streaming.rows import LiveCodebooks

if TYPE_CHECKING:
    from qarm_feast.codebook import Codebook

_MAX_ROWS_PER_BATCH = 256
_TELL_SECONDS = 1.0


def jensen_shannon_bits(first_K: Counts, second_K: Counts) -> float:
    """Return the Jensen-Shannon divergence of two sets of counts, in bits.

    With shares p and q and m = (p + q) / 2 it is H(m) - (H(p) + H(q)) / 2, H being the entropy to
    base 2: 0 for equal shares, 1 if no code is in both (J. Lin, Divergence measures based on the
    Shannon entropy, IEEE Transactions on Information Theory 37(1), 1991). Unlike the population
    stability index it needs no floor for codes that one side lacks. Two samples of n and w items
    of one distribution over K codes give about (K - 1) (1/n + 1/w) / (8 ln 2), not 0.

    Args:
        first_K: Items per code; at least one item.
        second_K: Items per code; at least one item.

    Returns:
        Divergence in [0, 1].
    """
    p_K = first_K / first_K.sum()
    q_K = second_K / second_K.sum()
    between = _entropy_bits((p_K + q_K) / 2)
    # Rounding can put equal shares a hair below 0.
    return max(0.0, between - (_entropy_bits(p_K) + _entropy_bits(q_K)) / 2)


class DriftMonitor:
    """Keeps one window per codebook version and sets the metrics; use from one thread.

    Args:
        window_items: Uploads in a window.
        clock: Seconds that only go forward.
    """

    def __init__(self, window_items: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_items = window_items
        self._clock = clock
        self._told_at = -math.inf
        self._windows: dict[str, _Window] = {}

    def observe(
        self,
        live: LiveCodebooks,
        encoded: Sequence[EncodedItems],
        codes: Mapping[str, pa.Table],
    ) -> None:
        """Take in one batch.

        Args:
            live: The codebooks that made the codes.
            encoded: The vectors, one entry per encoder.
            codes: Code rows by version: those of the vectors, in their order, then takedowns.
        """
        self._forget_all_but(live.codebooks)
        vectors = {group.encoder_version: group.vectors_ND for group in encoded}
        for version, table in codes.items():
            codebook = live.codebooks[version]
            x_ND = vectors[codebook.manifest.encoder_version]
            if codebook.training is not None and len(x_ND):
                self._add(version, codebook, x_ND, table)
        now = self._clock()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            for version, window in self._windows.items():
                _tell(version, live.codebooks[version].training, window)

    def _add(self, version: str, codebook: "Codebook", x_ND: np.ndarray, table: pa.Table) -> None:
        rows_S = _evenly_spaced(len(x_ND))
        codes_SL = _code_matrix(table, rows_S)
        errors_SL = level_errors(codebook.rq.codebooks, unit_rows(x_ND[rows_S]), codes_SL)
        if version not in self._windows:
            self._windows[version] = _Window(self._window_items, codes_SL.shape[1])
        self._windows[version].add(codes_SL, errors_SL)

    def _forget_all_but(self, versions: Mapping[str, "Codebook"]) -> None:
        for version in self._windows.keys() - versions.keys():
            num_levels = self._windows.pop(version).num_levels
            CODEBOOK_DRIFT_ITEMS.labels(version).set(0)
            for level in range(1, num_levels + 1):
                for gauge in (CODEBOOK_ERROR_RATIO, CODEBOOK_CODE_DIVERGENCE):
                    gauge.labels(version, str(level)).set(math.nan)


class _Window:
    """The latest codes and errors of one version, a ring."""

    def __init__(self, num_items: int, num_levels: int) -> None:
        self.num_levels = num_levels
        self.num_filled = 0
        self._codes_WL = np.empty((num_items, num_levels), dtype=np.int64)
        self._errors_WL = np.empty((num_items, num_levels), dtype=np.float64)
        self._next = 0

    def add(self, codes_SL: np.ndarray, errors_SL: np.ndarray) -> None:
        """Put rows in the place of the oldest."""
        num_rows = len(self._codes_WL)
        codes_SL, errors_SL = codes_SL[-num_rows:], errors_SL[-num_rows:]
        places_S = (self._next + np.arange(len(codes_SL))) % num_rows
        self._codes_WL[places_S] = codes_SL
        self._errors_WL[places_S] = errors_SL
        self._next = (self._next + len(codes_SL)) % num_rows
        self.num_filled = min(num_rows, self.num_filled + len(codes_SL))

    def counts(self, level: int, codebook_size: int) -> Counts:
        """Return the items of each code of one level."""
        return np.bincount(self._codes_WL[: self.num_filled, level], minlength=codebook_size)

    def mean_errors(self) -> npt.NDArray[np.float64]:
        """Return the mean error of each level."""
        means_L: npt.NDArray[np.float64] = self._errors_WL[: self.num_filled].mean(axis=0)
        return means_L


def _tell(version: str, training: TrainingReference | None, window: _Window) -> None:
    assert training is not None, "a window is made for versions with a reference"
    CODEBOOK_DRIFT_ITEMS.labels(version).set(window.num_filled)
    ratios_L = window.mean_errors() / np.maximum(training.errors_L, np.finfo(np.float64).tiny)
    for level, counts_K in enumerate(training.counts):
        labels = (version, str(level + 1))
        CODEBOOK_ERROR_RATIO.labels(*labels).set(ratios_L[level])
        recent_K = window.counts(level, len(counts_K))
        CODEBOOK_CODE_DIVERGENCE.labels(*labels).set(jensen_shannon_bits(counts_K, recent_K))


def _evenly_spaced(num_rows: int) -> npt.NDArray[np.int64]:
    places = np.linspace(0, num_rows - 1, min(num_rows, _MAX_ROWS_PER_BATCH))
    return places.astype(np.int64)


def _code_matrix(table: pa.Table, rows_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    column = table["rq_code"].take(pa.array(rows_S)).combine_chunks()
    codes_SL: npt.NDArray[np.int64] = column.flatten().to_numpy().reshape(len(rows_S), -1)
    return codes_SL


def _entropy_bits(share_K: npt.NDArray[np.float64]) -> float:
    used_U = share_K[share_K > 0]
    return float(-(used_U * np.log2(used_U)).sum())

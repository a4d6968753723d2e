"""What a codebook's training set looked like in codes, kept to hold new uploads against it.

Shape letters in this file: N items, D embedding width, L levels, K codebook size of a level.
May import: NumPy, the quantizers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qarm_feast.quantizers.base import Arrays, Codes, Embeddings
from qarm_feast.quantizers.rq import ResidualQuantizer

Counts = npt.NDArray[np.int64]
Errors = npt.NDArray[np.float64]

MAX_REFERENCE_ITEMS = 100_000
"""Evenly spaced training items that are looked at; enough for shares of 4096 codes."""

_ERRORS = "errors"
_COUNTS = "counts"


@dataclass(frozen=True)
class TrainingReference:
    """Use of codes and quantization error of the training set, under the nearest rule.

    Attributes:
        counts: Per level the items of each code, ``[K]``.
        errors_L: Per level the mean square of what it leaves over (``quantization_mse``). The
            centroids were fitted to these items, so new ones of the same kind have a little more.
    """

    counts: Sequence[Counts]
    errors_L: Errors

    @classmethod
    def of(cls, rq: ResidualQuantizer, unit_ND: Embeddings) -> "TrainingReference":
        """Return the reference of a trained quantizer.

        Args:
            rq: The quantizer.
            unit_ND: The vectors that it was trained on, of length 1; at least one.

        Returns:
            Counts and errors of a sample of them.
        """
        rows = np.linspace(0, len(unit_ND) - 1, min(len(unit_ND), MAX_REFERENCE_ITEMS))
        sample_ND = unit_ND[rows.astype(np.int64)]
        rq_NL = rq.encode(sample_ND)
        return cls(
            counts=[
                np.bincount(codes_N, minlength=size)
                for codes_N, size in zip(rq_NL.T, rq.level_sizes, strict=True)
            ],
            errors_L=level_errors(rq.codebooks, sample_ND, rq_NL).mean(axis=0),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "TrainingReference":
        """Return the reference that :meth:`arrays` was called on."""
        names = sorted(name for name in arrays if name != _ERRORS)
        return cls([arrays[name] for name in names], arrays[_ERRORS])

    def arrays(self) -> Arrays:
        """Return ``counts_00``, ``counts_01``, ... and ``errors``."""
        counts = {f"{_COUNTS}_{level:02d}": array for level, array in enumerate(self.counts)}
        return {**counts, _ERRORS: self.errors_L}


def level_errors(codebooks: Sequence[Embeddings], x_ND: Embeddings, rq_NL: Codes) -> Errors:
    """Return per vector and level the mean square of what is left after that level.

    Args:
        codebooks: Centroids per level, ``[K, D]``.
        x_ND: Vectors, float32.
        rq_NL: Their codes.

    Returns:
        Errors of shape ``[N, L]``, float64.
    """
    left_ND = np.array(x_ND)
    errors_NL = np.empty(rq_NL.shape, dtype=np.float64)
    for level, codebook_KD in enumerate(codebooks):
        left_ND -= codebook_KD[rq_NL[:, level]]
        errors_NL[:, level] = np.einsum("nd,nd->n", left_ND, left_ND) / x_ND.shape[1]
    return errors_NL

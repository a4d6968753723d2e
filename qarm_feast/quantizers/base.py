"""The protocol of every quantizer, and the checks that all of them make on their input.

Shape letters in this file: N items, D embedding width, C codes per item.
May import: NumPy (torch for type checking only).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import CodebookError, DataError

Embeddings = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[np.generic]]

if TYPE_CHECKING:
    import torch

MatrixT = TypeVar("MatrixT", npt.NDArray[np.float64], "torch.Tensor")

MAX_ABSOLUTE_VALUE = 1e15
"""Squared distances of larger values leave the range of float32."""

_ROWS_PER_BLOCK = 65_536


class Quantizer(Protocol):
    """Learns codes from vectors, then gives each vector its codes.

    ``encode`` of an untrained quantizer raises ``CodebookError``. The codes of a vector depend on
    that vector alone: not on the batch, its order, or the number of threads.
    """

    def train(self, x_ND: Embeddings) -> None:
        """Learn from ``x_ND``, float32 ``[N, D]``; same input and settings, same result."""

    def encode(self, x_ND: Embeddings) -> Codes:
        """Return the codes of each row, int64 ``[N, C]``; no rows give ``[0, C]``."""

    def decode(self, codes_NC: Codes) -> Embeddings:
        """Return the vector that each row of codes stands for, float32 ``[N, D]``."""

    def arrays(self) -> Arrays:
        """Return what has been learnt, by name: what an artifact stores."""


def check_embeddings(x_ND: Embeddings, embedding_dim: int | None = None) -> None:
    """Refuse what no quantizer can work with.

    Args:
        x_ND: The vectors to look at.
        embedding_dim: Required width; None takes any width above zero.

    Raises:
        CodebookError: If the array is not a float32 matrix of the required width.
        DataError: If a value is NaN, infinite, or so large that its square leaves float32.
    """
    if x_ND.ndim != 2 or x_ND.dtype != np.float32:
        raise CodebookError(
            f"vectors must be a float32 matrix, got {x_ND.dtype} with shape {x_ND.shape}"
        )
    if x_ND.shape[1] != (embedding_dim or x_ND.shape[1]) or x_ND.shape[1] == 0:
        raise CodebookError(
            f"vectors are {x_ND.shape[1]} wide, this codebook takes width {embedding_dim or '> 0'}"
        )
    # NaN passes through min and max and fails the comparison: no fault, no array of its own.
    if x_ND.min(initial=0) > -MAX_ABSOLUTE_VALUE and x_ND.max(initial=0) < MAX_ABSOLUTE_VALUE:
        return
    is_usable_N = (np.abs(x_ND) < MAX_ABSOLUTE_VALUE).all(axis=1)
    first = int(np.argmin(is_usable_N))
    raise DataError(
        f"{int((~is_usable_N).sum())} of {len(x_ND)} vectors hold NaN, an infinite value or "
        f"one beyond {MAX_ABSOLUTE_VALUE:g}; the first is row {first}"
    )


def usable_rows(x_ND: Embeddings) -> npt.NDArray[np.bool_]:
    """Return which rows can be coded: finite, in range, and not of length zero."""
    is_finite_N = np.abs(x_ND).max(axis=1, initial=0) < MAX_ABSOLUTE_VALUE
    is_usable_N: npt.NDArray[np.bool_] = is_finite_N & (x_ND != 0).any(axis=1)
    return is_usable_N


def unit_rows(x_ND: Embeddings) -> Embeddings:
    """Return ``x_ND`` with each row scaled to length 1.

    A row's result depends on that row alone: squares are summed in float64 by :func:`fold_sum`.

    Args:
        x_ND: Vectors, float32, finite.

    Returns:
        A new array of the same shape, float32.

    Raises:
        DataError: If a row has length zero.
    """
    unit_ND = np.empty_like(x_ND)
    for start in range(0, len(x_ND), _ROWS_PER_BLOCK):
        block_BD = x_ND[start : start + _ROWS_PER_BLOCK].astype(np.float64)
        norm_B = np.sqrt(fold_sum(np.square(block_BD)))
        if not norm_B.all():
            raise DataError(
                f"{int((norm_B == 0).sum())} vectors have length zero; "
                f"the first is row {start + int(np.argmin(norm_B))}"
            )
        unit_ND[start : start + _ROWS_PER_BLOCK] = block_BD / norm_B[:, None]
    return unit_ND


def fold_sum(terms_ND: MatrixT) -> MatrixT:
    """Return each row's sum in the canonical order; overwrites ``terms_ND``.

    The upper part is folded onto the lower part until one column is left; the cut is at the
    largest power of two below the width. Each step is elementwise, so no library, thread count or
    vector width can change the order of the additions.
    """
    width = terms_ND.shape[1]
    while width > 1:
        cut = 1 << (width - 1).bit_length() - 1
        terms_ND[:, : width - cut] += terms_ND[:, cut:width]
        width = cut
    return terms_ND[:, 0]

"""Where training vectors come from: memory, or batches of more than memory holds.

Shape letters in this file: N items, D embedding width, B items of a batch, M rows taken.
May import: NumPy, the quantizers' checks.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import DataError
from qarm_feast.quantizers.base import Embeddings, check_embeddings, unit_rows, usable_rows

ItemIds = npt.NDArray[np.int64]

_ROWS_PER_BATCH = 65_536


class VectorSource(Protocol):
    """Items and their vectors, which come in batches and can be read again."""

    def item_ids(self) -> ItemIds:
        """Return the ids of the items, int64 ``[N]``, in the order of the batches."""

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""

    def batches(self) -> Iterator[Embeddings]:
        """Yield the vectors in order, float32 ``[B, D]``."""


class VectorsInMemory:
    """A source whose vectors are one matrix, float32 ``[N, D]``."""

    def __init__(self, item_ids_N: ItemIds, x_ND: Embeddings) -> None:
        if x_ND.ndim != 2 or len(item_ids_N) != len(x_ND):
            raise DataError(f"{len(item_ids_N)} items came with vectors of shape {x_ND.shape}")
        self._item_ids_N = item_ids_N
        self._x_ND = x_ND

    @property
    def embedding_dim(self) -> int:
        """Width of the vectors."""
        return int(self._x_ND.shape[1])

    def item_ids(self) -> ItemIds:
        """Return the ids of the rows."""
        return self._item_ids_N

    def batches(self) -> Iterator[Embeddings]:
        """Yield slices of the matrix."""
        for start in range(0, len(self._x_ND), _ROWS_PER_BATCH):
            yield self._x_ND[start : start + _ROWS_PER_BATCH]


def take_unit_rows(source: VectorSource, rows_M: npt.NDArray[np.int64]) -> Embeddings:
    """Return some rows of ``source`` scaled to length 1, after a check of all of its rows.

    Args:
        source: Read once, from first to last batch.
        rows_M: Places in the source, each once, in any order.

    Returns:
        A new matrix in the order of ``rows_M``, float32 ``[M, D]``.

    Raises:
        DataError: If a vector of the source is NaN, infinite, out of range or of length zero.
        CodebookError: If the vectors are no float32 matrix.
    """
    by_place_M = np.argsort(rows_M)
    places_M = rows_M[by_place_M]
    taken_MD = np.empty((len(rows_M), source.embedding_dim), dtype=np.float32)
    item_ids_N = source.item_ids()
    start = 0
    for x_BD in source.batches():
        check_usable(item_ids_N[start : start + len(x_BD)], x_BD)
        low, high = np.searchsorted(places_M, [start, start + len(x_BD)])
        taken_MD[by_place_M[low:high]] = unit_rows(x_BD[places_M[low:high] - start])
        start += len(x_BD)
    return taken_MD


def checked_unit_rows(item_ids_N: ItemIds, x_ND: Embeddings) -> Embeddings:
    """Return rows of length 1; refuse vectors that have no code, and say whose they are.

    Args:
        item_ids_N: Items.
        x_ND: Their vectors, float32.

    Returns:
        A new matrix, float32 ``[N, D]``.

    Raises:
        DataError: If lengths differ, or a vector is NaN, infinite, out of range or of length zero.
        CodebookError: If the vectors are no float32 matrix.
    """
    if x_ND.ndim != 2 or len(item_ids_N) != len(x_ND):
        raise DataError(f"{len(item_ids_N)} items came with vectors of shape {x_ND.shape}")
    check_usable(item_ids_N, x_ND)
    return unit_rows(x_ND)


def check_usable(item_ids_N: ItemIds, x_ND: Embeddings) -> None:
    """Refuse vectors that have no code, and say whose they are.

    Args:
        item_ids_N: Items.
        x_ND: Their vectors.

    Raises:
        DataError: If a vector is NaN, infinite, out of range or of length zero.
        CodebookError: If the vectors are no float32 matrix.
    """
    is_usable_N = usable_rows(x_ND)
    if not is_usable_N.all():
        raise DataError(
            f"{int((~is_usable_N).sum())} of {len(x_ND)} vectors are NaN, infinite, out of range "
            "or of length zero; "
            f"the first is that of item {int(item_ids_N[np.argmin(is_usable_N)])}"
        )
    check_embeddings(x_ND)

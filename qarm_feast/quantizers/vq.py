"""Vector quantization by neighbours (VQ): an item's code is its nearest items of a pool.

Shape letters in this file: N items, P pool rows, D embedding width, k neighbours.
May import: NumPy, torch through ``search``.
"""

from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from qarm_feast.config import Section
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers.base import Arrays, Codes, Embeddings, check_embeddings
from qarm_feast.quantizers.kmeans import sample_rows
from qarm_feast.quantizers.search import NearestSearch

ItemIds = npt.NDArray[np.int64]


class VqConfig(Section):
    """Neighbour quantizer."""

    pool_size: Literal["auto"] | Annotated[int, Field(gt=1)] = Field(
        default="auto",
        description="Pool rows; auto takes every item with a train row, a number a sample of them.",
    )
    num_neighbors: int = Field(default=25, gt=0, description="Pool rows in a code.")
    seed: int = Field(default=0, ge=0, description="Seed of the pool's sample.")


class NeighborQuantizer:
    """The code of a vector: the rows of its nearest pool items, nearest first."""

    def __init__(
        self,
        config: VqConfig | None = None,
        pool_vectors_PD: Embeddings | None = None,
        pool_item_ids_P: ItemIds | None = None,
    ) -> None:
        self._config = config or VqConfig()
        self._search: NearestSearch | None = None
        if pool_vectors_PD is not None:
            self.set_pool(pool_vectors_PD, pool_item_ids_P)

    @property
    def num_neighbors(self) -> int:
        """Pool rows in a code."""
        return self._config.num_neighbors

    def train(self, x_ND: Embeddings, item_ids_N: ItemIds | None = None) -> None:
        """Make ``x_ND``, or a sample of it, the pool.

        Args:
            x_ND: Vectors of the items that may stand in the pool, float32.
            item_ids_N: Their ids, each once; None numbers the rows.

        Raises:
            CodebookError: If there are too few items for the pool or for a code.
            DataError: If there are no vectors, a value is NaN or infinite, or an id comes twice.
        """
        check_embeddings(x_ND)
        rows_P = self.pool_rows(len(x_ND))
        ids_N = np.arange(len(x_ND), dtype=np.int64) if item_ids_N is None else item_ids_N
        self.set_pool(x_ND[rows_P], ids_N[rows_P])

    def pool_rows(self, num_items: int) -> npt.NDArray[np.int64]:
        """Return which of ``num_items`` items stand in the pool, ascending.

        Args:
            num_items: Items that may stand in it.

        Returns:
            Places of the items, a seeded sample.

        Raises:
            CodebookError: If there are too few items for ``pool_size``.
            DataError: If there are no items.
        """
        if num_items == 0:
            raise DataError("no vectors to make a pool of")
        pool_size = self._config.pool_size
        if pool_size != "auto" and pool_size > num_items:
            raise CodebookError(
                f"quantizer.vq.pool_size is {pool_size}, but only {num_items} items can stand in "
                "the pool; lower it or set it to auto"
            )
        generator = np.random.default_rng(self._config.seed)
        return sample_rows(num_items, num_items if pool_size == "auto" else pool_size, generator)

    def set_pool(self, pool_vectors_PD: Embeddings, pool_item_ids_P: ItemIds | None) -> None:
        """Take a pool as it is.

        Args:
            pool_vectors_PD: Vectors, float32.
            pool_item_ids_P: The items in its rows, each once; None numbers the rows.

        Raises:
            CodebookError: If there are too few items for a code.
            DataError: If an id comes twice.
        """
        if pool_item_ids_P is None:
            pool_item_ids_P = np.arange(len(pool_vectors_PD), dtype=np.int64)
        if len(np.unique(pool_item_ids_P)) != len(pool_vectors_PD):
            raise DataError(
                f"the pool has {len(pool_vectors_PD)} vectors and "
                f"{len(np.unique(pool_item_ids_P))} distinct item ids; each item may come once"
            )
        if len(pool_vectors_PD) < self.num_neighbors + 1:
            raise CodebookError(
                f"a pool of {len(pool_vectors_PD)} items cannot give {self.num_neighbors} "
                f"neighbours besides the item itself; lower quantizer.vq.num_neighbors"
            )
        self._search = NearestSearch(pool_vectors_PD)
        self.pool_vectors_PD = pool_vectors_PD
        self.pool_item_ids_P = pool_item_ids_P

    def encode(self, x_ND: Embeddings, item_ids_N: ItemIds | None = None) -> Codes:
        """Return the nearest pool rows of each vector, nearest first, the item itself left out.

        Args:
            x_ND: Vectors, float32.
            item_ids_N: The items whose vectors these are; an item is never its own neighbour, so
                that new and old items get the same kind of list. None excludes nothing.

        Returns:
            Pool rows of shape ``[N, k]``, int64, each in ``[0, P)``.

        Raises:
            CodebookError: If the quantizer is untrained or the widths differ.
            DataError: If a value is NaN or infinite.
        """
        search = self._trained()
        if item_ids_N is None:
            return search.search(x_ND, self.num_neighbors)
        # One more than wanted: without the item itself the order of the rest does not change.
        rows_Nk = search.search(x_ND, self.num_neighbors + 1)
        is_left_out_Nk = self.pool_item_ids_P[rows_Nk] == item_ids_N[:, None]
        is_left_out_Nk[~is_left_out_Nk.any(axis=1), -1] = True
        kept_Nk: Codes = rows_Nk[~is_left_out_Nk].reshape(len(x_ND), self.num_neighbors)
        return kept_Nk

    def decode(self, codes_NC: Codes) -> Embeddings:
        """Return the mean of the pool vectors that each code lists.

        Args:
            codes_NC: Pool rows, int64.

        Returns:
            Vectors of shape ``[N, D]``, float32.

        Raises:
            CodebookError: If the quantizer is untrained or a code is no pool row.
        """
        self._trained()
        pool_size = len(self.pool_vectors_PD)
        if not ((codes_NC >= 0) & (codes_NC < pool_size)).all():
            raise CodebookError(
                f"vq_code holds {codes_NC.min()} ... {codes_NC.max()}; this pool has rows "
                f"0 ... {pool_size - 1}"
            )
        decoded_ND = np.zeros((len(codes_NC), self.pool_vectors_PD.shape[1]), dtype=np.float64)
        for rows_N in codes_NC.T:
            decoded_ND += self.pool_vectors_PD[rows_N]
        mean_ND: Embeddings = (decoded_ND / codes_NC.shape[1]).astype(np.float32)
        return mean_ND

    def arrays(self) -> Arrays:
        """Return ``pool_vectors`` and ``pool_item_ids``, row by row."""
        self._trained()
        return {"pool_vectors": self.pool_vectors_PD, "pool_item_ids": self.pool_item_ids_P}

    def _trained(self) -> NearestSearch:
        if self._search is None:
            raise CodebookError("this neighbour quantizer has no pool; call train first")
        return self._search

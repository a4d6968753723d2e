"""The canonical nearest search with faiss as its filter: for a GPU that faiss drives.

A flat index returns a short list with float32 distances; :class:`NearestSearch` orders it by the
rule, and scans all centroids for the rows whose list is not provably long enough. The thread of
:func:`~qarm_feast.quantizers.devices.gpu_owner` makes the index, asks it and frees it.

Shape letters in this file: N items, B items of a block, K centroids, D embedding width,
M short-listed centroids per item, k nearest wanted.
May import: NumPy, faiss through ``devices``.
"""

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers.base import Codes, Embeddings, check_embeddings
from qarm_feast.quantizers.devices import Gpu, gpu_owner, load_faiss
from qarm_feast.quantizers.search import NearestSearch

MAX_GPU_NEIGHBORS = 2048
"""The most results per query that faiss computes on a GPU."""
_NUM_SPARE = 8
_ROWS_PER_BLOCK = 16_384
_SMALLEST_DISTANCE = 1e-30
"""Absolute slack: below it the products of a distance may have been flushed to zero."""


class FaissSearch:
    """Searches one set of centroids with a faiss index on a GPU, or on the processor (``None``).

    The interface of :class:`NearestSearch`, with its codes. Safe to share between threads, which
    wait for each other. Owns the index and, on a GPU, its memory until :meth:`close`.
    """

    def __init__(self, centroids_KD: Embeddings, gpu: Gpu | None) -> None:
        self._exact = NearestSearch(centroids_KD, "cpu" if gpu is None else f"cuda:{gpu.number}")
        self._shape = centroids_KD.shape
        stride = -(-len(centroids_KD) // _ROWS_PER_BLOCK)
        self._centre_D = np.median(centroids_KD[::stride], axis=0).astype(np.float32)
        centred_KD = centroids_KD - self._centre_D
        self._largest_square = float(np.square(centred_KD.astype(np.float64)).sum(axis=1).max())
        index = load_faiss().IndexFlatL2(centred_KD.shape[1])
        index.add(np.ascontiguousarray(centred_KD))
        self._index = index if gpu is None else gpu_owner().copy_to_gpu(index, gpu)

    def search(self, x_ND: Embeddings, k: int = 1) -> Codes:
        """Return the k nearest centroids of each row.

        Args:
            x_ND: Vectors, float32.
            k: How many centroids to return per vector.

        Returns:
            Indices of shape ``[N, k]``, int64, nearest first.

        Raises:
            CodebookError: If widths differ, there are fewer than k centroids, or k is more than
                faiss computes on a GPU.
            DataError: If a value is NaN or infinite.
        """
        num_centroids, embedding_dim = self._shape
        check_embeddings(x_ND, embedding_dim)
        most = min(num_centroids, MAX_GPU_NEIGHBORS - _NUM_SPARE)
        if not 0 < k <= most:
            raise CodebookError(
                f"k={k} neighbours wanted of {num_centroids} centroids; faiss takes up to {most}"
            )
        codes_Nk = np.empty((len(x_ND), k), dtype=np.int64)
        for start in range(0, len(x_ND), _ROWS_PER_BLOCK):
            block = slice(start, start + _ROWS_PER_BLOCK)
            codes_Nk[block] = self._search_block(np.array(x_ND[block], order="C"), k)
        return codes_Nk

    def subtract_nearest(self, residual_ND: Embeddings) -> Codes:
        """Replace each row by what its nearest centroid leaves over, and return those centroids."""
        codes_N: Codes = self.search(residual_ND)[:, 0]
        residual_ND -= self._exact.centroids(codes_N)
        return codes_N

    def close(self) -> None:
        """Free the index, in the thread that made it; the search cannot be used afterwards."""
        gpu_owner().run(delattr, self, "_index")

    def _search_block(self, x_BD: Embeddings, k: int) -> Codes:
        centred_BD = x_BD - self._centre_D
        num_listed = min(k + _NUM_SPARE, self._shape[0])
        # One call at a time: the owner's queue is the lock.
        rough_BM, listed_BM = gpu_owner().run(self._index.search, centred_BD, num_listed)
        codes_Bk = self._exact.decide(x_BD, listed_BM, k)
        open_B = np.flatnonzero(~self._is_settled(centred_BD, rough_BM, k))
        if len(open_B):
            codes_Bk[open_B] = self._exact.search(x_BD[open_B], k)
        return codes_Bk

    def _is_settled(
        self, centred_BD: Embeddings, rough_BM: npt.NDArray[np.float32], k: int
    ) -> npt.NDArray[np.bool_]:
        """Return for which rows no centroid outside the list can be among the k nearest."""
        if rough_BM.shape[1] == self._shape[0]:
            return np.ones(len(rough_BM), dtype=bool)
        squares_B = np.square(centred_BD.astype(np.float64)).sum(axis=1)
        # Two norms and a product of D terms, in any order; then the rule's rounding to float32.
        slack = (2 * centred_BD.shape[1] + 32) * 2.0**-24
        bound_B = slack * (squares_B + self._largest_square) + _SMALLEST_DISTANCE
        gap_B = rough_BM[:, -1].astype(np.float64) - rough_BM[:, k - 1]
        is_settled_B: npt.NDArray[np.bool_] = gap_B > 2 * bound_B
        return is_settled_B

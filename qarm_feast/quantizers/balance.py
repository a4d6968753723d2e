"""Balanced k-means: centroids whose cells hold about equally many points.

Two means, both aimed at N / K points per cell, and both acting on training only: encoding stays
the nearest rule.

- Prices. A cell that holds more than its share gets dearer, one that holds less cheaper; a point
  goes where squared distance plus price is least. Prices are bounded: where a dense cluster cannot
  be spread at all, points would be driven to far centroids, which then stand between clusters and
  serve nobody.
- Splits. Every other iteration of the first half, the emptiest cells (below half of their share)
  restart as halves of the fullest (above one and a half), so that dense clusters get more
  centroids.

A price enters as one more coordinate: points have 0 there, centroids the root of their price, so
squared distances grow by just the price and the canonical nearest rule applies unchanged.

Shape letters in this file: N points, K centroids, D embedding width, E = D + 1,
M points of a cell.
May import: NumPy, torch through ``search``.
"""

import numpy as np
import numpy.typing as npt

from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.kmeans import cell_means
from qarm_feast.quantizers.search import nearest, squared_distances

PRICE_STEP = 0.05
"""Price change per e-fold of a cell's share, as a part of the mean squared distance."""
MAX_PRICE = 0.3
"""Largest price up or down, as a part of the mean squared distance."""
FULL_CELL = 1.5
EMPTY_CELL = 0.5
"""Cells above and below these multiples of N / K are split and restarted."""


def balanced_lloyd(x_ND: Embeddings, start_KD: Embeddings, num_iterations: int) -> Embeddings:
    """Return centroids like :func:`~qarm_feast.quantizers.kmeans.lloyd`, with more even cells.

    Takes one to two times as long: the same searches, and one more where cells are split. Holds a
    second copy of the points.

    Args:
        x_ND: Points, float32.
        start_KD: Centroids to start from.
        num_iterations: Iterations to run.

    Returns:
        Centroids of shape ``[K, D]``, float32, in the order of ``start_KD``.
    """
    centroids_KD = start_KD
    wide_NE = _with_column(x_ND, np.float32(0))
    prices_K = np.zeros(len(start_KD))
    for iteration in range(num_iterations):
        codes_N = _cheapest(wide_NE, centroids_KD, prices_K)
        distances_N = squared_distances(x_ND, centroids_KD[codes_N])
        centroids_KD = cell_means(x_ND, codes_N, centroids_KD)
        if iteration % 2 == 0 and iteration < num_iterations // 2:
            centroids_KD, num_split = _split_cells(x_ND, centroids_KD)
            if num_split:
                # Prices were made for cells that are gone.
                prices_K = np.zeros(len(start_KD))
                continue
        counts_K = np.bincount(codes_N, minlength=len(start_KD))
        prices_K = _moved_prices(prices_K, counts_K, float(distances_N.mean(dtype=np.float64)))
    return centroids_KD


def _cheapest(
    wide_NE: Embeddings, centroids_KD: Embeddings, prices_K: npt.NDArray[np.float64]
) -> Codes:
    roots_K = np.sqrt(prices_K - prices_K.min()).astype(np.float32)
    codes_N: Codes = nearest(wide_NE, _with_column(centroids_KD, roots_K))[:, 0]
    return codes_N


def _with_column(x_ND: Embeddings, last_N: npt.NDArray[np.float32] | np.float32) -> Embeddings:
    wide_NE = np.empty((len(x_ND), x_ND.shape[1] + 1), dtype=np.float32)
    wide_NE[:, :-1] = x_ND
    wide_NE[:, -1] = last_N
    return wide_NE


def _moved_prices(
    prices_K: npt.NDArray[np.float64], counts_K: npt.NDArray[np.int64], mean_distance: float
) -> npt.NDArray[np.float64]:
    shares_K = np.maximum(counts_K, 0.5) * len(counts_K) / counts_K.sum()
    limit = MAX_PRICE * mean_distance
    moved_K: npt.NDArray[np.float64] = np.clip(
        prices_K + PRICE_STEP * mean_distance * np.log(shares_K), -limit, limit
    )
    return moved_K


def _split_cells(x_ND: Embeddings, centroids_KD: Embeddings) -> tuple[Embeddings, int]:
    """Let the emptiest cells restart as halves of the fullest; return how many did."""
    codes_N = nearest(x_ND, centroids_KD)[:, 0]
    share = len(x_ND) / len(centroids_KD)
    counts_K = np.bincount(codes_N, minlength=len(centroids_KD))
    ascending_K = np.argsort(counts_K, kind="stable")
    empty = ascending_K[counts_K[ascending_K] < EMPTY_CELL * share].tolist()
    full = ascending_K[::-1][counts_K[ascending_K[::-1]] > FULL_CELL * share].tolist()
    rows_N = np.argsort(codes_N, kind="stable")
    ends_K = np.cumsum(counts_K)
    changed_KD = centroids_KD.copy()
    for donor, receiver in zip(full, empty, strict=False):
        members_M = rows_N[ends_K[donor] - counts_K[donor] : ends_K[donor]]
        changed_KD[[donor, receiver]] = _halves(x_ND[members_M], centroids_KD[donor])
    return changed_KD, min(len(full), len(empty))


def _halves(x_MD: Embeddings, centroid_D: Embeddings) -> Embeddings:
    """Return the means of a cell's two halves, cut across the line to its farthest point."""
    from_centroid_MD = x_MD.astype(np.float64) - centroid_D
    farthest_D = from_centroid_MD[np.square(from_centroid_MD).sum(axis=1).argmax()]
    order_M = np.argsort((from_centroid_MD * farthest_D).sum(axis=1), kind="stable")
    middle = len(x_MD) // 2
    halves = (x_MD[order_M[:middle]], x_MD[order_M[middle:]])
    return np.stack([half.mean(axis=0, dtype=np.float64) for half in halves]).astype(np.float32)

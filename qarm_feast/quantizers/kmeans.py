"""K-means: centroids that are the means of their own cells.

Shape letters in this file: N points, K centroids, D embedding width, T trial points,
B points of a block, U codes in use, E empty cells.
May import: NumPy, torch through ``search``.
"""

import numpy as np
import numpy.typing as npt

from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.search import RoughDistances, nearest, squared_distances

_ROWS_PER_BLOCK = 65_536
_MIN_START_SAMPLE = 16_384
_START_POINTS_PER_CENTROID = 8


def plus_plus_start(
    x_ND: Embeddings, num_centroids: int, generator: np.random.Generator
) -> Embeddings:
    """Return points of ``x_ND`` that lie far apart: greedy k-means++ on a sample.

    Each centroid is the best of a few points drawn with a chance that grows with the squared
    distance to the centroids before it.

    Args:
        x_ND: Points, float32; at least ``num_centroids`` of them.
        num_centroids: How many points to choose.
        generator: Source of every draw.

    Returns:
        Chosen points of shape ``[K, D]``, float32.
    """
    sample_size = max(_MIN_START_SAMPLE, _START_POINTS_PER_CENTROID * num_centroids)
    rows_N = sample_rows(len(x_ND), sample_size, generator)
    distances = RoughDistances(x_ND[rows_N])
    num_trials = 2 + int(np.log(num_centroids))
    chosen = [int(generator.integers(len(rows_N)))]
    closest_N = distances.to_all(np.array(chosen))[0]
    while len(chosen) < num_centroids:
        trials_T = _draw_trials(closest_N, chosen, num_trials, generator)
        closest_TN = np.minimum(closest_N, distances.to_all(trials_T))
        best = int(closest_TN.sum(axis=1, dtype=np.float64).argmin())
        chosen.append(int(trials_T[best]))
        closest_N = closest_TN[best]
    return x_ND[rows_N[chosen]]


def lloyd(x_ND: Embeddings, start_KD: Embeddings, num_iterations: int) -> Embeddings:
    """Return the centroids after Lloyd's iterations from ``start_KD``.

    Stops early when no point changes its cell. Sums are taken in float64 in row order, and cells
    by the canonical rule, so the result does not depend on the number of threads.

    Args:
        x_ND: Points, float32.
        start_KD: Centroids to start from: chosen points, or an older codebook (a warm start).
        num_iterations: Most iterations to run.

    Returns:
        Centroids of shape ``[K, D]``, float32, in the order of ``start_KD``.
    """
    centroids_KD = start_KD
    codes_N = np.full(len(x_ND), -1, dtype=np.int64)
    for _ in range(num_iterations):
        new_codes_N = nearest(x_ND, centroids_KD)[:, 0]
        if np.array_equal(new_codes_N, codes_N):
            break
        codes_N = new_codes_N
        centroids_KD = cell_means(x_ND, codes_N, centroids_KD)
    return centroids_KD


def cell_means(x_ND: Embeddings, codes_N: Codes, centroids_KD: Embeddings) -> Embeddings:
    """Return the mean of each cell; an empty cell restarts at a point far from its centroid.

    Args:
        x_ND: Points, float32.
        codes_N: The cell of each point.
        centroids_KD: What the points of a cell are far from; one row per cell.

    Returns:
        Centroids of shape ``[K, D]``, float32; sums are taken in float64 in row order.
    """
    sums_KD = np.zeros(centroids_KD.shape, dtype=np.float64)
    counts_K = np.bincount(codes_N, minlength=len(centroids_KD))
    for start in range(0, len(x_ND), _ROWS_PER_BLOCK):
        codes_B = codes_N[start : start + _ROWS_PER_BLOCK]
        order_B = np.argsort(codes_B, kind="stable")
        used_U, first_U = np.unique(codes_B[order_B], return_index=True)
        block_BD = x_ND[start : start + _ROWS_PER_BLOCK][order_B].astype(np.float64)
        sums_KD[used_U] += np.add.reduceat(block_BD, first_U, axis=0)
    means_KD: Embeddings = (sums_KD / np.maximum(counts_K, 1)[:, None]).astype(np.float32)
    empty_E = np.flatnonzero(counts_K == 0)
    if len(empty_E):
        distances_N = _own_distances(x_ND, codes_N, centroids_KD)
        farthest_N = np.argsort(-distances_N, kind="stable")
        means_KD[empty_E] = x_ND[farthest_N[: len(empty_E)]]
    return means_KD


def sample_rows(
    num_rows: int, sample_size: int, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return at most ``sample_size`` distinct row numbers, ascending; all rows if they fit."""
    if num_rows <= sample_size:
        return np.arange(num_rows, dtype=np.int64)
    return np.sort(generator.choice(num_rows, size=sample_size, replace=False).astype(np.int64))


def num_distinct_rows(x_ND: Embeddings) -> int:
    """Return how many different rows ``x_ND`` has."""
    # Adding zero turns -0.0 into 0.0, so that equal numbers have equal bytes.
    contiguous_ND = np.ascontiguousarray(x_ND + np.float32(0))
    return len(np.unique(contiguous_ND.view(f"V{contiguous_ND.strides[0]}")))


def _draw_trials(
    closest_N: npt.NDArray[np.float32],
    chosen: list[int],
    num_trials: int,
    generator: np.random.Generator,
) -> npt.NDArray[np.int64]:
    cumulative_N = closest_N.cumsum(dtype=np.float64)
    if cumulative_N[-1] == 0.0:
        # Every other point equals a chosen one up to rounding: take one that was not chosen.
        return np.setdiff1d(np.arange(len(closest_N)), chosen)[:1]
    draws_T = generator.random(num_trials) * cumulative_N[-1]
    rows_T = np.searchsorted(cumulative_N, draws_T, side="right")
    last = np.flatnonzero(closest_N)[-1]
    trials_T: npt.NDArray[np.int64] = np.minimum(rows_T, last).astype(np.int64)
    return trials_T


def _own_distances(x_ND: Embeddings, codes_N: Codes, centroids_KD: Embeddings) -> Embeddings:
    parts = [
        squared_distances(
            x_ND[start : start + _ROWS_PER_BLOCK],
            centroids_KD[codes_N[start : start + _ROWS_PER_BLOCK]],
        )
        for start in range(0, len(x_ND), _ROWS_PER_BLOCK)
    ]
    return np.concatenate(parts)

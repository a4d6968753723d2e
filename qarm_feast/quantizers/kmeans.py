"""K-means: centroids that are the means of their own cells.

Shape letters in this file: N points, K centroids, D embedding width, T trial points,
B points of a block, E empty cells.
May import: NumPy, SciPy, torch through ``search``.
"""

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.native import cell_sums, kernels
from qarm_feast.quantizers.search import RoughDistances, nearest, squared_distances

_ROWS_PER_BLOCK = 65_536
_MIN_START_SAMPLE = 4096
_START_POINTS_PER_CENTROID = 16
_TRIALS_PER_CENTROID = 4
_CHOSEN_PER_ADDED = 16


def plus_plus_start(
    x_ND: Embeddings, num_centroids: int, generator: np.random.Generator
) -> Embeddings:
    """Return points of ``x_ND`` that lie far apart: greedy k-means++ on a sample, in rounds.

    Trial points are drawn with a chance that grows with the squared distance to the points chosen
    so far. A round adds up to a 16th of those, best first, where best is the trial that lowers the
    sum of all distances most; a trial that the round itself has come near to is left out. One
    point at a time would choose about as well, and wait for memory.

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
    chosen = [int(generator.integers(len(rows_N)))]
    closest_N = distances.to_nearest(np.array(chosen))
    while len(chosen) < num_centroids:
        most = min(num_centroids - len(chosen), max(1, len(chosen) // _CHOSEN_PER_ADDED))
        trials_T = _draw_trials(closest_N, chosen, most * _TRIALS_PER_CENTROID, generator)
        added = _best_trials(distances, trials_T, closest_N, most)
        chosen.extend(added.tolist())
        closest_N = np.minimum(closest_N, distances.to_nearest(added))
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
        Centroids of shape ``[K, D]``, float32. Sums are taken in float64, in row order within
        blocks of rows and then block after block, whatever the number of threads.
    """
    counts_K = np.bincount(codes_N, minlength=len(centroids_KD))
    library = kernels()
    if library is None:
        sums_KD = _cell_sums(x_ND, codes_N, len(centroids_KD))
    else:
        sums_KD = cell_sums(library, x_ND, codes_N, len(centroids_KD), _ROWS_PER_BLOCK)
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
    """Return how many different rows ``x_ND`` has, told apart by a hash of 64 bits.

    Memory grows by 16 bytes a row, not by copies of the rows. Two different rows count as one
    with a chance of about 2^-64 per pair: 2 M rows, all different, lose one in 10^7 such sets.
    """
    generator = np.random.default_rng(0)
    factors_D = generator.integers(1 << 64, size=x_ND.shape[1], dtype=np.uint64) | np.uint64(1)
    hashes_N = np.empty(len(x_ND), dtype=np.uint64)
    for start in range(0, len(x_ND), _ROWS_PER_BLOCK):
        # Adding zero turns -0.0 into 0.0, so that equal numbers have equal bits.
        block_BD = np.ascontiguousarray(x_ND[start : start + _ROWS_PER_BLOCK] + np.float32(0))
        terms_BD = block_BD.view(np.uint32) * factors_D
        # The lower half gets its share of the upper bits, such as the sign.
        terms_BD ^= terms_BD >> np.uint64(32)
        hashes_N[start : start + _ROWS_PER_BLOCK] = terms_BD.sum(axis=1)
    return len(np.unique(hashes_N))


def _cell_sums(x_ND: Embeddings, codes_N: Codes, num_cells: int) -> npt.NDArray[np.float64]:
    """Return the sum of each cell's rows, in row order within blocks, then block after block."""
    sums_KD = np.zeros((num_cells, x_ND.shape[1]))
    for start in range(0, len(x_ND), _ROWS_PER_BLOCK):
        block = slice(start, start + _ROWS_PER_BLOCK)
        order_B = np.argsort(codes_N[block], kind="stable")
        ends_K = np.cumsum(np.bincount(codes_N[block], minlength=num_cells))
        # A sparse product adds row after row; numpy's reductions add in an order of their own.
        is_in_cell_KB = csr_array(
            (np.ones(len(order_B)), order_B, np.concatenate(([0], ends_K))),
            shape=(num_cells, len(order_B)),
        )
        sums_KD += is_in_cell_KB @ x_ND[block].astype(np.float64)
    return sums_KD


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
    return np.unique(np.minimum(rows_T, last)).astype(np.int64)


def _best_trials(
    distances: RoughDistances,
    trials_T: npt.NDArray[np.int64],
    closest_N: npt.NDArray[np.float32],
    most: int,
) -> npt.NDArray[np.int64]:
    """Return up to ``most`` trials by falling gain, without those near to a better one."""
    between_TT = distances.between(trials_T, trials_T)
    before_T = closest_N[trials_T]
    now_T = before_T.copy()
    taken: list[int] = []
    for trial in np.argsort(-distances.gains(trials_T, closest_N), kind="stable").tolist():
        if 2 * now_T[trial] >= before_T[trial]:
            taken.append(trial)
            now_T = np.minimum(now_T, between_TT[trial])
        if len(taken) == most:
            break
    return trials_T[taken]


def _own_distances(x_ND: Embeddings, codes_N: Codes, centroids_KD: Embeddings) -> Embeddings:
    parts = [
        squared_distances(
            x_ND[start : start + _ROWS_PER_BLOCK],
            centroids_KD[codes_N[start : start + _ROWS_PER_BLOCK]],
        )
        for start in range(0, len(x_ND), _ROWS_PER_BLOCK)
    ]
    return np.concatenate(parts)

"""Shape letters in this file: N points, D embedding width, K centroids."""

import numpy as np
import pytest

from qarm_feast.quality import code_use
from qarm_feast.quantizers.balance import (
    EMPTY_CELL,
    FULL_CELL,
    MAX_PRICE,
    PRICE_STEP,
    balanced_lloyd,
)
from qarm_feast.quantizers.kmeans import lloyd, plus_plus_start
from qarm_feast.quantizers.search import nearest


def _skewed(num_points: int = 4000, dim: int = 16) -> np.ndarray:
    """Clusters whose sizes fall like 1 / rank."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 101)
    centres = rng.standard_normal((100, dim))
    cluster_N = rng.choice(100, size=num_points, p=shares / shares.sum())
    x_ND = centres[cluster_N] + 0.3 * rng.standard_normal((num_points, dim))
    return x_ND.astype(np.float32)


def _reference(x_ND: np.ndarray, start_KD: np.ndarray, num_iterations: int) -> np.ndarray:
    """The written method, cell by cell, in float64; for points that leave no cell empty."""
    x_ND, centroids_KD = x_ND.astype(np.float64), start_KD.astype(np.float64)
    size, share = len(start_KD), len(x_ND) / len(start_KD)
    prices = np.zeros(size)
    for iteration in range(num_iterations):
        squared_NK = ((x_ND[:, None] - centroids_KD) ** 2).sum(axis=2)
        codes_N = (squared_NK + prices - prices.min()).argmin(axis=1)
        mean = squared_NK[np.arange(len(x_ND)), codes_N].mean()
        centroids_KD = np.array([x_ND[codes_N == code].mean(axis=0) for code in range(size)])
        counts = np.bincount(codes_N, minlength=size)
        if iteration % 2 == 0 and iteration < num_iterations // 2:
            codes_N = ((x_ND[:, None] - centroids_KD) ** 2).sum(axis=2).argmin(axis=1)
            new_counts = np.bincount(codes_N, minlength=size)
            by_count = sorted(range(size), key=lambda code: (new_counts[code], code))
            empty = [code for code in by_count if new_counts[code] < EMPTY_CELL * share]
            full = [code for code in by_count[::-1] if new_counts[code] > FULL_CELL * share]
            before_KD = centroids_KD.copy()
            for donor, receiver in zip(full, empty, strict=False):
                cell = x_ND[codes_N == donor] - before_KD[donor]
                axis = cell[(cell**2).sum(axis=1).argmax()]
                cell = cell[np.argsort(cell @ axis, kind="stable")]
                half = len(cell) // 2
                centroids_KD[donor] = before_KD[donor] + cell[:half].mean(axis=0)
                centroids_KD[receiver] = before_KD[donor] + cell[half:].mean(axis=0)
            if full and empty:
                prices = np.zeros(size)
                continue
        moved = prices + PRICE_STEP * mean * np.log(np.maximum(counts, 0.5) / share)
        prices = np.clip(moved, -MAX_PRICE * mean, MAX_PRICE * mean)
    return centroids_KD


@pytest.mark.parametrize("num_iterations", [1, 2, 6])
def test_centroids_equal_a_plain_reference(num_iterations: int) -> None:
    x_ND = _skewed(400, 4)
    start_KD = plus_plus_start(x_ND, 8, np.random.default_rng(0))

    centroids_KD = balanced_lloyd(x_ND, start_KD, num_iterations)

    expected_KD = _reference(x_ND, start_KD, num_iterations)
    np.testing.assert_allclose(centroids_KD, expected_KD, atol=1e-4)


def test_nearest_cells_of_skewed_points_become_more_even_at_a_bounded_error() -> None:
    x_ND = _skewed()
    start_KD = plus_plus_start(x_ND, 64, np.random.default_rng(0))
    use, error = {}, {}
    for name, iterate in (("plain", lloyd), ("balanced", balanced_lloyd)):
        centroids_KD = iterate(x_ND, start_KD, 25)
        codes_N = nearest(x_ND, centroids_KD)[:, 0]
        use[name] = code_use(np.bincount(codes_N, minlength=64))
        error[name] = np.square(x_ND - centroids_KD[codes_N]).sum()

    assert use["balanced"]["gini"] < 0.6 * use["plain"]["gini"]
    assert use["balanced"]["code_entropy_bits"] > use["plain"]["code_entropy_bits"]
    assert use["balanced"]["largest_bucket"] < use["plain"]["largest_bucket"]
    assert error["balanced"] < 1.35 * error["plain"]


def test_points_that_are_mostly_one_and_the_same_still_give_finite_centroids() -> None:
    x_ND = np.vstack([np.ones((500, 4)), _skewed(100, 4)]).astype(np.float32)
    start_KD = plus_plus_start(x_ND, 16, np.random.default_rng(0))

    centroids_KD = balanced_lloyd(x_ND, start_KD, 10)

    assert np.isfinite(centroids_KD).all()
    # The point that 500 share keeps a centroid: it may not be pushed away from itself.
    assert np.abs(centroids_KD - 1).max(axis=1).min() < 0.01

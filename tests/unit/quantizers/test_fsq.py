"""Shape letters in this file: N points, D embedding width, K lattice points, B bits."""

import numpy as np
import pytest

from qarm_feast.errors import CodebookError
from qarm_feast.quality import code_use, full_code_figures
from qarm_feast.quantizers.fsq import (
    code_bits,
    fit_lattice,
    num_bits_of,
    paired_codes,
    train_lattice,
)
from qarm_feast.quantizers.rq import ResidualQuantizer, RqConfig, level_sizes
from qarm_feast.quantizers.search import nearest


def _points(num_points: int = 3000, dim: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scales_D = 1 / np.sqrt(np.arange(1, dim + 1))
    return (rng.standard_normal((num_points, dim)) * scales_D + 0.5).astype(np.float32)


def _reference_lattice(x_ND: np.ndarray, num_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and directions (scaled), by an SVD of the points, one direction at a time."""
    x_ND = x_ND.astype(np.float64)
    mean_D = x_ND.mean(axis=0)
    axes = []
    for direction_D in np.linalg.svd(x_ND - mean_D, full_matrices=False)[2][:num_bits]:
        direction_D = direction_D * np.sign(direction_D[np.abs(direction_D).argmax()])
        axes.append(direction_D * np.abs((x_ND - mean_D) @ direction_D).mean())
    return mean_D, np.array(axes)


def test_a_lattice_equals_a_plain_reference() -> None:
    x_ND = _points()
    mean_D, axes_BD = _reference_lattice(x_ND, 4)

    centroids_KD = train_lattice(x_ND, 16)

    for code, centroid_D in enumerate(centroids_KD):
        signs = [1 if code >> bit & 1 else -1 for bit in range(4)]
        expected_D = mean_D + sum(s * axis_D for s, axis_D in zip(signs, axes_BD, strict=True))
        np.testing.assert_allclose(centroid_D, expected_D, atol=1e-5)


def test_the_nearest_lattice_point_has_the_signs_of_the_projections() -> None:
    x_ND = _points()
    mean_D, axes_BD = _reference_lattice(x_ND, 6)
    projections_NB = (_points(seed=1) - mean_D) @ axes_BD.T
    is_clear_N = (np.abs(projections_NB) > 1e-4).all(axis=1)

    codes_N = nearest(_points(seed=1), train_lattice(x_ND, 64))[:, 0]

    expected_N = ((projections_NB > 0) << np.arange(6)).sum(axis=1)
    assert is_clear_N.mean() > 0.99
    np.testing.assert_array_equal(codes_N[is_clear_N], expected_N[is_clear_N])


def test_points_on_a_lattice_give_it_back() -> None:
    # Four corners of a 6 x 2 rectangle around (1, 1), turned by nothing: by hand.
    x_ND = np.array([[-2, 0], [4, 0], [-2, 2], [4, 2]], dtype=np.float32)

    assert train_lattice(x_ND, 4).tolist() == [[-2, 0], [4, 0], [-2, 2], [4, 2]]


def test_bits_of_a_code_come_lowest_first() -> None:
    assert code_bits(np.array([6, 1]), 3).tolist() == [[0, 1, 1], [1, 0, 0]]


def test_a_fitted_lattice_follows_its_codes_through_a_rotation() -> None:
    x_ND = _points()
    lattice_KD = train_lattice(x_ND, 32)
    codes_N = nearest(x_ND, lattice_KD)[:, 0]
    turn_DD = np.linalg.qr(np.random.default_rng(3).standard_normal((12, 12)))[0]
    turned_ND = (x_ND @ turn_DD).astype(np.float32)

    fitted_KD = fit_lattice(turned_ND, codes_N, 32)

    agreement = (nearest(turned_ND, fitted_KD)[:, 0] == codes_N).mean()
    assert agreement > 0.85
    # Means of bits that are unevenly often 1: fitted where every point has its first bit set.
    high_N = (codes_N & 1) == 1
    one_sided_KD = fit_lattice(turned_ND[high_N], codes_N[high_N], 32)
    error = np.square(turned_ND[high_N] - one_sided_KD[codes_N[high_N]]).sum(axis=1).mean()
    assert error <= np.square(turned_ND[high_N] - fitted_KD[codes_N[high_N]]).sum(axis=1).mean()


def test_on_near_isotropic_residuals_a_lattice_spreads_items_more_than_k_means() -> None:
    # Clusters of unequal size: two levels of k-means leave over balls of noise around the origin.
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 301)
    cluster_N = rng.choice(300, size=6000, p=shares / shares.sum())
    centres = rng.standard_normal((300, 16))
    x_ND = (centres[cluster_N] + 0.4 * rng.standard_normal((6000, 16))).astype(np.float32)
    figures = {}
    for kind in ("kmeans", "fsq"):
        quantizer = ResidualQuantizer(RqConfig(codebook_size=(64, 64, 64), last_level=kind))
        quantizer.train(x_ND[:4000])
        codes_NL = quantizer.encode(x_ND)
        use = code_use(np.bincount(codes_NL[:, 2], minlength=64))
        figures[kind] = (full_code_figures(codes_NL)["collision_rate"], use["code_entropy_bits"])

    (kmeans_collisions, kmeans_bits), (fsq_collisions, fsq_bits) = figures.values()
    assert fsq_collisions < 0.8 * kmeans_collisions
    assert fsq_bits > kmeans_bits


@pytest.mark.parametrize("size", [3, 48, 1 << 17])
def test_a_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(CodebookError, match=f"of {size} codes .* power of two from 2 to 65536"):
        level_sizes(RqConfig(codebook_size=(8, 8, size), last_level="fsq"), 10**6)
    assert num_bits_of(1 << 16) == 16


@pytest.mark.parametrize(
    ("num_points", "sizes"),
    [(156, (4, 4, 32)), (3686, (64, 64, 512)), (10**7, (4096, 4096, 8192))],
)
def test_the_automatic_lattice_leaves_four_points_per_code(
    num_points: int, sizes: tuple[int, ...]
) -> None:
    assert level_sizes(RqConfig(last_level="fsq"), num_points) == sizes


def test_residuals_of_too_few_directions_are_refused() -> None:
    flat_ND = np.zeros((100, 8), dtype=np.float32)
    flat_ND[:, :2] = _points(100, 2)

    with pytest.raises(CodebookError, match="needs 3 directions, but its residuals spread over 2"):
        train_lattice(flat_ND, 8)
    with pytest.raises(CodebookError, match="spread over 0"):
        train_lattice(np.ones((100, 8), dtype=np.float32), 2)


def test_bits_are_paired_and_turned_over_so_that_codes_agree() -> None:
    rng = np.random.default_rng(0)
    old_N = rng.integers(0, 16, size=500)
    bits_NB = code_bits(old_N, 4)
    # New bit 0 is old bit 2, new 1 is old 0 turned over, new 2 is old 3, new 3 is old 1.
    new_N = bits_NB[:, 2] + 2 * (1 - bits_NB[:, 0]) + 4 * bits_NB[:, 3] + 8 * bits_NB[:, 1]

    source_K = paired_codes(old_N, new_N, 16)

    assert sorted(source_K.tolist()) == list(range(16))
    np.testing.assert_array_equal(source_K[old_N], new_N)

"""Where k-means starts on residuals.

Shape letters in this file: N points, K centroids, D embedding width.
"""

import numpy as np

from qarm_feast.quantizers.kmeans import lloyd, plus_plus_start
from qarm_feast.quantizers.search import nearest
from qarm_feast.quantizers.start import direction_start


def _mean_of_like_direction(x_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """Plain reference: each point goes to the centroid of most like direction."""
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    unit_KD = centroids_KD / np.linalg.norm(centroids_KD, axis=1, keepdims=True)
    codes_N = (unit_ND @ unit_KD.T).argmax(axis=1)
    return np.stack([x_ND[codes_N == k].mean(axis=0) for k in range(len(centroids_KD))])


def test_points_of_one_direction_share_a_centroid_whatever_their_length() -> None:
    x_ND = np.array([[0.01, 0], [3, 0], [0, 0.02], [0, 5], [0, 0]], dtype=np.float32)

    start_KD = direction_start(x_ND, 2, 10, np.random.default_rng(0))

    assert sorted(start_KD.tolist()) == [[0, np.float32(2.51)], [np.float32(1.505), 0]]


def test_centroids_are_the_means_of_their_directions() -> None:
    generator = np.random.default_rng(1)
    towards_KD = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    x_ND = np.repeat(towards_KD, 50, axis=0) + 0.1 * generator.standard_normal((150, 3))
    x_ND = (x_ND * generator.uniform(0.1, 4, (150, 1))).astype(np.float32)

    start_KD = direction_start(x_ND, 3, 25, generator)

    np.testing.assert_allclose(start_KD, _mean_of_like_direction(x_ND, start_KD), rtol=1e-5)


def test_fewer_directions_than_centroids_start_from_points() -> None:
    x_ND = np.array([[0, 0], [0, 0], [1, 0]], dtype=np.float32)

    start_KD = direction_start(x_ND, 2, 5, np.random.default_rng(0))

    assert sorted(start_KD.tolist()) == [[0, 0], [1, 0]]


def test_short_points_do_not_all_end_in_one_cell() -> None:
    generator = np.random.default_rng(0)
    lengths_N1 = generator.lognormal(0, 1.0, (3000, 1))
    directions_ND = generator.standard_normal((3000, 64))
    directions_ND /= np.linalg.norm(directions_ND, axis=1, keepdims=True)
    x_ND = (lengths_N1 * directions_ND).astype(np.float32)
    largest = []

    for start_KD in (
        plus_plus_start(x_ND, 64, np.random.default_rng(0)),
        direction_start(x_ND, 64, 25, np.random.default_rng(0)),
    ):
        centroids_KD = lloyd(x_ND, start_KD, 25)
        codes_N = nearest(x_ND, centroids_KD)[:, 0]
        largest.append(int(np.bincount(codes_N).max()))

    assert largest[1] < 0.7 * largest[0]

"""Shape letters in this file: N points, K centroids, D embedding width."""

import numpy as np

from qarm_feast.quantizers.kmeans import lloyd, num_distinct_rows, plus_plus_start, sample_rows
from qarm_feast.quantizers.search import nearest, squared_distances


def _inertia(x_ND: np.ndarray, centroids_KD: np.ndarray) -> float:
    codes_N = nearest(x_ND, centroids_KD)[:, 0]
    return float(squared_distances(x_ND, centroids_KD[codes_N]).sum())


def test_one_lloyd_iteration_gives_the_means_of_the_nearest_points() -> None:
    x_ND = np.array([[0, 0], [2, 0], [10, 0], [10, 4]], dtype=np.float32)
    start_KD = np.array([[1, 1], [9, 0]], dtype=np.float32)

    assert lloyd(x_ND, start_KD, num_iterations=1).tolist() == [[1, 0], [10, 2]]


def test_lloyd_equals_a_plain_reference() -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((500, 6)).astype(np.float32)
    expected_KD = x_ND[:8]
    for _ in range(4):
        distances_NK = np.square(x_ND[:, None].astype(np.float64) - expected_KD).sum(axis=2)
        codes_N = distances_NK.argmin(axis=1)
        means = [x_ND[codes_N == k].astype(np.float64).mean(axis=0) for k in range(8)]
        expected_KD = np.stack(means).astype(np.float32)

    np.testing.assert_allclose(lloyd(x_ND, x_ND[:8], 4), expected_KD, rtol=1e-5, atol=1e-7)


def test_lloyd_never_raises_inertia() -> None:
    x_ND = np.random.default_rng(1).standard_normal((800, 8)).astype(np.float32)
    inertias = [_inertia(x_ND, lloyd(x_ND, x_ND[:16], n)) for n in (1, 2, 5, 20)]

    assert inertias == sorted(inertias, reverse=True)
    assert inertias[0] > inertias[-1]


def test_an_empty_cell_restarts_at_the_point_farthest_from_its_centroid() -> None:
    x_ND = np.array([[0, 0], [1, 0], [0, 9]], dtype=np.float32)
    start_KD = np.array([[0, 0], [50, 50]], dtype=np.float32)

    centroids_KD = lloyd(x_ND, start_KD, num_iterations=5)

    assert centroids_KD.tolist() == [[0.5, 0], [0, 9]]


def test_k_means_plus_plus_finds_one_point_of_each_distant_group() -> None:
    rng = np.random.default_rng(2)
    group_N = np.arange(400) % 10
    x_ND = (100 * np.eye(10)[group_N] + rng.standard_normal((400, 10))).astype(np.float32)

    for seed in range(5):
        start_KD = plus_plus_start(x_ND, 10, np.random.default_rng(seed))
        assert sorted(start_KD.argmax(axis=1).tolist()) == list(range(10))


def test_k_means_plus_plus_takes_each_distinct_point_once_when_it_needs_all() -> None:
    distinct_KD = np.array([[0, 0], [1, 0], [1, 1e-9], [5, 5]], dtype=np.float32)
    x_ND = np.repeat(distinct_KD, [1, 1, 1, 1], axis=0)

    start_KD = plus_plus_start(x_ND, 4, np.random.default_rng(0))

    assert num_distinct_rows(start_KD) == 4


def test_distinct_rows_are_counted_by_value() -> None:
    assert num_distinct_rows(np.array([[0.0, 1.0], [-0.0, 1.0], [2.0, 1.0]], np.float32)) == 2


def test_a_sample_has_distinct_ascending_rows() -> None:
    rows_N = sample_rows(100, 30, np.random.default_rng(0))

    assert len(rows_N) == 30
    assert (np.diff(rows_N) > 0).all()
    assert sample_rows(5, 30, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]


def test_rows_that_differ_in_signs_alone_are_told_apart() -> None:
    signs_ND = np.unique(np.sign(np.random.default_rng(1).standard_normal((100_000, 24))), axis=0)

    assert num_distinct_rows(np.repeat(signs_ND, 2, axis=0).astype(np.float32)) == len(signs_ND)

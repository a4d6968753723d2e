"""Shape letters in this file: N items, K centroids, D embedding width, k nearest wanted."""

from collections.abc import Iterator

import numpy as np
import numpy_reference as reference
import pytest
import torch

from benchmarks.generators import clustered, iid, low_rank
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers import native, search
from qarm_feast.quantizers.search import NearestSearch, nearest

NUM_ITEMS = 64
NUM_CENTROIDS = 96


def _iid(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((NUM_ITEMS, dim)), rng.standard_normal((NUM_CENTROIDS, dim))


def _offset(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    x, c = _iid(rng, dim)
    return x * 1e-2 + 100, c * 1e-2 + 100


def _low_rank_with_one_huge_centroid(
    rng: np.random.Generator, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    x, c = _iid(rng, dim)
    scale = 1 / np.arange(1, dim + 1)
    c *= scale
    c[7] *= 1e6
    return x * scale, c


def _duplicate_centroids(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    x, c = _iid(rng, dim)
    c[48:] = c[:48]
    x[:48] = c[:48]
    return x, c


def _planted_ties(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """On a coarse grid many distances are equal, all of them exactly."""
    x, c = _iid(rng, dim)
    return np.round(x * 2) / 2, np.round(c)


def _two_far_groups(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """No one centre serves both groups: within a group every centroid is a candidate."""
    x, c = _iid(rng, dim)
    x[::2] = x[::2] * 1e-3 + 50
    c[::2] = c[::2] * 1e-3 + 50
    return x, c


def _subnormal(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Products, and half of the values themselves, leave the range of normal float32."""
    x, c = _iid(rng, dim)
    x, c = x * 1e-20, c * 1e-20
    x[::2] *= 1e-19
    c[::2] *= 1e-19
    return x, c


def _wide_range(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Values up to the largest that are taken."""
    x, c = _iid(rng, dim)
    powers = 10.0 ** rng.integers(-20, 15, size=(NUM_CENTROIDS, 1))
    return np.clip(x * powers[:NUM_ITEMS], -9e14, 9e14), np.clip(c * powers, -9e14, 9e14)


def _rounded_halfway(rng: np.random.Generator, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Every value lies halfway between two of bfloat16, where rounding errs the most."""
    x, c = _iid(rng, dim)
    return tuple(((np.round(a * 64) + 0.5) / 64 + 4) * (1 + 2.0**-8) for a in (x, c))


GENERATORS = [
    _iid,
    _offset,
    _low_rank_with_one_huge_centroid,
    _duplicate_centroids,
    _planted_ties,
    _two_far_groups,
    _subnormal,
    _wide_range,
    _rounded_halfway,
]


@pytest.fixture(params=["native", "torch"])
def filter_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with each filter."""
    if request.param == "torch":
        monkeypatch.setattr(search, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip("this machine cannot have the compiled kernels")
    return request.param


@pytest.mark.usefixtures("filter_name")
@pytest.mark.parametrize("generate", GENERATORS)
@pytest.mark.parametrize("dim", [1, 5, 33])
@pytest.mark.parametrize("k", [1, 9])
def test_nearest_equals_the_plain_reference_at_any_batch_size_and_thread_count(
    generate: object, dim: int, k: int, num_threads: int
) -> None:
    x_ND, c_KD = (a.astype(np.float32) for a in generate(np.random.default_rng(dim), dim))
    expected_Nk = reference.nearest(x_ND, c_KD, k)

    for batch_size in (1, 7, 256):
        parts = [
            nearest(x_ND[start : start + batch_size], c_KD, k)
            for start in range(0, NUM_ITEMS, batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), expected_Nk)


@pytest.mark.usefixtures("filter_name")
@pytest.mark.parametrize("num_centroids", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("num_rows", [1, 5, 49])
def test_few_centroids_and_few_rows_follow_the_rule(num_centroids: int, num_rows: int) -> None:
    rng = np.random.default_rng(num_centroids)
    x_ND = rng.standard_normal((num_rows, 7)).astype(np.float32)
    c_KD = rng.standard_normal((num_centroids, 7)).astype(np.float32)

    np.testing.assert_array_equal(nearest(x_ND, c_KD), reference.nearest(x_ND, c_KD, 1))


@pytest.mark.usefixtures("filter_name")
@pytest.mark.parametrize("generate", GENERATORS)
def test_what_the_nearest_leaves_over_is_the_float32_difference(generate: object) -> None:
    x_ND, c_KD = (a.astype(np.float32) for a in generate(np.random.default_rng(5), 50))
    codes_N = reference.nearest(x_ND, c_KD, 1)[:, 0]
    residual_ND = x_ND.copy()

    found_N = NearestSearch(c_KD).subtract_nearest(residual_ND)

    np.testing.assert_array_equal(found_N, codes_N)
    np.testing.assert_array_equal(residual_ND, x_ND - c_KD[codes_N])


@pytest.mark.usefixtures("filter_name", "num_threads")
@pytest.mark.parametrize("generate", [iid, low_rank, clustered])
def test_codes_of_realistic_vectors_equal_a_float64_scan(generate: object) -> None:
    x_ND, c_KD = generate(2000, 128, seed=0), generate(1000, 128, seed=1)
    x, c = (torch.from_numpy(a).double() for a in (x_ND, c_KD))
    best = torch.stack([((row - c) ** 2).sum(dim=1).float() for row in x]).argmin(dim=1)

    np.testing.assert_array_equal(nearest(x_ND, c_KD)[:, 0], best.numpy())


@pytest.mark.usefixtures("filter_name")
@pytest.mark.parametrize("k", [1, 25])
def test_nearest_of_a_row_does_not_depend_on_the_rows_beside_it(k: int) -> None:
    rng = np.random.default_rng(0)
    c_KD = rng.standard_normal((4000, 128)).astype(np.float32)
    x_ND = (c_KD[rng.integers(4000, size=3000)] + c_KD[rng.integers(4000, size=3000)]) / 2
    order_N = rng.permutation(3000)

    whole_Nk = nearest(x_ND, c_KD, k)

    np.testing.assert_array_equal(nearest(x_ND[order_N], c_KD, k), whole_Nk[order_N])
    np.testing.assert_array_equal(nearest(x_ND[2990:], c_KD, k), whole_Nk[2990:])


def test_of_equal_distances_the_lower_index_comes_first() -> None:
    c_KD = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0]], dtype=np.float32)
    x_ND = np.zeros((1, 2), dtype=np.float32)

    assert nearest(x_ND, c_KD, k=4).tolist() == [[1, 2, 3, 0]]


def test_distances_that_round_to_the_same_float32_are_equal() -> None:
    # 1 + 2^-25 and 1 differ in float64 only.
    c_KD = np.array([[1.0, 2.0**-12.5], [1.0, 0.0]], dtype=np.float32)
    x_ND = np.zeros((1, 2), dtype=np.float32)

    assert nearest(x_ND, c_KD).tolist() == [[0]]


@pytest.fixture
def restored_precision() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.usefixtures("restored_precision")
def test_a_process_that_allows_bfloat16_products_gets_the_same_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(1)
    c_KD = rng.standard_normal((512, 64)).astype(np.float32)
    x_ND = rng.standard_normal((512, 64)).astype(np.float32)
    monkeypatch.setattr(search, "kernels", lambda: None)
    exact_N = nearest(x_ND, c_KD)[:, 0]

    def rounded_product(
        bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, alpha: float
    ) -> torch.Tensor:
        return bias + alpha * (x.bfloat16().float() @ y.bfloat16().float())

    monkeypatch.setattr(search.torch, "addmm", rounded_product)
    unaware_N = nearest(x_ND, c_KD)[:, 0]
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    aware_N = nearest(x_ND, c_KD)[:, 0]

    assert (unaware_N != exact_N).any()
    np.testing.assert_array_equal(aware_N, exact_N)


@pytest.mark.parametrize("generate", GENERATORS)
def test_scores_stay_within_the_error_bound_of_the_filter(generate: object) -> None:
    dim = 128
    x_ND, c_KD = (a.astype(np.float32) for a in generate(np.random.default_rng(3), dim))
    searcher = NearestSearch(c_KD)
    centre_D = searcher._centre_D.numpy().astype(np.float64)
    x_exact, c_exact = x_ND - centre_D, c_KD - centre_D
    norms_K, norms_N = np.square(c_exact).sum(axis=1), np.square(x_exact).sum(axis=1)
    exact_NK = norms_K - 2 * x_exact @ c_exact.T
    centred_DK, squared_norms_K = searcher._centred

    score_NK = torch.addmm(
        squared_norms_K.float(),
        torch.from_numpy(x_ND) - searcher._centre_D,
        centred_DK,
        alpha=-2,
    ).numpy()

    bound_NK = (dim + 16) * 2.0**-24 * (norms_N[:, None] + norms_K)
    # Where products leave the range of normal numbers, the absolute slack covers them.
    assert (np.abs(score_NK - exact_NK) <= bound_NK + 1e-30).all()


@pytest.mark.parametrize("generate", [_iid, _offset, _low_rank_with_one_huge_centroid])
def test_the_filter_settles_nearly_every_row(
    generate: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_ND, c_KD = (a.astype(np.float32) for a in generate(np.random.default_rng(4), 128))
    searcher = NearestSearch(c_KD)
    open_rows = []
    decide = NearestSearch._decide_open

    def recording(
        self: NearestSearch, x_BD: torch.Tensor, is_near_BK: torch.Tensor, k: int
    ) -> torch.Tensor:
        open_rows.append(len(x_BD))
        return decide(self, x_BD, is_near_BK, k)

    monkeypatch.setattr(search, "kernels", lambda: None)
    monkeypatch.setattr(NearestSearch, "_decide_open", recording)
    searcher.search(x_ND)

    assert sum(open_rows) <= 2


def test_read_only_and_strided_input_is_taken_as_it_is() -> None:
    rng = np.random.default_rng(2)
    wide_ND = rng.standard_normal((40, 16)).astype(np.float32)
    wide_ND.flags.writeable = False
    x_ND, c_KD = wide_ND[::2, :8], wide_ND[1::2, :8]

    np.testing.assert_array_equal(nearest(x_ND, c_KD, 3), reference.nearest(x_ND, c_KD, 3))


def test_no_rows_give_no_codes() -> None:
    assert nearest(np.empty((0, 2), np.float32), np.eye(2, dtype=np.float32), 2).shape == (0, 2)


def test_wanting_more_neighbours_than_centroids_is_refused() -> None:
    with pytest.raises(CodebookError, match="k=3 neighbours wanted of 2"):
        nearest(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), k=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e16])
def test_a_value_without_a_distance_is_refused(value: float) -> None:
    x_ND = np.eye(2, dtype=np.float32)
    x_ND[1, 0] = value

    with pytest.raises(DataError, match=r"1 of 2 vectors .* first is row 1"):
        nearest(x_ND, np.eye(2, dtype=np.float32))


def test_another_width_or_type_is_refused() -> None:
    with pytest.raises(CodebookError, match="3 wide"):
        nearest(np.eye(3, dtype=np.float32), np.eye(2, dtype=np.float32))
    with pytest.raises(CodebookError, match="float64"):
        nearest(np.eye(2), np.eye(2, dtype=np.float32))
    with pytest.raises(CodebookError, match="no centroids"):
        nearest(np.eye(2, dtype=np.float32), np.empty((0, 2), np.float32))

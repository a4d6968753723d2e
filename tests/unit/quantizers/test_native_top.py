"""Shape letters in this file: N items, P vectors, D embedding width, I lists, k nearest wanted."""

import numpy as np
import numpy_reference as reference
import pytest

from qarm_feast.quantizers import ivf_lists, native, search
from qarm_feast.quantizers.devices import ON_CPU
from qarm_feast.quantizers.pool_index import PoolIndex, build_lists
from qarm_feast.quantizers.search import NearestSearch

pytestmark = pytest.mark.skipif(
    native.kernels() is None, reason="needs AVX-512 bf16 and a compiler"
)
NUM_VECTORS = 300


def _plain(rng: np.random.Generator, dim: int) -> np.ndarray:
    return rng.standard_normal((NUM_VECTORS, dim))


def _duplicates_across_tiles(rng: np.random.Generator, dim: int) -> np.ndarray:
    x_PD = _plain(rng, dim)
    x_PD[100:200] = x_PD[:100]
    x_PD[200:] = x_PD[0]
    return x_PD


def _one_huge(rng: np.random.Generator, dim: int) -> np.ndarray:
    x_PD = _plain(rng, dim)
    x_PD[70] *= 1e6
    return x_PD


def _one_huge_column(rng: np.random.Generator, dim: int) -> np.ndarray:
    """All other columns are rounded to nothing."""
    x_PD = _plain(rng, dim)
    x_PD[:, 0] *= 1e4
    return x_PD


def _offset(rng: np.random.Generator, dim: int) -> np.ndarray:
    return _plain(rng, dim) * 1e-2 + 100


def _lattice(rng: np.random.Generator, dim: int) -> np.ndarray:
    return np.round(_plain(rng, dim))


def _subnormal(rng: np.random.Generator, dim: int) -> np.ndarray:
    x_PD = _plain(rng, dim) * 1e-20
    x_PD[::2] *= 1e-19
    return x_PD


def _all_equal(rng: np.random.Generator, dim: int) -> np.ndarray:
    return np.full((NUM_VECTORS, dim), rng.standard_normal())


GENERATORS = [
    _plain,
    _duplicates_across_tiles,
    _one_huge,
    _one_huge_column,
    _offset,
    _lattice,
    _subnormal,
    _all_equal,
]
every_kind = pytest.mark.parametrize("generate", GENERATORS)
every_width = pytest.mark.parametrize("dim", [1, 5, 33, 64])


def _vectors(generate: object, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 300 vectors, and 24 to search for: new ones, and some of the 300."""
    rng = np.random.default_rng(dim)
    x_PD = generate(rng, dim).astype(np.float32)
    x_ND = np.concatenate([generate(rng, dim)[:12], x_PD[::25]]).astype(np.float32)
    return x_ND, x_PD


@every_kind
@every_width
@pytest.mark.parametrize("k", [2, 26, 100, NUM_VECTORS])
@pytest.mark.usefixtures("num_threads")
def test_the_k_nearest_of_all_vectors_follow_the_rule(generate: object, dim: int, k: int) -> None:
    x_ND, x_PD = _vectors(generate, dim)

    found_Nk = NearestSearch(x_PD).search(x_ND, k)

    np.testing.assert_array_equal(found_Nk, reference.nearest(x_ND, x_PD, k))


@every_kind
@every_width
@pytest.mark.parametrize("k", [1, 70, NUM_VECTORS])
@pytest.mark.usefixtures("num_threads")
def test_chosen_centroids_are_the_k_nearest_in_any_order(
    generate: object, dim: int, k: int
) -> None:
    x_ND, x_PD = _vectors(generate, dim)

    (chosen_Nk,) = NearestSearch(x_PD).choose(x_ND, (k,))

    expected_Nk = np.sort(reference.nearest(x_ND, x_PD, k), axis=1)
    np.testing.assert_array_equal(np.sort(chosen_Nk, axis=1), expected_Nk)


def test_a_row_has_the_same_nearest_in_a_batch_of_any_size() -> None:
    rng = np.random.default_rng(0)
    x_PD, x_ND = (rng.standard_normal((n, 24)).astype(np.float32) for n in (2000, 2100))
    searcher = NearestSearch(x_PD)
    whole_Nk = searcher.search(x_ND, 25)

    for batch_size, rows in ((1, 40), (19, 400), (20, 400), (2048, 2100)):
        parts = [
            searcher.search(x_ND[start : start + batch_size], 25)
            for start in range(0, rows, batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts)[:rows], whole_Nk[:rows])
    np.testing.assert_array_equal(whole_Nk[:50], reference.nearest(x_ND[:50], x_PD, 25))


def test_many_that_are_about_equally_near_are_left_to_the_rule() -> None:
    """More than a row's candidates can hold lie within the bound of each other."""
    rng = np.random.default_rng(3)
    x_PD = (100 + 1e-4 * rng.standard_normal((3000, 8))).astype(np.float32)
    x_PD[::2] += 300
    x_ND = x_PD[:20] + np.float32(1e-3)

    found_Nk = NearestSearch(x_PD).search(x_ND, 9)

    np.testing.assert_array_equal(found_Nk, reference.nearest(x_ND, x_PD, 9))


@pytest.mark.parametrize("num_probes", [1, 3, 16])
@every_kind
def test_an_index_gives_the_same_codes_with_and_without_kernels(
    generate: object, num_probes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_ND, x_PD = _vectors(generate, 24)
    num_lists = min(16, len(np.unique(x_PD, axis=0)))
    built = build_lists(x_PD, num_lists, seed=0)
    built.effort = min(num_probes, num_lists)
    with_kernels_Nk = built.search(x_ND, 30)
    arrays = built.arrays()

    monkeypatch.setattr(search, "kernels", lambda: None)
    monkeypatch.setattr(ivf_lists, "kernels", lambda: None)
    loaded = PoolIndex.from_bytes(arrays["index"].tobytes(), arrays, ON_CPU)

    np.testing.assert_array_equal(loaded.search(x_ND, 30), with_kernels_Nk)
    assert built._index._native is not None
    assert loaded._index._native is None

"""One suite for every backend of the nearest search.

Shape letters in this file: N items, K centroids, D embedding width, k nearest wanted.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pytest
import torch

from benchmarks.generators import clustered, iid, low_rank
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers import native, search
from qarm_feast.quantizers.base import Codes, Embeddings, fold_sum
from qarm_feast.quantizers.devices import Gpu
from qarm_feast.quantizers.faiss_search import FaissSearch
from qarm_feast.quantizers.search import NearestSearch

NUM_CENTROIDS, WIDTH = 300, 40


class Search(Protocol):
    def search(self, x_ND: Embeddings, k: int = 1) -> Codes: ...

    def subtract_nearest(self, residual_ND: Embeddings) -> Codes: ...


BACKENDS: dict[str, Callable[[Embeddings], Search]] = {
    "native": NearestSearch,
    "torch": NearestSearch,
    "faiss": functools.partial(FaissSearch, gpu=None),
    "torch-cuda": functools.partial(NearestSearch, device="cuda"),
    "faiss-cuda": functools.partial(FaissSearch, gpu=Gpu()),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.gpu] if name.endswith("-cuda") else [])
        for name in BACKENDS
    ]
)
def build(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Embeddings], Search]]:
    name = request.param
    if name.endswith("-cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if name == "native" and native.kernels() is None:
        pytest.skip("this machine cannot have the compiled kernels")
    if name == "torch":
        monkeypatch.setattr(search, "kernels", lambda: None)
    built: list[Search] = []

    def build_one(centroids_KD: Embeddings) -> Search:
        built.append(BACKENDS[name](centroids_KD))
        return built[-1]

    yield build_one
    for each in built:
        if isinstance(each, FaissSearch):
            each.close()


def _rule(x_ND: Embeddings, c_KD: Embeddings, k: int) -> Codes:
    rows = [
        np.argsort(
            fold_sum(np.square(x_D.astype(np.float64) - c_KD)).astype(np.float32), kind="stable"
        )
        for x_D in x_ND
    ]
    return np.stack(rows)[:, :k]


def _ties_and_duplicates(num_rows: int, dim: int, seed: int) -> Embeddings:
    x_ND = np.round(np.random.default_rng(seed).standard_normal((num_rows, dim)))
    x_ND[num_rows // 2 :] = x_ND[: num_rows - num_rows // 2]
    return x_ND.astype(np.float32)


def _one_huge_row(num_rows: int, dim: int, seed: int) -> Embeddings:
    x_ND = iid(num_rows, dim, seed) + np.float32(30)
    x_ND[5] *= 1e6
    return x_ND


@pytest.mark.parametrize(
    "generate", [iid, low_rank, clustered, _ties_and_duplicates, _one_huge_row]
)
@pytest.mark.parametrize("k", [1, 26])
def test_codes_follow_the_canonical_rule_at_any_batch_size_and_order(
    build: Callable[[Embeddings], Search], generate: Callable[..., Embeddings], k: int
) -> None:
    c_KD, x_ND = generate(NUM_CENTROIDS, WIDTH, seed=0), generate(200, WIDTH, seed=1)
    backend = build(c_KD)
    expected_Nk = _rule(x_ND, c_KD, k)
    order_N = np.random.default_rng(2).permutation(len(x_ND))

    np.testing.assert_array_equal(backend.search(x_ND, k), expected_Nk)
    np.testing.assert_array_equal(backend.search(x_ND[order_N], k), expected_Nk[order_N])
    for batch_size in (1, 19):
        parts = [
            backend.search(x_ND[start : start + batch_size], k)
            for start in range(0, len(x_ND), batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), expected_Nk)


def test_subtracting_the_nearest_leaves_the_float32_difference(
    build: Callable[[Embeddings], Search],
) -> None:
    c_KD, x_ND = low_rank(NUM_CENTROIDS, WIDTH, seed=0), low_rank(200, WIDTH, seed=1)
    codes_N = _rule(x_ND, c_KD, 1)[:, 0]
    residual_ND = x_ND.copy()

    np.testing.assert_array_equal(build(c_KD).subtract_nearest(residual_ND), codes_N)
    np.testing.assert_array_equal(residual_ND, x_ND - c_KD[codes_N])


@pytest.mark.parametrize("num_centroids", [1, 2, 9])
def test_fewer_centroids_than_a_short_list_are_all_ordered(
    build: Callable[[Embeddings], Search], num_centroids: int
) -> None:
    c_KD, x_ND = iid(num_centroids, 3, seed=0), iid(20, 3, seed=1)
    expected_Nk = _rule(x_ND, c_KD, num_centroids)

    np.testing.assert_array_equal(build(c_KD).search(x_ND, num_centroids), expected_Nk)


def test_threads_that_share_a_search_get_their_own_codes(
    build: Callable[[Embeddings], Search],
) -> None:
    backend = build(iid(NUM_CENTROIDS, WIDTH, seed=0))
    parts = [iid(500, WIDTH, seed=seed) for seed in range(8)]
    expected = [backend.search(x_ND, 3) for x_ND in parts]

    with ThreadPoolExecutor(max_workers=4) as pool:
        found = list(pool.map(lambda x_ND: backend.search(x_ND, 3), parts))

    np.testing.assert_array_equal(found, expected)


def test_bad_input_is_refused(build: Callable[[Embeddings], Search]) -> None:
    backend = build(np.eye(3, dtype=np.float32))

    with pytest.raises(CodebookError, match="k=4 neighbours wanted of 3"):
        backend.search(np.eye(3, dtype=np.float32), k=4)
    with pytest.raises(CodebookError, match="2 wide"):
        backend.search(np.eye(2, dtype=np.float32))
    with pytest.raises(DataError, match="1 of 1 vectors"):
        backend.search(np.full((1, 3), np.nan, dtype=np.float32))
    with pytest.raises(CodebookError, match="no centroids"):
        build(np.empty((0, 3), dtype=np.float32))


def test_a_closed_faiss_search_says_so() -> None:
    closing = FaissSearch(np.eye(3, dtype=np.float32), gpu=None)
    closing.close()

    with pytest.raises(AttributeError, match="_index"):
        closing.search(np.eye(3, dtype=np.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_faiss_search_on_a_gpu_without_one_is_an_error() -> None:
    with pytest.raises(CodebookError, match="torch finds no GPU"):
        FaissSearch(np.eye(3, dtype=np.float32), gpu=Gpu())

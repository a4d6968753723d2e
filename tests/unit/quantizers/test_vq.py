"""Shape letters in this file: N items, P pool rows, D embedding width, V neighbours, I lists."""

import itertools
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import numpy_reference as reference
import pytest
import torch

from qarm_feast.errors import CodebookError, ConfigError, DataError, MissingDependencyError
from qarm_feast.quantizers import pool_index, vq
from qarm_feast.quantizers.devices import Placement
from qarm_feast.quantizers.pool_index import PoolIndex, build_graph, build_lists
from qarm_feast.quantizers.vq import NeighborQuantizer, VqConfig

KINDS = ("exact", "ivf_flat", "hnsw")
needs_gpu = pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0,
    reason="faiss sees no GPU",
)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


def _clustered(num_rows: int, num_clusters: int = 40, width: int = 16) -> np.ndarray:
    """Rows around a few centres, every tenth row twice."""
    rng = np.random.default_rng(0)
    centres_CD = 3 * rng.standard_normal((num_clusters, width))
    x_ND = centres_CD[rng.integers(num_clusters, size=num_rows)]
    x_ND += 0.5 * rng.standard_normal((num_rows, width))
    x_ND[::10] = x_ND[5::10][: len(x_ND[::10])]
    return x_ND.astype(np.float32)


def _lattice() -> np.ndarray:
    """All 729 points of {-1, 0, 1} ** 6 in a random order: most distances are equal."""
    points_PD = np.array(list(itertools.product((-1, 0, 1), repeat=6)), dtype=np.float32)
    return np.random.default_rng(0).permutation(points_PD)


def _coarse_centroids(index: PoolIndex) -> np.ndarray:
    stored = faiss.deserialize_index(index.arrays()["index"])
    return stored.quantizer.reconstruct_n(0, stored.nlist)


def _line_pool(num_neighbors: int) -> NeighborQuantizer:
    """Five items at 0, 1, 2, 3 and 10 on a line, with the ids 100 ... 104."""
    pool_PD = np.array([[0], [1], [2], [3], [10]], dtype=np.float32)
    ids_P = np.arange(100, 105, dtype=np.int64)
    return NeighborQuantizer(VqConfig(num_neighbors=num_neighbors), pool_PD, ids_P)


def test_an_item_is_never_its_own_neighbour() -> None:
    x_ND = np.array([[0.0], [0.0]], dtype=np.float32)

    codes_NV = _line_pool(2).encode(x_ND, np.array([100, 999]))

    assert codes_NV.tolist() == [[1, 2], [0, 1]]


def test_an_edited_item_is_left_out_also_where_its_new_vector_is_far_from_its_pool_row() -> None:
    x_ND = np.array([[9.0], [2.1]], dtype=np.float32)

    codes_NV = _line_pool(2).encode(x_ND, np.array([100, 104]))

    assert codes_NV.tolist() == [[4, 3], [2, 3]]


def test_without_item_ids_nothing_is_left_out() -> None:
    assert _line_pool(2).encode(np.array([[0.0]], dtype=np.float32)).tolist() == [[0, 1]]


def test_encode_equals_the_plain_reference_at_any_batch_size() -> None:
    rng = np.random.default_rng(0)
    pool_PD = rng.standard_normal((120, 6)).astype(np.float32)
    pool_PD[60:70] = pool_PD[:10]
    ids_P = rng.permutation(1000)[:120].astype(np.int64)
    x_ND, ids_N = pool_PD[:50], ids_P[:50].copy()
    ids_N[40:] = 5000
    quantizer = NeighborQuantizer(VqConfig(num_neighbors=25), pool_PD, ids_P)
    expected_NV = reference.encode_neighbors(x_ND, ids_N, pool_PD, ids_P, 25)

    for batch_size in (1, 7, 256):
        parts = [
            quantizer.encode(x_ND[start : start + batch_size], ids_N[start : start + batch_size])
            for start in range(0, 50, batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), expected_NV)


def test_decode_is_the_mean_of_the_listed_pool_vectors() -> None:
    assert _line_pool(2).decode(np.array([[1, 3]])).tolist() == [[2]]
    for code in (-1, 5):
        with pytest.raises(CodebookError, match=r"rows 0 \.\.\. 4"):
            _line_pool(2).decode(np.array([[0, code]]))


def test_a_pool_without_k_items_besides_the_item_itself_is_refused() -> None:
    with pytest.raises(CodebookError, match="pool of 5 items cannot give 5 neighbours"):
        _line_pool(5)


def test_a_sampled_pool_has_the_wanted_size_and_a_larger_one_is_refused() -> None:
    x_ND = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    ids_N = np.arange(50, dtype=np.int64) * 10
    quantizer = NeighborQuantizer(VqConfig(pool_size=30, num_neighbors=5))

    quantizer.train(x_ND, ids_N)

    assert len(quantizer.pool_item_ids_P) == 30
    np.testing.assert_array_equal(quantizer.pool_vectors_PD, x_ND[quantizer.pool_item_ids_P // 10])
    with pytest.raises(CodebookError, match="pool_size is 30, but only 20"):
        quantizer.train(x_ND[:20], ids_N[:20])


def test_an_item_that_comes_twice_is_refused() -> None:
    with pytest.raises(DataError, match="5 vectors and 4 distinct item ids"):
        NeighborQuantizer(
            VqConfig(num_neighbors=2),
            np.zeros((5, 2), dtype=np.float32),
            np.array([1, 2, 3, 4, 4]),
        )


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_bit_equal_where_faiss_changes_its_formula(kind: Any) -> None:
    pool_PD = _clustered(3000)
    config = VqConfig(search=kind, num_neighbors=25, num_lists=32, num_probes=3, ef_search=40)
    quantizer = NeighborQuantizer(config, pool_PD)
    x_ND = _clustered(2048 + 19)[::-1].copy()
    ids_N = np.arange(len(x_ND))
    order_N = np.random.default_rng(1).permutation(len(x_ND))
    whole_NV = quantizer.encode(x_ND, ids_N)
    num_rows = {1: 150, 19: 600, 20: 600, 2048: len(x_ND)}

    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        faiss.omp_set_num_threads(num_threads)
        for batch_size, rows in num_rows.items():
            parts = [
                quantizer.encode(
                    x_ND[start : start + batch_size], ids_N[start : start + batch_size]
                )
                for start in range(0, rows, batch_size)
            ]
            np.testing.assert_array_equal(np.concatenate(parts)[:rows], whole_NV[:rows])
        reordered_NV = quantizer.encode(x_ND[order_N], ids_N[order_N])
        np.testing.assert_array_equal(reordered_NV, whole_NV[order_N])


def test_a_probed_pool_gives_the_canonical_answer_over_the_items_of_the_probed_lists() -> None:
    pool_PD = _clustered(600)
    x_ND = _clustered(700)[600:]
    index = build_lists(pool_PD, num_lists=12, seed=0)
    index.effort = 3

    found_NV = index.search(x_ND, 20)

    coarse_ID = _coarse_centroids(index)
    expected_NV = reference.encode_listed_neighbors(x_ND, pool_PD, coarse_ID, 3, 20)
    np.testing.assert_array_equal(found_NV, expected_NV)
    assert (found_NV != reference.nearest(x_ND, pool_PD, 20)).any()


@pytest.mark.parametrize("kind", ["ivf_flat", "hnsw"])
def test_ties_at_the_end_of_a_candidate_list_go_to_the_lowest_rows(kind: Any) -> None:
    pool_PD = _lattice()
    x_ND = np.concatenate([pool_PD[:20], pool_PD[20:40] / 2])
    config = VqConfig(search=kind, num_neighbors=9, num_lists=8, num_probes=8, ef_search=729)

    codes_NV = NeighborQuantizer(config, pool_PD).encode(x_ND)

    np.testing.assert_array_equal(codes_NV, reference.nearest(x_ND, pool_PD, 9))


@pytest.mark.parametrize("kind", ["ivf_flat", "hnsw"])
def test_of_duplicates_the_lowest_rows_stand_in_a_code_before_what_is_farther(kind: Any) -> None:
    pool_PD = np.repeat(np.array([[0.0], [1.0], [3.0]], dtype=np.float32), 40, axis=0)
    pool_PD[0], pool_PD[119] = 3.0, 0.0
    quantizer = NeighborQuantizer(VqConfig(search=kind, num_neighbors=41), pool_PD)

    codes_NV = quantizer.encode(np.array([[-1.0]], dtype=np.float32), np.array([2]))

    assert codes_NV.tolist() == [[1, *range(3, 40), 119, 40, 41]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_of_equal_vectors_gives_its_lowest_rows(kind: Any) -> None:
    pool_PD = np.ones((200, 4), dtype=np.float32)
    quantizer = NeighborQuantizer(VqConfig(search=kind, num_neighbors=3), pool_PD)

    codes_NV = quantizer.encode(pool_PD[:2], np.array([0, 7]))

    assert codes_NV.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert quantizer.search_recall == 1.0


def test_a_pool_whose_vectors_all_come_twice_is_measured_as_well() -> None:
    pool_PD = np.repeat(np.random.default_rng(0).standard_normal((400, 24)), 2, axis=0)
    config = VqConfig(search="hnsw", num_neighbors=10, hnsw_m=4, ef_search=11)

    assert 0 < NeighborQuantizer(config, pool_PD.astype(np.float32)).search_recall < 1


def test_late_vectors_are_new_to_a_graph_until_they_are_linked() -> None:
    pool_PD = _clustered(600)
    index, late_S = build_graph(pool_PD, 8, 40, num_late=30, seed=0)
    index.effort = 600
    early = np.setdiff1d(np.arange(600), late_S)

    before_NV = index.search(pool_PD[late_S], 5)
    index.link(pool_PD[late_S])
    after_NV = index.search(pool_PD[late_S], 5)

    assert len(late_S) == 30
    expected_NV = early[reference.nearest(pool_PD[late_S], pool_PD[early], 5)]
    np.testing.assert_array_equal(before_NV, expected_NV)
    np.testing.assert_array_equal(after_NV, reference.nearest(pool_PD[late_S], pool_PD, 5))


def test_zero_and_minus_zero_are_one_vector() -> None:
    pool_PD = np.array([[0.0, 1.0], [-0.0, 1.0], [0.0, 2.0]], dtype=np.float32)

    assert build_lists(pool_PD, num_lists="auto", seed=0).num_distinct == 2


def test_lists_too_short_for_a_code_are_joined_by_more() -> None:
    pool_PD = np.array([[0], [0.1], [10], [10.1], [20], [20.1]], dtype=np.float32)
    index = build_lists(pool_PD, num_lists=3, seed=1)

    rows_NV = index.search(np.array([[0.0], [20.0]], dtype=np.float32), 3)

    assert index.effort == 1
    assert rows_NV.tolist() == [[0, 1, 2], [4, 5, 3]]


def test_a_walk_that_finds_too_few_is_replaced_by_a_scan() -> None:
    pool_PD = _clustered(60)
    real, _ = build_graph(pool_PD, hnsw_m=8, ef_construction=16)
    stored = faiss.deserialize_index(real.arrays()["index"])
    lost = SimpleNamespace(
        hnsw=SimpleNamespace(efSearch=8),
        ntotal=real.num_distinct,
        storage=stored.storage,
        search=lambda x_ND, k, params: (None, np.full((len(x_ND), k), -1)),
    )
    graph = pool_index._Graph(lost)

    candidates_NC, _ = graph.candidates(pool_PD[:5], 3)

    nearest_N = graph.vectors(candidates_NC[:, 0])
    np.testing.assert_array_equal(nearest_N, pool_PD[:5])


def test_recall_is_the_share_of_exact_neighbours_that_pool_items_find() -> None:
    pool_PD = _clustered(400)
    config = VqConfig(search="ivf_flat", num_neighbors=10, num_lists=10, num_probes=1)
    quantizer = NeighborQuantizer(config, pool_PD)
    ids_P = np.arange(400)
    expected_PV = reference.encode_neighbors(pool_PD, ids_P, pool_PD, ids_P, 10)

    found_PV = quantizer.encode(pool_PD, ids_P)

    shares = [len(set(a) & set(b)) / 10 for a, b in zip(found_PV, expected_PV, strict=True)]
    assert quantizer.search_recall == pytest.approx(np.mean(shares))
    assert quantizer.search_recall < 1


@pytest.mark.parametrize(
    ("kind", "key", "fixed"), [("ivf_flat", "num_probes", 1), ("hnsw", "ef_search", 11)]
)
def test_effort_is_raised_to_the_wanted_recall_or_the_lack_of_it_is_said(
    kind: Any, key: str, fixed: int, caplog: pytest.LogCaptureFixture
) -> None:
    pool_PD = np.random.default_rng(0).standard_normal((700, 24)).astype(np.float32)
    settings: dict[str, Any] = {"search": kind, "num_neighbors": 10, "hnsw_m": 4}

    raised = NeighborQuantizer(VqConfig(**settings), pool_PD)
    quiet = caplog.text
    low = NeighborQuantizer(VqConfig(**settings, **{key: fixed}), pool_PD)

    assert raised.search_recall >= 0.99
    assert raised.search_settings[key] > low.search_settings[key] == fixed
    assert quiet == ""
    assert low.search_recall < 0.99
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert (
        f"recall={low.search_recall:.4f} is below quantizer.vq.min_recall=0.9900"
        in record.msg % (record.args)
    )
    assert f"at {key}={fixed}; raise {key} or set it to auto" in record.getMessage()


def test_auto_is_exact_for_small_pools_and_where_too_many_lists_would_be_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    easy_PD = _clustered(2000, num_clusters=200)
    hard_PD = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
    config = VqConfig(num_neighbors=5)

    assert NeighborQuantizer(config, easy_PD).search_kind == "exact"
    monkeypatch.setattr(vq, "MAX_EXACT_POOL_SIZE", 1000)
    assert NeighborQuantizer(config, easy_PD).search_kind == "ivf_flat"
    hard = NeighborQuantizer(config, hard_PD)
    assert (hard.search_kind, hard.search_settings, hard.search_recall) == ("exact", {}, 1.0)


def test_an_auto_pool_is_a_sample_above_its_cap(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vq, "MAX_AUTO_POOL_SIZE", 30)
    x_ND = _clustered(50)
    first, again = (
        NeighborQuantizer(VqConfig(num_neighbors=5)),
        NeighborQuantizer(VqConfig(num_neighbors=5)),
    )

    with caplog.at_level(logging.INFO):
        first.train(x_ND)
        again.train(x_ND)

    assert len(first.pool_item_ids_P) == 30
    np.testing.assert_array_equal(first.pool_item_ids_P, again.pool_item_ids_P)
    assert "vq_pool_sampled num_items=50 pool_size=30" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "ivf_flat", "num_lists": 31}, "num_lists is 31, but the pool has only 30"),
        (
            {"search": "ivf_flat", "num_lists": 4, "num_probes": 5},
            r"num_probes is 5, it must lie in 1 \.\.\. 4",
        ),
        ({"search": "hnsw", "ef_search": 3}, r"ef_search is 3, it must lie in 4 \.\.\. 4096"),
    ],
)
def test_settings_that_do_not_fit_the_pool_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    pool_PD = np.arange(60, dtype=np.float32).repeat(2).reshape(60, 2)[:30]

    with pytest.raises(CodebookError, match=message):
        NeighborQuantizer(VqConfig(num_neighbors=3, **settings), np.concatenate([pool_PD] * 2))


@pytest.mark.parametrize("kind", KINDS)
def test_another_pool_is_searched_in_the_same_way(kind: Any) -> None:
    config = VqConfig(search=kind, num_neighbors=5, num_lists=8, num_probes=4, ef_search=50)
    quantizer = NeighborQuantizer(config, _clustered(500))
    pool_PD, ids_P = _clustered(400)[::-1].copy(), np.arange(1000, 1400)

    other = quantizer.with_pool(pool_PD, ids_P)

    assert other.search_kind == kind
    own = {"num_lists", "num_probes", "hnsw_m", "ef_construction", "ef_search"}
    assert {key: other.search_settings.get(key) for key in own} == {
        key: quantizer.search_settings.get(key) for key in own
    }
    np.testing.assert_array_equal(other.pool_vectors_PD, pool_PD)
    assert other.encode(pool_PD[:50], ids_P[:50]).shape == (50, 5)


@pytest.mark.usefixtures("restored_threads")
def test_a_graph_is_the_same_bytes_whatever_the_number_of_threads() -> None:
    payloads = []
    for num_threads in (1, 2):
        faiss.omp_set_num_threads(num_threads)
        payloads.append(build_graph(_clustered(1000), 8, 40)[0].arrays()["index"].tobytes())
        assert faiss.omp_get_max_threads() == num_threads

    assert payloads[0] == payloads[1]


def test_an_approximate_search_without_faiss_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)

    assert NeighborQuantizer(VqConfig(num_neighbors=5), _clustered(50)).search_kind == "exact"
    with pytest.raises(MissingDependencyError, match=r'pip install "qarm-feast\[cpu\]"'):
        NeighborQuantizer(VqConfig(num_neighbors=5, search="hnsw"), _clustered(50))


@pytest.mark.skipif(
    hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0, reason="there is a GPU"
)
def test_a_gpu_that_is_not_there_is_refused() -> None:
    index = build_lists(_clustered(100), num_lists=2, seed=0)
    arrays = index.arrays()

    with pytest.raises(ConfigError, match="device is cuda, but faiss sees no GPU"):
        PoolIndex.from_bytes(arrays["index"].tobytes(), arrays, placement=Placement("cuda"))


@needs_gpu
@pytest.mark.gpu
def test_a_gpu_finds_the_codes_of_the_cpu() -> None:
    pool_PD = _clustered(5000)
    config = VqConfig(search="ivf_flat", num_lists=32, num_probes=4)
    trained = NeighborQuantizer(config, pool_PD)
    arrays = dict(trained.arrays())
    index = arrays.pop("index").tobytes()
    on_gpu = NeighborQuantizer.from_arrays(arrays, 25, index=index, placement=Placement("cuda"))

    np.testing.assert_array_equal(on_gpu.encode(pool_PD), trained.encode(pool_PD))

"""Shape letters in this file: N items, P pool rows, D embedding width, V neighbours."""

import numpy as np
import numpy_reference as reference
import pytest

from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers.vq import NeighborQuantizer, VqConfig


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

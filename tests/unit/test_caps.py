"""Shape letters in this file: N items, D embedding width, L levels, K centroids."""

import numpy as np
import pytest
import quantizers.numpy_reference as reference

from qarm_feast.caps import NO_PUBLISHED_CODE, capped_codes
from qarm_feast.quantizers.rq import ResidualQuantizer, RqConfig

LINE = ResidualQuantizer(codebooks=[np.array([[0], [10], [11], [14], [20]], dtype=np.float32)])
"""One level; squared distances can be read off."""


def _unpublished(num_items: int) -> np.ndarray:
    return np.full(num_items, NO_PUBLISHED_CODE)


def _cap(x_N: list[float], cap: int, published: dict[int, int] | None = None) -> list[int]:
    x_ND = np.array(x_N, dtype=np.float32)[:, None]
    published_N = _unpublished(len(x_N))
    for row, code in (published or {}).items():
        published_N[row] = code
    ids_N = np.arange(len(x_N), dtype=np.int64)
    result = capped_codes(LINE, ids_N, x_ND, LINE.encode(x_ND), published_N, cap)
    return result.rq_NL[:, 0].tolist()


def test_the_nearest_items_stay_and_the_others_move_to_the_next_nearest_free_centroid() -> None:
    # All are nearest to 10. 10.1 stays, 9.8 takes 11; 9.5 and 9 then find the next ones taken.
    assert _cap([9.5, 10.1, 9.8, 9.0], cap=1) == [3, 1, 2, 0]
    assert _cap([9.5, 10.1, 9.8, 9.0], cap=2) == [2, 1, 1, 2]


def test_equally_near_items_stay_by_the_lower_id_and_ties_of_centroids_go_to_the_lower_index() -> (
    None
):
    centroids_KD = np.array([[5], [0], [10]], dtype=np.float32)
    quantizer = ResidualQuantizer(codebooks=[centroids_KD])
    x_ND = np.full((3, 1), 5, dtype=np.float32)
    ids_N = np.array([30, 10, 20])

    result = capped_codes(quantizer, ids_N, x_ND, quantizer.encode(x_ND), _unpublished(3), 1)

    # 10 stays; 20 takes index 1 of the equally near 1 and 2; 30 is left with 2.
    assert result.rq_NL[:, 0].tolist() == [2, 0, 1]


def test_items_that_hold_a_published_code_stay_and_count_towards_the_cap() -> None:
    assert _cap([9.5, 10.1, 9.8, 9.0], cap=1, published={3: 1}) == [0, 2, 3, 1]
    assert _cap([9.5, 10.1, 9.8, 9.0], cap=1, published={0: 1, 3: 1}) == [1, 2, 3, 1]


def test_items_that_must_move_go_back_to_their_published_code_before_others_choose() -> None:
    # 9 was published with 14, and 9.8 would be the first to choose: 11, then 9.5 finds 0.
    assert _cap([9.5, 10.1, 9.8, 9.0], cap=1, published={3: 3}) == [0, 1, 2, 3]
    # 9 was published with 11: 9.8 has to pass it by. An item with room at its nearest stays there.
    assert _cap([9.5, 10.1, 9.8, 9.0], cap=1, published={3: 2, 1: 4}) == [0, 1, 3, 2]


def test_items_that_find_no_free_code_stay_and_are_counted() -> None:
    x_ND = np.full((7, 1), 10.25, dtype=np.float32)

    result = capped_codes(LINE, np.arange(7), x_ND, LINE.encode(x_ND), _unpublished(7), 1)

    assert result.rq_NL[:, 0].tolist() == [1, 2, 3, 4, 0, 1, 1]
    assert (result.num_moved, result.num_without_room) == (4, 2)


def test_a_code_that_is_full_already_takes_nobody() -> None:
    # 11 holds an item of its own; 9.8 must pass it by.
    assert _cap([10.0, 9.8, 11.0], cap=1) == [1, 3, 2]


def _reference_capped(
    quantizer: ResidualQuantizer,
    ids_N: np.ndarray,
    x_ND: np.ndarray,
    codes_NL: np.ndarray,
    published_N: np.ndarray,
    cap: int,
) -> list[list[int]]:
    codes = [tuple(row) for row in codes_NL.tolist()]
    is_held_N = published_N == codes_NL[:, -1]
    last_KD = quantizer.codebooks[-1]
    residual_ND = x_ND.copy()
    for level, codebook_KD in enumerate(quantizer.codebooks[:-1]):
        residual_ND = residual_ND - codebook_KD[codes_NL[:, level]]
    distance = [reference.distances(residual_ND[row], last_KD) for row in range(len(x_ND))]
    movers = []
    for code in set(codes):
        rows = [row for row in range(len(codes)) if codes[row] == code]
        rows.sort(key=lambda row: (not is_held_N[row], distance[row][code[-1]], ids_N[row]))
        movers += [row for row in rows[cap:] if not is_held_N[row]]
    movers.sort(key=lambda row: (distance[row][codes[row][-1]], ids_N[row]))
    count = {code: codes.count(code) for code in codes}
    for row in movers:
        count[codes[row]] -= 1
    for row in list(movers):
        home = (*codes[row][:-1], int(published_N[row]))
        if home[-1] >= 0 and count.get(home, 0) < cap:
            count[home] = count.get(home, 0) + 1
            codes[row] = home
            movers.remove(row)
    for row in movers:
        order = sorted(range(len(last_KD)), key=lambda k: (distance[row][k], k))
        free = [k for k in order if count.get((*codes[row][:-1], k), 0) < cap]
        if free:
            codes[row] = (*codes[row][:-1], free[0])
            count[codes[row]] = count.get(codes[row], 0) + 1
    return [list(code) for code in codes]


@pytest.mark.parametrize("cap", [1, 2, 5])
@pytest.mark.parametrize("sizes", [(8,), (4, 8), (3, 4, 8), (2, 64)])
def test_capped_codes_equal_a_plain_reference(sizes: tuple[int, ...], cap: int) -> None:
    rng = np.random.default_rng(0)
    x_ND = rng.standard_normal((300, 6)).astype(np.float32)
    x_ND[100:140] = x_ND[:40]
    quantizer = ResidualQuantizer(RqConfig(codebook_size=sizes))
    quantizer.train(x_ND)
    ids_N = rng.permutation(1000)[:300]
    codes_NL = quantizer.encode(x_ND)
    published_N = _unpublished(300)
    published_N[:60] = codes_NL[:60, -1]
    published_N[60:120] = rng.integers(sizes[-1], size=60)
    is_held_N = published_N == codes_NL[:, -1]

    result = capped_codes(quantizer, ids_N, x_ND, codes_NL, published_N, cap)

    expected = _reference_capped(quantizer, ids_N, x_ND, codes_NL, published_N, cap)
    assert result.rq_NL.tolist() == expected
    np.testing.assert_array_equal(result.rq_NL[is_held_N], codes_NL[is_held_N])
    assert (result.rq_NL[:, :-1] == codes_NL[:, :-1]).all()


def test_the_order_of_the_items_changes_nothing() -> None:
    x_ND = np.random.default_rng(0).standard_normal((400, 4)).astype(np.float32)
    quantizer = ResidualQuantizer(RqConfig(codebook_size=(4, 16)))
    quantizer.train(x_ND)
    ids_N, order_N = np.arange(400), np.random.default_rng(1).permutation(400)

    def capped(order_N: np.ndarray) -> np.ndarray:
        x_order_ND = x_ND[order_N]
        codes_NL = quantizer.encode(x_order_ND)
        held = _unpublished(400)
        return capped_codes(quantizer, ids_N[order_N], x_order_ND, codes_NL, held, 3).rq_NL

    np.testing.assert_array_equal(capped(order_N), capped(ids_N)[order_N])

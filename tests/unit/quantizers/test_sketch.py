"""Shape letters in this file: N queries, P vectors, D embedding width, I lists, k wanted."""

import numpy as np
import numpy_reference as reference
import pytest

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers import ivf_lists, search
from qarm_feast.quantizers.devices import ON_CPU
from qarm_feast.quantizers.pool_index import PoolIndex, build_lists
from qarm_feast.quantizers.sketch import (
    COUNTS_ALL,
    LEAF_SIZE,
    NO_MARGIN,
    Margins,
    Sketch,
    SketchedLists,
    fitted_margins,
    leaf_order,
)

WIDTHS = [5, 64, 70, 130]
RANK = 6


def _vectors(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors whose variance falls from column to column, around a point that is not zero."""
    rng = np.random.default_rng(seed)
    x_PD = rng.standard_normal((num_rows, width)) / np.sqrt(1 + np.arange(width)) + 0.5
    return x_PD.astype(np.float32)


def _lists(x_PD: np.ndarray, num_lists: int) -> tuple[Sketch, list[np.ndarray], SketchedLists]:
    """Return vectors in lists of unequal size; list 0 is empty."""
    sketch = Sketch.fit(x_PD)
    shares = np.arange(num_lists) / np.arange(num_lists).sum()
    list_P = np.random.default_rng(1).choice(num_lists, size=len(x_PD), p=shares)
    members_I = [np.flatnonzero(list_P == number) for number in range(num_lists)]
    vectors_I = [x_PD[members] for members in members_I]
    return sketch, members_I, SketchedLists(sketch, vectors_I, members_I)


def _plain_digits(sketch: Sketch, x_D: np.ndarray) -> tuple[list[int], int]:
    """The definition in Python's integers, which are exact whatever their size."""
    fine = [
        round(float((np.float64(x) - np.float64(centre)) * (256 / sketch.step)))
        for x, centre in zip(x_D, sketch.centre_D, strict=True)
    ]
    digits = []
    for axis in sketch.axes_DD.T:
        turned = sum(value * int(weight) for value, weight in zip(fine, axis, strict=True))
        digits.append(max(-127, min(127, round(turned / (256 * 16384)))))
    return digits, round(sum(value * value for value in fine) / (2 * 256**2))


def _plain_score(query: list[int], digits: list[int], half: int, width: int) -> int:
    return sum(a * b for a, b in zip(query[:width], digits[:width], strict=True)) - half


@pytest.mark.parametrize("width", WIDTHS)
def test_digits_and_squares_are_those_of_exact_integers(width: int) -> None:
    x_PD = _vectors(40, width)
    sketch = Sketch.fit(x_PD)

    digits_PD, halves_P = sketch.digits(x_PD)

    expected = [_plain_digits(sketch, x_D) for x_D in x_PD]
    assert digits_PD.tolist() == [digits for digits, _ in expected]
    assert halves_P.tolist() == [half for _, half in expected]


def test_digits_tell_products_to_about_a_percent() -> None:
    x_PD = _vectors(500, 70)
    sketch = Sketch.fit(x_PD)

    digits_PD, halves_P = sketch.digits(x_PD)

    centred_PD = (x_PD - sketch.centre_D) / sketch.step
    products_PP = centred_PD @ centred_PD.T
    rounded_PP = digits_PD.astype(np.int64) @ digits_PD.T.astype(np.int64)
    assert np.abs(rounded_PP - products_PP).max() < 0.02 * products_PP.max()
    np.testing.assert_allclose(halves_P, products_PP.diagonal() / 2, rtol=1e-2)


def test_a_pool_of_one_vector_repeated_has_digits_of_zero() -> None:
    x_PD = np.full((30, 4), 7.5, dtype=np.float32)

    digits_PD, halves_P = Sketch.fit(x_PD).digits(x_PD)

    assert not digits_PD.any()
    assert not halves_P.any()


def test_vectors_far_beyond_the_pool_are_cut_at_the_largest_digit() -> None:
    sketch = Sketch.fit(_vectors(100, 5))

    digits_ND, halves_N = sketch.digits(np.full((1, 5), 1e14, dtype=np.float32))

    assert np.abs(digits_ND[0]).max() == 127
    assert halves_N[0] == 5 * (1 << 19) ** 2 / (2 * 256**2)


def test_leaves_hold_vectors_that_are_near_each_other() -> None:
    """Ten groups of 16 and one of 5, far apart and shuffled, come out group by group."""
    rng = np.random.default_rng(0)
    groups_R = rng.permutation(np.repeat(np.arange(11), [*[16] * 10, 5]))
    centres = rng.permutation(np.arange(11)) * 20 - 100
    digits_RD = np.stack([centres[groups_R], rng.integers(-3, 4, len(groups_R))], axis=1)

    order_R = leaf_order(digits_RD.astype(np.int8))

    assert sorted(order_R) == list(range(165))
    leaves = np.split(centres[groups_R[order_R]], range(LEAF_SIZE, 165, LEAF_SIZE))
    spread = [leaf.max() - leaf.min() for leaf in leaves]
    # The group of 5 shifts those after it: a leaf may hold two neighbouring groups, never more.
    assert max(spread) <= 20


@pytest.mark.parametrize("width", WIDTHS)
def test_scores_and_limits_follow_their_definition(width: int) -> None:
    x_PD, x_ND = _vectors(150, width), _vectors(7, width, seed=2)
    sketch, members_I, lists = _lists(x_PD, 6)
    near_NM = np.array([[1, 4], [2, 5], [5, 1], [0, 3], [4, 2], [3, 5], [0, 1]])
    margins = Margins(RANK, leaf=900, score=700, full=50)

    limits_3N = lists.limits(sketch.digits(x_ND)[0], near_NM, margins)
    scores_3NP = lists.scores(sketch.digits(x_ND)[0], np.tile(np.arange(150), (7, 1)))

    plain = [_plain_digits(sketch, x_D) for x_D in x_PD]
    for number, x_D in enumerate(x_ND):
        query, _ = _plain_digits(sketch, x_D)
        own = [_plain_score(query, *vector, 64) for vector in plain]
        full = [_plain_score(query, *vector, width) for vector in plain]
        assert scores_3NP[1, number].tolist() == own
        assert scores_3NP[2, number].tolist() == full
        near = np.concatenate([members_I[near] for near in near_NM[number]])
        mark = sorted((own[row] for row in near), reverse=True)[RANK - 1]
        full_mark = sorted((full[row] for row in near if own[row] >= mark - 700), reverse=True)
        expected = [mark - 900, mark - 700, full_mark[RANK - 1] - 50]
        assert limits_3N[:, number].tolist() == expected


def test_a_leaf_is_scored_by_the_mean_of_its_vectors() -> None:
    x_PD, x_ND = _vectors(150, 5), _vectors(1, 5, seed=2)
    sketch, members_I, lists = _lists(x_PD, 6)
    leaf = members_I[4][:LEAF_SIZE]

    (score,) = lists.scores(sketch.digits(x_ND)[0], leaf[None, :1])[0, 0]

    plain = [_plain_digits(sketch, x_D) for x_D in x_PD[leaf]]
    head = np.rint(np.mean([digits for digits, _ in plain], axis=0)).astype(int).tolist()
    query, _ = _plain_digits(sketch, x_ND[0])
    assert score == _plain_score(query, head, round(np.mean([half for _, half in plain])), 64)


def test_fewer_near_vectors_than_the_rank_let_everything_count() -> None:
    x_PD = _vectors(150, 5)
    sketch, members_I, lists = _lists(x_PD, 6)
    margins = Margins(len(members_I[1]) + 1, leaf=0, score=0, full=0)

    limits_3N = lists.limits(sketch.digits(x_PD[:1])[0], np.array([[0, 1]]), margins)

    assert limits_3N.tolist() == [[COUNTS_ALL]] * 3


def test_margins_leave_out_the_allowed_share_of_true_neighbours() -> None:
    gaps_3Nk = np.stack([np.arange(-500, 500).reshape(100, 10)] * 3)

    margins = fitted_margins(gaps_3Nk, rank=10, allowed_miss=0.1)

    left_out = [
        int((gaps > margin).sum())
        for gaps, (_, margin) in zip(gaps_3Nk, margins.named(), strict=True)
    ]
    assert left_out == [49, 9, 4]
    assert fitted_margins(gaps_3Nk, rank=10, allowed_miss=0.0).leaf == 499
    assert fitted_margins(gaps_3Nk - 1000, rank=10, allowed_miss=0.1).score == 0


def _index(x_PD: np.ndarray, num_probes: int, allowed_miss: float) -> PoolIndex:
    index = build_lists(x_PD, 24, seed=0)
    queries_ND = _vectors(40, x_PD.shape[1], seed=3)
    index.fit_margins(queries_ND, reference.nearest(queries_ND, x_PD, RANK), allowed_miss)
    index.effort = num_probes
    return index


def _without_kernels(index: PoolIndex, monkeypatch: pytest.MonkeyPatch) -> PoolIndex:
    arrays = index.arrays()
    with monkeypatch.context() as patch:
        patch.setattr(search, "kernels", lambda: None)
        patch.setattr(ivf_lists, "kernels", lambda: None)
        return PoolIndex.from_bytes(arrays["index"].tobytes(), arrays, ON_CPU)


def _expected(index: PoolIndex, x_PD: np.ndarray, x_ND: np.ndarray, k: int) -> np.ndarray:
    """The module's definition, query by query: probed lists, marks, what counts, the rule."""
    ivf = index._ivf
    coarse_ID = ivf._index.quantizer.reconstruct_n(0, ivf._index.nlist)
    lists = SketchedLists(ivf.sketch, ivf._vectors_I, ivf._numbers_I)
    near_NM = reference.nearest(x_ND, coarse_ID, min(8, index.effort))
    probes_NI = reference.nearest(x_ND, coarse_ID, index.effort)
    digits_ND, _ = ivf.sketch.digits(x_ND)
    limits_3N = lists.limits(digits_ND, near_NM, ivf.sketch.margins)
    rows = []
    for number, probes in enumerate(probes_NI):
        probed = np.sort(np.concatenate([ivf._numbers_I[probe] for probe in probes]))
        scores_3R = lists.scores(digits_ND[number : number + 1], probed[None])[:, 0]
        counted = probed[(scores_3R >= limits_3N[:, number : number + 1]).all(axis=0)]
        members = counted if len(counted) >= k else probed
        nearest = reference.nearest(x_ND[number : number + 1], x_PD[members], k)[0]
        rows.append(members[nearest])
    return np.stack(rows)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("num_probes", "allowed_miss"), [(3, 0.2), (20, 0.2), (20, 0.8)])
@pytest.mark.usefixtures("num_threads")
def test_codes_are_the_rule_over_what_counts_with_and_without_kernels(
    width: int, num_probes: int, allowed_miss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_PD, x_ND = _vectors(2000, width), _vectors(60, width, seed=4)
    index = _index(x_PD, num_probes, allowed_miss)

    expected_Nk = _expected(index, x_PD, x_ND, RANK)

    np.testing.assert_array_equal(index.search(x_ND, RANK), expected_Nk)
    np.testing.assert_array_equal(
        _without_kernels(index, monkeypatch).search(x_ND, RANK), expected_Nk
    )


def test_a_tight_sketch_misses_neighbours_that_whole_lists_have() -> None:
    """So the equality above is not one of searches that leave nothing out."""
    x_PD, x_ND = _vectors(2000, 70), _vectors(60, 70, seed=4)
    tight = _index(x_PD, 24, 0.8).search(x_ND, RANK)
    exact = reference.nearest(x_ND, x_PD, RANK)

    missed = 1 - (tight[:, :, None] == exact[:, None]).any(axis=2).mean()

    assert 0.01 < missed < 0.8


@pytest.mark.parametrize("with_kernels", [True, False])
def test_where_too_few_count_whole_lists_do(
    with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_PD, x_ND = _vectors(400, 5), _vectors(20, 5, seed=4)
    index = _index(x_PD, 24, 0.5)
    index = index if with_kernels else _without_kernels(index, monkeypatch)

    found_Nk = index.search(x_ND, 300)

    np.testing.assert_array_equal(found_Nk, reference.nearest(x_ND, x_PD, 300))


@pytest.mark.parametrize("with_kernels", [True, False])
def test_codes_do_not_depend_on_the_batch(
    with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_PD, x_ND = _vectors(3000, 70), _vectors(2100, 70, seed=4)
    index = _index(x_PD, 20, 0.1)
    index = index if with_kernels else _without_kernels(index, monkeypatch)
    whole_Nk = index.search(x_ND, RANK)

    for batch_size, rows in ((1, 40), (19, 400), (20, 400), (2048, 2100)):
        parts = [
            index.search(x_ND[start : min(start + batch_size, rows)], RANK)
            for start in range(0, rows, batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole_Nk[:rows])


def test_few_long_lists_are_searched_in_bounded_parts() -> None:
    """Two lists of 10,000: more near scores and more candidates than are held at once."""
    x_PD, x_ND = _vectors(20_000, 5), _vectors(2100, 5, seed=4)
    index = build_lists(x_PD, 2, seed=0)
    index.effort = 2

    found_Nk = index.search(x_ND, RANK)

    np.testing.assert_array_equal(found_Nk[:100], reference.nearest(x_ND[:100], x_PD, RANK))
    parts = [index.search(x_ND[start : start + 300], RANK) for start in range(0, 2100, 300)]
    np.testing.assert_array_equal(found_Nk, np.concatenate(parts))


def test_the_same_pool_has_the_same_sketch() -> None:
    x_PD = _vectors(2000, 70)
    first, second = (_index(x_PD, 20, 0.2).arrays() for _ in range(2))

    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def test_a_stored_index_searches_as_the_built_one() -> None:
    x_PD, x_ND = _vectors(2000, 70), _vectors(60, 70, seed=4)
    index = _index(x_PD, 20, 0.2)
    arrays = index.arrays()

    loaded = PoolIndex.from_bytes(arrays["index"].tobytes(), arrays, ON_CPU)

    assert loaded.settings == index.settings
    assert loaded.settings["leaf_margin"] < NO_MARGIN
    np.testing.assert_array_equal(loaded.search(x_ND, RANK), index.search(x_ND, RANK))


def test_an_index_without_a_sketch_is_refused() -> None:
    arrays = dict(build_lists(_vectors(200, 5), 4, seed=0).arrays())
    del arrays["sketch_axes"]

    with pytest.raises(CodebookError, match=r"has no sketch.*qarm codebook train"):
        PoolIndex.from_bytes(arrays["index"].tobytes(), arrays, ON_CPU)

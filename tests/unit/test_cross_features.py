from typing import Any

import numpy as np
import pytest

from qarm_feast.cross_features import CrossFeatures, cross_features, on_demand_features
from qarm_feast.errors import DataError


def reference(
    candidates: list[list[int]], histories: list[list[list[int]]]
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Item by item, as one would write it down."""
    counts, positions, shares = [], [], []
    for candidate, history in zip(candidates, histories, strict=True):
        row: list[tuple[int, int, float]] = []
        num_present = sum(codes[0] != -1 for codes in history)
        for length in (1, 2):
            prefix = candidate[:length]
            places = [
                place
                for place, codes in enumerate(history)
                if len(prefix) == length and -1 not in prefix and codes[:length] == prefix
            ]
            share = len(places) / num_present if num_present else 0.0
            row.append((len(places), min(places, default=-1), share))
        for column, parts in zip((counts, positions, shares), zip(*row, strict=True), strict=True):
            column.append(list(parts))
    return counts, positions, shares


def flat(histories: list[list[list[int]]], num_levels: int) -> tuple[np.ndarray, np.ndarray]:
    items = [codes for history in histories for codes in history]
    lengths_B = np.array([len(history) for history in histories], dtype=np.int64)
    return np.array(items, dtype=np.int64).reshape(-1, num_levels), lengths_B


def test_counts_newest_place_and_share_per_prefix() -> None:
    history = [[7, 1, 0], [3, 9, 0], [3, 4, 0], [3, 4, 5]]
    history_HL, lengths_B = flat([history, history[:1]], 3)

    found = cross_features(np.array([[3, 4, 8], [3, 4, 8]]), history_HL, lengths_B)

    assert found.counts_BP.tolist() == [[3, 2], [0, 0]]
    assert found.positions_BP.tolist() == [[1, 2], [-1, -1]]
    assert found.shares_BP.tolist() == [[0.75, 0.5], [0.0, 0.0]]
    assert [str(part.dtype) for part in vars(found).values()] == ["int64", "int64", "float32"]


def test_a_missing_code_matches_nothing_and_keeps_its_place() -> None:
    history_HL, lengths_B = flat([[[-1, -1], [3, -1], [3, 4]], [[-1, -1]]], 2)

    found = cross_features(np.array([[3, 4], [-1, -1]]), history_HL, lengths_B)

    assert found.counts_BP.tolist() == [[2, 1], [0, 0]]
    assert found.positions_BP.tolist() == [[1, 2], [-1, -1]]
    assert found.shares_BP.tolist() == [[1.0, 0.5], [0.0, 0.0]]


def test_an_item_that_stands_twice_counts_twice() -> None:
    history_HL, lengths_B = flat([[[1, 1], [3, 4], [3, 4]]], 2)

    found = cross_features(np.array([[3, 4]]), history_HL, lengths_B)

    assert (found.counts_BP.tolist(), found.positions_BP.tolist()) == ([[2, 2]], [[1, 1]])


def test_codes_of_one_level_never_share_two() -> None:
    found = cross_features(np.array([[3]]), np.array([[3], [3]]), np.array([2]))

    assert (found.counts_BP.tolist(), found.positions_BP.tolist()) == ([[2, 0]], [[0, -1]])


def test_codes_of_no_level_match_nothing() -> None:
    no_codes = np.empty((2, 0), np.int64)

    found = cross_features(no_codes, no_codes, np.array([2, 0]))

    assert found.dense_inputs().tolist() == [[0.0] * 6] * 2


@pytest.mark.parametrize("num_rows", [0, 3])
def test_without_history_or_rows_there_are_no_matches(num_rows: int) -> None:
    codes_BL, lengths_B = np.ones((num_rows, 2), np.int64), np.zeros(num_rows, np.int64)

    found = cross_features(codes_BL, np.empty((0, 2), np.int64), lengths_B)

    assert found.counts_BP.tolist() == [[0, 0]] * num_rows
    assert found.dense_inputs().tolist() == [[0.0] * 6] * num_rows


@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_random_rows_equal_the_reference(num_levels: int) -> None:
    rng = np.random.default_rng(num_levels)
    candidates = rng.integers(-1, 3, (200, num_levels)).tolist()
    histories = [rng.integers(-1, 3, (rng.integers(0, 9), num_levels)).tolist() for _ in range(200)]

    found = cross_features(np.array(candidates), *flat(histories, num_levels))

    counts, positions, shares = reference(candidates, histories)
    assert found.counts_BP.tolist() == counts
    assert found.positions_BP.tolist() == positions
    np.testing.assert_array_equal(found.shares_BP, np.array(shares, dtype=np.float32))


def test_inputs_of_a_net_grow_with_count_and_fall_with_age() -> None:
    found = CrossFeatures(
        np.array([[3, 0]]), np.array([[1, -1]]), np.array([[0.75, 0.0]], np.float32)
    )

    inputs_BW = found.dense_inputs()

    expected = [[np.log(4), 0.0, 0.5, 0.0, 0.75, 0.0]]
    np.testing.assert_allclose(inputs_BW, expected, rtol=1e-6)
    assert inputs_BW.dtype == np.float32


@pytest.mark.parametrize(
    ("lengths", "levels", "message"),
    [([2, 1], 2, "2 lengths that add up to 3"), ([2], 3, "2 levels, history items of 3")],
)
def test_shapes_that_do_not_fit_are_refused_with_both_values(
    lengths: list[int], levels: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        cross_features(np.ones((1, 2), int), np.ones((2, levels), int), np.array(lengths))


def test_the_on_demand_function_takes_feasts_lists_and_unknown_items() -> None:
    inputs: dict[str, list[Any]] = {
        "rq_code": [[3, 4], None, [3, 9], [3, 4]],
        "history_rq_codes": [[3, 9, 3, 4], [3, 9], [], None],
    }

    outputs = on_demand_features(inputs)

    assert outputs == {
        "c1_count": [2, 0, 0, 0],
        "c1_position": [0, -1, -1, -1],
        "c1_share": [1.0, 0.0, 0.0, 0.0],
        "c1_c2_count": [1, 0, 0, 0],
        "c1_c2_position": [1, -1, -1, -1],
        "c1_c2_share": [0.5, 0.0, 0.0, 0.0],
    }


@pytest.mark.parametrize(
    ("codes", "history", "message"),
    [
        ([[3, 4]], [[3, 4, 5]], "row 0 holds 3 codes, no multiple of the candidate's 2"),
        ([[3, 4], [3]], [[], []], r"codes of \[1, 2\] levels"),
    ],
)
def test_a_request_of_another_codebook_is_refused(
    codes: list[Any], history: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        on_demand_features({"rq_code": codes, "history_rq_codes": history})

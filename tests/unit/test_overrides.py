"""Shape letters in this file: N items, M overrides, L levels."""

import numpy as np
import pytest

from qarm_feast.errors import CodebookError, DataError
from qarm_feast.overrides import NO_ROW, Overrides, hash_array


def _table(rows: list[tuple[int, str, list[int]]]) -> Overrides:
    ids, hashes, codes = zip(*rows, strict=True)
    return Overrides.from_rows(np.array(ids), hashes, np.array(codes, dtype=np.int64))


def test_rows_are_found_by_item_and_content_whatever_their_order() -> None:
    table = _table([(7, "b", [1, 1]), (-3, "x", [2, 2]), (7, "a", [3, 3]), (7, "c", [4, 4])])

    rows_N = table.rows_of(np.array([7, 7, 7, 7, -3, 5, -3]), ["c", "a", "b", "d", "x", "a", "y"])

    assert table.item_ids_M.tolist() == [-3, 7, 7, 7]
    assert rows_N.tolist() == [3, 1, 2, NO_ROW, 0, NO_ROW, NO_ROW]


def test_a_hash_that_starts_like_a_stored_one_is_another_hash() -> None:
    table = _table([(1, "abc", [1])])

    assert table.rows_of(np.array([1, 1, 1]), ["ab", "abcd", "abc"]).tolist() == [
        NO_ROW, NO_ROW, 0,
    ]  # fmt: skip


def test_stored_codes_equal_a_plain_dictionary() -> None:
    rng = np.random.default_rng(0)
    keys = sorted({(int(i), f"h{h}") for i, h in rng.integers(0, 40, size=(300, 2))})
    codes_ML = rng.integers(0, 9, size=(len(keys), 3))
    order = rng.permutation(len(keys))
    table = Overrides.from_rows(
        np.array([keys[row][0] for row in order]), [keys[row][1] for row in order], codes_ML[order]
    )
    items = rng.integers(0, 40, size=500)
    hashes = [f"h{h}" for h in rng.integers(0, 40, size=500)]
    rq_NL = rng.integers(10, 20, size=(500, 3))

    served_NL = table.apply(items, hashes, rq_NL)

    stored = dict(zip(keys, codes_ML.tolist(), strict=True))
    expected = [
        stored.get((int(item), hash_), row)
        for item, hash_, row in zip(items, hashes, rq_NL.tolist(), strict=True)
    ]
    assert served_NL.tolist() == expected


def test_an_empty_table_changes_nothing() -> None:
    rq_NL = np.array([[1, 2]])

    assert Overrides.empty(2).apply(np.array([5]), ["a"], rq_NL) is rq_NL


def test_columns_of_unequal_length_are_refused() -> None:
    codes_ML = np.zeros((1, 2), dtype=np.int64)

    with pytest.raises(CodebookError, match="2 items came with 2 content hashes and 1 codes"):
        Overrides.from_rows(np.array([1, 2]), ["a", "b"], codes_ML)


def test_a_content_hash_that_is_not_ascii_is_named() -> None:
    with pytest.raises(DataError, match="must be ASCII, found 'h\u00e9'"):
        hash_array(["ha", "h\u00e9"])


def test_a_table_comes_back_from_its_columns_in_the_width_that_it_was_stored_in() -> None:
    codes_MC = np.array([[5, 6], [7, 8]], dtype=np.int32)
    table = Overrides.from_rows(np.array([2, 1]), ["b", "a"], codes_MC)

    again = Overrides.from_arrays(table.arrays("vq_codes"), "vq_codes")

    assert again.codes_MC.dtype == np.int32
    served_NC = again.apply(np.array([1, 2, 2]), ["a", "b", "c"], np.zeros((3, 2), dtype=np.int64))
    assert (served_NC.dtype, served_NC.tolist()) == (np.dtype(np.int64), [[7, 8], [5, 6], [0, 0]])

"""Shape letters in this file: N items, D embedding width."""

import numpy as np
import pytest

from qarm_feast.errors import DataError
from qarm_feast.quantizers.base import fold_sum, unit_rows, usable_rows


def test_fold_sum_adds_in_the_written_order() -> None:
    # ((a + e) + c) + (b + d): 1 is lost beside 1e16, so another order gives another sum.
    terms_ND = np.array([[1e16, 1.0, -1e16, 1.0, 1.0]])

    assert fold_sum(terms_ND).tolist() == [((1e16 + 1.0) + -1e16) + (1.0 + 1.0)]


def test_unit_rows_have_length_one_and_do_not_depend_on_the_rows_beside_them() -> None:
    x_ND = np.random.default_rng(0).standard_normal((70_000, 3)).astype(np.float32)

    unit_ND = unit_rows(x_ND)

    np.testing.assert_allclose(np.linalg.norm(unit_ND, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(unit_rows(x_ND[65_530:65_540]), unit_ND[65_530:65_540])


def test_a_row_of_length_zero_has_no_direction() -> None:
    with pytest.raises(DataError, match="1 vectors have length zero; the first is row 1"):
        unit_rows(np.array([[1, 0], [0, 0]], dtype=np.float32))


def test_usable_rows_tells_which_vectors_can_be_coded() -> None:
    x_ND = np.array([[1, 0], [0, 0], [np.nan, 1], [np.inf, 1], [1e16, 1]], dtype=np.float32)

    assert usable_rows(x_ND).tolist() == [True, False, False, False, False]

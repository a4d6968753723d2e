from collections.abc import Callable

import numpy as np
import pytest

from qarm_feast.alignment.evaluate import (
    evaluate_vectors,
    format_report,
    neighbor_auc,
    next_item_hits,
    read_behaviour,
)
from qarm_feast.errors import DataError
from qarm_feast.input_data import InputData

Loader = Callable[..., InputData]


def test_behaviour_comes_from_validation_rows_and_never_from_test_rows(load_rows: Loader) -> None:
    checked = load_rows(
        [
            (1, 0, 1, "train", True),
            (1, 1, 2, "train", True),
            (1, 2, 3, "valid", True),
            (1, 3, 4, "test", True),
            (2, 0, 1, "train", True),
            (2, 2, 2, "valid", True),
            (2, 3, 3, "valid", False),
            (3, 3, 1, "test", True),
        ]
    )

    behaviour = read_behaviour(checked)

    # Item 2 shares two users with item 0 and one with item 1.
    assert behaviour.query_items.tolist() == [2]
    assert behaviour.neighbor_items.tolist() == [[0, 1, -1, -1, -1]]
    assert behaviour.histories.toarray().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert behaviour.next_items.tolist() == [2, 2]
    # Item 3 has a validation row (of no positive) and test rows, but no train row.
    assert behaviour.is_cold.tolist() == [False, False, True, True]


def test_neighbor_auc_counts_the_random_items_that_are_farther(load_rows: Loader) -> None:
    rows = [(1, 0, 1, "train", True), (1, 1, 2, "valid", True)]
    rows += [(9, item, 1, "train", False) for item in (2, 3, 4)]
    behaviour = read_behaviour(load_rows(rows))
    angles = np.radians([30, 0, 10, 30, 80])
    vectors_MD = np.column_stack([np.cos(angles), np.sin(angles)])

    aucs_Q = neighbor_auc(behaviour, vectors_MD)

    # Seen from item 1, item 0 beats item 4, ties with item 3 and loses to item 2.
    assert behaviour.query_items.tolist() == [1]
    np.testing.assert_allclose(aucs_Q, [0.5])


def test_next_item_hits_rank_the_next_item_among_items_outside_the_history(
    load_rows: Loader,
) -> None:
    num_items = 14
    rows = [(1, 0, 1, "train", True), (1, 13, 5, "valid", True)]
    rows += [(9, item, 1, "train", False) for item in range(1, num_items)]
    behaviour = read_behaviour(load_rows(rows))

    def hit(next_rank: int) -> bool:
        angles = np.linspace(0.0, 1.0, num_items)
        angles[13] = angles[next_rank] + 0.001
        vectors_MD = np.column_stack([np.cos(angles), np.sin(angles)])
        return bool(next_item_hits(behaviour, vectors_MD)[0])

    # Item 0 is the history; with 9 other items nearer the next item is the tenth.
    assert hit(next_rank=9)
    assert not hit(next_rank=10)


def test_report_slices_by_cold_items(clustered: InputData) -> None:
    clusters = np.arange(40) // 10
    perfect = np.eye(4)[clusters]

    report = evaluate_vectors(clustered, {"perfect": perfect, "blind": np.ones((40, 1))})

    # Of the 34 items that are no neighbours, 30 are farther and 4 of the same cluster tie.
    assert report["perfect"]["neighbor_auc_warm"] == pytest.approx(32 / 34)
    assert report["perfect"]["neighbor_auc_cold"] == pytest.approx(32 / 34)
    assert report["blind"]["neighbor_auc_all"] == 0.5
    assert report["counts"]["num_queries_cold"] == 4
    assert "neighbor_auc_cold" in format_report(report)


def test_data_without_validation_positives_is_refused(load_rows: Loader) -> None:
    checked = load_rows([(1, 0, 1, "train", True), (1, 0, 2, "test", True)])

    with pytest.raises(DataError, match="no positive validation row"):
        read_behaviour(checked)

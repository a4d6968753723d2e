from pathlib import Path

import numpy as np
import pytest
import torch

from qarm_feast.errors import ConfigError
from torchrec_models import vector_inputs
from torchrec_models.row_store import SnapshotArrays
from torchrec_models.snapshot import ItemSnapshot
from torchrec_models.vector_inputs import NamedVectors


def _snapshot(folder: Path, vectors_ID: np.ndarray | None = None) -> ItemSnapshot:
    SnapshotArrays(
        item_ids_I=np.array([30, 10, 20]),
        event_times_I=np.array([300, 100, 200]),
        rq_IL=np.array([[3, 33], [1, 11], [-1, -1]]),
        vectors_ID=vectors_ID,
    ).write(folder)
    return ItemSnapshot(folder)


def test_a_code_row_later_than_the_label_is_masked_and_counted(tmp_path: Path) -> None:
    snapshot = _snapshot(tmp_path)

    found = snapshot.history_codes(np.array([30, 30, 10, 99]), np.array([299, 300, 100, 500]))

    assert found.present_H.tolist() == [False, True, True, False]
    assert found.rq_HL[found.present_H].tolist() == [[3, 33], [1, 11]]
    assert snapshot.masked_share == 0.25


def test_a_deleted_item_has_no_code(tmp_path: Path) -> None:
    found = _snapshot(tmp_path).history_codes(np.array([20]), np.array([500]))

    assert found.present_H.tolist() == [False]


def test_vectors_are_zero_where_unknown_or_later(tmp_path: Path) -> None:
    snapshot = _snapshot(tmp_path, np.array([[0, 3], [1, 0], [2, 0]], dtype=np.float32))

    named = NamedVectors.of(snapshot, np.array([10, 30, 30, 99]), np.array([100, 299, 300, 999]))

    assert named.rows().tolist() == [[1, 0], [0, 0], [0, 3], [0, 0]]


def test_vectors_and_cosines_of_a_small_catalogue_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors_ID = np.array([[0, 1], [0, 0], [0.6, 0.8]], dtype=np.float32)
    snapshot = _snapshot(tmp_path, vectors_ID)
    places, _ = snapshot.find(np.array([10, 20, 30]), np.array([999, 999, 999]))

    held = snapshot.held

    assert held is not None
    assert torch.equal(held.vectors_ID[places], snapshot.take(places))
    assert held.has_vector_I[places].tolist() == [False, True, True]
    by_hand = [[0, 0, 0], [0, 1, 0.8], [0, 0.8, 1]]
    np.testing.assert_allclose(held.cosines_II[np.ix_(places, places)], by_hand, atol=1e-6)
    monkeypatch.setattr(vector_inputs, "_MOST_TABLE_CELLS", 8)
    assert _snapshot(tmp_path, vectors_ID).held is None


def test_a_snapshot_without_vectors_holds_none(tmp_path: Path) -> None:
    assert _snapshot(tmp_path).held is None


def test_a_snapshot_without_vectors_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qarm align export"):
        _snapshot(tmp_path).take(np.array([0]))


def test_vectors_come_from_the_source_that_is_asked_for(tmp_path: Path) -> None:
    aligned = np.array([[0, 3], [1, 0], [2, 0]], dtype=np.float32)
    SnapshotArrays(
        item_ids_I=np.array([30, 10, 20]),
        event_times_I=np.array([300, 100, 200]),
        rq_IL=np.zeros((3, 2), dtype=np.int64),
        vectors_ID=aligned,
        raw_vectors_IE=np.array([[3, 3, 3], [1, 1, 1], [2, 2, 2]], dtype=np.float32),
    ).write(tmp_path)

    vectors = ItemSnapshot(tmp_path, "raw").take(np.array([0, 2]))

    assert vectors.tolist() == [[1, 1, 1], [3, 3, 3]]
    assert ItemSnapshot(tmp_path).take(np.array([0])).tolist() == [[1, 0]]


def test_a_snapshot_gives_itself_with_vectors_of_another_source(tmp_path: Path) -> None:
    SnapshotArrays(
        item_ids_I=np.array([30, 10]),
        event_times_I=np.array([300, 100]),
        rq_IL=np.array([[3, 3], [1, 1]]),
        vectors_ID=np.array([[0, 3], [1, 0]], dtype=np.float32),
        raw_vectors_IE=np.array([[0, 0, 1], [0, 1, 0]], dtype=np.float32),
    ).write(tmp_path)
    raw = ItemSnapshot(tmp_path, "raw")
    assert raw.held is not None

    aligned = raw.with_source("aligned")

    assert raw.with_source("raw") is raw
    assert aligned.take(np.array([0])).tolist() == [[1, 0]]
    assert aligned.held is not None
    assert aligned.held.vectors_ID.shape == (2, 2)
    assert raw.take(np.array([0])).tolist() == [[0, 1, 0]]
    codes = aligned.history_codes(np.array([30]), np.array([300]))
    assert codes.rq_HL.tolist() == [[3, 3]]


def test_a_snapshot_without_raw_vectors_names_them(tmp_path: Path) -> None:
    _snapshot(tmp_path, np.zeros((3, 2), dtype=np.float32))

    with pytest.raises(ConfigError, match="holds no raw vectors"):
        ItemSnapshot(tmp_path, "raw").take(np.array([0]))

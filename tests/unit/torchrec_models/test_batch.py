from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from torchrec_models.batch import BatchBuilder, HistoryCodes
from torchrec_models.config import FeatureName, RankerConfig
from torchrec_models.row_columns import Ints, RowColumns
from torchrec_models.vector_inputs import Bools
from torchrec_models.vocabulary import IdVocabulary, Vocabularies

VOCABULARIES = Vocabularies(
    user_ids=IdVocabulary(np.array([1, 2])), item_ids=IdVocabulary(np.array([10, 11, 12]))
)


class _Lookup:
    """Item 10 has codes [4, 5] and vector (1, 0); 11 [6, 7] and (0, 1); others nothing.

    Item 12 will have the codes [4, 5], later than any row.
    """

    held = None

    def history_codes(self, item_ids_H: Ints, label_times_H: Ints) -> HistoryCodes:
        codes = {10: (4, 5), 11: (6, 7)}
        rq_HL = np.array([codes.get(item, (4, 5)) for item in item_ids_H.tolist()])
        return HistoryCodes(rq_HL.reshape(-1, 2), np.isin(item_ids_H, list(codes)))

    def find(self, item_ids_N: Ints, label_times_N: Ints) -> tuple[Ints, Bools]:
        return item_ids_N, np.isin(item_ids_N, [10, 11])

    def take(self, places_U: Ints) -> torch.Tensor:
        vectors = {10: (1.0, 0.0), 11: (0.0, 1.0)}
        found = [vectors.get(item, (0.5, 0.5)) for item in places_U.tolist()]
        return torch.tensor(found).reshape(-1, 2)


class _OtherLookup(_Lookup):
    """Item 11 has the vector (.6, .8)."""

    def take(self, places_U: Ints) -> torch.Tensor:
        vectors_UD = super().take(places_U)
        vectors_UD[torch.from_numpy(places_U == 11)] = torch.tensor([0.6, 0.8])
        return vectors_UD


def _rows() -> RowColumns:
    """User 1 with history 11, 10, 12 and target 10; user 9 without history and code, target 99."""
    return RowColumns(
        user_ids_B=np.array([1, 9]),
        item_ids_B=np.array([10, 99]),
        label_times_B=np.array([100, 200]),
        rq_BL=np.array([[4, 5], [-1, -1]]),
        vq_BK=np.array([[3, 8, 1], [-1, -1, -1]]),
        history_item_ids_H=np.array([11, 10, 12]),
        history_lengths_B=np.array([3, 0]),
        labels_BT=np.array([[1, 0], [0, 0]], dtype=np.float32),
        is_train_B=np.array([True, False]),
    )


def _builder(
    features: tuple[FeatureName, ...], names: tuple[str, ...], **keys: int | str
) -> BatchBuilder:
    config = RankerConfig.model_validate({"features": features, **keys})
    return BatchBuilder(config, VOCABULARIES, names, _Lookup(), _Lookup(), _OtherLookup())


def test_ids_and_codes_become_jagged_features() -> None:
    names = ("item_id", "history_item_id", "vq_code", "rq_0", "rq_1", "history_rq_0")
    builder = _builder(
        ("item_id", "history_item_id", "vq_code", "rq_code", "history_rq_code"), names
    )

    batch = builder.build(_rows())

    lists = {name: batch.sparse_features[name].to_dense() for name in names}
    as_lists = {name: [row.tolist() for row in rows] for name, rows in lists.items()}
    assert as_lists == {
        "item_id": [[1], [0]],
        "history_item_id": [[2, 1, 3], []],
        "vq_code": [[3, 8, 1], []],
        "rq_0": [[4], []],
        "rq_1": [[5], []],
        "history_rq_0": [[6, 4], []],
    }
    assert batch.item_rows.tolist() == [1, 0]
    assert batch.dense_features.shape == (2, 0)


def test_a_history_is_cut_to_its_newest_items() -> None:
    builder = _builder(("history_item_id",), ("history_item_id",), history_length=2)

    batch = builder.build(_rows())

    assert batch.sparse_features["history_item_id"].lengths().tolist() == [2, 0]
    assert batch.sparse_features["history_item_id"].values().tolist() == [2, 1]


def test_vector_features_are_target_mean_history_and_cosines_at_unit_scale() -> None:
    batch = _builder(("item_id", "vector"), ("item_id",)).build(_rows())

    third, scale = 1 / 3, 2**0.5
    vectors = [scale, 0, third * scale, third * scale]
    expected = torch.tensor([[*vectors, third * 5, 5], [0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(batch.dense_features, expected)


def test_aligned_cosines_are_of_their_own_vectors_and_stand_behind_the_others() -> None:
    alone = _builder(("item_id", "aligned_cosine"), ("item_id",)).build(_rows()).dense_features
    features: tuple[FeatureName, ...] = ("item_id", "vector", "aligned_cosine", "cross")
    behind = _builder(features, ("item_id",), vector_source="raw").build(_rows()).dense_features

    # Target 10 and history 11, 10, 12: cosines .6, 1 and, of an item unknown by then, none.
    torch.testing.assert_close(alone, torch.tensor([[5 * 1.6 / 3, 5.0], [0.0, 0.0]]))
    torch.testing.assert_close(behind[:, 6:8], alone)


def test_cross_features_stand_behind_the_vectors_and_leave_later_codes_out() -> None:
    alone = _builder(("item_id", "cross"), ("item_id",)).build(_rows()).dense_features
    behind = _builder(("item_id", "vector", "cross"), ("item_id",)).build(_rows()).dense_features

    log_2 = float(np.log(2))
    expected = torch.tensor([[log_2, log_2, 0.5, 0.5, 0.5, 0.5], [0.0] * 6])
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(behind[:, 6:], expected)


def test_cross_features_see_what_is_left_of_a_cut_history() -> None:
    builder = _builder(("item_id", "cross"), ("item_id",), history_length=1)

    assert builder.build(_rows()).dense_features.tolist() == [[0.0] * 6] * 2


def test_a_batch_moves_as_a_whole() -> None:
    batch = _builder(("item_id",), ("item_id",)).build(_rows())

    moved = batch.to(torch.device("meta"))

    assert moved.labels.device.type == moved.dense_features.device.type == "meta"
    assert moved.sparse_features.device().type == "meta"


def test_user_columns_go_through_their_vocabulary() -> None:
    train = pa.table({"user_id": [1], "item_id": [10], "gender": ["F"]})
    from torchrec_models.vocabulary import build_vocabularies

    builder = BatchBuilder(
        RankerConfig(features=("user_columns",)),
        build_vocabularies(train, ("gender",), 2),
        ("user_gender",),
        _Lookup(),
    )
    rows = _rows()
    rows = RowColumns(**(vars(rows) | {"user_columns": {"gender": pa.array(["F", None])}}))

    assert builder.build(rows).sparse_features["user_gender"].values().tolist() == [1, 0]


@pytest.mark.parametrize("history", [[], [11], [12, 10, 11, 10]])
def test_one_history_of_all_rows_gives_what_it_gives_row_by_row(history: list[int]) -> None:
    repeated = RowColumns(
        user_ids_B=np.array([1, 1, 1]),
        item_ids_B=np.array([10, 99, 11]),
        label_times_B=np.array([100, 100, 100]),
        rq_BL=np.array([[4, 5], [-1, -1], [6, 9]]),
        vq_BK=np.array([[3, 8, 1], [-1, -1, -1], [2, 2, 2]]),
        history_item_ids_H=np.array(history * 3, dtype=np.int64),
        history_lengths_B=np.full(3, len(history)),
        labels_BT=np.zeros((3, 2), dtype=np.float32),
        is_train_B=np.zeros(3, dtype=np.bool_),
    )
    builder = _builder(
        ("history_item_id", "history_rq_code", "cross", "vector", "aligned_cosine"),
        ("history_item_id", "history_rq_0", "history_rq_1"),
        vector_source="raw",
    )

    first = builder.build(repeated)
    second = builder.build(replace(repeated, has_one_history=True))

    assert second.sparse_features.keys() == first.sparse_features.keys()
    assert second.sparse_features.values().tolist() == first.sparse_features.values().tolist()
    assert second.sparse_features.lengths().tolist() == first.sparse_features.lengths().tolist()
    torch.testing.assert_close(second.dense_features, first.dense_features)

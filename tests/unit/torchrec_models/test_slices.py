import numpy as np
import pyarrow.parquet as pq

from torchrec_models.inputs import TrainInputs
from torchrec_models.slices import COLD, HEAD, MIDDLE, SLICES, TAIL, item_slices, popularity_slices


def test_head_makes_four_fifths_of_the_positives_and_middle_the_next_fifteen_percent() -> None:
    # 100 positives; the default row stands first. The third item's 15 reach from 80 to 95 %.
    positives_V = np.array([7, 50, 30, 15, 3, 2, 0])

    slices_V = popularity_slices(positives_V)

    assert slices_V.tolist() == [COLD, HEAD, HEAD, MIDDLE, TAIL, TAIL, TAIL]


def test_items_of_equal_count_share_the_upper_slice() -> None:
    slices_V = popularity_slices(np.array([0, 1, 1, 1, 1, 0]))

    assert slices_V.tolist() == [COLD, HEAD, HEAD, HEAD, HEAD, TAIL]


def test_without_a_positive_every_known_item_is_tail() -> None:
    assert popularity_slices(np.array([0, 0, 0])).tolist() == [COLD, TAIL, TAIL]


def test_an_item_is_cold_if_and_only_if_it_has_no_train_row(inputs: TrainInputs) -> None:
    slices_V = item_slices(inputs.store, inputs.store.vocabularies().item_ids)
    train = pq.read_table(inputs.store.split_path("train"))
    test_items = pq.read_table(inputs.store.split_path("test"))["item_id"].to_numpy()
    item_ids = inputs.store.vocabularies().item_ids

    is_cold_N = slices_V[item_ids.rows(test_items)] == COLD
    liked = train.filter(train["is_like"])["item_id"].to_numpy()
    head = item_ids.ids_V[slices_V[1:] == HEAD]

    assert is_cold_N.any()
    assert is_cold_N.tolist() == (~np.isin(test_items, train["item_id"].to_numpy())).tolist()
    assert 0.8 <= np.isin(liked, head).mean() < 0.9
    assert len(SLICES) == 4

from collections.abc import Iterator

import numpy as np
import torch

from torchrec_models.batch import BatchBuilder, HistoryCodes, RankingBatch
from torchrec_models.config import RankerConfig
from torchrec_models.row_columns import Ints, RowColumns
from torchrec_models.sequence_inputs import (
    PickedItems,
    most_similar_places,
    picked_lengths,
    sequence_features,
    shared_history,
)
from torchrec_models.vector_inputs import Bools
from torchrec_models.vocabulary import IdVocabulary, Vocabularies

CODES = {10: (4, 5), 11: (4, 7), 12: (2, 5), 13: (4, 5)}
"""Item 14 has no codes."""
VECTORS = {10: (1.0, 0.0), 11: (0.6, 0.8), 12: (0.0, 1.0), 13: (1.0, 0.0), 14: (-1.0, 0.0)}
"""Item 15 has no vector."""


class _Lookup:
    held = None

    def history_codes(self, item_ids_H: Ints, label_times_H: Ints) -> HistoryCodes:
        rq_HL = np.array([CODES.get(item, (0, 0)) for item in item_ids_H.tolist()])
        return HistoryCodes(rq_HL.reshape(-1, 2), np.isin(item_ids_H, list(CODES)))

    def find(self, item_ids_N: Ints, label_times_N: Ints) -> tuple[Ints, Bools]:
        return item_ids_N, np.isin(item_ids_N, list(VECTORS))

    def take(self, places_U: Ints) -> torch.Tensor:
        found = [VECTORS.get(item, (0.5, 0.5)) for item in places_U.tolist()]
        return torch.tensor(found).reshape(-1, 2)


def _rows() -> RowColumns:
    """Target 10 with history 11, 14, 13, 12, 10; target 14, without codes, with 11, 14; none."""
    return RowColumns(
        user_ids_B=np.array([1, 2, 3]),
        item_ids_B=np.array([10, 14, 12]),
        label_times_B=np.array([100, 200, 300]),
        rq_BL=np.array([[4, 5], [-1, -1], [2, 5]]),
        vq_BK=np.zeros((3, 1), dtype=np.int64),
        history_item_ids_H=np.array([11, 14, 13, 12, 10, 11, 14]),
        history_lengths_B=np.array([5, 2, 0]),
        is_train_B=np.zeros(3, dtype=np.bool_),
        labels_BT=np.zeros((3, 1), dtype=np.float32),
    )


def _batch(names: tuple[str, ...], **keys: object) -> RankingBatch:
    ids = IdVocabulary(np.array([10, 11, 12, 13, 14]))
    config = RankerConfig.model_validate(keys)
    vocabularies = Vocabularies(user_ids=ids, item_ids=ids)
    builder = BatchBuilder(config, vocabularies, names, _Lookup(), _Lookup(), level_sizes=(8, 9))
    return builder.build(_rows())


def _lists(batch: RankingBatch, name: str) -> list[list[int]]:
    return [row.tolist() for row in batch.sparse_features[name].to_dense()]


def test_sequences_hold_the_codes_of_coded_items_level_behind_level() -> None:
    batch = _batch(("target_sequence", "history_sequence"), features=("item_id", "attention"))

    # Rows of the second level stand behind the eight of the first.
    assert _lists(batch, "target_sequence") == [[4, 13], [], [2, 13]]
    # The second target has no codes to ask with.
    assert _lists(batch, "history_sequence") == [[4, 15, 4, 13, 2, 13, 4, 13], [], []]


def test_a_sequence_holds_the_newest_items_of_a_longer_history() -> None:
    batch = _batch(("history_sequence",), features=("item_id", "attention"), history_length=3)

    assert _lists(batch, "history_sequence") == [[4, 15, 4, 13], [], []]


def test_shared_history_holds_the_items_of_equal_prefix_as_codes_and_as_ids() -> None:
    names = ("shared_c1_sequence", "shared_c1_c2_sequence")
    bags = ("shared_c1_item_id", "shared_c1_c2_item_id")

    batch = _batch((*names, *bags), features=("shared_history",))

    assert _lists(batch, names[0]) == [[4, 15, 4, 13, 4, 13], [], []]
    assert _lists(batch, names[1]) == [[4, 13, 4, 13], [], []]
    # Items 11, 13 and 10 by their rows of the item table.
    assert _lists(batch, bags[0]) == [[2, 4, 1], [], []]
    assert _lists(batch, bags[1]) == [[4, 1], [], []]


def test_the_search_takes_the_most_similar_items_also_beyond_the_short_history() -> None:
    names = ("searched_sequence", "searched_item_id")

    batch = _batch(names, features=("long_history",), history_length=1, num_searched=2)

    # Items 13 and 10 are equal to the first target; the second one, 14, is nearest to itself.
    assert _lists(batch, names[1]) == [[4, 1], [2, 5], []]
    # The second target has a vector to search with, but no codes to attend with.
    assert _lists(batch, names[0]) == [[4, 13, 4, 13], [], []]
    cut = _batch(names, features=("long_history",), long_history_length=3, num_searched=2)
    assert _lists(cut, names[1]) == [[2, 4], [2, 5], []]


def test_items_without_a_vector_are_never_searched() -> None:
    similarities_H = np.array([-0.5, -np.inf, 0.1, -np.inf], dtype=np.float32)

    places_S = most_similar_places(similarities_H, np.array([3, 1]), 3)

    assert places_S.tolist() == [0, 2]


def test_of_equally_similar_items_the_newest_are_searched() -> None:
    similarities_H = np.array([0.5, 0.9, 0.5, 0.5, 0.2, 0.5], dtype=np.float32)

    places_S = most_similar_places(similarities_H, np.array([4, 2]), 2)

    assert places_S.tolist() == [0, 1, 4, 5]
    assert picked_lengths(places_S, np.array([4, 2])).tolist() == [2, 2]


def _reference_search(
    similarities_H: np.ndarray, lengths_B: np.ndarray, num_searched: int
) -> Iterator[int]:
    start = 0
    for length in lengths_B.tolist():
        row = similarities_H[start : start + length].tolist()
        best = sorted(range(length), key=lambda place: (-row[place], place))[:num_searched]
        yield from (start + place for place in sorted(best) if row[place] > -np.inf)
        start += length


def test_the_search_equals_a_sort_of_each_row() -> None:
    rng = np.random.default_rng(0)
    lengths_B = rng.integers(0, 30, 50)
    lengths_B[-1] = 0
    # Many are equal, and in some rows fewer than five items can be picked.
    similarities_H = rng.choice([-np.inf, -np.inf, -np.inf, 0, 1, 2], lengths_B.sum())
    similarities_H = similarities_H.astype(np.float32)

    places_S = most_similar_places(similarities_H, lengths_B, 5)

    assert places_S.tolist() == list(_reference_search(similarities_H, lengths_B, 5))


def test_shared_history_equals_a_loop_over_all_items() -> None:
    rng = np.random.default_rng(1)
    lengths_B = rng.integers(0, 8, 40)
    # Absent codes are -1, also of targets.
    rq_BL = rng.integers(-1, 3, (40, 1)).repeat(2, axis=1)
    rq_BL[:, 1] = np.where(rq_BL[:, 0] < 0, -1, rng.integers(0, 2, 40))
    rq_HL = rng.integers(-1, 3, (lengths_B.sum(), 1)).repeat(2, axis=1)
    rq_HL[:, 1] = np.where(rq_HL[:, 0] < 0, -1, rng.integers(0, 2, len(rq_HL)))
    items = PickedItems(np.arange(len(rq_HL)), rq_HL, lengths_B)

    found = shared_history(rq_BL, items)

    rows_H = np.repeat(np.arange(40), lengths_B).tolist()
    for length, picked in enumerate(found.values(), start=1):
        expected = [
            item
            for item, row in enumerate(rows_H)
            if rq_BL[row, 0] >= 0 and (rq_HL[item, :length] == rq_BL[row, :length]).all()
        ]
        assert picked.item_ids_H.tolist() == expected
        assert (
            picked.lengths_B.tolist()
            == np.bincount(np.array(rows_H)[expected], minlength=40).tolist()
        )


def test_a_batch_of_empty_histories_has_empty_sequences() -> None:
    nothing = PickedItems(
        np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.int64), np.zeros(2, dtype=np.int64)
    )

    features = sequence_features({"history_sequence": nothing}, np.array([[1, 2], [3, 4]]), (8, 8))

    values, lengths_B = features["history_sequence"]
    assert (values.tolist(), lengths_B.tolist()) == ([], [0, 0])

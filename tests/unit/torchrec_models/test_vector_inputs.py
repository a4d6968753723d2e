import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from torchrec_models import vector_inputs
from torchrec_models.vector_inputs import (
    Bools,
    Floats,
    HeldVectors,
    Ints,
    NamedVectors,
    cosine_features,
    pair_cosines,
    searched_cosines,
    vector_features,
)

NUM_ITEMS, WIDTH, LATE_ITEM, ZERO_ITEM, UNKNOWN_ITEM = 12, 5, 3, 4, 99


@dataclass(frozen=True)
class _Lookup:
    """Item i has row i; one comes later than every row, one has no vector."""

    vectors_ID: Floats
    held: HeldVectors | None = None

    def find(self, item_ids_N: Ints, label_times_N: Ints) -> tuple[Ints, Bools]:
        is_known_N = item_ids_N < NUM_ITEMS
        is_in_time_N = (item_ids_N != LATE_ITEM) | (label_times_N > 5)
        return np.where(is_known_N, item_ids_N, 0), is_known_N & is_in_time_N

    def take(self, places_U: Ints) -> torch.Tensor:
        return torch.from_numpy(self.vectors_ID[places_U])


def _lookup(*, is_held: bool = False) -> _Lookup:
    vectors_ID = np.random.default_rng(0).normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32)
    vectors_ID /= np.linalg.norm(vectors_ID, axis=1, keepdims=True)
    vectors_ID[ZERO_ITEM] = 0
    held = HeldVectors.of(torch.from_numpy(vectors_ID)) if is_held else None
    return _Lookup(vectors_ID, held)


def _vector(lookup: _Lookup, item_id: int) -> Floats:
    is_absent = item_id in (LATE_ITEM, ZERO_ITEM, UNKNOWN_ITEM)
    return np.zeros(WIDTH, np.float32) if is_absent else lookup.vectors_ID[item_id]


TARGETS = np.array([0, 7, LATE_ITEM, 8, ZERO_ITEM, UNKNOWN_ITEM])
HISTORIES = [[1, 2, 1], [], [5], [LATE_ITEM, ZERO_ITEM, UNKNOWN_ITEM, 9], [10, 11], [2, 0]]
LENGTHS = np.array([len(history) for history in HISTORIES])
TIMES = np.zeros(len(TARGETS), dtype=np.int64)


def _named(lookup: _Lookup) -> tuple[NamedVectors, NamedVectors]:
    items_H = np.array(list(itertools.chain(*HISTORIES)))
    return (
        NamedVectors.of(lookup, TARGETS, TIMES),
        NamedVectors.of(lookup, items_H, np.repeat(TIMES, LENGTHS)),
    )


@pytest.mark.parametrize(
    ("cells_per_pair", "is_held"),
    [(0, False), (1000, False), (0, True)],
    ids=["gathered", "table", "held"],
)
def test_features_equal_a_loop_over_rows(
    cells_per_pair: int, is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_inputs, "_TABLE_CELLS_PER_PAIR", cells_per_pair)
    monkeypatch.setattr(vector_inputs, "_GATHERED_PAIRS", 4)
    lookup = _lookup(is_held=is_held)

    found_BW = torch.cat(vector_features(*_named(lookup), LENGTHS, is_one_history=False), dim=1)

    expected = []
    for target, history in zip(TARGETS, HISTORIES, strict=True):
        target_D = _vector(lookup, target)
        items_HD = np.array([_vector(lookup, item) for item in history]).reshape(-1, WIDTH)
        mean_D = items_HD.sum(axis=0) / max(len(history), 1)
        largest = (items_HD @ target_D).max() if len(history) else 0.0
        scaled = np.concatenate([target_D, mean_D]) * WIDTH**0.5
        expected.append([*scaled, 5 * (mean_D @ target_D), 5 * largest])
    torch.testing.assert_close(found_BW, torch.tensor(np.array(expected, dtype=np.float32)))


def test_a_history_that_all_rows_share_gives_what_its_copies_give() -> None:
    lookup, history = _lookup(), np.array([1, 2, ZERO_ITEM, 1])
    targets = NamedVectors.of(lookup, TARGETS, TIMES)
    copies = NamedVectors.of(lookup, np.tile(history, len(TARGETS)), np.repeat(TIMES, 4))
    lengths_B = np.full(len(TARGETS), 4)

    shared = vector_features(
        targets, NamedVectors.of(lookup, history, TIMES[:4]), lengths_B, is_one_history=True
    )

    torch.testing.assert_close(
        shared, vector_features(targets, copies, lengths_B, is_one_history=False)
    )


@pytest.mark.parametrize("is_one_history", [False, True])
def test_cosines_alone_are_those_beside_the_vectors(is_one_history: bool) -> None:
    lookup, history = _lookup(), np.array([1, 2, ZERO_ITEM, 1])
    copies = 1 if is_one_history else len(TARGETS)
    targets = NamedVectors.of(lookup, TARGETS, TIMES)
    named = NamedVectors.of(lookup, np.tile(history, copies), np.full(4 * copies, TIMES[0]))
    lengths_B = np.full(len(TARGETS), 4)

    (found_B2,) = cosine_features(targets, named, lengths_B, is_one_history=is_one_history)

    *_, beside_B2 = vector_features(targets, named, lengths_B, is_one_history=is_one_history)
    assert found_B2.any()
    assert torch.equal(found_B2, beside_B2)


def test_a_shared_history_may_be_empty() -> None:
    lookup, nothing = _lookup(), np.empty(0, dtype=np.int64)
    targets = NamedVectors.of(lookup, TARGETS, TIMES)

    _, *of_history = vector_features(
        targets, NamedVectors.of(lookup, nothing, nothing), np.zeros(6, int), is_one_history=True
    )

    assert not torch.cat(of_history, dim=1).any()


@pytest.mark.parametrize("is_held", [False, True], ids=["computed", "held"])
def test_a_search_finds_the_same_cosines_part_by_part(
    is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_inputs, "_GATHERED_PAIRS", 8)
    lookup = _lookup(is_held=is_held)
    items_H = np.array(list(itertools.chain(*HISTORIES)))

    searched_H = searched_cosines(lookup, TARGETS, TIMES, items_H, LENGTHS)

    targets, history = _named(_lookup())
    whole_H = pair_cosines(targets, history, LENGTHS, absent=-np.inf)
    np.testing.assert_allclose(searched_H, whole_H, atol=1e-6)
    assert np.isinf(searched_H).sum() == 1 + 3 + 2 + 2


@pytest.mark.parametrize("places_per_name", [0, 1000], ids=["sorted", "looked through"])
def test_distinct_places_are_those_that_a_sort_finds(
    places_per_name: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_inputs, "_PLACES_PER_NAME", places_per_name)

    for places in ([7, 2, 7, 0, 2], [3], []):
        places_N = np.array(places, dtype=np.int64)
        found_U, numbers_N = vector_inputs._distinct(places_N)

        assert found_U.tolist() == sorted(set(places))
        assert found_U[numbers_N].tolist() == places


def test_rows_may_all_be_without_a_history() -> None:
    lookup, nothing = _lookup(), np.empty(0, dtype=np.int64)
    targets = NamedVectors.of(lookup, TARGETS, TIMES)

    _, *of_history = vector_features(
        targets, NamedVectors.of(lookup, nothing, nothing), np.zeros(6, int), is_one_history=False
    )

    assert [part_BW.shape for part_BW in of_history] == [(6, WIDTH), (6, 2)]
    assert not torch.cat(of_history, dim=1).any()


def test_a_vector_named_twice_is_fetched_once() -> None:
    named = NamedVectors.of(_lookup(), np.array([5, 5, 6, 5]), np.zeros(4, dtype=np.int64))

    assert named.vectors_UD.shape == (2, WIDTH)
    assert named.rows().shape == (4, WIDTH)

"""Which items are held out of an encoder's training."""

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.alignment.held_out import held_items, hold_items_out
from qarm_feast.alignment.pair_rows import PairRows, pair_rows
from qarm_feast.alignment.pairs import PAIR_ROWS


def _pairs(item_ids_M: np.ndarray) -> PairRows:
    num = len(item_ids_M)
    columns = {
        "trigger_item_id": item_ids_M[:-1],
        "target_item_id": item_ids_M[1:],
        "user_row": np.zeros(num - 1, dtype=np.int64),
        "weight": np.ones(num - 1, dtype=np.float32),
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(num - 1, field.type)
        for field in PAIR_ROWS
    ]
    return pair_rows(pa.table(arrays, schema=PAIR_ROWS), item_ids_M)


def test_whether_an_item_is_held_out_depends_on_its_id_and_the_seed_alone() -> None:
    ids_M = np.random.default_rng(0).integers(-(2**62), 2**62, size=20_000)

    held_M = held_items(ids_M, 0.1, seed=3)

    assert held_M.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(held_items(ids_M[::-1][:500], 0.1, 3), held_M[::-1][:500])
    other_M = held_items(ids_M, 0.1, seed=4)
    assert (held_M & other_M).mean() == pytest.approx(0.01, abs=0.005)
    # Neighbouring ids are no neighbours in the draw.
    assert held_items(np.arange(20_000), 0.3, 0).mean() == pytest.approx(0.3, abs=0.02)


def test_the_mixing_is_that_of_splitmix64() -> None:
    # The first two outputs of the generator of seed 0; share * 2^64 lies around them.
    first, second = 0xE220A8397B1DCDAF / 2**64, 0x6E789E6AA1B965F4 / 2**64

    for seed, place in ((0, first), (1, second)):
        assert held_items(np.array([0]), place + 1e-9, seed).tolist() == [True]
        assert held_items(np.array([0]), place - 1e-9, seed).tolist() == [False]


def test_a_refresh_of_more_items_holds_the_same_ones_out() -> None:
    fewer, more = np.arange(100, 400), np.arange(50, 500)

    first, second = (
        hold_items_out(_pairs(ids_M), len(ids_M), 0.1, seed=0) for ids_M in (fewer, more)
    )

    assert set(fewer[first.is_held_M]) == set(more[second.is_held_M]) & set(fewer)
    for ids_M, split in ((fewer, first), (more, second)):
        assert len(split.train) + len(split.valid) == len(ids_M) - 1
        assert not split.is_held_M[
            np.concatenate([split.train.triggers, split.train.targets])
        ].any()
        held = split.is_held_M[split.valid.triggers] | split.is_held_M[split.valid.targets]
        assert held.all()


def test_where_nothing_can_be_held_out_all_pairs_do_both() -> None:
    split = hold_items_out(_pairs(np.arange(3)), 3, 1e-9, seed=0)

    assert (len(split.train), len(split.valid), split.is_held_M.any()) == (2, 2, False)

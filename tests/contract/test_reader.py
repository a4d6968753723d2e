"""The reader over a real repository on both online stores."""

import asyncio
from typing import Any

import numpy as np
import pandas as pd
import pytest
from feast import FeatureStore
from online_store_cases import (
    ITEM,
    USER,
    Online,
    code_rows,
    code_view,
    moment,
    profile_rows,
    profile_view,
    recent_rows,
    recent_view,
)

from qarm_feast.errors import DataError
from qarm_feast.reader import CodeReader
from qarm_feast.schema import ABSENT_CODE


@pytest.fixture
def feature_store(online: Online) -> FeatureStore:
    made = FeatureStore(config=online.config)
    views = [code_view(), recent_view(), profile_view()]
    made.apply([ITEM, USER, *views])
    return made


@pytest.fixture
def reader(feature_store: FeatureStore) -> CodeReader:
    return CodeReader(feature_store, "v1")


def test_codes_come_in_the_order_asked_for_and_absent_items_are_masked(
    online: Online, reader: CodeReader
) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [10, 11]), (2, 1, "a", [20, 21])]))
    online.write(code_view(), code_rows([(3, 1, "", [-1, -1])], is_deleted=True))

    codes, present_N = reader.read_codes(np.array([2, 9, 1, 3, 2]))

    absent = [ABSENT_CODE] * 3
    assert present_N.tolist() == [True, False, True, False, True]
    assert codes.item_ids_N.tolist() == [2, 9, 1, 3, 2]
    assert codes.rq_NL.tolist() == [[20, 21], absent[:2], [10, 11], absent[:2], [20, 21]]
    assert codes.vq_NV.tolist() == [[20, 21, 5], absent, [10, 11, 5], absent, [20, 21, 5]]


def test_the_width_of_the_codes_is_known_even_when_no_item_is(reader: CodeReader) -> None:
    codes, present_N = reader.read_codes(np.array([7, 8]))

    assert present_N.tolist() == [False, False]
    assert codes.rq_NL.shape == (2, 2)
    assert codes.vq_NV.shape == (2, 3)


def test_no_ids_give_no_codes(reader: CodeReader) -> None:
    codes, present_N = reader.read_codes(np.array([], dtype=np.int64))

    assert (codes.rq_NL.shape, codes.vq_NV.shape, present_N.shape) == ((0, 2), (0, 3), (0,))


def test_a_row_with_the_codes_of_another_codebook_is_refused(
    online: Online, reader: CodeReader
) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [1, 2, 3])]))

    with pytest.raises(DataError, match="a row of 4 codes, its codebook has 3"):
        reader.read_codes(np.array([1]))


def test_ids_that_are_not_int64_are_refused(reader: CodeReader) -> None:
    with pytest.raises(DataError, match="float64"):
        reader.read_codes(np.array([1.0]))
    with pytest.raises(DataError, match="int32"):
        reader.read_recent_items(np.array([1], dtype=np.int32), 3)


def test_recent_items_are_cut_and_padded_to_the_length_asked_for(
    online: Online, reader: CodeReader
) -> None:
    online.write(recent_view(), recent_rows([(1, [(3, 30), (2, 20), (1, 10)]), (2, [(5, 50)])]))

    item_ids_NH, timestamps_NH, lengths_N = reader.read_recent_items(np.array([2, 1, 7, 1]), 2)

    assert item_ids_NH.tolist() == [[50, ABSENT_CODE], [30, 20], [ABSENT_CODE] * 2, [30, 20]]
    assert timestamps_NH.tolist() == [[5, 0], [3, 2], [0, 0], [3, 2]]
    assert lengths_N.tolist() == [1, 2, 0, 2]


def test_the_mark_of_an_erasure_is_no_recent_item(online: Online, reader: CodeReader) -> None:
    online.write(recent_view(), recent_rows([(1, [(3, 30), (2, -1)]), (2, [(5, -1)])]))

    item_ids_NH, timestamps_NH, lengths_N = reader.read_recent_items(np.array([1, 2]), 2)

    assert item_ids_NH.tolist() == [[30, ABSENT_CODE], [ABSENT_CODE] * 2]
    assert timestamps_NH.tolist() == [[3, 0], [0, 0]]
    assert lengths_N.tolist() == [1, 0]


def test_scoring_reads_candidates_history_and_its_codes(online: Online, reader: CodeReader) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [10, 11]), (2, 1, "a", [20, 21])]))
    online.write(recent_view(), recent_rows([(7, [(3, 2), (2, 9), (1, 2)])]))

    read = reader.read_scoring_inputs(7, np.array([1, 8, 2]), 2)

    assert read.candidates.item_ids_N.tolist() == [1, 8, 2]
    assert read.candidates.rq_NL.tolist() == [[10, 11], [ABSENT_CODE] * 2, [20, 21]]
    assert read.candidates.vq_NV.tolist() == [[10, 11, 5], [ABSENT_CODE] * 3, [20, 21, 5]]
    assert read.has_codes_B.tolist() == [True, False, True]
    assert read.history.item_ids_N.tolist() == [2, 9]
    assert read.history.rq_NL.tolist() == [[20, 21], [ABSENT_CODE] * 2]
    assert read.history_has_codes_H.tolist() == [True, False]
    assert read.history_times_H.tolist() == [3, 2]


def test_a_user_without_history_and_a_request_without_candidates_are_served(
    online: Online, reader: CodeReader
) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [10, 11])]))

    read = reader.read_scoring_inputs(7, np.array([1]), 2)
    nothing = reader.read_scoring_inputs(7, np.array([], dtype=np.int64), 2)

    assert (read.candidates.rq_NL.tolist(), read.history.rq_NL.shape) == ([[10, 11]], (0, 2))
    assert (nothing.candidates.rq_NL.shape, len(nothing.has_codes_B)) == ((0, 2), 0)


def test_an_empty_array_of_candidates_may_have_any_type(online: Online, reader: CodeReader) -> None:
    online.write(code_view(), code_rows([(2, 1, "a", [20, 21])]))
    online.write(recent_view(), recent_rows([(7, [(3, 2)])]))

    read = reader.read_scoring_inputs(7, np.array([]), 2)

    assert read.candidates.rq_NL.shape == (0, 2)
    assert read.history.rq_NL.tolist() == [[20, 21]]


def test_reads_off_the_event_loop_run_side_by_side_and_give_the_same(
    online: Online, reader: CodeReader
) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [10, 11]), (2, 1, "a", [20, 21])]))
    online.write(recent_view(), recent_rows([(1, [(3, 30)])]))
    online.write(profile_view(), profile_rows())

    async def read_all() -> list[Any]:
        return await asyncio.gather(
            reader.read_codes_async(np.array([2, 1])),
            reader.read_codes_async(np.array([1])),
            reader.read_recent_items_async(np.array([1]), 1),
            reader.read_profiles_async(np.array([1])),
            reader.read_scoring_inputs_async(1, np.array([1]), 1),
        )

    (codes, _), (others, _), (item_ids_NH, *_), profiles, read = asyncio.run(read_all())

    assert codes.rq_NL.tolist() == [[20, 21], [10, 11]]
    assert others.rq_NL.tolist() == [[10, 11]]
    assert item_ids_NH.tolist() == [[30]]
    assert profiles.columns["age"].values.tolist() == [40]
    assert (read.candidates.rq_NL.tolist(), read.history.item_ids_N.tolist()) == ([[10, 11]], [30])


def test_profiles_come_as_columns_by_the_views_features(online: Online, reader: CodeReader) -> None:
    online.write(profile_view(), profile_rows())

    batch = reader.read_profiles(np.array([-3, 4]))

    assert batch.present_N.tolist() == [True, False]
    assert set(batch.columns) == {field.name for field in profile_view().features}
    assert batch.columns["age"].values.tolist() == [2**60]
    assert batch.columns["age"].lengths_N.tolist() == [1, 0]


def test_rows_that_feast_writes_are_read_as_columns_and_by_feast_alike(
    feature_store: FeatureStore, reader: CodeReader
) -> None:
    frame = pd.DataFrame(
        {
            "item_id": [1, 2],
            "rq_code": [[1, 2], [3, 4]],
            "vq_code": [[1, 2, 5], [3, 4, 5]],
            "encoder_version": ["e1", "e1"],
            "content_hash": ["a", "b"],
            "is_deleted": [False, False],
            "event_timestamp": [moment(1), moment(2)],
        }
    )

    feature_store.write_to_online_store("item_codes_v1", frame)
    codes, _ = reader.read_codes(np.array([2, 1]))
    by_feast = feature_store.get_online_features(
        features=["item_codes_v1:rq_code"], entity_rows=[{"item_id": 2}, {"item_id": 1}]
    ).to_dict()

    assert codes.rq_NL.tolist() == by_feast["rq_code"] == [[3, 4], [1, 2]]

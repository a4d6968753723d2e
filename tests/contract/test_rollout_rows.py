"""The rows that a rollout compares, read from both online stores."""

import pytest
from feast import FeatureStore
from online_store_cases import ITEM, Online, code_rows, code_view

from qarm_feast.rollout_sample import read_rows


@pytest.fixture
def feature_store(online: Online) -> FeatureStore:
    made = FeatureStore(config=online.config)
    made.apply([ITEM, code_view()])
    return made


def test_rows_are_read_with_their_takedowns_and_absent_items_are_left_out(
    online: Online, feature_store: FeatureStore
) -> None:
    online.write(code_view(), code_rows([(1, 1, "a", [10, 11]), (2, 2, "b", [20, 21])]))
    online.write(code_view(), code_rows([(3, 3, "", [-1, -1])], is_deleted=True))

    rows = read_rows(feature_store, "v1", [3, 9, 1, 2])

    assert {item: (row.is_deleted, row.content_hash) for item, row in rows.items()} == {
        3: (True, ""),
        1: (False, "a"),
        2: (False, "b"),
    }
    assert rows[1].codes == (10, 11, 10, 11, 5)
    assert rows[1].event_timestamp < rows[2].event_timestamp < rows[3].event_timestamp
    assert read_rows(feature_store, "v1", []) == {}

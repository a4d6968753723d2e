import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.errors import ConfigError
from qarm_feast.schema import TIMESTAMP
from torchrec_models.item_columns import build_item_columns, select_item_columns
from torchrec_models.vocabulary import CategoryVocabulary

SCHEMA = pa.schema(
    [
        ("item_id", pa.int64()),
        ("upload_timestamp", TIMESTAMP),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("price", pa.float64()),
        ("is_new", pa.bool_()),
        ("seen_at", TIMESTAMP),
        ("tags", pa.list_(pa.string())),
        ("embedding", pa.list_(pa.float32(), 2)),
    ]
)


def test_brand_and_further_typed_columns_become_features_by_themselves() -> None:
    assert select_item_columns(SCHEMA, None) == ("brand", "price", "is_new")


def test_wanted_columns_may_be_content_too_and_keep_their_order() -> None:
    assert select_item_columns(SCHEMA, ("price", "title")) == ("price", "title")


@pytest.mark.parametrize("name", ["tags", "colour", "seen_at"])
def test_a_wanted_column_that_is_missing_or_of_another_type_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        select_item_columns(SCHEMA, (name,))


@pytest.mark.parametrize("name", ["item_id", "upload_timestamp"])
def test_ids_and_upload_times_are_never_features(name: str) -> None:
    with pytest.raises(ConfigError, match="never features"):
        select_item_columns(SCHEMA, (name,))


def _items() -> pa.Table:
    return pa.table(
        {
            "item_id": [5, 1, 2, 3, 4],
            "brand": ["b", "b", "b", "own", "late"],
            "price": [9.0, 1.0, 2.0, 3.0, None],
        }
    )


def test_vocabularies_know_the_values_of_train_items_and_no_item_by_itself() -> None:
    columns, vocabularies = build_item_columns(
        _items(), ("brand", "price"), np.array([1, 2, 3]), num_numeric_buckets=2
    )

    assert vocabularies["brand"] == CategoryVocabulary(("b",))
    assert columns.rows("brand", np.array([1, 3, 4, 5])).tolist() == [1, 0, 0, 1]
    # The one edge is the median of 1, 2 and 3; item 5 is no train item, but has a price.
    assert columns.rows("price", np.array([1, 2, 3, 4, 5])).tolist() == [1, 2, 2, 0, 2]


def test_an_item_that_is_not_listed_has_the_default_row() -> None:
    columns, _ = build_item_columns(_items(), ("brand",), np.array([1, 2]), 2)
    empty, _ = build_item_columns(_items().slice(0, 0), ("brand",), np.array([1, 2]), 2)

    assert columns.rows("brand", np.array([99, 1])).tolist() == [0, 1]
    assert empty.rows("brand", np.array([99])).tolist() == [0]

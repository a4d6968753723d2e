import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.errors import DataError
from torchrec_models.vocabulary import (
    BucketVocabulary,
    CategoryVocabulary,
    IdVocabulary,
    Vocabularies,
    build_vocabularies,
)


def test_an_id_that_train_never_saw_gets_the_default_row() -> None:
    vocabulary = IdVocabulary(np.array([10, 30]))

    rows = vocabulary.rows(np.array([30, 10, 20, 99, -5]))

    assert rows.tolist() == [2, 1, 0, 0, 0]
    assert vocabulary.num_embeddings == 3


def test_an_empty_vocabulary_knows_only_the_default_row() -> None:
    assert IdVocabulary(np.array([], dtype=np.int64)).rows(np.array([1, 2])).tolist() == [0, 0]


def test_a_category_that_is_null_or_unseen_gets_the_default_row() -> None:
    vocabulary = CategoryVocabulary(("F", "M"))

    assert vocabulary.rows(pa.array(["M", None, "X", "F"])).tolist() == [2, 0, 0, 1]


def test_bools_are_categories() -> None:
    train = pa.table({"user_id": [1, 2], "item_id": [1, 2], "is_member": [True, False]})

    vocabulary = build_vocabularies(train, ("is_member",), 4).user_columns["is_member"]

    assert vocabulary == CategoryVocabulary(("false", "true"))
    assert vocabulary.rows(pa.array([True, False, None])).tolist() == [2, 1, 0]


def test_a_number_falls_into_the_bucket_of_its_train_quantile() -> None:
    train = pa.table({"user_id": [1] * 4, "item_id": [1] * 4, "age": [10, 20, 30, 40]})

    vocabulary = build_vocabularies(train, ("age",), 2).user_columns["age"]

    assert vocabulary == BucketVocabulary((25.0,))
    assert vocabulary.rows(pa.array([5, 24, 25, 99, None])).tolist() == [1, 1, 2, 2, 0]
    assert vocabulary.num_embeddings == 3


def test_a_column_that_cannot_be_a_feature_is_refused_by_name() -> None:
    train = pa.table({"user_id": [1], "item_id": [1], "tags": [["a"]]})

    with pytest.raises(DataError, match="'tags' has type list"):
        build_vocabularies(train, ("tags",), 2)


def test_vocabularies_survive_json() -> None:
    train = pa.table(
        {"user_id": [7, 3], "item_id": [5, 5], "age": [1.5, 2.5], "gender": ["F", None]}
    )
    vocabularies = build_vocabularies(train, ("age", "gender"), 3)

    restored = Vocabularies.from_json(vocabularies.to_json())

    assert restored.user_ids.ids_V.tolist() == [3, 7]
    assert restored.item_ids.ids_V.tolist() == [5]
    assert dict(restored.user_columns) == dict(vocabularies.user_columns)

from dataclasses import fields

import numpy as np
import pyarrow as pa

from torchrec_models.config import CodeSizes, RankerConfig
from torchrec_models.tables import (
    centroid_start,
    code_tables,
    ranker_tables,
    sparse_feature_names,
)
from torchrec_models.vocabulary import build_vocabularies

SIZES = CodeSizes(level_sizes=(8, 4), pool_size=50, vector_dim=6)


def test_code_tables_take_their_sizes_from_the_codebook() -> None:
    tables = code_tables(SIZES, RankerConfig(embedding_dim=16))

    assert [(table.name, table.num_embeddings) for table in tables] == [
        ("rq_0", 8),
        ("rq_1", 4),
        ("vq_code", 50),
    ]
    assert {table.embedding_dim for table in tables} == {16}


def test_code_sizes_hold_what_tables_and_vectors_are_sized_by_and_no_more() -> None:
    # A VQ list is pooled, so its length sizes nothing.
    names = ["level_sizes", "pool_size", "vector_dim", "raw_vector_dim"]
    assert [field.name for field in fields(CodeSizes)] == names


def test_target_and_history_read_the_same_table() -> None:
    train = pa.table({"user_id": [1], "item_id": [1]})
    tables = ranker_tables(SIZES, build_vocabularies(train, (), 2), RankerConfig())
    features = {table.name: table.feature_names for table in tables}

    assert features["item_id"] == ["item_id", "history_item_id"]
    assert features["rq_1"] == ["rq_1", "history_rq_1"]


def test_sequences_and_their_target_read_one_table_of_all_levels() -> None:
    config = RankerConfig(features=("item_id", "attention", "shared_history", "long_history"))
    train = pa.table({"user_id": [1], "item_id": [1]})

    tables = ranker_tables(SIZES, build_vocabularies(train, (), 2), config)

    found = {table.name: (table.num_embeddings, table.feature_names) for table in tables}
    subsets = ["shared_c1", "shared_c1_c2", "searched"]
    assert found["item_id"] == (2, ["item_id", *(f"{name}_item_id" for name in subsets)])
    sequences = [f"{name}_sequence" for name in ("target", "history", *subsets)]
    assert found["sequence_rq"] == (8 + 4, sequences)


def test_a_switched_off_feature_leaves_no_table_behind() -> None:
    train = pa.table({"user_id": [1], "item_id": [1], "age": [3]})
    vocabularies = build_vocabularies(train, ("age",), 2)
    config = RankerConfig(features=("user_id", "history_rq_code"))

    tables = ranker_tables(SIZES, vocabularies, config)

    assert sparse_feature_names(tables) == ("user_id", "history_rq_0", "history_rq_1")
    assert [table.name for table in tables] == ["user_id", "rq_0", "rq_1"]


def test_centroid_start_keeps_the_geometry_of_the_centroids() -> None:
    rng = np.random.default_rng(0)
    pool_PD = rng.normal(size=(50, 6)).astype(np.float32) + 3
    codebooks = [pool_PD[:8], rng.normal(size=(4, 6)).astype(np.float32)]

    weights = centroid_start(codebooks, pool_PD, RankerConfig(embedding_dim=8, centroid_scale=0.3))

    first_KE = weights["rq_0"]
    centred_KD = pool_PD[:8] - pool_PD.mean(axis=0)
    ratio = (first_KE @ first_KE.T) / (centred_KD @ centred_KD.T)
    assert first_KE.shape == (8, 8)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)
    np.testing.assert_allclose(weights["vq_code"][:8], first_KE, atol=1e-6)
    np.testing.assert_array_equal(
        weights["sequence_rq"], np.concatenate([first_KE, weights["rq_1"]])
    )


def test_centroid_start_projects_onto_the_widest_directions() -> None:
    rng = np.random.default_rng(0)
    spread = np.array([1.0, 9.0, 0.1, 8.0, 7.0, 6.0], dtype=np.float32)
    pool_PD = rng.normal(size=(200, 6)).astype(np.float32) * spread

    weights = centroid_start([pool_PD[:10]], pool_PD, RankerConfig(embedding_dim=4))

    kept_share = np.var(weights["vq_code"], axis=0).sum()
    scale = (weights["rq_0"].std() / (pool_PD[:10, [1, 3, 4, 5]]).std()) ** 2
    expected = np.var(pool_PD[:, [1, 3, 4, 5]], axis=0).sum() * scale
    np.testing.assert_allclose(kept_share, expected, rtol=0.2)
    np.testing.assert_allclose(weights["rq_0"].std(), 0.3, rtol=1e-5)

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from test_dataset import make_dataset

from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import FeatureName, RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.prefixes import PrefixVocabulary, build_prefixes, prefix_start
from torchrec_models.sharding import Ranks
from torchrec_models.tables import centroid_start
from torchrec_models.training import train

TRAIN = np.array([[1, 5, 2], [1, 5, 3], [0, 5, 2], [-1, -1, -1]])
MASK = 2**64 - 1


def test_distinct_prefixes_are_numbered_by_length_and_then_by_code() -> None:
    vocabulary = build_prefixes(TRAIN, 3, 100)

    rows_NP = vocabulary.rows(TRAIN)

    # (0) (1) | (0, 5) (1, 5) | (0, 5, 2) (1, 5, 2) (1, 5, 3)
    assert rows_NP.tolist() == [[1, 3, 5], [1, 3, 6], [0, 2, 4], [-1, -1, -1]]
    assert vocabulary.num_embeddings == 7


def test_a_prefix_that_no_train_item_has_has_no_row_and_the_shorter_ones_do() -> None:
    vocabulary = build_prefixes(TRAIN, 3, 100)

    rows_NP = vocabulary.rows(np.array([[1, 5, 9], [1, 9, 2], [9, 5, 2]]))

    assert rows_NP.tolist() == [[1, 3, -1], [1, -1, -1], [-1, -1, -1]]


def test_prefixes_are_no_longer_than_asked_for_or_than_the_code() -> None:
    assert build_prefixes(TRAIN, 2, 100).rows(TRAIN[:1]).tolist() == [[1, 3]]
    assert build_prefixes(TRAIN, 9, 100).rows(TRAIN[:1]).tolist() == [[1, 3, 5]]


def test_codes_of_the_rows_lead_back_to_the_prefixes() -> None:
    codes = build_prefixes(TRAIN, 3, 100).codes()

    assert [codes_KP.tolist() for codes_KP in codes] == [
        [[0], [1]],
        [[0, 5], [1, 5]],
        [[0, 5, 2], [1, 5, 2], [1, 5, 3]],
    ]


def test_dense_numbers_equal_a_dictionary_over_random_codes() -> None:
    rng = np.random.default_rng(0)
    rq_NL = rng.integers(0, 5, (200, 4))
    vocabulary = build_prefixes(rq_NL[:100], 4, 10_000)
    known = {tuple(row[:p]) for row in rq_NL[:100].tolist() for p in (1, 2, 3, 4)}
    numbers = {prefix: n for n, prefix in enumerate(sorted(known, key=lambda x: (len(x), x)))}

    rows_NP = vocabulary.rows(rq_NL)

    for row, codes in zip(rows_NP.tolist(), rq_NL.tolist(), strict=True):
        assert row == [numbers.get(tuple(codes[:p]), -1) for p in (1, 2, 3, 4)]
    assert vocabulary.num_embeddings == len(numbers)


def _plain_hash(prefix: list[int]) -> int:
    value = 0
    for code in prefix:
        value = (value + code + 1 + 0x9E3779B97F4A7C15) & MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        value ^= value >> 31
    return value


def test_too_many_prefixes_are_hashed_by_the_stated_formula(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        vocabulary = build_prefixes(TRAIN, 3, 5)

    rows_NP = vocabulary.rows(np.array([[1, 5, 2], [-1, -1, -1], [7, 7, 7]]))

    expected = [[_plain_hash(codes[:p]) % 5 for p in (1, 2, 3)] for codes in ([1, 5, 2], [7] * 3)]
    assert rows_NP.tolist() == [expected[0], [-1] * 3, expected[1]]
    known = [[0], [1], [0, 5], [1, 5], [0, 5, 2], [1, 5, 2], [1, 5, 3]]
    counts = np.bincount([_plain_hash(prefix) % 5 for prefix in known])
    assert f"prefixes=7 rows=5 prefixes_that_share_a_row={counts[counts > 1].sum()}" in caplog.text


@pytest.mark.parametrize("max_rows", [5, 100])
def test_a_vocabulary_comes_back_from_json(max_rows: int) -> None:
    vocabulary = build_prefixes(TRAIN, 3, max_rows)

    again = PrefixVocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))

    assert again.rows(TRAIN).tolist() == vocabulary.rows(TRAIN).tolist()
    assert again.num_embeddings == vocabulary.num_embeddings


def test_a_prefix_starts_as_the_sum_of_its_centroids() -> None:
    levels = [np.full((10, 2), 10.0**level, dtype=np.float32) for level in range(3)]
    for level_KE in levels:
        level_KE *= np.arange(10)[:, None]

    weights_RE = prefix_start(build_prefixes(TRAIN, 3, 100), levels)

    assert weights_RE is not None
    assert weights_RE[:, 0].tolist() == [0, 1, 50, 51, 250, 251, 351]
    assert prefix_start(build_prefixes(TRAIN, 3, 5), levels) is None


def test_no_train_item_with_codes_leaves_a_table_of_one_row() -> None:
    vocabulary = build_prefixes(TRAIN[3:], 3, 100)

    assert vocabulary.num_embeddings == 1
    assert vocabulary.rows(TRAIN[:1]).tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("prefix_table_rows", [10, 1000])
def test_prefix_bags_of_target_and_history_train(
    inputs: TrainInputs, ranks: Ranks, prefix_table_rows: int
) -> None:
    features: tuple[FeatureName, ...] = ("item_id", "prefix", "history_prefix")
    config = RankerConfig(
        features=features, prefix_table_rows=prefix_table_rows, num_epochs=1, batch_size=500
    )

    result = train(config, inputs, enable_checkpoint=False)

    batch = next(make_dataset(inputs, "test", config, Ranks(0, 1)).eval_batches())
    lengths_B = batch.sparse_features["prefix"].lengths()
    assert result.num_steps == 4
    assert lengths_B.max() == 2
    # Cold items may have second codes that no train item has behind the first one.
    assert (lengths_B == 2).float().mean() > 0.5
    assert batch.sparse_features["history_prefix"].lengths().max() > 2


def test_a_run_starts_its_prefix_table_from_decoded_prefixes(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    config = RankerConfig(
        checkpoint_dir=str(tmp_path), features=("prefix",), num_epochs=0, embedding_dim=8
    )

    train(config, inputs)

    checkpoint = Checkpoint(str(tmp_path), "ranker_v1")
    prefixes, codebook = checkpoint.vocabularies().prefixes, inputs.codebook
    assert prefixes is not None
    assert codebook is not None
    weights = centroid_start(codebook.codebooks, codebook.pool_vectors_PD, config)
    expected_RE = prefix_start(prefixes, [weights["rq_0"], weights["rq_1"]])
    state = checkpoint.load_ranker().state_dict()
    (found_RE,) = (tensor for name, tensor in state.items() if "prefix" in name)
    np.testing.assert_array_equal(found_RE.numpy(), expected_RE)

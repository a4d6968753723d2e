from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
import torch

from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.alignment.evaluate import evaluate_vectors
from qarm_feast.alignment.export import raw_and_aligned_vectors
from qarm_feast.alignment.features import features_of_vectors
from qarm_feast.alignment.fusion import AlignmentHead
from qarm_feast.alignment.pairs import PAIR_ROWS, build_pairs
from qarm_feast.alignment.train import PairRows, pair_rows, train_encoder, train_head
from qarm_feast.errors import DataError
from qarm_feast.input_data import InputData

CREATED = datetime(2024, 2, 1, tzinfo=UTC)
SMALL = AlignmentConfig(embedding_dim=16, hidden_dim=16, batch_size=64, learning_rate=3e-3)


@pytest.mark.parametrize("is_centred", [True, False])
def test_a_new_head_keeps_the_cosines_of_content_centred_or_not(is_centred: bool) -> None:
    features_NE = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    head = AlignmentHead({"embedding": (1, 6)}, embedding_dim=6, hidden_dim=3)
    tensors = features_of_vectors(features_NE.numpy()).tensors()

    head.start_from_content(*tensors, is_centred=is_centred)

    unit_NE = torch.nn.functional.normalize(features_NE, dim=1)
    mean_E = unit_NE.mean(dim=0) if is_centred else 0.0
    centred_NE = torch.nn.functional.normalize(unit_NE - mean_E, dim=1)
    with torch.no_grad():
        embeddings_ND = head(*tensors)
    torch.testing.assert_close(embeddings_ND @ embeddings_ND.T, centred_NE @ centred_NE.T)


def test_training_brings_the_neighbors_of_later_behaviour_nearer_warm_and_cold(
    clustered: InputData,
) -> None:
    pairs = build_pairs(clustered, PairConfig(), seed=0)

    encoder = train_encoder(clustered, pairs, SMALL, CREATED)

    vectors = raw_and_aligned_vectors(clustered.items, encoder, SMALL)
    report = evaluate_vectors(clustered, vectors)
    losses = encoder.manifest.training["valid_losses"]
    assert min(losses) < losses[0]
    for key in ("neighbor_auc_warm", "neighbor_auc_cold"):
        assert report["aligned"][key] > report["raw"][key] + 0.03
    assert encoder.manifest.behaviour_cutoff == clustered.behaviour_cutoff()
    assert encoder.manifest.training["num_train_items"] == 36


def test_training_twice_gives_the_same_head(clustered: InputData) -> None:
    pairs = build_pairs(clustered, PairConfig(), seed=0)
    config = SMALL.model_copy(update={"num_epochs": 2})

    first, second = (train_encoder(clustered, pairs, config, CREATED) for _ in range(2))

    assert torch.equal(first.head.linear.weight, second.head.linear.weight)
    assert torch.equal(first.head.correction.weight, second.head.correction.weight)


def test_a_refreshed_encoder_names_its_parent(clustered: InputData) -> None:
    pairs = build_pairs(clustered, PairConfig(), seed=0)
    config = SMALL.model_copy(update={"num_epochs": 1})
    parent = train_encoder(clustered, pairs, config, CREATED)

    refreshed = train_encoder(
        clustered, pairs, config.model_copy(update={"encoder_version": "e2"}), CREATED, parent
    )

    assert parent.manifest.parent is None
    assert (refreshed.version, refreshed.manifest.parent) == ("e2", "e1")


def test_a_heavy_geometry_weight_keeps_content_cosines() -> None:
    generator = np.random.default_rng(0)
    features_ME = generator.normal(size=(40, 16)).astype(np.float32)
    triggers = generator.integers(0, 40, size=400)
    # Pairs that the content says nothing about.
    targets = (triggers + 1 + 10 * generator.integers(0, 3, size=400)) % 40
    pairs = PairRows(triggers, targets, np.full(400, -1), np.ones(400, dtype=np.float32))
    features = features_of_vectors(features_ME)
    start = AlignmentHead(features.shapes, 16, 16)
    start.start_from_content(*features.tensors())

    def drift(weight: float) -> float:
        # With no item held out the training pairs choose the epoch, and that is the last one.
        changed = {"geometry_weight": weight, "num_epochs": 10, "valid_item_share": 1e-9}
        head, run = train_head(features, pairs, SMALL.model_copy(update=changed))
        assert run.best_epoch == 10
        with torch.no_grad():
            old_MD, new_MD = (net(*features.tensors()) for net in (start, head))
        return float(((old_MD @ old_MD.T) - (new_MD @ new_MD.T)).square().mean())

    assert drift(100.0) < drift(0.0) / 4


def test_too_few_pairs_to_hold_any_out_still_train(caplog: pytest.LogCaptureFixture) -> None:
    features = np.eye(3, dtype=np.float32)
    one = pa.table(
        [[0], [1], ["swing"], [-1], np.float32([1.0]), np.float32([1.0])], schema=PAIR_ROWS
    )

    with caplog.at_level("WARNING", logger="qarm_feast"):
        _, run = train_head(features_of_vectors(features), pair_rows(one, np.arange(3)), SMALL)

    assert (run.num_train_pairs, run.num_valid_pairs) == (1, 1)
    assert "too few to hold any out" in caplog.text


def test_pairs_of_items_without_a_train_row_are_refused() -> None:
    pairs = pa.table(
        [[0], [9], ["swing"], [-1], np.float32([1.0]), np.float32([1.0])], schema=PAIR_ROWS
    )

    with pytest.raises(DataError, match="items without a train row"):
        pair_rows(pairs, np.arange(3))
    with pytest.raises(DataError, match="no item pairs"):
        pair_rows(pairs.slice(0, 0), np.arange(3))

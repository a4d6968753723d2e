"""Training that goes on from a parent encoder."""

import logging
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.alignment.encoder import ItemEncoder
from qarm_feast.alignment.features import features_of_vectors
from qarm_feast.alignment.pairs import build_pairs
from qarm_feast.alignment.train import PairRows, train_encoder, train_head
from qarm_feast.input_data import InputData

CREATED = datetime(2024, 2, 1, tzinfo=UTC)
SMALL = AlignmentConfig(
    embedding_dim=16, hidden_dim=16, batch_size=64, learning_rate=3e-3, num_epochs=4
)
NEXT = SMALL.model_copy(update={"encoder_version": "e2"})


def _encoder(
    data: InputData, config: AlignmentConfig, parent: ItemEncoder | None = None
) -> ItemEncoder:
    return train_encoder(data, build_pairs(data, PairConfig(), 0), config, CREATED, parent)


def _cosines(head: torch.nn.Module, features_ME: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        x_MD = head(*features_of_vectors(features_ME).tensors()).numpy()
    return x_MD @ x_MD.T


def test_a_refresh_goes_on_from_its_parent_and_leaves_it_as_it_is(clustered: InputData) -> None:
    parent = _encoder(clustered, SMALL)
    before = {name: tensor.clone() for name, tensor in parent.head.state_dict().items()}

    again = _encoder(clustered, NEXT, parent)
    fresh = _encoder(clustered, NEXT.model_copy(update={"seed": 1}))

    losses = [encoder.manifest.training["valid_losses"] for encoder in (parent, again)]
    assert losses[1][0] == pytest.approx(min(losses[0]), abs=1e-4)
    assert (again.manifest.training["start"], again.manifest.parent) == ("parent", "e1")
    assert (fresh.manifest.training["start"], fresh.manifest.parent) == ("content", None)
    for name, tensor in parent.head.state_dict().items():
        assert torch.equal(tensor, before[name])
    first_ND, again_ND, fresh_ND = (
        encoder.encode(clustered.items) for encoder in (parent, again, fresh)
    )
    assert (first_ND * again_ND).sum(axis=1).mean() > 0.9
    assert (first_ND * again_ND).sum(axis=1).mean() > (first_ND * fresh_ND).sum(axis=1).mean()


def test_the_geometry_that_is_kept_is_the_parents() -> None:
    generator = np.random.default_rng(0)
    features_ME = generator.normal(size=(60, 16)).astype(np.float32)
    pairs = [
        PairRows(
            generator.integers(0, 60, size=400),
            generator.integers(0, 60, size=400),
            np.full(400, -1),
            np.ones(400, dtype=np.float32),
        )
        for _ in range(2)
    ]
    loose = SMALL.model_copy(update={"geometry_weight": 0.0, "valid_item_share": 0.01})
    tight = SMALL.model_copy(update={"geometry_weight": 1e4, "valid_item_share": 0.01})
    features = features_of_vectors(features_ME)
    parent, _ = train_head(features, pairs[0], loose)

    child, _ = train_head(
        features, pairs[1], tight.model_copy(update={"parent_weight": 0.0}), parent=parent
    )
    content, _ = train_head(features, pairs[1], tight)

    moved = np.abs(_cosines(child, features_ME) - _cosines(parent, features_ME)).max()
    apart = np.abs(_cosines(content, features_ME) - _cosines(parent, features_ME)).max()
    assert moved < 0.05
    assert apart > 0.15


def test_a_heavy_parent_weight_keeps_each_item_where_the_parent_has_it(
    clustered: InputData,
) -> None:
    parent = _encoder(clustered, SMALL.model_copy(update={"seed": 1}))

    free, held = (
        _encoder(clustered, NEXT.model_copy(update={"parent_weight": weight}), parent)
        for weight in (0.0, 300.0)
    )

    before_ND = parent.encode(clustered.items)
    moved = [1 - (before_ND * each.encode(clustered.items)).sum(axis=1).mean()
             for each in (free, held)]  # fmt: skip
    assert held.manifest.training["best_epoch"] > 0
    assert 0 < moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    ("changed", "named"), [({"hidden_dim": 24}, "fusion"), ({"embedding_dim": 8}, "embedding_dim")]
)
def test_a_parent_of_other_sizes_is_not_continued_and_a_warning_says_so(
    clustered: InputData,
    changed: dict[str, int],
    named: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parent = _encoder(clustered, SMALL)
    config = NEXT.model_copy(update=changed)

    with caplog.at_level(logging.WARNING):
        child = _encoder(clustered, config, parent)

    assert f"parent=e1: its {named} differ" in caplog.text
    assert (child.manifest.training["start"], child.manifest.parent) == ("content", "e1")
    assert torch.equal(child.head.linear.weight, _encoder(clustered, config).head.linear.weight)

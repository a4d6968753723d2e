from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from qarm_feast.alignment.backbones.base import Backbone
from qarm_feast.alignment.backbones.opening import open_stored
from qarm_feast.alignment.backbones.ready import ReadyVectors
from qarm_feast.alignment.backbones.text import TextBackbone
from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.alignment.encoder import load_encoder
from qarm_feast.alignment.features import ItemFeatures, read_features
from qarm_feast.alignment.fusion import FusionSizes, build_fusion
from qarm_feast.alignment.pairs import build_pairs
from qarm_feast.alignment.train import train_and_save, train_encoder
from qarm_feast.alignment.tuning import TunedItems, finish_tuning, start_tuning
from qarm_feast.errors import ConfigError
from qarm_feast.input_data import InputData

ITEMS = pa.table({"title": ["w1 w2 w3", "w4", None, "w5 w6 w7 w8 w9"]})
CREATED = datetime(2024, 2, 1, tzinfo=UTC)
KINDS = pytest.mark.parametrize("tuning", ["lora", "full"])


def tuned_items(folder: Path, tuning: str) -> tuple[TunedItems, ItemFeatures, Backbone]:
    backbone = TextBackbone(folder, max_tokens=16)
    features = read_features(ITEMS, {"text": backbone})
    fusion = build_fusion(features.shapes, 16, FusionSizes(hidden_dim=16))
    fusion.start_from_content(*features.tensors())
    config = AlignmentConfig(tuning=tuning, lora_rank=4)
    tuned = start_tuning({"text": backbone}, config)
    return TunedItems(ITEMS, features, tuned, fusion, None), features, backbone


@KINDS
def test_embeddings_of_tuned_backbones_start_as_those_of_frozen_ones(
    tiny_text_folder: Path, tuning: str
) -> None:
    items, features, _ = tuned_items(tiny_text_folder, tuning)

    embeddings = items.eval().embed(np.array([3, 0, 2, 1, 0]))

    expected = items.fusion(*features.take(np.array([3, 0, 2, 1, 0])).tensors())
    torch.testing.assert_close(embeddings, expected)
    assert len(items) == 4


@KINDS
def test_a_step_alters_the_weights_that_the_tuning_names_and_the_artifact_holds_them(
    tiny_text_folder: Path, tuning: str, tmp_path: Path
) -> None:
    items, before, backbone = tuned_items(tiny_text_folder, tuning)
    old_hash = TextBackbone(tiny_text_folder, max_tokens=16).hash
    trained = {name for name, one in items.backbones.named_parameters() if one.requires_grad}
    optimizer = torch.optim.Adam(items.parameters(), lr=0.05)

    for _ in range(2):
        optimizer.zero_grad()
        items.train().embed(np.arange(4))[:, 0].sum().backward()
        optimizer.step()
    finish_tuning({"text": backbone})

    if tuning == "lora":
        # Two matrices beside queries and values in each of two layers.
        assert len(trained) == 8
        assert all("lora" in name for name in trained)
    for name, payload in backbone.payloads().items():
        (tmp_path / name).write_bytes(payload)
    loaded = open_stored("text", tmp_path, backbone.settings)
    after = read_features(ITEMS, {"text": backbone}).by_modality["text"]
    assert np.abs(after - before.by_modality["text"]).max() > 1e-3
    assert np.array_equal(read_features(ITEMS, {"text": loaded}).by_modality["text"], after)
    assert loaded.hash == backbone.hash != old_hash


def test_backbones_without_weights_cannot_be_tuned() -> None:
    with pytest.raises(ConfigError, match="none of the backbones of embedding has layers for it"):
        start_tuning({"embedding": ReadyVectors(16)}, AlignmentConfig(tuning="full"))


@pytest.fixture
def grouped(load_rows: Callable[..., InputData]) -> InputData:
    """Words say which of two groups an item is of; users stay in one group."""
    generator = np.random.default_rng(0)
    titles = [f"w{generator.integers(30) + 30 * (item % 2)} w{item % 2}" for item in range(40)]
    rows = [
        (user, int(item), 10 + n, "train", True)
        for user in range(40)
        for n, item in enumerate(generator.permutation(np.arange(user % 2, 40, 2))[:4])
    ]
    return load_rows(rows, item_id=list(range(40)), title=titles)


@pytest.fixture
def config(tiny_text_folder: Path, tmp_path: Path) -> AlignmentConfig:
    return AlignmentConfig(
        backbone=str(tiny_text_folder),
        embedding_dim=16,
        hidden_dim=16,
        batch_size=64,
        chunk_size=16,
        num_epochs=2,
        valid_item_share=1e-9,
        backbone_learning_rate=1e-2,
        features_uri=str(tmp_path / "features"),
        encoder_uri=str(tmp_path / "encoders"),
        device="cpu",
    )


@KINDS
def test_a_tuned_encoder_is_trained_from_the_head_and_repeats_itself_when_loaded(
    grouped: InputData, config: AlignmentConfig, tuning: str, tmp_path: Path
) -> None:
    config = config.model_copy(update={"tuning": tuning})

    encoder = train_and_save(grouped, build_pairs(grouped, PairConfig(), 0), config, CREATED)

    figures = encoder.manifest.training
    # Tuning starts where the head ended, and goes on from there.
    assert figures["valid_losses"][0] == pytest.approx(min(figures["head"]["valid_losses"]), 1e-4)
    assert figures["valid_losses"][-1] < figures["valid_losses"][0]
    loaded = load_encoder(config.encoder_uri, config.encoder_version)
    assert np.array_equal(loaded.encode(grouped.items), encoder.encode(grouped.items))
    assert not (tmp_path / "encoders/.e1.training").exists()


def test_a_tuned_encoder_too_is_held_to_the_places_of_its_parent(
    grouped: InputData, config: AlignmentConfig
) -> None:
    pairs = build_pairs(grouped, PairConfig(), 0)
    parent = train_encoder(grouped, pairs, config, CREATED)

    free, held = (
        train_encoder(
            grouped,
            pairs,
            config.model_copy(update={"tuning": "full", "parent_weight": weight}),
            CREATED,
            parent,
        )
        for weight in (0.0, 300.0)
    )

    before_ND = parent.encode(grouped.items)
    moved = [1 - (before_ND * each.encode(grouped.items)).sum(axis=1).mean()
             for each in (free, held)]  # fmt: skip
    assert held.manifest.training["start"] == "parent"
    assert 0 < moved[1] < 0.5 * moved[0]

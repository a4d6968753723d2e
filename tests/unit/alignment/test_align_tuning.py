from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from qarm_feast.alignment.backbones.base import Backbone
from qarm_feast.alignment.backbones.opening import open_stored
from qarm_feast.alignment.backbones.ready import ReadyVectors
from qarm_feast.alignment.backbones.text import TextBackbone
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures, read_features
from qarm_feast.alignment.fusion import FusionSizes, build_fusion
from qarm_feast.alignment.tuning import TunedItems, finish_tuning, start_tuning
from qarm_feast.errors import ConfigError

ITEMS = pa.table({"title": ["w1 w2 w3", "w4", None, "w5 w6 w7 w8 w9"]})
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

import numpy as np
import pytest
import torch

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures, features_of_vectors
from qarm_feast.alignment.inter_content import Views, inter_content_task
from qarm_feast.alignment.pair_rows import PairRows
from qarm_feast.alignment.train import start_head, train_head
from qarm_feast.alignment.trainable import HeadItems
from qarm_feast.errors import DataError

CONFIG = AlignmentConfig(
    embedding_dim=16,
    hidden_dim=16,
    batch_size=64,
    learning_rate=3e-3,
    num_epochs=2,
    geometry_weight=1.0,
    inter_content_epochs=30,
    device="cpu",
)
CPU = torch.device("cpu")


def two_modalities(num_items: int) -> ItemFeatures:
    """Two modalities show the same 8 hidden numbers by maps of their own; few items lack one."""
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(num_items, 8))
    tokens = {
        name: (hidden @ generator.normal(size=(8, 16)))[:, None].astype(np.float32)
        for name in ("text", "image")
    }
    present = {name: generator.random(num_items) < 0.9 for name in tokens}
    present["text"] |= ~present["image"]
    return ItemFeatures(
        {name: tokens[name] * present[name][:, None, None] for name in tokens}, present
    )


def items_of(features: ItemFeatures) -> HeadItems:
    return HeadItems(start_head(features, CONFIG), features, CPU)


def test_every_two_views_of_one_item_are_a_pair_and_absent_ones_are_none() -> None:
    present = {
        "text": np.array([True, True, False]),
        "image": np.array([True, False, True]),
        "audio": np.array([True, False, True]),
    }
    features = ItemFeatures({name: np.ones((3, 1, 16), np.float32) for name in present}, present)

    views = Views(items_of(features))
    pairs = views.pairs()

    # Text of items 0, 1; image of 0, 2; audio of 0, 2.
    assert views.items_V.tolist() == [0, 1, 0, 2, 0, 2]
    found = sorted(zip(pairs.triggers.tolist(), pairs.targets.tolist(), strict=True))
    assert found == [(0, 2), (0, 4), (2, 4), (3, 5)]


def test_a_view_is_the_embedding_of_the_item_without_its_other_modalities() -> None:
    features = two_modalities(20)
    items = items_of(features)
    views = Views(items)
    rows = np.random.default_rng(0).permutation(len(views))

    embedded = views.embed(rows)

    for row, embedding in zip(rows, embedded, strict=True):
        item = views.items_V[row]
        name = "text" if row < features.present["text"].sum() else "image"
        alone = features.take(np.array([item]))
        present = {key: torch.tensor([key == name]) for key in alone.present}
        expected = items.module(alone.tensors()[0], present)[0]
        torch.testing.assert_close(embedding, expected)


def test_the_first_stage_brings_the_modalities_of_an_item_together() -> None:
    features = two_modalities(150)
    both = np.flatnonzero(features.present["text"] & features.present["image"])
    triggers = np.arange(150)
    pairs = PairRows(triggers, (triggers + 1) % 150, np.full(150, -1), np.ones(150, np.float32))

    def share_found(**changed: object) -> float:
        """How often an item's picture is nearest to its own text, of all texts."""
        head, _ = train_head(features, pairs, CONFIG.model_copy(update=changed))
        items = HeadItems(head, features, CPU)
        with torch.no_grad():
            text, image = (items.embed_view(name, both) for name in ("text", "image"))
        return float(((image @ text.T).argmax(dim=1) == torch.arange(len(both))).float().mean())

    without = share_found(inter_content_epochs=0, num_epochs=0)
    tied = share_found(num_epochs=0)
    assert without < 0.2
    assert tied > 0.8


def test_items_of_one_modality_cannot_be_tied() -> None:
    items = items_of(features_of_vectors(np.ones((3, 16), np.float32)))

    with pytest.raises(DataError, match=r"no item has two: they have embedding; set it to 0"):
        inter_content_task(items, torch.ones(3, 16), np.zeros(3, dtype=bool), 10.0)

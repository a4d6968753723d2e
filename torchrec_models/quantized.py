"""Embedding tables in eight bits per number, for scoring; everything dense stays float32.

Each row keeps its own scale and offset (float16 each, behind the row's bytes), so that the error
of a value is at most half a step of its row: (largest - smallest) / 255 / 2, and the rounding of
scale and offset. May import: torch, torchrec.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torchrec.modules import embedding_modules as float_modules
from torchrec.quant import embedding_modules as quantized_modules
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# TorchRec reads these two from what torch.ao.quantization, deprecated, would set.
_INT8 = SimpleNamespace(
    activation=lambda: SimpleNamespace(dtype=torch.float32),
    weight=lambda: SimpleNamespace(dtype=torch.qint8),
)
_KINDS = {
    float_modules.EmbeddingBagCollection: quantized_modules.EmbeddingBagCollection,
    float_modules.EmbeddingCollection: quantized_modules.EmbeddingCollection,
}


class OwnFeatures(nn.Module):
    """A quantized collection that gets its own features only.

    They stand one behind the other in the batch. Picked by their keys, as a collection does it
    itself, they would pass through an operator whose export takes no batch without any of them.
    """

    def __init__(self, collection: nn.Module, feature_names: list[str]) -> None:
        super().__init__()
        self.collection = collection
        self.feature_names = feature_names

    def forward(self, features: KeyedJaggedTensor) -> Any:
        """Return what the collection does of its features."""
        keys = features.keys()
        start, count = keys.index(self.feature_names[0]), len(self.feature_names)
        assert keys[start : start + count] == self.feature_names
        return self.collection(features.split([start, count, len(keys) - start - count])[1])


def quantize_tables(model: nn.Module) -> None:
    """Replace every table collection of a trained model, pooled or not, by its int8 form.

    No weight has a gradient afterwards.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in _KINDS:
                setattr(parent, name, _quantized(child))


def _quantized(collection: Any) -> OwnFeatures:
    is_pooled = isinstance(collection, float_modules.EmbeddingBagCollection)
    tables = collection.embedding_bag_configs() if is_pooled else collection.embedding_configs()
    collection.qconfig = _INT8
    quantized = _KINDS[type(collection)].from_float(collection)
    # Names of tensors that the lookup holds as well: a program would hold each table twice.
    setattr(quantized, "embedding_bags" if is_pooled else "embeddings", nn.ModuleDict())
    return OwnFeatures(quantized, [name for table in tables for name in table.feature_names])

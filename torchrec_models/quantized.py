"""Embedding tables in eight bits per number, for scoring; everything dense stays float32.

Each row keeps its own scale and offset (float16 each, behind the row's bytes), so that the error
of a value is at most half a step of its row: (largest - smallest) / 255 / 2, and the rounding of
scale and offset. May import: torch, torchrec.
"""

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torchrec.modules import embedding_modules as float_modules
from torchrec.modules.embedding_configs import DataType
from torchrec.quant import embedding_modules as quantized_modules

_CPU = torch.device("cpu")
# TorchRec reads these two from what torch.ao.quantization, deprecated, would set.
_INT8 = SimpleNamespace(
    activation=lambda: SimpleNamespace(dtype=torch.float32),
    weight=lambda: SimpleNamespace(dtype=torch.qint8),
)


def quantize_tables(model: nn.Module) -> None:
    """Replace every table collection of a trained model, pooled or not, by its int8 form."""
    _replace_collections(model, _quantized)


def allocate_quantized_tables(model: nn.Module) -> None:
    """Replace every table collection by an int8 one without content, to load a state into.

    The float tables may lie on the meta device: nothing of their size is made.
    """
    _replace_collections(model, _allocated)


def _replace_collections(model: nn.Module, replace: Callable[[nn.Module], nn.Module]) -> None:
    kinds = (float_modules.EmbeddingBagCollection, float_modules.EmbeddingCollection)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                setattr(parent, name, replace(child))


def _quantized(collection: nn.Module) -> nn.Module:
    setattr(collection, "qconfig", _INT8)  # noqa: B010  # nn.Module types no attributes of others
    is_pooled = isinstance(collection, float_modules.EmbeddingBagCollection)
    kind = (
        quantized_modules.EmbeddingBagCollection
        if is_pooled
        else quantized_modules.EmbeddingCollection
    )
    quantized: nn.Module = kind.from_float(collection)
    return quantized


def _allocated(collection: Any) -> nn.Module:
    if isinstance(collection, float_modules.EmbeddingBagCollection):
        tables = _int8_configs(collection.embedding_bag_configs())
        pooled: nn.Module = quantized_modules.EmbeddingBagCollection(
            tables, collection.is_weighted(), _CPU
        )
        return pooled
    tables = _int8_configs(collection.embedding_configs())
    sequences: nn.Module = quantized_modules.EmbeddingCollection(
        tables, _CPU, need_indices=collection.need_indices()
    )
    return sequences


def _int8_configs(tables: Sequence[Any]) -> list[Any]:
    copies = copy.deepcopy(list(tables))
    for table in copies:
        table.data_type = DataType.INT8
    return copies

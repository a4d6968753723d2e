"""Opens backbones: those that a configuration names, and those that an artifact holds.

May import: everything in this folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from qarm_feast.alignment.backbones.base import Backbone
from qarm_feast.alignment.backbones.ready import ReadyVectors
from qarm_feast.alignment.backbones.text import TextBackbone, find_text_backbone
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.errors import ConfigError
from qarm_feast.input_data import EMBEDDING


def open_backbones(
    modalities: Sequence[str], items: pa.Table, config: AlignmentConfig
) -> dict[str, Backbone]:
    """Return the configured backbones.

    Args:
        modalities: What is read.
        items: The items; they tell the width of ready vectors.
        config: Section ``alignment``.

    Returns:
        A backbone per modality, in the same order.

    Raises:
        ConfigError: If one is not there.
    """
    return {modality: _open_configured(modality, items, config) for modality in modalities}


def open_stored(modality: str, folder: Path, settings: Mapping[str, Any]) -> Backbone:
    """Return a backbone of an encoder artifact.

    Args:
        modality: What it reads.
        folder: Where its files lie.
        settings: What the manifest says of it.

    Returns:
        The backbone.
    """
    if modality == "embedding":
        return ReadyVectors(**settings)
    if modality == "text":
        return TextBackbone(folder, **settings)
    raise ConfigError(f"this version of qarm-feast has no backbone for {modality}")


def _open_configured(modality: str, items: pa.Table, config: AlignmentConfig) -> Backbone:
    if modality == "embedding":
        return ReadyVectors(items[EMBEDDING].type.list_size)
    if modality == "text":
        return TextBackbone(find_text_backbone(config.backbone), config.max_tokens)
    raise ConfigError(f"this version of qarm-feast has no backbone for {modality}")

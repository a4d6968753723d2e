"""Opens backbones: those that a configuration names, and those that an artifact holds.

May import: everything in this folder.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from qarm_feast.alignment.backbones.audio import AudioBackbone, AudioNetwork
from qarm_feast.alignment.backbones.base import CONFIG_FILE, WEIGHTS_FILE, Backbone
from qarm_feast.alignment.backbones.efficientnet import EFFICIENTNET_LITE0, EfficientNetLite
from qarm_feast.alignment.backbones.image import ImageBackbone, ImageNetwork
from qarm_feast.alignment.backbones.ready import ReadyVectors
from qarm_feast.alignment.backbones.speaker_lstm import SPEAKER_LSTM, SpeakerLstm
from qarm_feast.alignment.backbones.text import TextBackbone, find_text_backbone
from qarm_feast.alignment.backbones.transformers_models import (
    FOLDER_FILES,
    TransformersAudio,
    TransformersImage,
)
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

    Raises:
        ConfigError: If a file is missing.
    """
    if modality == "embedding":
        return ReadyVectors(**settings)
    if modality == "text":
        return TextBackbone(folder, **settings)
    if modality == "image":
        return ImageBackbone(_image_network(folder), **settings)
    return AudioBackbone(_audio_network(folder), **settings)


def _open_configured(modality: str, items: pa.Table, config: AlignmentConfig) -> Backbone:
    if modality == "embedding":
        return ReadyVectors(items[EMBEDDING].type.list_size)
    if modality == "text":
        folder = find_text_backbone(config.backbone)
        return TextBackbone(folder, config.max_tokens, config.text_tokens)
    if modality == "image":
        folder = Path(config.image_backbone)
        is_packaged = not folder.is_dir() and folder.name == EFFICIENTNET_LITE0
        network = EfficientNetLite() if is_packaged else _image_network(folder)
        return ImageBackbone(network, config.max_image_pixels, config.image_grid)
    folder = Path(config.audio_backbone)
    is_packaged = not folder.is_dir() and folder.name == SPEAKER_LSTM
    sounds = SpeakerLstm() if is_packaged else _audio_network(folder)
    return AudioBackbone(sounds, config.max_audio_seconds, config.audio_tokens)


def _image_network(folder: Path) -> ImageNetwork:
    if _architecture(folder, "image", EFFICIENTNET_LITE0) == EFFICIENTNET_LITE0:
        return EfficientNetLite(folder)
    return TransformersImage(folder)


def _audio_network(folder: Path) -> AudioNetwork:
    if _architecture(folder, "audio", SPEAKER_LSTM) == SPEAKER_LSTM:
        return SpeakerLstm(folder)
    return TransformersAudio(folder)


def _architecture(folder: Path, modality: str, packaged: str) -> str | None:
    """Return what our own folders say of themselves; None for a model of transformers."""
    path = folder / CONFIG_FILE
    architecture: str | None = None
    if path.is_file():
        architecture = json.loads(path.read_bytes()).get("architecture")
    needed = FOLDER_FILES if architecture is None else (CONFIG_FILE, WEIGHTS_FILE)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"alignment.{modality}_backbone: {folder} holds no {', '.join(missing)}; name an "
            f"installed backbone ({packaged}) or a folder with a transformers {modality} model"
        )
    return architecture

"""The item encoder: a backbone per modality, a trained fusion, and the artifact that holds them.

Shape letters in this file: N items, D embedding width.
May import: torch, safetensors; what backbones need only through these.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from qarm_feast.alignment.backbones.base import Backbone
from qarm_feast.alignment.backbones.opening import open_stored
from qarm_feast.alignment.features import FeatureCache, ItemFeatures, read_features
from qarm_feast.alignment.fusion import FusionSizes, build_fusion
from qarm_feast.alignment.modalities import columns_of
from qarm_feast.artifact import MANIFEST_NAME, read_verified, replace_file, sha256, sync_folder
from qarm_feast.config import Section
from qarm_feast.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

HEAD_FILE = "head.safetensors"
MANIFEST_FORMAT = 2
"""Format 1, of text or ready vectors alone, is still read."""
HEAD_ROWS = 64
"""Rows of every pass through the head: like the backbones', its shape never varies."""


class BackboneManifest(Section):
    """A backbone in ``manifest.json``."""

    folder: str | None = Field(description="Folder of its files in the artifact; null: none.")
    hash: str = Field(description="SHA-256 over its files and settings.")
    num_tokens: int = Field(description="Feature tokens per item.")
    width: int = Field(description="Width of a feature token.")
    settings: dict[str, Any] = Field(description="Settings that alter its features.")


class EncoderManifest(Section):
    """``manifest.json`` of an encoder artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = Field(default=2, description="Form of this manifest.")
    version: str = Field(description="Name of the encoder.")
    parent: str | None = Field(
        default=None, description="The encoder that this one refreshes; null: trained from nothing."
    )
    embedding_dim: int = Field(description="Width of aligned embeddings.")
    backbones: dict[str, BackboneManifest] = Field(description="What is read, by modality.")
    fusion: FusionSizes = Field(description="Kind and sizes of the fusion.")
    behaviour_cutoff: datetime = Field(description="Newest train interaction that it has seen.")
    created: datetime = Field(description="When the command or refresh that trained it began.")
    training: dict[str, Any] = Field(description="Figures of the training run.")
    files: dict[str, str] = Field(description="SHA-256 by file name.")

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the encoder reads."""
        return tuple(self.backbones)


@dataclass(frozen=True)
class ItemEncoder:
    """Item content to aligned embeddings.

    Attributes:
        manifest: Facts of the artifact; ``files`` is empty until it is saved.
        head: The trained fusion, in evaluation mode.
        backbones: By modality, in the order in which the head reads them.
        media_dir: Folder at which relative paths of pictures and sounds start; None: what is given
            as text is never opened.
    """

    manifest: EncoderManifest
    head: nn.Module
    backbones: Mapping[str, Backbone]
    media_dir: Path | None = None

    @property
    def version(self) -> str:
        """Name of the encoder."""
        return self.manifest.version

    @property
    def embedding_dim(self) -> int:
        """Width of aligned embeddings."""
        return self.manifest.embedding_dim

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the encoder reads."""
        return self.manifest.modalities

    @property
    def content_columns(self) -> tuple[str, ...]:
        """The content columns that the encoder reads."""
        return tuple(name for modality in self.modalities for name in columns_of(modality))

    def encode(self, items: pa.Table) -> np.ndarray:
        """Return the aligned embeddings of the items: float32 ``[N, D]``, L2-normalised.

        Args:
            items: Any content columns; a null, an absent column, and a picture or sound that cannot
                be read count as absent. All items with nothing at all get the same vector.

        Returns:
            One row per item; the same bits whatever other items came with it.

        Raises:
            DataError: If the encoder reads ready vectors alone, and one is missing.
        """
        return self.project(self.read_features(items))

    def read_features(self, items: pa.Table, cache: FeatureCache | None = None) -> ItemFeatures:
        """Return what the head reads of the items.

        Args:
            items: Any content columns.
            cache: Looked up first and completed.

        Returns:
            One row per item.

        Raises:
            DataError: If the encoder reads ready vectors alone, and one is missing.
        """
        return read_features(items, self.backbones, cache, self.media_dir)

    def project(self, features: ItemFeatures) -> np.ndarray:
        """Return the head's output for given features: float32 ``[N, D]``, L2-normalised."""
        return project_features(self.head, features, self.embedding_dim)

    def save(self, uri: str) -> Path:
        """Write the artifact ``<uri>/<version>/``: all of it or nothing.

        1. Backbone files and head go into a folder under a temporary name, each fsynced.
        2. The manifest with their hashes goes in last.
        3. The folder is renamed into place.

        Args:
            uri: Folder of encoder artifacts.

        Returns:
            The artifact's folder.

        Raises:
            ConfigError: If that version exists: an artifact is never changed.
        """
        final = Path(uri) / self.version
        check_version_is_free(uri, self.version)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        files = {}
        for name, payload in self._payloads():
            replace_file(temporary / name, payload)
            files[name] = sha256(payload)
        manifest = self.manifest.model_copy(update={"files": files})
        replace_file(temporary / MANIFEST_NAME, manifest.model_dump_json(indent=2).encode())
        temporary.rename(final)
        # Before the caller removes what it would go on from.
        sync_folder(final.parent)
        return final

    def _payloads(self) -> list[tuple[str, bytes]]:
        payloads = [(HEAD_FILE, safetensors.torch.save(self.head.state_dict()))]
        for modality, backbone in self.backbones.items():
            payloads += [(f"{modality}/{name}", file) for name, file in backbone.payloads().items()]
        return payloads


def project_features(head: nn.Module, features: ItemFeatures, embedding_dim: int) -> np.ndarray:
    """Return a head's output in passes of one shape, so that no item alters another's bits.

    Args:
        head: A fusion, in evaluation mode.
        features: What it reads.
        embedding_dim: D.

    Returns:
        Float32 ``[N, D]``, L2-normalised.
    """
    embeddings_ND = np.empty((len(features), embedding_dim), dtype=np.float32)
    for begin in range(0, len(features), HEAD_ROWS):
        part = features.take(slice(begin, begin + HEAD_ROWS))
        with torch.inference_mode():
            block_ND = head(*_padded_tensors(part))[: len(part)]
        embeddings_ND[begin : begin + HEAD_ROWS] = block_ND.numpy()
    return embeddings_ND


def _padded_tensors(part: ItemFeatures) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    num_dummies = HEAD_ROWS - len(part)
    features = {
        name: functional.pad(torch.from_numpy(np.array(tokens)), (0, 0, 0, 0, 0, num_dummies))
        for name, tokens in part.by_modality.items()
    }
    present = {
        name: functional.pad(torch.from_numpy(np.array(is_present)), (0, num_dummies))
        for name, is_present in part.present.items()
    }
    return features, present


def backbone_manifests(backbones: Mapping[str, Backbone]) -> dict[str, BackboneManifest]:
    """Return what a manifest says of the backbones that an encoder is saved with."""
    return {
        modality: BackboneManifest(
            folder=modality if backbone.payloads() else None,
            hash=backbone.hash,
            num_tokens=backbone.num_tokens,
            width=backbone.width,
            settings=backbone.settings,
        )
        for modality, backbone in backbones.items()
    }


def check_version_is_free(uri: str, version: str) -> None:
    """Refuse to train or save a version that exists.

    Args:
        uri: Folder of encoder artifacts.
        version: Name of the encoder.

    Raises:
        ConfigError: If ``<uri>/<version>`` exists.
    """
    path = Path(uri) / version
    if path.exists():
        raise ConfigError(
            f"{path} exists, and an encoder artifact is never changed; "
            f"set alignment.encoder_version to a new name (now {version!r})"
        )


def read_encoder_manifest(uri: str, version: str) -> EncoderManifest:
    """Return the manifest of an encoder artifact without loading the model.

    Args:
        uri: Folder of encoder artifacts.
        version: Name of the encoder.

    Returns:
        The manifest.

    Raises:
        DataError: If there is no such encoder, or its manifest cannot be read.
    """
    path = Path(uri) / version / MANIFEST_NAME
    if not path.is_file():
        # Of one that a refresh has removed the folder stays, and no training may have its name.
        is_removed = path.parent.is_dir()
        remedy = "it was removed; name another" if is_removed else "run `qarm align train` first"
        raise DataError(f"there is no encoder at {path.parent}; {remedy}")
    try:
        return EncoderManifest.model_validate(_current_form(json.loads(path.read_bytes())))
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} is no manifest of an encoder: {error}") from error


def _current_form(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest of format 1, which had one modality and no ``format``, as format 2."""
    if "format" in manifest:
        return manifest
    kept = dict(manifest)
    modality, width = kept.pop("source"), kept.pop("feature_dim")
    settings = {"vector_width": width}
    if (max_tokens := kept.pop("max_tokens")) is not None:
        settings = {"max_tokens": max_tokens, "num_tokens": 1}
    backbone = {
        "folder": "backbone" if modality == "text" else None,
        "hash": kept.pop("backbone_hash") or "",
        "num_tokens": 1,
        "width": width,
        "settings": settings,
    }
    fusion = {"kind": "concat", "hidden_dim": kept.pop("hidden_dim")}
    return {**kept, "format": MANIFEST_FORMAT, "backbones": {modality: backbone}, "fusion": fusion}


def load_encoder(uri: str, version: str, media_dir: Path | None = None) -> ItemEncoder:
    """Return a stored encoder after verifying the hash of each of its files.

    Args:
        uri: Folder of encoder artifacts.
        version: Name of the encoder.
        media_dir: Folder at which relative paths of pictures and sounds start; None: what is given
            as text is never opened.

    Returns:
        The encoder, ready to encode; nothing is fetched from a network.

    Raises:
        DataError: If there is no such encoder.
        CorruptArtifactError: If a file's hash is not the manifest's.
    """
    manifest = read_encoder_manifest(uri, version)
    folder = Path(uri) / version
    remedy = "put back a copy of it, or run `qarm align train` again"
    payloads = {
        name: read_verified(folder, name, manifest.files, remedy) for name in manifest.files
    }
    shapes: dict[str, tuple[int, int]] = {
        name: (one.num_tokens, one.width) for name, one in manifest.backbones.items()
    }
    head = build_fusion(shapes, manifest.embedding_dim, manifest.fusion)
    head.load_state_dict(safetensors.torch.load(payloads[HEAD_FILE]))
    backbones: dict[str, Backbone] = {
        name: open_stored(name, folder / (one.folder or ""), one.settings)
        for name, one in manifest.backbones.items()
    }
    return ItemEncoder(manifest, head.eval(), backbones, media_dir)

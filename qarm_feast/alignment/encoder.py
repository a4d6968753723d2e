"""The item encoder: frozen backbone, trained head, and the artifact that holds both.

Items with text columns are encoded from text. Items without any, but with an ``embedding`` column,
are encoded from that ready vector: the head then starts as its PCA.

Shape letters in this file: N items, E feature width, W width of a ready vector, D embedding
width, H hidden width.
May import: torch, safetensors; transformers only through the backbone.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from qarm_feast.alignment.backbone import BACKBONE_FILES, FeatureCache, TextBackbone
from qarm_feast.artifact import MANIFEST_NAME, read_verified, replace_file, sha256
from qarm_feast.config import Section
from qarm_feast.encode import content_hashes
from qarm_feast.errors import ConfigError, DataError
from qarm_feast.input_data import EMBEDDING, embedding_matrix
from qarm_feast.schema import CONTENT_BINARY_COLUMNS, CONTENT_TEXT_COLUMNS

logger = logging.getLogger(__name__)

HEAD_FILE = "head.safetensors"
BACKBONE_FOLDER = "backbone"
HEAD_ROWS = 64
"""Rows of every pass through the head: like the backbone's, its shape never varies."""
WIDTH_MULTIPLE = 16
"""Ready vectors are filled up with zeros to a multiple of this. In the product of narrow or odd
matrices the last bits of a row depend on its place among the others (seen with MKL below 12
columns), and the encoder promises that they do not."""


class EncoderManifest(Section):
    """``manifest.json`` of an encoder artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(description="Name of the encoder.")
    parent: str | None = Field(
        default=None, description="The encoder that this one refreshes; null: trained from nothing."
    )
    source: Literal["text", "embedding"] = Field(description="What is encoded.")
    embedding_dim: int = Field(description="Width of aligned embeddings.")
    feature_dim: int = Field(description="Width of what the head reads.")
    hidden_dim: int = Field(description="Width of the head's hidden layer.")
    max_tokens: int | None = Field(description="Tokens of a text that are read; null: no text.")
    backbone_hash: str | None = Field(description="Hash over the backbone's files; null: none.")
    behaviour_cutoff: datetime = Field(description="Newest train interaction that it has seen.")
    created: datetime = Field(description="When training ended.")
    training: dict[str, Any] = Field(description="Figures of the training run.")
    files: dict[str, str] = Field(description="SHA-256 by file name.")


class AlignmentHead(nn.Module):
    """Features to aligned embeddings: a linear map plus a correction by one hidden layer.

    It starts as the content geometry itself: the linear map is the PCA of the training items'
    centred unit features and the correction is zero.
    """

    mean_E: Tensor

    def __init__(self, feature_dim: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(feature_dim))
        self.linear = nn.Linear(feature_dim, embedding_dim, bias=False)
        self.hidden = nn.Linear(feature_dim, hidden_dim)
        self.correction = nn.Linear(hidden_dim, embedding_dim, bias=False)
        nn.init.zeros_(self.correction.weight)

    @torch.no_grad()
    def start_from_content(self, features_NE: Tensor) -> None:
        """Set mean and linear map from the features of the training items."""
        unit_NE = functional.normalize(features_NE.double(), dim=1)
        mean_E = unit_NE.mean(dim=0)
        centred_NE = unit_NE - mean_E
        _, directions_EE = torch.linalg.eigh(centred_NE.T @ centred_NE)
        # eigh sorts by rising variance; the map keeps the directions of most.
        top_DE = directions_EE.T.flip(0)[: self.linear.out_features]
        self.mean_E.copy_(mean_E)
        self.linear.weight.copy_(top_DE)

    def forward(self, features_NE: Tensor) -> Tensor:
        """Return L2-normalised embeddings ``[N, D]``."""
        centred_NE = functional.normalize(features_NE, dim=1) - self.mean_E
        # Components of unit vectors are small; the hidden layer gets them near unit variance.
        hidden_NH = functional.gelu(self.hidden(centred_NE * centred_NE.shape[1] ** 0.5))
        return functional.normalize(self.linear(centred_NE) + self.correction(hidden_NH), dim=1)


def source_of(items: pa.Table) -> Literal["text", "embedding"]:
    """Return what an encoder for these items reads: text where there is any, else ready vectors.

    Args:
        items: Input items; only the names of the columns matter.

    Returns:
        ``text`` or ``embedding``.

    Raises:
        DataError: If the only content is of a kind that no encoder here reads.
    """
    if any(name in items.column_names for name in CONTENT_TEXT_COLUMNS):
        return "text"
    if EMBEDDING in items.column_names:
        return "embedding"
    found = [name for name in CONTENT_BINARY_COLUMNS if name in items.column_names]
    raise DataError(
        f"the only content of the items is {' and '.join(found) or 'absent'}, which the encoder "
        f"does not read; add a text column ({', '.join(CONTENT_TEXT_COLUMNS)}), or vectors of a "
        f"model of yours as the column {EMBEDDING!r}"
    )


def item_texts(items: pa.Table) -> list[str]:
    """Return one text per item: its text columns in a fixed order, empty where all are null."""
    names = [name for name in CONTENT_TEXT_COLUMNS if name in items.column_names]
    if not names:
        return [""] * items.num_rows
    columns = [items[name].to_pylist() for name in names]
    return [". ".join(part for part in parts if part) for parts in zip(*columns, strict=True)]


def content_features(
    items: pa.Table, backbone: TextBackbone | None, cache: FeatureCache | None = None
) -> np.ndarray:
    """Return what the head reads: backbone features of the texts, or the ready vectors.

    Args:
        items: Content columns; without a backbone ``embedding`` has no null.
        backbone: The text model; None for ready vectors.
        cache: Looked up first and completed; only for texts.

    Returns:
        Float32 ``[N, E]``, one row per item, not normalised; ready vectors are filled up with
        zeros to a multiple of ``WIDTH_MULTIPLE``.

    Raises:
        DataError: If ready vectors are needed and missing or null.
    """
    if backbone is None:
        return _ready_vectors(items)
    if cache is None:
        return backbone.encode(item_texts(items))
    hashes = content_hashes(items)
    known = cache.read()
    # The same text may stand in many items; the first of each is read.
    wanted = {text_hash: row for row, text_hash in reversed(list(enumerate(hashes)))}
    rows = sorted(row for text_hash, row in wanted.items() if text_hash not in known)
    logger.info("features reused=%d to_encode=%d", items.num_rows - len(rows), len(rows))
    if rows:
        fresh_NE = backbone.encode(item_texts(items.take(rows)))
        known |= {hashes[row]: vector for row, vector in zip(rows, fresh_NE, strict=True)}
        cache.write(list(known), np.stack(list(known.values())))
    return np.stack([known[text_hash] for text_hash in hashes])


def _ready_vectors(items: pa.Table) -> np.ndarray:
    if EMBEDDING not in items.column_names or items[EMBEDDING].null_count:
        raise DataError(
            f"this encoder reads ready vectors, and an item has no {EMBEDDING!r}; "
            "give every item one, or train an encoder on text"
        )
    vectors_NW = embedding_matrix(items[EMBEDDING])
    return np.pad(vectors_NW, ((0, 0), (0, -vectors_NW.shape[1] % WIDTH_MULTIPLE)))


@dataclass(frozen=True)
class ItemEncoder:
    """Item content to aligned embeddings.

    Attributes:
        manifest: Facts of the artifact; ``files`` is empty until it is saved.
        head: The trained head, in evaluation mode.
        backbone: The text model; None if ready vectors are read.
    """

    manifest: EncoderManifest
    head: AlignmentHead
    backbone: TextBackbone | None

    @property
    def version(self) -> str:
        """Name of the encoder."""
        return self.manifest.version

    @property
    def embedding_dim(self) -> int:
        """Width of aligned embeddings."""
        return self.manifest.embedding_dim

    def encode(self, items: pa.Table) -> np.ndarray:
        """Return the aligned embeddings of the items: float32 ``[N, D]``, L2-normalised.

        Args:
            items: Any of the text columns (a null or an absent one counts as empty), or
                ``embedding`` where the encoder reads ready vectors.

        Returns:
            One row per item; the same bits whatever other items came with it.

        Raises:
            DataError: If ready vectors are needed and missing.
        """
        return self.project(content_features(items, self.backbone))

    def project(self, features_NE: np.ndarray) -> np.ndarray:
        """Return the head's output for given features: float32 ``[N, D]``, L2-normalised."""
        embeddings_ND = np.empty((len(features_NE), self.embedding_dim), dtype=np.float32)
        for begin in range(0, len(features_NE), HEAD_ROWS):
            part_NE = torch.from_numpy(np.array(features_NE[begin : begin + HEAD_ROWS]))
            padding = (0, 0, 0, HEAD_ROWS - len(part_NE))
            with torch.inference_mode():
                block_ND = self.head(functional.pad(part_NE, padding))[: len(part_NE)]
            embeddings_ND[begin : begin + HEAD_ROWS] = block_ND.numpy()
        return embeddings_ND

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
        return final

    def _payloads(self) -> list[tuple[str, bytes]]:
        payloads = [(HEAD_FILE, safetensors.torch.save(self.head.state_dict()))]
        if self.backbone is not None:
            folder = self.backbone.folder
            for name in BACKBONE_FILES:
                payloads.append((f"{BACKBONE_FOLDER}/{name}", (folder / name).read_bytes()))
        return payloads


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
        raise DataError(f"there is no encoder at {path.parent}; run `qarm align train` first")
    try:
        return EncoderManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path} is no manifest of an encoder: {error}") from error


def load_encoder(uri: str, version: str) -> ItemEncoder:
    """Return a stored encoder after verifying the hash of each of its files.

    Args:
        uri: Folder of encoder artifacts.
        version: Name of the encoder.

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
    head = AlignmentHead(manifest.feature_dim, manifest.embedding_dim, manifest.hidden_dim)
    head.load_state_dict(safetensors.torch.load(payloads[HEAD_FILE]))
    backbone = None
    if manifest.max_tokens is not None:
        backbone = TextBackbone(folder / BACKBONE_FOLDER, manifest.max_tokens)
    return ItemEncoder(manifest=manifest, head=head.eval(), backbone=backbone)

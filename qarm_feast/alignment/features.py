"""Content features of items: what backbones make of their values, each value once.

Shape letters in this file: N items, T feature tokens, E feature width.
May import: numpy, pyarrow, safetensors, torch.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch
from torch import Tensor

from qarm_feast.alignment.backbones.base import Backbone
from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.modalities import FAULTS, MODALITIES, choose_modalities, content_values
from qarm_feast.artifact import replace_file
from qarm_feast.errors import DataError

logger = logging.getLogger(__name__)

_HASH_BYTES = 16
_ROWS_AT_ONCE = {"text": 65_536, "image": 256, "audio": 64, "embedding": 65_536}
"""Items whose values are in memory at once; a picture takes more than a title."""


@dataclass(frozen=True)
class ItemFeatures:
    """What the fusion reads of some items.

    Attributes:
        by_modality: Feature tokens, float32 ``[N, T, E]``, not normalised.
        present: Which items have the modality, bool ``[N]``. Every item has one at least: an item
            with nothing at all counts as having the first modality, with what its backbone gives
            for nothing (text: the features of the empty text, else zeros).
        counts: What became of the items' values, by modality and outcome; for reports.
    """

    by_modality: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(next(iter(self.present.values())))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Feature tokens per item and their width, ``(T, E)``, by modality."""
        return {name: tokens.shape[1:] for name, tokens in self.by_modality.items()}

    def take(self, rows: np.ndarray | slice) -> "ItemFeatures":
        """Return some of the items, chosen by positions, by a mask or by a slice."""
        return ItemFeatures(
            {name: tokens[rows] for name, tokens in self.by_modality.items()},
            {name: is_present[rows] for name, is_present in self.present.items()},
        )

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what a fusion's ``forward`` takes; the numbers are shared, not copied."""
        return (
            {name: torch.from_numpy(tokens) for name, tokens in self.by_modality.items()},
            {name: torch.from_numpy(is_present) for name, is_present in self.present.items()},
        )

    def raw_vectors(self) -> np.ndarray:
        """Return what the content says before any training, for comparisons: float32, unit rows.

        The unit means of each modality's tokens, side by side, zeros where one is absent; divided
        by the root of the number that an item has.
        """
        blocks = [
            _unit(tokens.mean(axis=1)) * self.present[name][:, None]
            for name, tokens in self.by_modality.items()
        ]
        num_present_N = np.sum(list(self.present.values()), axis=0, dtype=np.float32)
        raw_NC: np.ndarray = np.concatenate(blocks, axis=1) / np.sqrt(num_present_N)[:, None]
        return raw_NC


def features_of_vectors(vectors_NE: np.ndarray) -> ItemFeatures:
    """Return given vectors as features of the modality ``embedding``, one token per item."""
    return ItemFeatures(
        {"embedding": vectors_NE[:, None]}, {"embedding": np.ones(len(vectors_NE), dtype=bool)}
    )


class FeatureCache:
    """Features by hash of a value, in one safetensors file per backbone.

    Training and export read the same content; the second finds its features here.

    Args:
        uri: Folder of the files.
    """

    def __init__(self, uri: str) -> None:
        self._folder = Path(uri)

    def read(self, modality: str, backbone_hash: str) -> dict[str, np.ndarray]:
        """Return the cached features ``[T, E]`` by value hash."""
        path = self._path(modality, backbone_hash)
        if not path.is_file():
            return {}
        arrays = safetensors.numpy.load_file(path)
        hashes = [row.tobytes().hex() for row in arrays["value_hashes"]]
        return dict(zip(hashes, arrays["features"], strict=True))

    def write(self, modality: str, backbone_hash: str, known: Mapping[str, np.ndarray]) -> None:
        """Replace a backbone's file by the given features."""
        packed = np.frombuffer(bytes.fromhex("".join(known)), dtype=np.uint8)
        arrays = {
            "value_hashes": packed.reshape(len(known), -1).copy(),
            "features": np.stack(list(known.values())),
        }
        replace_file(self._path(modality, backbone_hash), safetensors.numpy.save(arrays))

    def _path(self, modality: str, backbone_hash: str) -> Path:
        return self._folder / f"{modality}_{backbone_hash[:16]}.safetensors"


def read_features(
    items: pa.Table,
    backbones: Mapping[str, Backbone],
    cache: FeatureCache | None = None,
    media_dir: Path | None = None,
) -> ItemFeatures:
    """Return the features of all items; equal values are encoded once.

    Args:
        items: Any content columns.
        backbones: By modality.
        cache: Looked up first and completed; not for ready vectors.
        media_dir: Folder at which relative paths start; None: no path is opened.

    Returns:
        Features, one row per item: the same bits whatever other items came with it.

    Raises:
        DataError: If ready vectors have another width than the encoder's.
    """
    names: list[str] = [name for name in MODALITIES if name in backbones]
    readers = {name: _Reader(name, backbones[name], cache) for name in names}
    parts = {name: readers[name].read(items, media_dir) for name in names}
    present = {name: is_present_N for name, (_, is_present_N) in parts.items()}
    has_none_N = ~np.any(list(present.values()), axis=0)
    if has_none_N.any():
        _check_not_ready_only(names, int(has_none_N.sum()))
        present[names[0]] = present[names[0]] | has_none_N
    counts = {name: reader.outcomes() for name, reader in readers.items()}
    counts["all"] = {"items": items.num_rows, "without_content": int(has_none_N.sum())}
    return ItemFeatures({name: part[0] for name, part in parts.items()}, present, counts)


def content_features(
    items: pa.Table, config: AlignmentConfig, media_dir: Path | None = None
) -> ItemFeatures:
    """Return the features that an encoder with this configuration would read, through its cache.

    Args:
        items: Any content columns.
        config: Section ``alignment``.
        media_dir: Folder at which relative paths start; None: no path is opened.

    Returns:
        Features, one row per item.

    Raises:
        DataError: If the items have no content that the configuration wants.
        ConfigError: If a backbone is not there.
    """
    backbones = open_backbones(choose_modalities(items, config.modalities), items, config)
    return read_features(items, backbones, FeatureCache(config.features_uri), media_dir)


def _check_not_ready_only(names: Sequence[str], count: int) -> None:
    # Who has vectors of a model has one for every item; an empty one would hide a mistake.
    if tuple(names) == ("embedding",):
        raise DataError(
            f"this encoder reads ready vectors, and {count} item(s) have no 'embedding', or one of "
            "zeros; give every item one, or train an encoder on other content as well"
        )


class _Reader:
    """Reads one modality and counts what it meets."""

    def __init__(self, modality: str, backbone: Backbone, cache: FeatureCache | None) -> None:
        self._modality = modality
        self._backbone = backbone
        self._cache = None if modality == "embedding" else cache
        self._known: dict[str, np.ndarray] = {}
        self.counts: Counter[str] = Counter()

    def read(self, items: pa.Table, media_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
        """Return features ``[N, T, E]`` and presence ``[N]``."""
        backbone_hash = ""
        if self._cache is not None:
            backbone_hash = self._backbone.hash
            self._known = self._cache.read(self._modality, backbone_hash)
        num_known = len(self._known)
        shape = (items.num_rows, self._backbone.num_tokens, self._backbone.width)
        features_NTE, is_present_N = np.empty(shape, np.float32), np.zeros(items.num_rows, bool)
        for begin in range(0, items.num_rows, _ROWS_AT_ONCE[self._modality]):
            rows = slice(begin, begin + _ROWS_AT_ONCE[self._modality])
            content = content_values(items[rows], self._modality, media_dir)
            self.counts.update(content.faults)
            # What could not be opened came as None; it is counted once, by its fault.
            self.counts["absent"] -= content.faults.total()
            features_NTE[rows], is_present_N[rows] = self._read_part(content.values)
        self.counts["present"] = int(is_present_N.sum())
        self._warn()
        if self._cache is not None and len(self._known) > num_known:
            self._cache.write(self._modality, backbone_hash, self._known)
        return features_NTE, is_present_N

    def outcomes(self) -> dict[str, int]:
        """Return the counts of what happened at all, and how many values there were."""
        return {name: n for name, n in self.counts.items() if n or name == "present"}

    def _warn(self) -> None:
        faults = sorted((name, self.counts[name]) for name in self.counts if name in FAULTS)
        if faults:
            logger.warning("content_unreadable modality=%s %s", self._modality,
                           " ".join(f"{name}={count}" for name, count in faults))  # fmt: skip

    def _read_part(self, values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        hashes = [_value_hash(value) for value in values]
        unread = self._encode_unknown(values, hashes)
        self.counts.update(unread[key].fault or "absent" for key in hashes if key in unread)
        present = [key for key in hashes if key not in unread]
        self.counts["repeated"] += len(present) - len(set(present))
        features_NTE = np.stack(
            [unread[key].features_TE if key in unread else self._known[key] for key in hashes]
        )
        return features_NTE, np.array([key not in unread for key in hashes])

    def _encode_unknown(self, values: Sequence[Any], hashes: Sequence[str]) -> dict[str, "_Unread"]:
        """Add what can be read to the known features; return what cannot, by value hash."""
        # The same text may stand in many items; the first of each is read.
        first = {value_hash: row for row, value_hash in reversed(list(enumerate(hashes)))}
        rows = sorted(row for value_hash, row in first.items() if value_hash not in self._known)
        encoded = self._backbone.encode([values[row] for row in rows])
        unread = {}
        for n, row in enumerate(rows):
            if encoded.is_present_N[n]:
                self._known[hashes[row]] = encoded.features_NTE[n]
                self.counts["encoded"] += 1
            else:
                unread[hashes[row]] = _Unread(encoded.features_NTE[n], encoded.faults[n])
        return unread


class _Unread(NamedTuple):
    """What a backbone gives for a value that is absent or cannot be read, and why it cannot."""

    features_TE: np.ndarray
    fault: str | None


def _value_hash(value: str | bytes | np.ndarray | None) -> str:
    if isinstance(value, np.ndarray):
        value = value.tobytes()
    payload = value.encode() if isinstance(value, str) else value or b""
    return hashlib.blake2b(payload, digest_size=_HASH_BYTES).hexdigest()


def _unit(x_NE: np.ndarray) -> np.ndarray:
    norms_N1 = np.linalg.norm(x_NE, axis=1, keepdims=True)
    unit_NE: np.ndarray = x_NE / np.maximum(norms_N1, np.finfo(np.float32).tiny)
    return unit_NE

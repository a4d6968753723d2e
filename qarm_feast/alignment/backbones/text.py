"""Text backbones: a folder with a transformers model becomes feature tokens per text.

Every forward pass has one of a few fixed shapes (padding buckets of length, a fixed number of rows
each, dummy rows where texts run out), so a text's vector does not depend on which other texts came
with it: the same bits one by one, in a stream's small batches, and over a whole catalogue.

Shape letters in this file: N texts, F feature tokens, E feature width, R rows of a forward pass,
T tokens of a row.
May import: torch; transformers is imported on first use.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qarm_feast.alignment.backbones.base import (
    WEIGHTS_FILE,
    Encoded,
    NetworkBackbone,
    TowerInput,
    Weights,
    device_of,
)
from qarm_feast.alignment.backbones.packages import packaged_file
from qarm_feast.alignment.backbones.transformers_models import folder_payloads, load_model
from qarm_feast.errors import ConfigError

logger = logging.getLogger(__name__)

MINILM = "minilm"
BACKBONE_FILES = ("config.json", WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json")
"""What a backbone folder must hold, and all that an encoder artifact copies from it."""
BUCKET_LENGTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 65_536}
"""Rows of a forward pass times its padded length, by kind of device. Throughput on a CPU is flat
above this, and one item costs a stream a whole pass."""
_CHARACTERS_PER_TOKEN = 32
_PROGRESS_PASSES = 100


def find_text_backbone(name: str) -> Path:
    """Return the folder of a text backbone.

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
    if not folder.is_dir() and folder.name == MINILM:
        folder = packaged_file("alignment.backbone", MINILM, "model")
    missing = [file for file in BACKBONE_FILES if not (folder / file).is_file()]
    if missing:
        raise ConfigError(
            f"alignment.backbone: {folder} holds no {', '.join(missing)}; "
            f"name an installed backbone ({MINILM}) or a folder with a transformers text model"
        )
    return folder


class TextPass(NamedTuple):
    """One forward pass: which texts it reads, their tokens, and which of these are no padding.

    Rows that are left over beyond the texts are dummies.
    """

    rows: np.ndarray
    ids_RT: Tensor
    is_token_RT: Tensor


class TextBackbone(NetworkBackbone):
    """A text model with mean pooling over its last layer (as sentence-transformers does).

    The model is read when it is first needed.

    Args:
        folder: A backbone folder, see :func:`find_text_backbone`.
        max_tokens: Tokens of a text that are read; the rest is cut off.
        num_tokens: Parts of equal length into which a text is cut for pooling; 1: the whole of it.
    """

    def __init__(self, folder: Path, max_tokens: int, num_tokens: int = 1) -> None:
        self.folder = folder
        self.max_tokens = max_tokens
        self.num_tokens = num_tokens
        self._lengths = [n for n in BUCKET_LENGTHS if n < max_tokens] + [max_tokens]
        self._tokens_of: dict[str, list[int]] = {}
        super().__init__(Weights(lambda: load_model(folder), self._payloads))

    @cached_property
    def _tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @property
    def width(self) -> int:
        """Width of the last layer."""
        config: Any = self.module.config
        return int(config.hidden_size)

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest says beside the files."""
        return {"max_tokens": self.max_tokens, "num_tokens": self.num_tokens}

    def _payloads(self, tuned: nn.Module | None) -> dict[str, bytes]:
        return folder_payloads(self.folder, BACKBONE_FILES, tuned)

    def encode(self, values: Sequence[str]) -> Encoded:
        """Return the features of the texts, not normalised.

        Args:
            values: Any texts; an empty one gets the features of the bare start and end tokens.

        Returns:
            One row per text; the same bits whatever else is in ``values``.
        """
        features_NFE = np.empty((len(values), self.num_tokens, self.width), dtype=np.float32)
        passes = self.passes(values, is_fixed=True)
        for index, one in enumerate(passes, start=1):
            with torch.inference_mode():
                pooled_RFE = self.tower(one.ids_RT, one.is_token_RT)
            features_NFE[one.rows] = pooled_RFE[: len(one.rows)].cpu().numpy()
            if index % _PROGRESS_PASSES == 0:
                logger.info("backbone_progress passes=%d of=%d", index, len(passes))
        is_present_N = np.array([bool(text) for text in values], dtype=bool)
        return Encoded(features_NFE, is_present_N, [None] * len(values))

    def forward(self, values: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the features with gradients, and which texts are not empty."""
        passes = self.passes(values, is_fixed=False)
        features = torch.cat([self.tower(one.ids_RT, one.is_token_RT) for one in passes])
        order_N = torch.from_numpy(np.argsort(np.concatenate([one.rows for one in passes])))
        is_present_N = torch.tensor([bool(text) for text in values], device=features.device)
        return features[order_N.to(features.device)], is_present_N

    def passes(self, values: Sequence[str], *, is_fixed: bool) -> list[TextPass]:
        """Return the forward passes that read some texts; every text stands in one.

        Args:
            values: The texts.
            is_fixed: Whether every pass of a length has the same number of rows, so that a text's
                bits do not depend on the others; else texts of one length share one pass, and
                their tokens stay in memory: training asks for them in every epoch.

        Returns:
            Passes by rising length.
        """
        token_ids = self._tokenize(values) if is_fixed else self._known_tokens(values)
        lengths_N = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        buckets_N = np.searchsorted(self._lengths, lengths_N)
        passes = []
        for bucket in np.unique(buckets_N):
            members, length = np.flatnonzero(buckets_N == bucket), self._lengths[bucket]
            num_rows = self._rows_per_forward(length) if is_fixed else len(members)
            for begin in range(0, len(members), num_rows):
                rows = members[begin : begin + num_rows]
                padded = self._padded([token_ids[row] for row in rows], num_rows, length)
                passes.append(TextPass(rows, *padded))
        return passes

    def _known_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        unknown = list(dict.fromkeys(text for text in texts if text not in self._tokens_of))
        self._tokens_of.update(zip(unknown, self._tokenize(unknown), strict=True))
        return [self._tokens_of[text] for text in texts]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        # Cut first: the tokenizer would read a text of 100 kB to its end.
        limit = self.max_tokens * _CHARACTERS_PER_TOKEN
        cut_texts = [text[:limit] for text in texts]
        if not cut_texts:
            return []
        tokens = self._tokenizer(cut_texts, truncation=True, max_length=self.max_tokens)
        token_ids: list[list[int]] = tokens["input_ids"]
        return token_ids

    def _rows_per_forward(self, length: int) -> int:
        return max(1, TOKENS_PER_FORWARD[device_of(self.module).type] // length)

    def _padded(
        self, token_ids: list[list[int]], num_rows: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and mask ``[R, T]``; rows that are left over are dummies."""
        ids_RT = torch.full((num_rows, length), self._tokenizer.pad_token_id, dtype=torch.int64)
        is_token_RT = torch.zeros((num_rows, length), dtype=torch.bool)
        # A dummy row attends to one token: a row that attends to none is not a number.
        is_token_RT[:, 0] = True
        lengths_R = torch.tensor([len(ids) for ids in token_ids])
        has_token_RT = torch.arange(length) < lengths_R[:, None]
        flat = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int64)
        ids_RT[: len(token_ids)][has_token_RT] = flat
        is_token_RT[: len(token_ids)] |= has_token_RT
        device = device_of(self.module)
        return ids_RT.to(device), is_token_RT.to(device)

    def tower(self, *inputs: Tensor) -> Tensor:
        """Return the feature tokens ``[R, F, E]`` of token ids and their mask, each ``[R, T]``."""
        ids_RT, is_token_RT = inputs[0], inputs[1].bool()
        num_rows, length = ids_RT.shape
        # The mask is given per query: transformers drops a flat mask without padding, and the
        # attention kernel would then depend on which texts share the pass.
        mask_R1TT = is_token_RT[:, None, None, :].expand(num_rows, 1, length, length)
        hidden_RTE = self.module(input_ids=ids_RT, attention_mask=mask_R1TT).last_hidden_state
        return pool_tokens(hidden_RTE, is_token_RT, self.num_tokens)

    def tower_inputs(self) -> list[TowerInput]:
        """Return token ids and mask of two texts; their number and length vary."""
        length = max(2, self.num_tokens)
        ids_RT = torch.full((2, length), self._tokenizer.pad_token_id, dtype=torch.int64)
        mask_RT = torch.ones_like(ids_RT)
        return [
            TowerInput("input_ids", ids_RT, (0, 1)),
            TowerInput("attention_mask", mask_RT, (0, 1)),
        ]


def pool_tokens(hidden_RTE: Tensor, is_token_RT: Tensor, num_parts: int) -> Tensor:
    """Return the means over parts of equal length of each row's tokens.

    Args:
        hidden_RTE: One vector per token.
        is_token_RT: Which are no padding; these come first.
        num_parts: Parts, F; a row of fewer tokens has some of them in several parts.

    Returns:
        Float32 ``[R, F, E]``.
    """
    if num_parts == 1:
        kept_RTE = hidden_RTE * is_token_RT[:, :, None]
        pooled_RE: Tensor = kept_RTE.sum(dim=1) / is_token_RT.sum(dim=1, keepdim=True)
        return pooled_RE[:, None]
    places_T = torch.arange(hidden_RTE.shape[1], device=hidden_RTE.device)
    lengths_R1 = is_token_RT.sum(dim=1, keepdim=True)
    parts_F = torch.arange(num_parts, device=hidden_RTE.device)
    begins_RF = parts_F * lengths_R1 // num_parts
    ends_RF = torch.maximum((parts_F + 1) * lengths_R1 // num_parts, begins_RF + 1)
    is_in_RFT = (places_T >= begins_RF[:, :, None]) & (places_T < ends_RF[:, :, None])
    weights_RFT = is_in_RFT / is_in_RFT.sum(dim=2, keepdim=True)
    return weights_RFT @ hidden_RTE

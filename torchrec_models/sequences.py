"""Sequences of history items under target attention.

An item of a sequence has one row per level; their sum is what the residual quantizer decodes it to
while the rows are the centroids. The target reads the same rows and asks for the items most like
it: the dot product of each level, weighted per level, plus a learned bias of the item's place in
the sequence (0 = the newest item that has codes), through a softmax over the row's items.
Items of all rows stand one behind the other: nothing is padded, and no row is looped over.
Shape letters: B rows, N targets with codes, H items of one sequence of all rows together,
L levels, E table width, V vectors.
May import: torch, torchrec.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_models.config import CodeSizes, RankerConfig
from torchrec_models.tables import TARGET_SEQUENCE, sequence_names, sequence_tables

NUM_VECTORS_PER_SEQUENCE: Final = 2


class SequenceArch(nn.Module):
    """Looks the codes of sequences up and attends over them: ``[B, V, E]``."""

    def __init__(
        self, embedding_collection: EmbeddingCollection, attention: "SequenceAttention"
    ) -> None:
        super().__init__()
        self.embedding_collection = embedding_collection
        self.attention = attention

    def forward(self, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Return the vectors of :class:`SequenceAttention`."""
        vectors_BVE: torch.Tensor = self.attention(self.embedding_collection(sparse_features))
        return vectors_BVE


class SequenceAttention(nn.Module):
    """The decoded target, and for each sequence two vectors of :class:`TargetAttention`.

    Args:
        sequence_names: Features of the sequences' codes, L per item.
        num_levels: L.
        embedding_dim: E.
        max_length: Items of the longest sequence.
        is_frozen: Whether the table gets no gradient: whatever steps it, it keeps its weights.
    """

    def __init__(
        self,
        sequence_names: Sequence[str],
        num_levels: int,
        embedding_dim: int,
        max_length: int,
        is_frozen: bool,
    ) -> None:
        super().__init__()
        self.is_frozen = is_frozen
        self.sequence_names = list(sequence_names)
        self.num_levels = num_levels
        self.attentions = nn.ModuleList(
            TargetAttention(num_levels, embedding_dim, max_length) for _ in self.sequence_names
        )
        self.num_vectors = 1 + NUM_VECTORS_PER_SEQUENCE * len(self.sequence_names)

    def forward(self, embeddings: dict[str, JaggedTensor]) -> torch.Tensor:
        """Return the decoded target, then the vectors of each sequence, ``[B, V, E]``."""
        target_BLE = self._target(embeddings[TARGET_SEQUENCE])
        vectors = [target_BLE.sum(dim=1, keepdim=True)]
        for name, attention in zip(self.sequence_names, self.attentions, strict=True):
            sequence = embeddings[name]
            items_HLE = self._items(sequence)
            lengths_B = sequence.lengths().long() // self.num_levels
            vectors.append(attention(target_BLE, items_HLE, lengths_B))
        return torch.cat(vectors, dim=1)

    def _target(self, codes: JaggedTensor) -> torch.Tensor:
        """Return the codes' rows of each target, zeros where a target has no codes."""
        has_codes_B = codes.lengths() > 0
        known_NLE = self._items(codes)
        # The row behind the last one is the zeros.
        zeros_1LE = known_NLE.new_zeros(1, self.num_levels, known_NLE.shape[2])
        padded_NLE = torch.cat([known_NLE, zeros_1LE])
        places_B = torch.where(has_codes_B, has_codes_B.cumsum(0) - 1, known_NLE.shape[0])
        return padded_NLE.index_select(0, places_B)

    def _items(self, codes: JaggedTensor) -> torch.Tensor:
        values = codes.values()
        # As a quotient, not as -1: `torch.export` knows no other way to tell the size.
        num_items = values.shape[0] // self.num_levels
        torch._check(num_items * self.num_levels == values.shape[0])  # type: ignore[no-untyped-call]
        items_HLE: torch.Tensor = values.view(num_items, self.num_levels, values.shape[1])
        return items_HLE.detach() if self.is_frozen else items_HLE


class TargetAttention(nn.Module):
    """Softmax attention of a target over a jagged sequence, in two vectors ``[B, 2, E]``.

    An item's score is the weighted sum of its dot products with the target, one per level, and of
    the bias of its place. The first vector is the attended item; the second one is made of the
    attended dot products. A row without items gets zeros.

    Args:
        num_levels: L.
        embedding_dim: E.
        max_length: Items of the longest sequence.
    """

    def __init__(self, num_levels: int, embedding_dim: int, max_length: int) -> None:
        super().__init__()
        self.level_weights = nn.Parameter(torch.ones(num_levels))
        self.place_biases = nn.Parameter(torch.zeros(max_length))
        self.match = nn.Linear(num_levels, embedding_dim, bias=False)

    def forward(
        self, target_BLE: torch.Tensor, items_HLE: torch.Tensor, lengths_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the attended item and the attended match.

        Args:
            target_BLE: The targets' rows of each level.
            items_HLE: The items' rows of each level, newest first, row after row.
            lengths_B: Items of each row, int64; their sum is H.

        Returns:
            ``[B, 2, E]``.
        """
        num_rows = lengths_B.shape[0]
        row_of_H = torch.repeat_interleave(lengths_B, output_size=items_HLE.shape[0])
        dots_HL = (items_HLE * target_BLE.index_select(0, row_of_H)).sum(dim=2)
        starts_B = lengths_B.cumsum(0) - lengths_B
        places_H = torch.arange(items_HLE.shape[0], device=row_of_H.device) - starts_B[row_of_H]
        scores_H = dots_HL @ self.level_weights + self.place_biases[places_H]
        shares_H = segment_softmax(scores_H, row_of_H, num_rows)
        weighted = torch.cat([items_HLE.sum(dim=1), dots_HL], dim=1) * shares_H.unsqueeze(1)
        sums = weighted.new_zeros(num_rows, weighted.shape[1])
        sums = sums.index_add(0, row_of_H, weighted)
        embedding_dim = items_HLE.shape[2]
        attended_BE, match_BL = sums[:, :embedding_dim], sums[:, embedding_dim:]
        return torch.stack([attended_BE, self.match(match_BL)], dim=1)


def segment_softmax(scores_H: torch.Tensor, row_of_H: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the softmax of the scores within each row.

    Args:
        scores_H: Scores of all rows' items.
        row_of_H: Row of each item, int64.
        num_rows: B.

    Returns:
        Shares that sum to 1 in each row that has items.
    """
    lowest_B = scores_H.new_full((num_rows,), float("-inf"))
    # The largest score only keeps the exponentials in range: no gradient goes through it.
    largest_B = lowest_B.scatter_reduce(0, row_of_H, scores_H.detach(), "amax")
    weights_H = (scores_H - largest_B[row_of_H]).exp()
    sums_B = scores_H.new_zeros(num_rows).index_add(0, row_of_H, weights_H)
    return weights_H / sums_B[row_of_H]


def build_sequence_arch(
    config: RankerConfig, sizes: CodeSizes, table_device: torch.device | None
) -> SequenceArch | None:
    """Return the part that reads sequences, or None if no feature does.

    Args:
        config: The ranker section.
        sizes: Sizes of the code tables.
        table_device: Device of the table; ``meta`` when it will be sharded.

    Returns:
        The part on CPU, its table on ``table_device``.
    """
    tables = sequence_tables(sizes, config)
    if not tables:
        return None
    attention = SequenceAttention(
        sequence_names(config),
        len(sizes.level_sizes),
        config.embedding_dim,
        max(config.history_length, config.num_searched),
        config.code_table_training == "frozen",
    )
    return SequenceArch(EmbeddingCollection(tables=tables, device=table_device), attention)

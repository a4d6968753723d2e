"""The multi-task ranker and its training task.

Shape letters: B rows, F features, E table width, W dense width, L interaction width, T tasks.
May import: torch, torchrec.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from qarm_feast.errors import ConfigError
from torchrec_models.archs import DenseArch, EmbeddingDropout, SparseArch
from torchrec_models.batch import RankingBatch
from torchrec_models.config import CodeSizes, RankerConfig, TaskConfig
from torchrec_models.heads import Head, build_head
from torchrec_models.interactions import Interaction, build_interaction
from torchrec_models.losses import ContentIdLoss, TaskLosses
from torchrec_models.sequences import SequenceArch, build_sequence_arch
from torchrec_models.tables import ITEM_ID_FEATURE, dense_width, frozen_tables, pooled_tables
from torchrec_models.towers import TaskChain, TaskLabels, TaskTowers
from torchrec_models.vocabulary import DEFAULT_ROW, Vocabularies

StepOutput = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


class MultiTaskRanker(nn.Module):
    """Sparse and dense features, their interaction, a head, one tower per task."""

    def __init__(
        self,
        sparse_arch: SparseArch,
        sequence_arch: SequenceArch | None,
        dense_arch: DenseArch | None,
        interaction_arch: Interaction,
        head: Head,
        task_towers: TaskTowers,
    ) -> None:
        super().__init__()
        self.sparse_arch = sparse_arch
        self.sequence_arch = sequence_arch
        self.dense_arch = dense_arch
        self.interaction_arch = interaction_arch
        self.head = head
        self.task_towers = task_towers

    def forward(
        self, sparse_features: KeyedJaggedTensor, dense_features_BW: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits ``[B, T]`` of the tasks' probabilities."""
        features_BFE = self.embeddings(sparse_features, dense_features_BW)
        return self.logits(features_BFE, dense_features_BW)

    def embeddings(
        self, sparse_features: KeyedJaggedTensor, dense_features_BW: torch.Tensor
    ) -> torch.Tensor:
        """Return the embeddings ``[B, F, E]``: pooled in table order, dense, sequences."""
        features_BFE: torch.Tensor = self.sparse_arch(sparse_features)
        if self.dense_arch is not None:
            dense_BE = self.dense_arch(dense_features_BW)
            features_BFE = torch.cat([features_BFE, dense_BE.unsqueeze(1)], dim=1)
        if self.sequence_arch is not None:
            sequences_BVE = self.sequence_arch(sparse_features)
            features_BFE = torch.cat([features_BFE, sequences_BVE], dim=1)
        return features_BFE

    def logits(self, features_BFE: torch.Tensor, dense_features_BW: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[B, T]`` of embeddings, and of dense features once more.

        One dense embedding is narrow for vectors and counts together, so the head reads them too.
        """
        interactions_BL = self.interaction_arch(features_BFE)
        mixtures_BTY = self.head(interactions_BL, dense_features_BW)
        logits_BT: torch.Tensor = self.task_towers(mixtures_BTY)
        return logits_BT


class RankerTrainTask(nn.Module):
    """A ranker with its losses: those of the tasks, and the content-ID term where it is on.

    In training a share of the embeddings' numbers, ``embedding_dropout``, reads as 0.
    """

    def __init__(
        self,
        ranker: MultiTaskRanker,
        task_weights: Sequence[float],
        content_id_loss: ContentIdLoss | None = None,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.ranker = ranker
        self.embedding_dropout = EmbeddingDropout(embedding_dropout)
        self.task_labels = TaskLabels(ranker.task_towers.chain)
        self.task_losses = TaskLosses(task_weights)
        self.content_id_loss = content_id_loss

    def forward(self, batch: RankingBatch) -> StepOutput:
        """Return the loss ``[1]``, and detached logits and labels ``[B, T]``.

        A label is NaN where its task has none, see :class:`~torchrec_models.towers.TaskLabels`.
        """
        features_BFE = self.ranker.embeddings(batch.sparse_features, batch.dense_features)
        kept_BFE = self.embedding_dropout(features_BFE)
        logits_BT = self.ranker.logits(kept_BFE, batch.dense_features)
        labels_BT = self.task_labels(batch.labels)
        loss = self.task_losses(logits_BT, labels_BT)
        if self.content_id_loss is not None:
            dense_arch = self.ranker.dense_arch
            assert dense_arch is not None, "the term needs vectors, which are dense features"
            vectors_BW = self.content_id_loss.vectors_alone(batch.dense_features)
            item_rows_B = batch.sparse_features[ITEM_ID_FEATURE].values()
            loss = loss + self.content_id_loss(
                dense_arch(vectors_BW),
                features_BFE[:, self.ranker.sparse_arch.feature_names.index(ITEM_ID_FEATURE)],
                item_rows_B.where(vectors_BW.any(dim=1), DEFAULT_ROW),
            )
        return loss.reshape(1), (logits_BT.detach(), labels_BT)


def build_ranker(
    config: RankerConfig,
    tasks: Sequence[TaskConfig],
    vocabularies: Vocabularies,
    sizes: CodeSizes,
    table_device: torch.device | None = None,
) -> MultiTaskRanker:
    """Return a ranker with random weights from torch's global generator.

    Args:
        config: The ranker section.
        tasks: Resolved tasks, one tower each.
        vocabularies: Sizes of the id and column tables.
        sizes: Sizes of the code tables.
        table_device: Device of the tables; ``meta`` when they will be sharded.

    Returns:
        The ranker on CPU, its tables on ``table_device``.

    Raises:
        ConfigError: If no feature has a table, as user columns of data without users, or if
            the features or tasks do not fit ``interaction`` or ``task_groups``.
    """
    tables = pooled_tables(sizes, vocabularies, config)
    if not tables:
        raise ConfigError(
            f"ranker.features is {list(config.features)}, and none of them has a table on this "
            "data; add one, for example item_id"
        )
    sparse_arch = SparseArch(
        EmbeddingBagCollection(tables=tables, device=table_device), frozen_tables(sizes, config)
    )
    num_features = sum(len(table.feature_names) for table in tables)
    sequence_arch = build_sequence_arch(config, sizes, table_device)
    if sequence_arch is not None:
        num_features += sequence_arch.attention.num_vectors
    dense_arch = None
    width = dense_width(sizes, config, len(tasks))
    if width:
        dense_arch = DenseArch(width, config.dense_arch_layer_sizes, config.embedding_dim)
        num_features += 1
    interaction_arch = build_interaction(config, num_features)
    head = build_head(config, interaction_arch.out_features + width, tasks)
    chain = TaskChain(tasks, config.enable_esmm)
    towers = TaskTowers(head.out_features, config.over_arch_layer_sizes, chain)
    return MultiTaskRanker(sparse_arch, sequence_arch, dense_arch, interaction_arch, head, towers)


def ranker_logits(ranker: nn.Module, batch: RankingBatch) -> torch.Tensor:
    """Return the logits ``[B, T]`` that a ranker, be it a quantized one, gives a batch."""
    logits_BT: torch.Tensor = ranker(batch.sparse_features, batch.dense_features)
    return logits_BT

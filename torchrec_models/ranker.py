"""The multi-task ranker and its training task.

Shape letters: B rows, F features, E table width, W dense width, T tasks.
May import: torch, torchrec.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from qarm_feast.errors import ConfigError
from torchrec_models.archs import DenseArch, InteractionArch, SparseArch
from torchrec_models.batch import RankingBatch
from torchrec_models.config import CodeSizes, RankerConfig, TaskConfig
from torchrec_models.heads import Mmoe, TaskArch
from torchrec_models.tables import dense_width, ranker_tables
from torchrec_models.vocabulary import Vocabularies

StepOutput = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


class MultiTaskRanker(nn.Module):
    """Sparse and dense features, dot interaction, MMoE, one tower per task."""

    def __init__(
        self,
        sparse_arch: SparseArch,
        dense_arch: DenseArch | None,
        interaction_arch: InteractionArch,
        mmoe: Mmoe,
        task_archs: Sequence[TaskArch],
    ) -> None:
        super().__init__()
        self.sparse_arch = sparse_arch
        self.dense_arch = dense_arch
        self.interaction_arch = interaction_arch
        self.mmoe = mmoe
        self.task_archs = nn.ModuleList(task_archs)

    def forward(
        self, sparse_features: KeyedJaggedTensor, dense_features_BW: torch.Tensor
    ) -> torch.Tensor:
        """Return logits ``[B, T]``."""
        features_BFE = self.sparse_arch(sparse_features)
        if self.dense_arch is not None:
            dense_BE = self.dense_arch(dense_features_BW)
            features_BFE = torch.cat([features_BFE, dense_BE.unsqueeze(1)], dim=1)
        mixtures = self.mmoe(self.interaction_arch(features_BFE))
        logits = [task_arch(mixtures[t]) for t, task_arch in enumerate(self.task_archs)]
        return torch.cat(logits, dim=1)


class RankerTrainTask(nn.Module):
    """A ranker with its loss: binary cross entropy per task, weighted and summed."""

    def __init__(self, ranker: MultiTaskRanker, task_weights: Sequence[float]) -> None:
        super().__init__()
        self.ranker = ranker
        self._task_weights: torch.Tensor
        self.register_buffer("_task_weights", torch.tensor(list(task_weights)), persistent=False)

    def forward(self, batch: RankingBatch) -> StepOutput:
        """Return the loss ``[1]``, and detached logits and labels ``[B, T]``."""
        logits_BT = self.ranker(batch.sparse_features, batch.dense_features)
        losses_BT = nn.functional.binary_cross_entropy_with_logits(
            logits_BT, batch.labels, reduction="none"
        )
        loss = (losses_BT.mean(dim=0) * self._task_weights).sum()
        return loss.reshape(1), (logits_BT.detach(), batch.labels)


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
        ConfigError: If no feature has a table, as user columns of data without users.
    """
    tables = ranker_tables(sizes, vocabularies, config)
    if not tables:
        raise ConfigError(
            f"ranker.features is {list(config.features)}, and none of them has a table on this "
            "data; add one, for example item_id"
        )
    sparse_arch = SparseArch(EmbeddingBagCollection(tables=tables, device=table_device))
    num_features = sum(len(table.feature_names) for table in tables)
    dense_arch = None
    if width := dense_width(sizes, config):
        dense_arch = DenseArch(width, config.dense_arch_layer_sizes, config.embedding_dim)
        num_features += 1
    interaction_arch = InteractionArch(num_features, config.embedding_dim)
    mmoe = Mmoe(
        interaction_arch.out_features, config.expert_layer_sizes, config.num_experts, len(tasks)
    )
    task_archs = [TaskArch(mmoe.out_features, config.over_arch_layer_sizes) for _ in tasks]
    return MultiTaskRanker(sparse_arch, dense_arch, interaction_arch, mmoe, task_archs)


def ranker_logits(ranker: nn.Module, batch: RankingBatch) -> torch.Tensor:
    """Return the logits ``[B, T]`` that a ranker, be it a quantized one, gives a batch."""
    logits_BT: torch.Tensor = ranker(batch.sparse_features, batch.dense_features)
    return logits_BT

"""Losses of the ranker; means are over the rows of all ranks.

Gradients of dense parts and of tables are averaged over the ranks, so that each rank's loss is
its own sum, times the number of ranks, divided by the rows of all.
Shape letters: B rows, T tasks, E table width, W dense width, S sampled negatives.
May import: torch.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from torchrec_models.config import CodeSizes, RankerConfig
from torchrec_models.tables import vector_width
from torchrec_models.vocabulary import DEFAULT_ROW


class TaskLosses(nn.Module):
    """Binary cross entropy per task over the rows that have its label, weighted and summed."""

    def __init__(self, task_weights: Sequence[float]) -> None:
        super().__init__()
        self._task_weights: torch.Tensor
        self.register_buffer("_task_weights", torch.tensor(list(task_weights)), persistent=False)

    def forward(self, logits_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """Return ``sum_t w_t / n_t sum_b bce(logit_bt, label_bt)``, n_t the labelled rows.

        Args:
            logits_BT: Logits of the tasks' probabilities.
            labels_BT: 0, 1, or NaN where the row has no label of the task.

        Returns:
            A scalar; a task without any labelled row adds 0.
        """
        is_labelled_BT = ~labels_BT.isnan()
        losses_BT = nn.functional.binary_cross_entropy_with_logits(
            logits_BT, labels_BT.where(is_labelled_BT, 0.0), reduction="none"
        )
        sums_T = (losses_BT * is_labelled_BT).sum(dim=0)
        means_T = mean_over_ranks(sums_T, is_labelled_BT.sum(dim=0))
        return (means_T * self._task_weights).sum()


class ContentIdLoss(nn.Module):
    """EM3's content-ID contrastive term (arXiv 2404.06078): ties content to the item's ID.

    ``-log(exp(cos(c_b, e_b) / tau) / sum_j exp(cos(c_b, e_j) / tau))``, averaged, where c is
    the embedding of the row's item vector, e the item ID's, and j runs over b and the next
    ``num_negatives`` rows of the batch that show another item. Rows whose ID is unseen or was
    dropped, or whose item has no vector, have no term and are no negatives.

    Args:
        weight: Factor of the term.
        temperature: Tau.
        num_negatives: Rows that each row is set against.
        vector_dim: Width of the item's vector, the first dense features.
    """

    def __init__(
        self, weight: float, temperature: float, num_negatives: int, vector_dim: int
    ) -> None:
        super().__init__()
        self.weight = weight
        self.temperature = temperature
        self.num_negatives = num_negatives
        self.vector_dim = vector_dim

    def vectors_alone(self, dense_features_BW: torch.Tensor) -> torch.Tensor:
        """Return the dense features with zeros for all but the item's vector.

        What depends on the user or on counts is no content, and zeros are what an item has that
        nobody has seen yet.
        """
        vectors_BD = dense_features_BW[:, : self.vector_dim]
        num_others = dense_features_BW.shape[1] - self.vector_dim
        return nn.functional.pad(vectors_BD, (0, num_others))

    def forward(
        self, content_BE: torch.Tensor, id_BE: torch.Tensor, item_rows_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted term.

        Args:
            content_BE: Content embeddings.
            id_BE: Item ID embeddings.
            item_rows_B: Rows of the item ID table, :data:`DEFAULT_ROW` for those without a term.

        Returns:
            A scalar; 0 where no row has an ID.
        """
        num_rows = len(item_rows_B)
        steps_S = torch.arange(min(self.num_negatives + 1, num_rows), device=item_rows_B.device)
        # Batches of train rows are shuffled: the next rows are a random draw.
        others_BS = (torch.arange(num_rows, device=steps_S.device)[:, None] + steps_S) % num_rows
        unit_BE = nn.functional.normalize(id_BE, dim=1)
        content_B1E = nn.functional.normalize(content_BE, dim=1).unsqueeze(1)
        # No matrix product: autocast would round cosines to bfloat16.
        cosines_BS = (unit_BE[others_BS] * content_B1E).sum(dim=2)
        other_rows_BS = item_rows_B[others_BS]
        is_other_BS = (other_rows_BS != item_rows_B[:, None]) & (other_rows_BS != DEFAULT_ROW)
        # The first column is the row's own item.
        is_hidden_BS = ~is_other_BS & (steps_S > 0)
        logits_BS = (cosines_BS / self.temperature).masked_fill(is_hidden_BS, float("-inf"))
        has_id_B = item_rows_B != DEFAULT_ROW
        losses_B = logits_BS.logsumexp(dim=1) - logits_BS[:, 0]
        return self.weight * mean_over_ranks((losses_B * has_id_B).sum(), has_id_B.sum())


def build_content_id_loss(config: RankerConfig, sizes: CodeSizes) -> ContentIdLoss | None:
    """Return the content-ID term; none where its weight is 0."""
    if not config.content_id_weight:
        return None
    return ContentIdLoss(
        config.content_id_weight,
        config.content_id_temperature,
        config.content_id_num_negatives,
        vector_width(sizes, config),
    )


def mean_over_ranks(own_sums: torch.Tensor, own_counts: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of means over all ranks; their average over ranks is the mean.

    Args:
        own_sums: Sums over this rank's rows.
        own_counts: How many rows each sum is of.

    Returns:
        ``own sum * ranks / counts of all ranks``; 0 where the count is 0.
    """
    counts = own_counts.to(own_sums.dtype)
    num_ranks = 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        num_ranks = dist.get_world_size()
        dist.all_reduce(counts)
    return own_sums * num_ranks / counts.clamp(min=1.0)

"""Losses of the alignment: pairs attract, and content similarities stay what they were.

Shape letters in this file: B pairs of a batch, D embedding width.
May import: torch.
"""

import torch
from torch import Tensor
from torch.nn import functional


def negatives_mask(
    triggers_B: Tensor, targets_B: Tensor, users_B: Tensor, is_pair_BB: Tensor
) -> Tensor:
    """Return which (trigger of row a, target of row b) may serve as a negative.

    Not a negative are: the row's own pair, a target that is the row's trigger or target again,
    a target of the same user (users_B equal and not negative), and any known pair.

    Args:
        triggers_B: Item rows, int64.
        targets_B: Item rows, int64.
        users_B: User rows, int64; below zero where a pair has no user.
        is_pair_BB: Whether (trigger a, target b) is a known pair.

    Returns:
        Bool matrix ``[B, B]``, False on the diagonal.
    """
    is_repeated_BB = targets_B[:, None] == targets_B[None, :]
    is_trigger_repeated_BB = triggers_B[:, None] == triggers_B[None, :]
    is_self_BB = triggers_B[:, None] == targets_B[None, :]
    is_same_user_BB = (users_B[:, None] == users_B[None, :]) & (users_B[:, None] >= 0)
    is_neighbor_BB = is_repeated_BB | is_trigger_repeated_BB | is_self_BB
    return ~(is_neighbor_BB | is_same_user_BB | is_pair_BB)


def info_nce(
    triggers_BD: Tensor,
    targets_BD: Tensor,
    is_negative_BB: Tensor,
    weights_B: Tensor,
    temperature: float,
) -> Tensor:
    """Return the symmetric InfoNCE loss, averaged over pairs by weight.

    Each trigger has to find its target among the batch's negatives, and each target its trigger.

    Args:
        triggers_BD: L2-normalised embeddings.
        targets_BD: L2-normalised embeddings.
        is_negative_BB: Which (trigger, target) are negatives; see :func:`negatives_mask`.
        weights_B: Weight of each pair, above zero.
        temperature: Divides the cosines.

    Returns:
        A scalar, at least zero.
    """
    logits_BB = triggers_BD @ targets_BD.T / temperature
    is_own_BB = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    logits_BB = logits_BB.masked_fill(~(is_negative_BB | is_own_BB), -torch.inf)
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    by_trigger_B = functional.cross_entropy(logits_BB, own_B, reduction="none")
    by_target_B = functional.cross_entropy(logits_BB.T, own_B, reduction="none")
    return (weights_B * (by_trigger_B + by_target_B)).sum() / (2.0 * weights_B.sum())


def geometry_loss(embeddings_BD: Tensor, content_BB: Tensor) -> Tensor:
    """Return the mean squared change of cosines between items (AlignRec's regulariser).

    Args:
        embeddings_BD: L2-normalised embeddings.
        content_BB: Cosines of the same items before any training.

    Returns:
        A scalar, at least zero.
    """
    return functional.mse_loss(embeddings_BD @ embeddings_BD.T, content_BB)

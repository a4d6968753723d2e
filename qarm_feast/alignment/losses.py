"""Losses of the alignment: pairs attract, and content similarities stay what they were.

Where several ranks train, each of them calls these with all embeddings and its own rows; the sums
over ranks are the losses of the whole batch.

Shape letters in this file: B pairs of a batch, Q own pairs of this rank, S items, D embedding
width.
May import: torch.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

WHOLE = slice(None)
TEMPERATURE_BOUNDS = (0.01, 1.0)
"""Where a learned temperature may lie: CLIP's limit of 100 times the cosine, and none at all."""


class Temperature(nn.Module):
    """The temperature of the pair loss, fixed or learned.

    A learned one is trained as its logarithm, so that a step is a factor, and put back between
    ``TEMPERATURE_BOUNDS`` after each step; below them one wrong negative outweighs the batch.

    Args:
        start: The temperature at the start.
        is_learned: Whether it has a parameter.

    Attributes:
        logarithm: The parameter; None if the temperature is fixed.
    """

    logarithm: nn.Parameter | None

    def __init__(self, start: float, is_learned: bool) -> None:
        super().__init__()
        self.start = start
        logarithm = nn.Parameter(torch.tensor(math.log(start))) if is_learned else None
        self.register_parameter("logarithm", logarithm)

    def forward(self) -> float | Tensor:
        """Return the temperature."""
        return self.start if self.logarithm is None else self.logarithm.exp()

    @property
    def value(self) -> float:
        """The temperature as a number."""
        return self.start if self.logarithm is None else self.logarithm.detach().exp().item()

    @torch.no_grad()
    def clamp(self) -> None:
        """Put a learned temperature back between its bounds."""
        if self.logarithm is not None:
            self.logarithm.clamp_(*(math.log(bound) for bound in TEMPERATURE_BOUNDS))


def pair_logits(
    queries_QD: Tensor,
    answers_BD: Tensor,
    is_blocked_QB: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """Return what each query says about each answer of the batch.

    Args:
        queries_QD: L2-normalised embeddings.
        answers_BD: L2-normalised embeddings.
        is_blocked_QB: Which answers are neither a query's own nor a negative of it.
        temperature: Divides the cosines.

    Returns:
        Logits ``[Q, B]``, minus infinity where blocked.
    """
    logits_QB = queries_QD @ answers_BD.T / temperature
    return logits_QB.masked_fill(is_blocked_QB, -torch.inf)


def info_nce(
    by_trigger_QB: Tensor, by_target_QB: Tensor, weights_B: Tensor, own: slice = WHOLE
) -> Tensor:
    """Return the symmetric InfoNCE loss, averaged over pairs by weight.

    Each trigger has to find its target among the batch's negatives, and each target its trigger.

    Args:
        by_trigger_QB: Logits of the targets, one row per own trigger.
        by_target_QB: Logits of the triggers, one row per own target.
        weights_B: Weight of each pair of the batch, above zero.
        own: This rank's pairs; by default all.

    Returns:
        A scalar, at least zero; the sum over ranks is the loss of the batch.
    """
    own_Q = torch.arange(len(weights_B), device=weights_B.device)[own]
    trigger_losses_Q = functional.cross_entropy(by_trigger_QB, own_Q, reduction="none")
    target_losses_Q = functional.cross_entropy(by_target_QB, own_Q, reduction="none")
    losses_Q = trigger_losses_Q + target_losses_Q
    return (weights_B[own] * losses_Q).sum() / (2.0 * weights_B.sum())


def anchor_loss(embeddings_SD: Tensor, anchors_SD: Tensor, own: slice = WHOLE) -> Tensor:
    """Return how far items are from where they were: the mean of 1 - cosine.

    Args:
        embeddings_SD: L2-normalised embeddings.
        anchors_SD: Embeddings that the same items had before, L2-normalised.
        own: This rank's items; by default all.

    Returns:
        A scalar in [0, 2]; the sum over ranks is the loss of all items.
    """
    cosines_Q = (embeddings_SD[own] * anchors_SD[own]).sum(dim=1)
    return (1.0 - cosines_Q).sum() / len(embeddings_SD)


def geometry_loss(embeddings_SD: Tensor, content_SD: Tensor, own: slice = WHOLE) -> Tensor:
    """Return the mean squared change of cosines between items (AlignRec's regulariser).

    Args:
        embeddings_SD: L2-normalised embeddings.
        content_SD: Embeddings of the same items whose cosines are to be kept, L2-normalised.
        own: This rank's items; by default all.

    Returns:
        A scalar, at least zero; the sum over ranks is the loss of all items.
    """
    cosines_QS = embeddings_SD[own] @ embeddings_SD.T
    content_QS = content_SD[own] @ content_SD.T
    if not len(cosines_QS):
        return embeddings_SD.sum() * 0.0
    share = len(cosines_QS) / len(embeddings_SD)
    return functional.mse_loss(cosines_QS, content_QS) * share

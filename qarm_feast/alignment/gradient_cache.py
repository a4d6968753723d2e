"""Gradient caching: a batch of any size with the memory of one chunk (GradCache).

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021). The
loss of a batch needs all of its embeddings, but the gradient of the weights is a sum over items:

1. Embed the items chunk by chunk, without a graph.
2. Backward from the loss to these embeddings only: the cached gradients.
3. Embed each chunk again, with a graph, and go on backward from its cached gradients.

Dropout has to draw the same in 1 and 3: each chunk is embedded under a seed of its own.

Shape letters in this file: N items, D embedding width.
May import: torch.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Embed = Callable[[np.ndarray], Tensor]
"""Item rows to their embeddings ``[N, D]``, with a graph where gradients are on."""
_SEED_STRIDE = 1_000_003
_NUM_SEEDS = 1 << 63


def backward(
    embed: Embed,
    rows_N: np.ndarray,
    loss_of: Callable[[Tensor], Tensor],
    chunk_size: int | None,
    seed: int,
) -> Tensor:
    """Add the gradients of a loss to the weights behind ``embed`` and to those of ``loss_of``.

    It seeds torch's generators; call it within ``torch.random.fork_rng``.

    Args:
        embed: The model.
        rows_N: Items, at least one.
        loss_of: The loss of all embeddings ``[N, D]``, a scalar.
        chunk_size: Items embedded at a time; None: all at once, and nothing twice.
        seed: What dropout draws depends on this and the chunk alone.

    Returns:
        The loss, without a graph.
    """
    if chunk_size is None or len(rows_N) <= chunk_size:
        torch.manual_seed(_chunk_seed(seed, 0))
        loss = loss_of(embed(rows_N))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss.detach()
    starts = range(0, len(rows_N), chunk_size)
    chunks = [rows_N[begin : begin + chunk_size] for begin in starts]
    with torch.no_grad():
        whole_ND = torch.cat(list(embedded(embed, chunks, seed)))
    whole_ND.requires_grad_()
    loss = loss_of(whole_ND)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert whole_ND.grad is not None, "the loss is a function of the embeddings"
    cached = torch.split(whole_ND.grad, chunk_size)
    for chunk_ND, gradient_ND in zip(embedded(embed, chunks, seed), cached, strict=True):
        chunk_ND.backward(gradient_ND)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss.detach()


def embedded(embed: Embed, chunks: Sequence[np.ndarray], seed: int) -> Iterator[Tensor]:
    """Yield the embeddings of each chunk, drawn under the chunk's own seed.

    Args:
        embed: The model.
        chunks: Item rows, chunk by chunk.
        seed: Seed of the step.

    Yields:
        Embeddings of one chunk.
    """
    for number, chunk in enumerate(chunks):
        torch.manual_seed(_chunk_seed(seed, number))
        yield embed(chunk)


def _chunk_seed(seed: int, number: int) -> int:
    # Seeds of one step's chunks follow each other; those of steps lie far apart.
    return (seed * _SEED_STRIDE + number) % _NUM_SEEDS

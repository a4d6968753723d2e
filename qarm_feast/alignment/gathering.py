"""Exchanges between the ranks of a training run; a process alone exchanges nothing.

Every rank knows all pairs and draws the same batches, so only embeddings and gradients travel:
each rank embeds its share of a batch's items, all get all embeddings, each computes the loss of
its share of the pairs. Gradients are summed, not averaged, so that ranks together take the step
that one process would take on the whole batch.

Shape letters in this file: N rows of all ranks, P rows of one rank's share, D embedding width.
May import: torch.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

ValueT = TypeVar("ValueT")

EXCHANGE_TIMEOUT = timedelta(hours=12)
"""How long a rank waits for the others: the first one may encode a catalogue meanwhile. A rank that
dies ends the wait at once, because torchrun ends the others."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of a run."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Say whether this process writes and logs for all."""
        return self.rank == 0

    def share(self, num_rows: int) -> slice:
        """Return this rank's part of ``num_rows`` rows; a part may be empty."""
        bounds = [num_rows * rank // self.size for rank in (self.rank, self.rank + 1)]
        return slice(*bounds)


def current_ranks() -> Ranks:
    """Return this process's place among the ranks that joined; alone if none did."""
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


def is_first_process() -> bool:
    """Tell whether this process is the first that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the other processes where torchrun started this one; leave them at the end."""
    if "RANK" not in os.environ:
        yield Ranks()
        return
    # What is exchanged on CPU (decisions, a checkpoint) goes by gloo also where NCCL trains.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=EXCHANGE_TIMEOUT)
    # Each rank of this machine takes its share of the cores; torchrun gives one to each.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let the first rank do something before all others: they find its outcome in a cache."""
    is_first = current_ranks().is_first
    if not is_first:
        said_by_first(None)
    yield
    if is_first:
        said_by_first(None)


def own_rows(rows_N: np.ndarray) -> np.ndarray:
    """Return the rows whose embeddings this rank computes, equally many on each rank.

    Args:
        rows_N: Rows that all ranks together need, at least one.

    Returns:
        A part of ``rows_N``; on the last ranks its last row may stand in for rows that lack.
    """
    ranks = current_ranks()
    num_own = -(-len(rows_N) // ranks.size)
    places = np.arange(ranks.rank * num_own, (ranks.rank + 1) * num_own)
    own: np.ndarray = rows_N[np.minimum(places, len(rows_N) - 1)]
    return own


def gather_rows(own_PD: Tensor, num_rows: int) -> Tensor:
    """Return the embeddings of all ranks, in the order of the rows that :func:`own_rows` split.

    The gradient of a rank's share is the sum of what the losses of all ranks say about it: every
    rank has to call ``backward`` on what it made of the result.

    Args:
        own_PD: Embeddings of this rank's share.
        num_rows: Rows that were split.

    Returns:
        Embeddings ``[N, D]``, N being ``num_rows``.
    """
    if current_ranks().size == 1:
        return own_PD
    gathered: Tensor = _GatherRows.apply(own_PD)  # type: ignore[no-untyped-call]  # torch's own
    return gathered[:num_rows]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_PD: Tensor) -> Tensor:
        ctx.num_own = len(own_PD)
        num_gathered = len(own_PD) * dist.get_world_size()
        gathered = own_PD.new_empty((num_gathered, *own_PD.shape[1:]))
        dist.all_gather_into_tensor(gathered, own_PD.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # A copy: the sum is written in place, and autograd may hold on to what it gave.
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        begin = dist.get_rank() * ctx.num_own
        return summed[begin : begin + ctx.num_own]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of this rank by their sum over all ranks.

    Args:
        parameters: The same on every rank; one without a gradient counts as zero.
    """
    if current_ranks().size == 1:
        return
    trained = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    # One exchange: the time of many small ones is the time of their round trips.
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for parameter, part in zip(trained, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of the ranks' values of a tensor without a graph."""
    if current_ranks().size > 1:
        dist.all_reduce(value)
    return value


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the first rank."""
    if current_ranks().size == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


def said_by_first(value: ValueT) -> ValueT:
    """Return the first rank's value: one decision for all, whatever rounding differs."""
    if current_ranks().size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]

"""Processes and shards: who this rank is, and a ranker whose tables are split over all ranks.

May import: torch, torchrec.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch._C._distributed_c10d import HashStore
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ModuleSharder, ShardingType
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from qarm_feast.errors import ConfigError
from torchrec_models.allocator import keep_freed_memory
from torchrec_models.config import RankerConfig
from torchrec_models.dependency import silence_tracing_notice
from torchrec_models.ranker import RankerTrainTask


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of a run."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Say whether this process logs and writes for all."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the process group that torchrun describes, or a group of one; leave it at the end.

    For good, the process keeps freed memory, see :mod:`torchrec_models.allocator`.
    """
    # Every rank would say it.
    silence_tracing_notice()
    keep_freed_memory()
    # What is exchanged on CPU (metrics, plans, stop requests) goes by gloo also where NCCL trains.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    _share_cores()
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()


def _share_cores() -> None:
    """Give each rank of this machine its share of the cores; torch would give all to each."""
    if "RANK" not in os.environ and "OMP_NUM_THREADS" in os.environ:
        # Of a single process it is the user's word; torchrun sets it to 1 for all workers.
        return
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))


def current_ranks() -> Ranks:
    """Return this process's place in the joined process group.

    Returns:
        Rank and world size.

    Raises:
        ConfigError: If no process group was joined.
    """
    if not dist.is_initialized():
        raise ConfigError(
            "training needs a process group; start it by `torchrun --standalone "
            "--nproc-per-node 2 -m torchrec_models.train --config feature_repo/qarm.yaml`"
        )
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size())


def training_device(config: RankerConfig) -> torch.device:
    """Return where this rank trains: its GPU of this machine, or the CPU.

    Args:
        config: The ranker section.

    Returns:
        A device; a GPU is made the current one.

    Raises:
        ConfigError: If ``cuda`` is asked for and there is none.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("ranker.device is 'cuda', but torch finds no GPU; set it to auto or cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


class CpuSharder(EmbeddingBagCollectionSharder):
    """Splits every table by rows over several ranks; TorchRec's own does not offer it on CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the one way for this number of ranks."""
        return _cpu_sharding_types()


class CpuSequenceSharder(EmbeddingCollectionSharder):
    """Splits every table of sequences as :class:`CpuSharder` does the pooled ones."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the one way for this number of ranks."""
        return _cpu_sharding_types()


def _cpu_sharding_types() -> list[str]:
    # A rank alone holds whole tables. Split by rows, it would still sort all ids by rank and
    # divide the sums of bags by itself, a tenth of a step.
    is_alone = current_ranks().world_size == 1
    return [(ShardingType.TABLE_WISE if is_alone else ShardingType.ROW_WISE).value]


@dataclass(frozen=True)
class ShardedRanker:
    """A sharded training task and the optimizer that steps it (tables step in their backward)."""

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    device: torch.device


def shard_ranker(task: RankerTrainTask, config: RankerConfig) -> ShardedRanker:
    """Split the task's tables over all ranks, and give tables and dense parts their optimizers.

    Args:
        task: The unsharded training task, its tables on the meta device.
        config: The ranker section: learning rates.

    Returns:
        The sharded model; its dense parameters are equal on all ranks.
    """
    device = training_device(config)
    sharders = _sharders(device, config)
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            TrainerConfig(world_size=current_ranks().world_size),
            kernel_config=KernelConfig(device.type),
        ),
        # The default reservation guesses the memory of dense parts, which are small here.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
    )
    plan = planner.collective_plan(task, sharders, dist.GroupMember.WORLD)
    with warnings.catch_warnings():
        # TorchRec 1.8 passes torch 2.13 an argument by its old name; a comparison of many runs
        # would print it for each run and rank.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = DistributedModelParallel(module=task, device=device, plan=plan, sharders=sharders)
    return ShardedRanker(
        model=model,
        optimizer=CombinedOptimizer([model.fused_optimizer, _dense_optimizer(model, config)]),
        device=device,
    )


def _sharders(device: torch.device, config: RankerConfig) -> list[ModuleSharder[torch.nn.Module]]:
    fused_params = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": config.sparse_learning_rate,
        "eps": 1.0e-8,
    }
    if device.type == "cpu":
        return [CpuSharder(fused_params), CpuSequenceSharder(fused_params)]
    # On a GPU the planner chooses among all ways to split.
    return [EmbeddingBagCollectionSharder(fused_params), EmbeddingCollectionSharder(fused_params)]


def _dense_optimizer(model: DistributedModelParallel, config: RankerConfig) -> KeyedOptimizer:
    optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=config.learning_rate, fused=True),
    )
    # Adam makes its state in the first step; made now, it can be saved and loaded at any time.
    optimizer.init_state()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    if config.max_gradient_norm is None:
        return optimizer
    # Gradients are averaged over the ranks before, so that all clip alike.
    return GradientClippingOptimizer(
        optimizer, clipping=GradientClipping.NORM, max_gradient=config.max_gradient_norm
    )


class WarmUp:
    """Lets all learning rates grow in equal steps up to those that the optimizer starts with.

    It keeps no state but the step's number, so a run that goes on needs nothing saved.
    """

    def __init__(self, optimizer: CombinedOptimizer, num_steps: int) -> None:
        self._groups = list(optimizer.param_groups)
        self._rates = [group["lr"] for group in self._groups]
        self._num_steps = num_steps

    def set_rates(self, step: int) -> None:
        """Set the rates for a step, the first being 0; to be called before it."""
        share = min(1.0, (step + 1) / max(self._num_steps, 1))
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate * share


def start_tables(
    model: DistributedModelParallel, weights: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """Set first weights of some tables; every rank writes the rows of its own shards.

    Args:
        model: The sharded model.
        weights: Table name to the whole table's weights.
    """
    state: dict[str, Any] = model.state_dict()
    for key, parameter in state.items():
        table_name = key.removesuffix(".weight").rpartition(".")[2]
        if not isinstance(parameter, ShardedTensor) or table_name not in weights:
            continue
        for shard in parameter.local_shards():
            part = tuple(
                slice(offset, offset + size)
                for offset, size in zip(
                    shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True
                )
            )
            shard.tensor.copy_(torch.from_numpy(weights[table_name][part]))

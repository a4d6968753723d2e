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
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from qarm_feast.errors import ConfigError
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
    """Join the process group that torchrun describes, or a group of one; leave it at the end."""
    # Every rank would say it.
    silence_tracing_notice()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Ranks of one machine share its cores; torch would give all of them to each.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()


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


class RowWiseSharder(EmbeddingBagCollectionSharder):
    """Splits every table by rows: TorchRec's own sharder does not offer it on CPU."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the only way to split that this project uses."""
        return [ShardingType.ROW_WISE.value]


class RowWiseSequenceSharder(EmbeddingCollectionSharder):
    """Splits every table of sequences by rows, as :class:`RowWiseSharder` does the pooled ones."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the only way to split that this project uses."""
        return [ShardingType.ROW_WISE.value]


@dataclass(frozen=True)
class ShardedRanker:
    """A sharded training task and the optimizer that steps it (tables step in their backward)."""

    model: DistributedModelParallel
    optimizer: CombinedOptimizer


def shard_ranker(task: RankerTrainTask, config: RankerConfig) -> ShardedRanker:
    """Split the task's tables over all ranks, and give tables and dense parts their optimizers.

    Args:
        task: The unsharded training task, its tables on the meta device.
        config: The ranker section: learning rates.

    Returns:
        The sharded model; its dense parameters are equal on all ranks.
    """
    ranks = current_ranks()
    fused_params = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": config.sparse_learning_rate,
        "eps": 1.0e-8,
    }
    sharders: list[ModuleSharder[torch.nn.Module]] = [
        RowWiseSharder(fused_params),
        RowWiseSequenceSharder(fused_params),
    ]
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            TrainerConfig(world_size=ranks.world_size), kernel_config=KernelConfig("cpu")
        ),
        # The default reservation guesses the memory of dense parts, which are small here.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
    )
    plan = planner.collective_plan(task, sharders, dist.GroupMember.WORLD)
    with warnings.catch_warnings():
        # TorchRec 1.8 passes torch 2.13 an argument by its old name; a comparison of many runs
        # would print it for each run and rank.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = DistributedModelParallel(
            module=task, device=torch.device("cpu"), plan=plan, sharders=sharders
        )
    dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense_optimizer = KeyedOptimizerWrapper(
        dense_parameters,
        lambda parameters: torch.optim.Adam(parameters, lr=config.learning_rate, fused=True),
    )
    return ShardedRanker(
        model=model, optimizer=CombinedOptimizer([model.fused_optimizer, dense_optimizer])
    )


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
            first_row, _ = shard.metadata.shard_offsets
            num_rows, _ = shard.metadata.shard_sizes
            rows = weights[table_name][first_row : first_row + num_rows]
            shard.tensor.copy_(torch.from_numpy(rows))

from typing import Any

import torch
from test_dataset import make_dataset
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_models.config import RankerConfig, resolve_tasks
from torchrec_models.inputs import TrainInputs
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import Ranks, ShardedRanker, shard_ranker, start_tables
from torchrec_models.tables import centroid_start

CONFIG = RankerConfig(
    embedding_dim=8,
    batch_size=500,
    num_searched=2,
    history_length=6,
    features=(*RankerConfig().features, "attention", "long_history"),
)


def _sharded(inputs: TrainInputs, config: RankerConfig = CONFIG) -> ShardedRanker:
    manifest = inputs.store.manifest
    tasks = resolve_tasks(config, manifest.label_names)
    ranker = build_ranker(
        config, tasks, inputs.store.vocabularies(), code_sizes(manifest), torch.device("meta")
    )
    return shard_ranker(RankerTrainTask(ranker, [1.0, 1.0]), config)


def whole_weights(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """Copies of all weights by name; a group of one rank holds each table in one shard."""
    state: dict[str, Any] = model.state_dict()
    return {
        name: (value.local_shards()[0].tensor if hasattr(value, "local_shards") else value).clone()
        for name, value in state.items()
    }


def test_code_tables_start_as_the_weights_given(inputs: TrainInputs, ranks: Ranks) -> None:
    assert inputs.codebook is not None
    sharded = _sharded(inputs)
    first = centroid_start(inputs.codebook.codebooks, inputs.codebook.pool_vectors_PD, CONFIG)

    start_tables(sharded.model, first)

    weights = whole_weights(sharded.model)
    found = {name: weights[key] for key in weights for name in first if f".{name}." in key}
    assert (
        found.keys()
        == first.keys()
        == {
            "rq_0",
            "rq_1",
            "vq_code",
            "sequence_rq",
        }
    )
    for name, table in found.items():
        torch.testing.assert_close(table, torch.from_numpy(first[name]))


def test_random_code_tables_start_as_wide_as_centroids_would(
    inputs: TrainInputs, ranks: Ranks
) -> None:
    weights = whole_weights(_sharded(inputs).model)

    scales = {
        name: weights[key].std().item()
        for key in weights
        for name in ("rq_0", "vq_code", "sequence_rq")
        if f".{name}." in key
    }
    assert len(scales) == 3
    assert all(0.22 < scale < 0.38 for scale in scales.values())


def test_one_step_moves_every_parameter(inputs: TrainInputs, ranks: Ranks) -> None:
    sharded = _sharded(inputs)
    before = whole_weights(sharded.model)
    batches = make_dataset(inputs, "train", CONFIG, ranks).train_batches(
        seed=0, epoch=0, window_rows=2000
    )

    sharded.optimizer.zero_grad()
    loss, _ = sharded.model(next(batches))
    loss.sum().backward()
    sharded.optimizer.step()

    after = whole_weights(sharded.model)
    assert [name for name in before if torch.equal(before[name], after[name])] == []

from typing import Any

import pytest
import torch
from test_dataset import make_dataset
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from qarm_feast.errors import ConfigError
from torchrec_models import sharding
from torchrec_models.config import RankerConfig, resolve_tasks
from torchrec_models.inputs import TrainInputs
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.sharding import (
    CpuSequenceSharder,
    CpuSharder,
    Ranks,
    ShardedRanker,
    WarmUp,
    shard_ranker,
    start_tables,
    training_device,
)
from torchrec_models.tables import centroid_start
from torchrec_models.training import train

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
        config,
        tasks,
        inputs.store.run_vocabularies(config),
        code_sizes(manifest),
        torch.device("meta"),
    )
    return shard_ranker(RankerTrainTask(ranker, [1.0, 1.0]), config)


def whole_weights(model: DistributedModelParallel) -> dict[str, torch.Tensor]:
    """Copies of all weights by name; a group of one rank holds each table in one shard."""
    state: dict[str, Any] = model.state_dict()
    return {
        name: (value.local_shards()[0].tensor if hasattr(value, "local_shards") else value).clone()
        for name, value in state.items()
    }


@pytest.mark.parametrize(("world_size", "way"), [(1, "table_wise"), (2, "row_wise")])
def test_tables_are_split_by_rows_where_there_are_several_ranks(
    world_size: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "current_ranks", lambda: Ranks(0, world_size))

    for sharder in (CpuSharder(), CpuSequenceSharder()):
        assert sharder.sharding_types("cpu") == [way]


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
    config = CONFIG.model_copy(update={"features": (*CONFIG.features, "prefix")})

    weights = whole_weights(_sharded(inputs, config).model)

    scales = {
        name: weights[key].std().item()
        for key in weights
        for name in ("rq_0", "vq_code", "sequence_rq", "prefix")
        if f".{name}." in key
    }
    assert len(scales) == 4
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


def test_rates_grow_in_equal_steps_and_then_stay() -> None:
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.4)
    optimizer = CombinedOptimizer([KeyedOptimizerWrapper({"x": torch.zeros(1)}, lambda _: adam)])
    warm_up = WarmUp(optimizer, num_steps=4)
    rates = []

    for step in range(6):
        warm_up.set_rates(step)
        rates.append(adam.param_groups[0]["lr"])

    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_without_a_gpu_one_is_not_trained_on() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")

    assert training_device(RankerConfig()) == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        training_device(RankerConfig(device="cuda"))


@pytest.mark.parametrize("keys", [{"enable_bf16": True}, {"max_gradient_norm": 0.01}])
def test_bf16_and_clipping_change_the_training_of_the_dense_part(
    inputs: TrainInputs, ranks: Ranks, keys: dict[str, object]
) -> None:
    small = {"embedding_dim": 8, "batch_size": 400, "num_epochs": 2}
    plain = RankerConfig.model_validate(small)

    expected = train(plain, inputs, enable_checkpoint=False)
    result = train(plain.model_copy(update=keys), inputs, enable_checkpoint=False)

    assert result.valid_metrics["auc/like"] > 0.6
    assert not torch.equal(result.test_predictions.logits_NT, expected.test_predictions.logits_NT)
    assert result.test_predictions.logits_NT.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reaches_what_the_cpu_reaches(inputs: TrainInputs, ranks: Ranks) -> None:
    small = {"embedding_dim": 8, "batch_size": 200, "num_epochs": 3}

    found = [
        train(
            RankerConfig.model_validate(small | {"device": device}), inputs, enable_checkpoint=False
        )
        for device in ("cpu", "cuda")
    ]

    assert found[1].metrics["auc/like"] == pytest.approx(found[0].metrics["auc/like"], abs=0.02)

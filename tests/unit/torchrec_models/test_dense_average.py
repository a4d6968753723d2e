from pathlib import Path

import pytest
import torch
from torch import nn

from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import RankerConfig
from torchrec_models.dense_average import DenseAverage
from torchrec_models.inputs import TrainInputs
from torchrec_models.label_maps import LabelMap
from torchrec_models.sharding import Ranks
from torchrec_models.training import train
from torchrec_models.warm_start import WarmStart


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)


def test_the_window_grows_from_the_last_step_to_the_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = DenseAverage(model, decay=0.5)
    values, expected, found = [3.0, 5.0, 1.0, *[2.0] * 20], [], []

    for step, value in enumerate(values, start=1):
        _fill(model, value)
        average.update(step)
        decay = min(0.5, (step - 1) / (step + 8))
        expected.append(value if step == 1 else decay * expected[-1] + (1 - decay) * value)
        found.append(average.averages["weight"].item())

    assert expected[:2] == [3.0, pytest.approx(4.8)]
    assert found == pytest.approx(expected)


def test_the_model_has_the_averages_for_a_while_also_where_an_evaluation_fails() -> None:
    model = nn.BatchNorm1d(1)
    average = DenseAverage(model, decay=0.9)
    average.update(1)
    _fill(model, 7.0)
    assert model.num_batches_tracked is not None
    model.num_batches_tracked.fill_(5)

    def fail() -> None:
        assert model.weight.item() == 1.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), average.in_model():
        fail()

    assert model.weight.item() == 7.0
    assert set(average.averages) == {"weight", "bias", "running_mean", "running_var"}
    assert model.num_batches_tracked.item() == 5


def test_without_a_decay_nothing_is_kept() -> None:
    model = nn.Linear(1, 1)
    average = DenseAverage(model, decay=0.0)
    average.update(1)
    _fill(model, 7.0)

    with average.in_model():
        assert model.weight.item() == 7.0

    assert average.averages == {}


def test_a_run_saves_the_averages_of_dense_weights_and_the_tables_of_its_last_step(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    def trained(num_steps: int, decay: float) -> dict[str, torch.Tensor]:
        config = RankerConfig.model_validate(
            {
                "checkpoint_dir": str(tmp_path / f"{num_steps}_{decay}"),
                # All train rows are one batch.
                "batch_size": 2000,
                "embedding_dim": 8,
                "num_epochs": num_steps,
                "dense_average_decay": decay,
            }
        )
        train(config, inputs)
        return Checkpoint(config.checkpoint_dir, "ranker_v1").load_ranker().state_dict()

    steps = [trained(num_steps, decay=0.0) for num_steps in (1, 2, 3)]
    averaged = trained(3, decay=0.15)

    # Decays of step 2 and 3: 1 / 10, and .15 where 2 / 11 would be more.
    for key, found in averaged.items():
        first, second, third = (weights[key] for weights in steps)
        if "embedding_bag" in key:
            assert torch.equal(found, third)
        else:
            expected = 0.15 * (0.1 * first + 0.9 * second) + 0.85 * third
            torch.testing.assert_close(found, expected)
            assert not torch.equal(found, third)


def test_warm_started_and_not_trained_a_ranker_keeps_its_weights(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    keys = {"batch_size": 400, "embedding_dim": 8, "num_epochs": 1, "dense_average_decay": 0.9}
    config = RankerConfig.model_validate({**keys, "checkpoint_dir": str(tmp_path)})
    parent = train(config, inputs)
    older = Checkpoint(config.checkpoint_dir, "ranker_v1")
    sizes = older.manifest.sizes
    labels = LabelMap.same_numbers(sizes.level_sizes, sizes.pool_size)

    same = train(
        config.model_copy(update={"num_epochs": 0}),
        inputs,
        warm_start=WarmStart(older, labels),
        enable_checkpoint=False,
    )

    assert torch.equal(same.test_predictions.logits_NT, parent.test_predictions.logits_NT)

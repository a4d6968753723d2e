import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from qarm_feast.errors import ConfigError
from torchrec_models.batch import RankingBatch
from torchrec_models.config import RankerConfig
from torchrec_models.dataset import RowDataset
from torchrec_models.early_stopping import EarlyStopping
from torchrec_models.inputs import TrainInputs
from torchrec_models.sharding import Ranks
from torchrec_models.training import train


def _stopping(model: nn.Module, patience: int = 2, metric: str = "auc") -> EarlyStopping:
    keys = {"early_stopping_patience": patience, "early_stopping_metric": metric}
    return EarlyStopping(RankerConfig.model_validate(keys), model)


def test_training_stops_after_patience_evaluations_without_a_better_mean_of_tasks() -> None:
    stopping = _stopping(nn.Linear(1, 1), patience=2)
    exhausted = []

    for step, (like, love) in enumerate([(0.6, 0.6), (0.7, 0.4), (0.7, 0.6), (0.7, 0.6), (0, 1)]):
        stopping.judge({"auc/like": like, "auc/love": love, "cold_auc/like": 1.0}, step)
        exhausted.append(stopping.is_exhausted)

    assert exhausted == [False, False, False, False, True]
    assert stopping.state.best_step == 2


def test_a_lower_log_loss_is_better_and_an_undefined_task_is_left_out() -> None:
    stopping = _stopping(nn.Linear(1, 1), metric="log_loss")

    for step, value in enumerate([0.5, 0.4, 0.45]):
        stopping.judge({"log_loss/like": value, "log_loss/love": math.nan}, step)

    assert (stopping.state.best_step, stopping.state.num_worse) == (1, 1)


def test_the_best_weights_come_back() -> None:
    model = nn.Linear(1, 1)
    stopping = _stopping(model)
    for step, value in enumerate([0.5, 0.6, 0.4]):
        with torch.no_grad():
            model.weight.fill_(float(step))
        stopping.judge({"auc/like": value}, step)

    stopping.restore_best()

    assert model.weight.item() == 1.0


def test_a_metric_that_no_task_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="'auc', which is defined for no task"):
        _stopping(nn.Linear(1, 1)).judge({"auc/like": math.nan}, 8)


@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["last weights", "averages"])
def test_a_run_that_stops_early_ends_as_if_it_had_ended_at_its_best_evaluation(
    inputs: TrainInputs, ranks: Ranks, decay: float
) -> None:
    keys = {"batch_size": 400, "embedding_dim": 8, "id_dropout": 0.0, "learning_rate": 0.01}
    keys["dense_average_decay"] = decay
    num_steps_per_epoch, patience = 4, 2
    stopping = {"early_stopping_patience": patience, "num_epochs": 20}

    stopped = train(RankerConfig.model_validate(keys | stopping), inputs, enable_checkpoint=False)

    num_best_epochs = stopped.num_steps // num_steps_per_epoch - patience
    best = train(
        RankerConfig.model_validate(keys | {"num_epochs": num_best_epochs}),
        inputs,
        enable_checkpoint=False,
    )
    assert num_best_epochs < 20 - patience
    assert stopped.valid_metrics == pytest.approx(best.valid_metrics, abs=0, nan_ok=True)
    assert torch.equal(stopped.test_predictions.logits_NT, best.test_predictions.logits_NT)


def test_batches_of_valid_rows_may_stay_in_memory_between_evaluations(
    inputs: TrainInputs, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"batch_size": 400, "embedding_dim": 8, "eval_every_steps": 2, "num_epochs": 1}
    num_passes = {"valid": 0, "test": 0}
    build = RowDataset.eval_batches

    def counted(dataset: RowDataset) -> Iterator[RankingBatch]:
        num_passes[dataset.path.stem] += 1
        return build(dataset)

    monkeypatch.setattr(RowDataset, "eval_batches", counted)
    found = []
    for held_rows in (0, 10_000):
        config = RankerConfig.model_validate({**keys, "held_eval_rows": held_rows})
        num_passes |= {"valid": 0}
        metrics = train(config, inputs, enable_checkpoint=False).valid_metrics
        found.append((num_passes["valid"], metrics))

    assert found[0][0] > 1
    assert found[1][0] == 1
    assert found[0][1] == found[1][1]

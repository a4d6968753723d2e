"""The code tables of a trained ranker: frozen, or trained from the centroids."""

from pathlib import Path

import pytest
import torch

from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.ranker import RankerTrainTask, build_ranker
from torchrec_models.sharding import Ranks
from torchrec_models.tables import centroid_start
from torchrec_models.training import train

CODE_TABLES = {"rq_0", "rq_1", "vq_code", "sequence_rq"}


def _trained_tables(config: RankerConfig, inputs: TrainInputs) -> dict[str, torch.Tensor]:
    """Train, and return the weights of every table from the checkpoint."""
    train(config, inputs)
    checkpoint = Checkpoint(config.checkpoint_dir, "ranker_v1")
    manifest = checkpoint.manifest
    ranker = build_ranker(
        config, manifest.tasks, checkpoint.vocabularies(), manifest.sizes, torch.device("cpu")
    )
    task = RankerTrainTask(ranker, [1.0, 1.0])
    checkpoint.load_into(task)
    tables = {name.split(".")[-2]: weight for name, weight in task.named_parameters()}
    return {name: tables[name].detach() for name in (*CODE_TABLES, "user_id")}


@pytest.mark.parametrize("training", ["frozen", "trained"])
def test_frozen_code_tables_end_as_they_began_to_the_last_bit(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path, training: str
) -> None:
    config = RankerConfig.model_validate(
        {
            "checkpoint_dir": str(tmp_path),
            "embedding_dim": 8,
            "batch_size": 200,
            "num_epochs": 2,
            "code_table_training": training,
            "features": ("user_id", "rq_code", "vq_code", "history_rq_code", "attention"),
        }
    )

    tables = _trained_tables(config, inputs)

    assert inputs.codebook is not None
    first = centroid_start(inputs.codebook.codebooks, inputs.codebook.pool_vectors_PD, config)
    unchanged = {
        name for name in CODE_TABLES if torch.equal(tables[name], torch.from_numpy(first[name]))
    }
    assert unchanged == (CODE_TABLES if training == "frozen" else set())


def test_frozen_random_tables_stay_while_ids_learn(
    inputs: TrainInputs, ranks: Ranks, tmp_path: Path
) -> None:
    keys = {
        "embedding_dim": 8,
        "batch_size": 200,
        "enable_centroid_start": False,
        "code_table_training": "frozen",
        "features": ("user_id", "rq_code", "vq_code", "attention"),
    }
    runs = [
        RankerConfig.model_validate(
            keys | {"num_epochs": epochs, "checkpoint_dir": str(tmp_path / str(epochs))}
        )
        for epochs in (1, 2)
    ]

    one, two = (_trained_tables(config, inputs) for config in runs)

    assert {name for name in one if torch.equal(one[name], two[name])} == CODE_TABLES

"""`qarm align train` on two processes of torchrun: the encoder of one process, also after a death.

Shape letters in this file: D width of ready vectors.
"""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from qarm_feast.alignment.cli import align_group
from qarm_feast.alignment.encoder import load_encoder

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2024, 1, 1, tzinfo=UTC)
NUM_ITEMS, NUM_USERS, WIDTH_D = 120, 90, 24
DYING_RANK = """
import os, runpy, sys
from qarm_feast.alignment.trainer import PairTrainer

epoch = PairTrainer.train_epoch

def dies_in_the_second(trainer, generator):
    if os.environ["RANK"] == "1" and trainer.num_steps:
        os._exit(9)
    return epoch(trainer, generator)

PairTrainer.train_epoch = dies_in_the_second
runpy.run_module("qarm_feast.alignment.train", run_name="__main__")
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    """Items of six groups, which ready vectors show; users stay in theirs; pairs are built."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(6, WIDTH_D))
    vectors = centres[np.arange(NUM_ITEMS) % 6] + generator.normal(size=(NUM_ITEMS, WIDTH_D))
    microseconds = pa.timestamp("us", tz="UTC")
    ready = pa.array(vectors.astype(np.float32).reshape(-1))
    items = {
        "item_id": pa.array(range(NUM_ITEMS)),
        "upload_timestamp": pa.array([START] * NUM_ITEMS, microseconds),
        "embedding": pa.FixedSizeListArray.from_arrays(ready, WIDTH_D),
    }
    rows = [
        (user, int(item), START + timedelta(seconds=10 + n))
        for user in range(NUM_USERS)
        for n, item in enumerate(generator.permutation(np.arange(user % 6, NUM_ITEMS, 6))[:6])
    ]
    users, item_ids, times = zip(*rows, strict=True)
    interactions = {
        "user_id": users,
        "item_id": item_ids,
        "event_timestamp": pa.array(times, microseconds),
        "split": ["train"] * len(rows),
        "is_click": [True] * len(rows),
    }
    (tmp_path / "input").mkdir()
    pq.write_table(pa.table(items), tmp_path / "input/items.parquet")
    pq.write_table(pa.table(interactions), tmp_path / "input/interactions.parquet")
    path = tmp_path / "qarm.yaml"
    path.write_text(
        "data: {input_dir: input}\n"
        "alignment: {encoder_version: e1, embedding_dim: 16, hidden_dim: 16, batch_size: 101,\n"
        "            chunk_size: 16, learning_rate: 0.003, num_epochs: 3, device: cpu}\n"
    )
    _align("pairs", path)
    return path


def _align(verb: str, config_path: Path) -> None:
    result = CliRunner().invoke(align_group, [verb, "--config", str(config_path)])
    assert result.exit_code == 0, result.output


def _torchrun(program: list[str], config_path: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", "2", *program, "--config", str(config_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=False,
    )


def test_two_ranks_train_the_encoder_of_one_and_go_on_where_a_dead_one_ended_the_run(
    config_path: Path, tmp_path: Path
) -> None:
    encoders = tmp_path / "data/encoders"
    dying = tmp_path / "dying.py"
    dying.write_text(DYING_RANK)

    died = _torchrun([str(dying)], config_path)

    # The first rank waits for the dead one, and is ended with it; what it saved is all there is.
    assert died.returncode != 0
    assert not (encoders / "e1").exists()
    states = [path.name for path in (encoders / ".e1.training").iterdir()]
    assert states == ["head_weight_10.safetensors"]

    done = _torchrun(["-m", "qarm_feast.alignment.train"], config_path)

    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("encoder e1:") == 1
    assert done.stderr.count("alignment_resumed epoch=1") == 1
    assert not (encoders / ".e1.training").exists()
    two = load_encoder(str(encoders), "e1")

    config_path.write_text(config_path.read_text().replace("e1", "e2"))
    (tmp_path / "data/pairs/e1.parquet").rename(tmp_path / "data/pairs/e2.parquet")
    _align("train", config_path)

    one = load_encoder(str(encoders), "e2")
    for name, tensor in one.head.state_dict().items():
        torch.testing.assert_close(two.head.state_dict()[name], tensor, rtol=5e-3, atol=5e-5)
    assert two.manifest.training["best_epoch"] == one.manifest.training["best_epoch"]

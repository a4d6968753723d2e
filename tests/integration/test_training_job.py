"""The training job under torchrun: ranks that agree, stop, go on, die, and read each other."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_job import SERVICE, take_over

from torchrec_models.checkpoint import Checkpoint
from torchrec_models.inputs import TrainInputs
from torchrec_models.row_store import RowStore
from torchrec_models.sharding import process_group

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
SYNTHETIC = ROOT / "tests" / "unit" / "torchrec_models" / "synthetic.py"
JOB = ROOT / "tests" / "integration" / "training_job.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SECONDS_TO_END = 60.0


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job") / "rows"
    # The folder of the unit tests is no place to import from.
    runpy.run_path(str(SYNTHETIC))["write_synthetic_rows"](folder)
    return folder


def _torchrun(num_ranks: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_ranks), *arguments]


def _run_job(
    num_ranks: int, action: str, rows: Path, out: Path
) -> subprocess.CompletedProcess[str]:
    command = _torchrun(num_ranks, str(JOB), action, str(rows), str(out))
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


def test_two_ranks_stop_and_go_on_and_other_numbers_of_ranks_read_what_they_saved(
    rows: Path, tmp_path: Path
) -> None:
    done = _run_job(2, "resume", rows, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    saved = Checkpoint(str(tmp_path / "parts"), "ranker_v1")
    (tmp_path / "newest").write_text(str(saved.folder))

    with process_group() as alone:
        take_over(TrainInputs(RowStore(str(rows), SERVICE), codebook=None), tmp_path, alone)
    done = _run_job(3, "take_over", rows, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]

    scores = {ranks: np.load(tmp_path / f"scores-{ranks}.npy") for ranks in (1, 2, 3)}
    assert saved.manifest.world_size == 2
    assert scores[2].std() > 0.1
    np.testing.assert_allclose(scores[1], scores[2], atol=1e-5)
    np.testing.assert_allclose(scores[3], scores[2], atol=1e-5)


def test_an_exception_in_one_rank_ends_the_run_with_its_traceback(
    rows: Path, tmp_path: Path
) -> None:
    started = time.monotonic()

    done = _run_job(2, "fail", rows, tmp_path)

    assert done.returncode == 1
    assert "RuntimeError: planted in the second rank" in done.stderr
    assert "training_job.py" in done.stderr
    assert time.monotonic() - started < SECONDS_TO_END


@pytest.fixture
def endless(rows: Path, tmp_path: Path) -> Callable[[], "subprocess.Popen[str]"]:
    """Start a training of two ranks that would take hours; return when it is in its steps."""
    config_path = tmp_path / "qarm.yaml"
    config_path.write_text(
        f"ranker: {{rows_uri: {rows}, checkpoint_dir: checkpoints, codebook_version: v1, "
        "enable_centroid_start: false, embedding_dim: 8, batch_size: 64, num_epochs: 1000000}\n"
    )

    def start() -> "subprocess.Popen[str]":
        command = _torchrun(2, "-m", "torchrec_models.train", "--config", str(config_path))
        run = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        logs = tmp_path / "checkpoints" / "ranker_v1" / "logs"
        deadline = time.monotonic() + 120
        while not list(logs.glob("*/metrics.jsonl")):
            assert run.poll() is None, run.communicate()[1][-4000:]
            assert time.monotonic() < deadline, "no evaluation yet"
            time.sleep(0.1)
        return run

    return start


def _workers(run: "subprocess.Popen[str]") -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ]


def test_sigterm_ends_all_ranks_after_a_checkpoint(
    endless: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    run = endless()

    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=SECONDS_TO_END)

    saved = Checkpoint.to_resume(str(tmp_path / "checkpoints"), "ranker_v1")
    assert run.returncode == 1
    assert saved.manifest.step % 8 == 0
    assert saved.manifest.world_size == 2
    message = f"error: stopped by SIGTERM after step {saved.manifest.step}: saved {saved.folder}"
    assert errors.count(message) == 2


def test_a_killed_rank_ends_the_run(
    endless: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    run = endless()
    victim, other = _workers(run)

    os.kill(victim, signal.SIGKILL)
    _, errors = run.communicate(timeout=SECONDS_TO_END)

    assert run.returncode == 1
    assert "SIGKILL" in errors
    assert not Path(f"/proc/{other}").exists()
    # Half a checkpoint is none.
    assert not list((tmp_path / "checkpoints" / "ranker_v1").glob("step-*"))

"""The pip path: what a bare environment gets from the wheel, with and without torchrec."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# pip brings about 3 GB, from its cache or from the registry, and unpacks them.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]


def _run(*arguments: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    finished = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def bare_bin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``bin`` of an environment that holds the wheel with ``[cpu]`` and nothing else of ours."""
    folder = tmp_path_factory.mktemp("bare")
    _run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    bare_bin = folder / "venv/bin"
    _run(bare_bin / "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("qarm_feast-*.whl")
    _run(bare_bin / "pip", "install", f"{wheel}[cpu]", cwd=folder)
    yield bare_bin
    # 5 GB: too much to keep with the other temporary folders.
    shutil.rmtree(folder)


def _installed(bare_bin: Path) -> set[str]:
    listed = _run(bare_bin / "pip", "list", "--format", "json", cwd=bare_bin).stdout
    return {package["name"].lower().replace("_", "-") for package in json.loads(listed)}


def test_pip_path_brings_cpu_builds_only_and_torchrec_enables_the_ranker(
    bare_bin: Path, tmp_path: Path
) -> None:
    installed = _installed(bare_bin)
    assert {"qarm-feast", "faiss-cpu", "fbgemm-gpu-cpu", "tensordict"} <= installed
    assert installed & {"fbgemm-gpu", "faiss-gpu", "torchrec"} == set()

    for command in ("qarm", "qarm-stream", "qarm-rank"):
        assert "Usage:" in _run(bare_bin / command, "--help", cwd=tmp_path).stdout

    score = (bare_bin / "qarm-rank", "score", "--user-id", "1", "--items", "1")
    refused = _run(*score, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "pip install --no-deps torchrec==1.8.0" in refused.stderr

    _run(bare_bin / "pip", "install", "--no-deps", "torchrec==1.8.0", cwd=tmp_path)
    program = (
        "import torchrec_models.ranker, torch;"
        "print(torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2])).tolist())"
    )
    imported = _run(bare_bin / "python", "-W", "ignore", "-c", program, cwd=tmp_path)
    assert imported.stdout.strip() == "[0, 1, 3]"
    assert _installed(bare_bin) & {"fbgemm-gpu", "faiss-gpu"} == set()

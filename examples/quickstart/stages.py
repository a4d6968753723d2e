"""The main job's stages, in order; each reads what the ones before left under the run's folder.

Every stage calls the commands that a user would call, in processes of their own; only fetching
the demo data, producing events and comparing two stores happen in this process. Stages that need
feast or kafka import them when they run: a run that is finished prints its table at once.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart import layout as run_layout
from examples.quickstart.layout import RunLayout, StageRecord
from examples.quickstart.ml100k import write_ml100k
from examples.quickstart.processes import Processes
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.config import load_section
from qarm_feast.input_data import DataConfig, describe, load_input_data

CODEBOOK_VERSION = "v1"
_BIN = Path(sys.executable).parent
_NUM_RANKS = 2


@dataclass(frozen=True)
class Context:
    """What a stage gets: the run's paths, its child processes, the results so far."""

    layout: RunLayout
    processes: Processes
    record: StageRecord

    def command(self, name: str, *arguments: str) -> None:
        """Run an installed command to its end; its output is shown as it comes."""
        program, *rest = arguments
        self.processes.run(name, [str(_BIN / program), *rest], on_line=_show)

    def torchrun(self, name: str, module: str, *arguments: str) -> None:
        """Run a module on two ranks of this machine."""
        launcher = (str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", str(_NUM_RANKS))
        # One thread a rank: torchrun would choose the same, and say so on many lines.
        threads = {"OMP_NUM_THREADS": "1"}
        self.processes.run(name, [*launcher, "-m", module, *arguments], _show, threads)

    @property
    def config(self) -> tuple[str, str]:
        """The option that names this run's configuration."""
        return ("--config", str(self.layout.config_path))


@dataclass(frozen=True)
class Stage:
    """One step of the main job; ``run`` returns what the report needs, as JSON."""

    name: str
    title: str
    run: Callable[[Context], dict[str, Any]]


def child_environment() -> dict[str, str]:
    """Return what every child process finds in its environment."""
    return {
        "QARM_ALIGNMENT__BACKBONE": str(run_layout.BACKBONE),
        # Weights lie on disk; nothing may look for them on a network.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Third-party deprecations would bury the demo's own lines.
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
    }


def _show(line: str) -> None:
    print(f"      {line}", flush=True)


def _prepare_data(context: Context) -> dict[str, Any]:
    if context.layout.source_dir is None:
        counts = write_ml100k(run_layout.MOVIELENS_SOURCE, context.layout.input_dir)
        _show("ML-100K: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    config = load_section(context.layout.config_path, "data", DataConfig)
    checked = load_input_data(config)
    for line in describe(checked):
        _show(line)
    return {"tasks": list(checked.task_names), "positive_label": checked.positive_label}


def _align(context: Context) -> dict[str, Any]:
    alignment = load_section(context.layout.config_path, "alignment", AlignmentConfig)
    encoder = Path(alignment.encoder_uri) / alignment.encoder_version / "manifest.json"
    # An artifact never changes, so a run that was stopped after it was stored goes on from it.
    verbs = ("evaluate", "export") if encoder.exists() else ("pairs", "train", "evaluate", "export")
    for verb in verbs:
        context.command(f"align-{verb}", "qarm", "align", verb, *context.config)
    return {}


def _codebook(context: Context) -> dict[str, Any]:
    version = ("--codebook-version", CODEBOOK_VERSION)
    for verb in ("train", "evaluate", "publish"):
        context.command(f"codebook-{verb}", "qarm", "codebook", verb, *context.config, *version)
    return {}


def _apply(context: Context) -> dict[str, Any]:
    repo = ("feast", "-c", str(context.layout.repo_dir))
    context.command("feast-plan", *repo, "plan")
    context.command("feast-apply", *repo, "apply")
    if (context.layout.input_dir / "users.parquet").exists():
        context.command("load-users", "qarm", "load-users", *context.config)
    return {}


def _stream(context: Context) -> dict[str, Any]:
    from examples.quickstart.stream import run_stream

    return run_stream(context.layout, context.processes, _BIN, _show)


def _materialize(context: Context) -> dict[str, Any]:
    from examples.quickstart.second_store import run_second_store

    return run_second_store(context.layout, context.processes, _BIN, _show)


def _train(context: Context) -> dict[str, Any]:
    context.command("rank-rows", "qarm-rank", "rows", *context.config)
    context.torchrun("rank-train", "torchrec_models.train", *context.config)
    return {}


def _score(context: Context) -> dict[str, Any]:
    from examples.quickstart.top_items import run_score

    return run_score(context.layout, context.processes, _BIN, CODEBOOK_VERSION, _show)


def _compare(context: Context) -> dict[str, Any]:
    output = context.layout.data_dir / "comparison.json"
    context.torchrun(
        "rank-comparison",
        "torchrec_models.comparison",
        *context.config,
        "--output",
        str(output),
    )
    runs: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return {"comparison": runs}


STAGES = (
    Stage("data", "Input data", _prepare_data),
    Stage("align", "Align the encoder and export vectors", _align),
    Stage("codebook", f"Train, judge and publish codebook {CODEBOOK_VERSION}", _codebook),
    Stage("apply", "feast plan, feast apply", _apply),
    Stage("stream", "Kafka and two streaming workers", _stream),
    Stage("materialize", "feast materialize into an empty second online store", _materialize),
    Stage("train", "Point-in-time rows and the ranker on two ranks", _train),
    Stage("score", "Score one user's candidates from the online store", _score),
    Stage("compare", "Compare three arms over three seeds", _compare),
)

"""What each part of the ranker is worth, against IDs and against a fixed vector, on real rows.

    uv run --frozen --extra cpu python benchmarks/ranking_quality.py [--data DIR] [--seeds N]
        [--arms a,b] [--quick] [--features DIR] [--page FILE] [--train-share S]
        [--moved-back S]

``--moved-back`` asks the same of an earlier time, with more cold rows, and touches no test row.
Without ``--data`` it runs on the quickstart's ML-100K. The text model is the one that
`make quickstart` fetches. The protocol is written down in ``ranking_protocol.md``, the arms and
their tuned settings in ``ranking_arms.py`` (some run only by name: ``full_plus_*`` with a part that
did not pay on valid rows, ``full_minus_*`` without one feature group of a part). A file
``third_party_codes.parquet`` in the data folder (``item_id``, ``rq_code``) makes an arm of its own.

``auc_<arm>`` and ``cold_auc_<arm>`` are of the first task, mean over the seeds; a difference comes
with its 95 % interval (``_low``, ``_high``). A table and a plot are written as one HTML page.
Progress goes to stderr, the last line of stdout is one JSON object.
"""

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.data import data_dir
from benchmarks.ranking_arms import (
    ALIGNED,
    COMMON,
    QUICK_ARMS,
    RAW,
    THIRD_PARTY,
    all_arms,
    chosen_arms,
)
from benchmarks.ranking_data import (
    VALID_SHARE,
    coded_items,
    item_vectors,
    moved_back,
    publish_coded_rows,
    say,
    third_party_items,
    train_codebook,
    with_fewer_users,
)
from benchmarks.ranking_page import PART_PREFIX, ranking_page
from benchmarks.ranking_runs import Rows, Run, Task, run_config, train_all
from benchmarks.user_bootstrap import interval, seed_mean_aucs, user_weights
from examples.quickstart.layout import BACKBONE, ROOT
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from torchrec_models.inputs import TrainInputs
from torchrec_models.slices import SLICES

BASELINE, FULL = "fixed", "full"
PART_ARM = f"{FULL}_minus_"
DIFFERENCES = {
    "full_minus_fixed": (FULL, BASELINE),
    "trainable_minus_frozen": ("rq_vq", "frozen_centroid"),
    "aligned_minus_raw_codes": ("rq_vq", "raw_codes"),
}
NUM_DRAWS, NUM_QUICK_DRAWS = 1000, 100
ALL_ROWS = ""
TARGETS_ON_GIVEN_DATA = {
    "full_minus_fixed_auc": ("ge", 0.010),
    "full_minus_fixed_auc_low": ("ge", 0.0),
    "full_minus_fixed_cold_auc": ("ge", 0.0),
}
TARGETS_ON_ML100K = {"full_minus_fixed_auc_high": ("ge", 0.0)}

Draws = dict[tuple[str, str], npt.NDArray[np.float64]]
"""AUC by arm and slice: of the rows as they are, then of each draw."""


@dataclass(frozen=True)
class TaskFigures:
    """Figures of one task by name, and the draws that they are read from."""

    figures: dict[str, float]
    draws: Draws


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        checked = load_input_data(DataConfig(input_dir=str(data_dir(arguments.data, folder))))
        if arguments.train_share < 1:
            checked = with_fewer_users(checked, arguments.train_share)
        if arguments.moved_back is not None:
            checked = moved_back(checked, arguments.moved_back)
        inputs = prepare(checked, Path(folder), arguments.backbone, arguments.features or folder)
        say(f"prepared after {time.monotonic() - started:.0f} s")
        names = ",".join(QUICK_ARMS) if arguments.quick and not arguments.arms else arguments.arms
        arms = chosen_arms(all_arms(THIRD_PARTY in inputs), names)
        seeds = range(1 if arguments.quick else arguments.seeds)
        limits = {"num_epochs": 1} if arguments.quick else _limits(_row_share(arguments))
        tasks = [
            Task(
                arm,
                run_config(arm, inputs[arm.codes], seed).model_copy(update=limits),
                inputs[arm.codes],
            )
            for seed in seeds
            for arm in arms
        ]
        runs, rows = _trained(tasks, arguments.processes)
    num_draws = NUM_QUICK_DRAWS if arguments.quick else NUM_DRAWS
    found = {
        task: task_figures(runs, rows, number, num_draws)
        for number, task in enumerate(checked.task_names)
    }
    data_name = Path(arguments.data).name if arguments.data else "ml-100k"
    result = _result(found, runs, arguments, data_name, time.monotonic() - started)
    share = _row_share(arguments)
    part = f"_{share:g}{'_back' if arguments.moved_back is not None else ''}" if share < 1 else ""
    page = Path(arguments.page or ROOT / "runs" / f"ranking_quality_{data_name}{part}.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(ranking_page(result, runs), encoding="utf-8")
    say(f"table and plot: {page}")
    print(json.dumps(result))


def _row_share(arguments: argparse.Namespace) -> float:
    """Return about which share of the data's train rows teaches."""
    share: float = arguments.train_share if arguments.moved_back is None else arguments.moved_back
    return share


def _limits(row_share: float) -> dict[str, int]:
    """Return the most epochs and the patience that are as many steps on a share of the rows."""
    keys = ("num_epochs", "early_stopping_patience")
    return {key: math.ceil(COMMON[key] / row_share) for key in keys}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Folder in the input contract; default: ML-100K.")
    parser.add_argument("--seeds", type=int, default=5, help="Runs per arm.")
    parser.add_argument("--arms", help="These arms, comma-separated.")
    parser.add_argument(
        "--train-share", type=float, default=1.0, help="Share of users whose train rows are kept."
    )
    parser.add_argument(
        "--moved-back",
        type=float,
        help="Share of train rows that are older than an earlier cut-off; test rows are left out.",
    )
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    parser.add_argument("--features", help="Folder to keep outputs of the text model in.")
    parser.add_argument("--page", help="HTML file to write; default: in runs/.")
    parser.add_argument("--processes", type=int, default=2, help="Runs that go at a time.")
    parser.add_argument("--quick", action="store_true", help="Four arms, one seed, one epoch.")
    arguments = parser.parse_args()
    if not 0 < arguments.train_share <= 1:
        parser.error("--train-share is above 0 and at most 1")
    if arguments.moved_back is not None:
        if not 0 < arguments.moved_back <= 1 - VALID_SHARE:
            parser.error(f"--moved-back is above 0 and at most {1 - VALID_SHARE:g}")
        if arguments.train_share < 1:
            parser.error("--moved-back and --train-share do not go together: leave one out")
    return arguments


def prepare(
    checked: InputData, folder: Path, backbone: str, features_uri: str
) -> dict[str, TrainInputs]:
    """Return the rows of the data, once per way of coding its items.

    Args:
        checked: The data.
        folder: Where rows are kept.
        backbone: Folder of the text model.
        features_uri: Folder where its outputs are kept.
    """
    vectors = item_vectors(checked, backbone, features_uri)
    coded = {
        name: coded_items(checked, train_codebook(checked, x_ND, name), x_ND)
        for name, x_ND in ((RAW, vectors.raw_NE), (ALIGNED, vectors.aligned_ND))
    }
    if (third_party := third_party_items(checked, vectors.raw_NE)) is not None:
        coded[THIRD_PARTY] = third_party
    rows = folder / "rows"
    return {
        name: publish_coded_rows(checked, each, vectors, name, rows) for name, each in coded.items()
    }


def _trained(tasks: Sequence[Task], num_processes: int) -> tuple[list[Run], Rows]:
    runs: list[Run] = []
    for run, found in train_all(tasks, num_processes):
        runs.append(run)
        rows = found
        shown = " ".join(
            f"{key} {value:.4f}"
            for key, value in run.valid_metrics.items()
            if key.startswith("auc/")
        )
        say(
            f"{len(runs):>3} of {len(tasks)}: {run.arm:<25} seed {run.seed} {run.seconds:5.1f} s "
            f"{run.num_steps} steps, valid {shown}"
        )
    return runs, rows


def task_figures(runs: Sequence[Run], rows: Rows, task: int, num_draws: int) -> TaskFigures:
    """Return the AUCs of all arms and slices on one task, and differences with intervals.

    Args:
        runs: All runs.
        rows: The test rows.
        task: Number of the task.
        num_draws: Draws of users.
    """
    draws: Draws = {}
    arms = list(dict.fromkeys(run.arm for run in sorted(runs, key=lambda run: run.seed)))
    all_weights_NB = user_weights(rows.user_ids_N, num_draws)
    for name in (ALL_ROWS, *SLICES):
        is_in_N = _in_slice(rows, name)
        if len(np.unique(rows.labels_NT[is_in_N, task])) < 2:
            continue
        weights_NB = all_weights_NB[is_in_N]
        labels_N = rows.labels_NT[is_in_N, task]
        scores = [[run.logits_NT[is_in_N, task] for run in runs if run.arm == arm] for arm in arms]
        # NumPy works without the interpreter's lock.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found = threads.map(
                partial(seed_mean_aucs, labels_N=labels_N, weights_NB=weights_NB), scores
            )
        draws |= {(arm, name): found_B for arm, found_B in zip(arms, found, strict=True)}
    figures = {
        f"{_prefixed(name)}auc_{arm}": float(found[0]) for (arm, name), found in draws.items()
    }
    return TaskFigures(figures | _differences(draws, arms), draws)


def _in_slice(rows: Rows, name: str) -> npt.NDArray[np.bool_]:
    if name == ALL_ROWS:
        return np.ones(len(rows.slices_N), dtype=np.bool_)
    return rows.slices_N == SLICES.index(name)


def _prefixed(name: str) -> str:
    return f"{name}_" if name else ""


def _differences(draws: Draws, arms: Sequence[str]) -> dict[str, float]:
    pairs = dict(DIFFERENCES)
    for arm in arms:
        if arm not in (FULL, BASELINE):
            is_part = arm.startswith(PART_ARM)
            name = f"{PART_PREFIX}{arm.removeprefix(PART_ARM)}" if is_part else f"{arm}_minus_fixed"
            pairs[name] = (FULL, arm) if is_part else (arm, BASELINE)
    figures = {}
    for name, (first, second) in pairs.items():
        for part in (ALL_ROWS, *SLICES):
            if (first, part) in draws and (second, part) in draws:
                difference_B = draws[first, part] - draws[second, part]
                key = f"{name}_{_prefixed(part)}auc"
                figures[key] = float(difference_B[0])
                figures[f"{key}_low"], figures[f"{key}_high"] = interval(difference_B)
    return figures


def _result(
    found: Mapping[str, TaskFigures],
    runs: Sequence[Run],
    arguments: argparse.Namespace,
    data_name: str,
    seconds: float,
) -> dict[str, Any]:
    rounded = {
        task: {name: round(value, 5) for name, value in each.figures.items()}
        for task, each in found.items()
    }
    targets = TARGETS_ON_GIVEN_DATA if arguments.data else TARGETS_ON_ML100K
    return {
        "benchmark": "ranking_quality",
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "figures": {**next(iter(rounded.values())), "seconds": round(seconds)},
        "targets": {name: {"op": op, "value": value} for name, (op, value) in targets.items()},
        "tasks": rounded,
        "settings": {
            "data": data_name,
            "seeds": len({run.seed for run in runs}),
            "arms": list(dict.fromkeys(run.arm for run in runs)),
            "quick": arguments.quick,
            "train_share": arguments.train_share,
            "moved_back": arguments.moved_back,
        },
    }


if __name__ == "__main__":
    main()

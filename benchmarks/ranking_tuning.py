"""Let every arm choose among the same few settings, on valid rows, and write down its choice.

    uv run --frozen --extra cpu python benchmarks/ranking_tuning.py [--data DIR] [--arms a,b]
        [--features DIR] [--seeds N] [--vary KEY=A,B]

Not part of a benchmark run: ``ranking_settings.json`` is committed and read from then on. An arm
tries each of ``SEARCHED`` (``ranking_arms.py``) and takes the one with the best AUC on valid rows,
mean over tasks and seeds: seeds differ by more than settings do. Test rows play no part. Arms that
are not named keep their choice.
``--vary`` writes nothing: it shows what a key that all arms share (``COMMON``) does to the named
arms, on valid rows and on those of cold items.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import data_dir
from benchmarks.ranking_arms import (
    SEARCHED,
    SETTINGS_PATH,
    THIRD_PARTY,
    Arm,
    all_arms,
    chosen_arms,
    tuned,
)
from benchmarks.ranking_data import say
from benchmarks.ranking_quality import prepare
from benchmarks.ranking_runs import Run, Task, run_config, train_all
from examples.quickstart.layout import BACKBONE
from qarm_feast.input_data import DataConfig, load_input_data


def main() -> None:
    """Tune the arms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Folder in the input contract; default: ML-100K.")
    parser.add_argument("--arms", help="These arms, comma-separated.")
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    parser.add_argument("--features", help="Folder to keep outputs of the text model in.")
    parser.add_argument(
        "--vary", type=_key_and_values, help="KEY=A,B: only show what these values do."
    )
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each setting or value.")
    parser.add_argument("--processes", type=int, default=2, help="Runs that go at a time.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checked = load_input_data(DataConfig(input_dir=str(data_dir(arguments.data, folder))))
        inputs = prepare(checked, Path(folder), arguments.backbone, arguments.features or folder)
        arms = chosen_arms(all_arms(THIRD_PARTY in inputs), arguments.arms)
        if arguments.vary:
            tries = [each for arm in arms for each in _varied(arm, *arguments.vary)]
        else:
            tries = [each for arm in arms for each in _tries(arm)]
        tasks = [
            Task(each, run_config(each, inputs[each.codes], seed), inputs[each.codes])
            for each in tries
            for seed in range(arguments.seeds)
        ]
        found = _trained(tasks, arguments.processes)
        if not arguments.vary:
            for arm in arms:
                _write_choice(arm, found)


def _key_and_values(text: str) -> tuple[str, list[Any]]:
    key, _, values = text.partition("=")
    try:
        found = json.loads(f"[{values}]")
    except json.JSONDecodeError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=A,B with JSON values")
    return key, found


def _varied(arm: Arm, key: str, values: Sequence[Any]) -> list[Arm]:
    return [
        replace(
            arm,
            name=f"{arm.name} {key}={json.dumps(value)}",
            overrides={**tuned(arm.name), **arm.overrides, key: value},
        )
        for value in values
    ]


def _tries(arm: Arm) -> list[Arm]:
    return [
        replace(arm, name=f"{arm.name}/{number}", overrides={**arm.overrides, **setting})
        for number, setting in enumerate(SEARCHED)
    ]


def _trained(tasks: Sequence[Task], num_processes: int) -> dict[str, float]:
    """Train all, say what each try gave, and return the AUCs by its name."""
    num_seeds = len({task.config.seed for task in tasks})
    runs: dict[str, list[tuple[float, float]]] = {}
    found = {}
    for run, _ in train_all(tasks, num_processes):
        own = runs.setdefault(run.arm, [])
        own.append((_auc(run, "auc/"), _auc(run, "cold_auc/")))
        if len(own) == num_seeds:
            auc, cold_auc = np.mean(own, axis=0)
            say(f"{run.arm:<36} valid {auc:.4f}, cold {cold_auc:.4f}")
            found[run.arm] = float(auc)
    return found


def _auc(run: Run, prefix: str) -> float:
    """Return an AUC on valid rows, mean over the tasks."""
    found = [value for key, value in run.valid_metrics.items() if key.startswith(prefix)]
    return float(np.mean(found))


def _write_choice(arm: Arm, found: Mapping[str, float]) -> None:
    names = [each.name for each in _tries(arm)]
    best = max(range(len(names)), key=lambda number: found[names[number]])
    settings = json.loads(SETTINGS_PATH.read_text("utf-8"))
    settings[arm.name] = SEARCHED[best]
    text = json.dumps(settings, indent=2, sort_keys=True)
    SETTINGS_PATH.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Let every arm choose among the same few settings, on valid rows, and write down its choice.

    uv run --frozen --extra cpu python benchmarks/ranking_tuning.py [--data DIR] [--arms a,b]
        [--features DIR] [--vary KEY=A,B [--seeds N]]

Not part of a benchmark run: ``ranking_settings.json`` is committed and read from then on. An arm
tries each of ``SEARCHED`` (``ranking_arms.py``) with seed 0 and takes the one with the best AUC on
valid rows, mean over the tasks; test rows play no part. Arms that are not named keep their choice.
``--vary`` writes nothing: it shows what a key that all arms share (``COMMON``) does to the named
arms, on valid rows and on those of cold items, mean over seeds.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.data import data_dir
from benchmarks.ranking_arms import (
    SEARCHED,
    SETTINGS_PATH,
    THIRD_PARTY,
    Arm,
    all_arms,
    chosen_arms,
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
    parser.add_argument("--vary", help="KEY=A,B: only show what these values do.")
    parser.add_argument("--seeds", type=int, default=2, help="Runs per value of --vary.")
    parser.add_argument("--processes", type=int, default=2, help="Runs that go at a time.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checked = load_input_data(DataConfig(input_dir=str(data_dir(arguments.data, folder))))
        inputs = prepare(checked, Path(folder), arguments.backbone, arguments.features or folder)
        arms = chosen_arms(all_arms(THIRD_PARTY in inputs), arguments.arms)
        if arguments.vary:
            tries = [each for arm in arms for each in _varied(arm, *arguments.vary.split("="))]
        else:
            tries = [each for arm in arms for each in _tries(arm)]
        tasks = [
            Task(each, run_config(each, inputs[each.codes], seed), inputs[each.codes])
            for each in tries
            for seed in range(arguments.seeds if arguments.vary else 1)
        ]
        (_show if arguments.vary else _choose)(tasks, arguments.processes)


def _varied(arm: Arm, key: str, values: str) -> list[Arm]:
    return [
        replace(
            arm,
            name=f"{arm.name} {key}={value}",
            overrides={**arm.overrides, key: json.loads(value)},
        )
        for value in values.split(",")
    ]


def _tries(arm: Arm) -> list[Arm]:
    return [
        replace(arm, name=f"{arm.name}/{number}", overrides={**arm.overrides, **setting})
        for number, setting in enumerate(SEARCHED)
    ]


def _show(tasks: Sequence[Task], num_processes: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for run, _ in train_all(tasks, num_processes):
        found.setdefault(run.arm, []).append((_auc(run, "auc/"), _auc(run, "cold_auc/")))
    for name, aucs in sorted(found.items()):
        mean, cold = np.mean(aucs, axis=0)
        say(f"{name:<40} {mean:.4f}, cold {cold:.4f}, {len(aucs)} seeds")


def _auc(run: Run, prefix: str) -> float:
    """Return an AUC on valid rows, mean over the tasks."""
    found = [value for key, value in run.valid_metrics.items() if key.startswith(prefix)]
    return float(np.mean(found))


def _choose(tasks: Sequence[Task], num_processes: int) -> None:
    found: dict[str, dict[int, float]] = {}
    for run, _ in train_all(tasks, num_processes):
        name, _, number = run.arm.partition("/")
        own = found.setdefault(name, {})
        own[int(number)] = _auc(run, "auc/")
        if len(own) == len(SEARCHED):
            say(f"{name:<24}" + " ".join(f"{own[each]:.4f}" for each in sorted(own)))
            _write_choice(name, max(own, key=lambda each: own[each]))


def _write_choice(arm_name: str, number: int) -> None:
    settings = json.loads(SETTINGS_PATH.read_text("utf-8"))
    settings[arm_name] = dict(SEARCHED[number])
    text = json.dumps(dict(sorted(settings.items())), indent=2)
    SETTINGS_PATH.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

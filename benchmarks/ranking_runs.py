"""Runs of a comparison in several processes, each a process group of its own.

Two processes of one thread each train twice as many runs in a given time as two ranks do, which
wait for each other at every step.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.ranking_arms import EVALUATIONS_PER_EPOCH, Arm
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.metrics import Predictions, defined_metrics
from torchrec_models.sharding import process_group
from torchrec_models.training import train


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed; ``logits_NT`` are those of the test rows, in file order."""

    arm: str
    seed: int
    seconds: float
    num_steps: int
    samples_per_second: float
    valid_metrics: Mapping[str, float]
    metrics: Mapping[str, float]
    logits_NT: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """What all runs share of the test rows."""

    labels_NT: npt.NDArray[np.bool_]
    user_ids_N: npt.NDArray[np.int64]
    slices_N: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Task:
    """What one process does at a time."""

    arm: Arm
    config: RankerConfig
    inputs: TrainInputs


def run_config(arm: Arm, inputs: TrainInputs, seed: int) -> RankerConfig:
    """Return the ranker section of an arm on some rows."""
    keys = arm.settings()
    steps = -(-inputs.store.manifest.num_rows["train"] // keys["batch_size"])
    return RankerConfig.model_validate(
        {"eval_every_steps": -(-steps // EVALUATIONS_PER_EPOCH), **keys, "seed": seed}
    )


def train_all(tasks: Sequence[Task], num_processes: int) -> Iterator[tuple[Run, Rows]]:
    """Train every task and yield each run as it ends; its arm and seed name it.

    Args:
        tasks: What to train.
        num_processes: Runs that go at a time; 1 stays in this process.

    Yields:
        Runs, each with the test rows that it ranked.
    """
    if num_processes == 1:
        with process_group():
            yield from map(_trained, tasks)
        return
    executor = ProcessPoolExecutor(
        num_processes,
        mp_context=get_context("spawn"),
        initializer=join_group_of_one,
        initargs=(max(1, (os.cpu_count() or 1) // num_processes),),
    )
    with executor:
        futures = [executor.submit(_trained, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()


_joined = ExitStack()


def join_group_of_one(num_threads: int) -> None:
    """Make this process a process group of its own, until it ends."""
    _joined.enter_context(process_group())
    torch.set_num_threads(num_threads)


def _trained(task: Task) -> tuple[Run, Rows]:
    started = time.monotonic()
    result = train(task.config, task.inputs, enable_checkpoint=False)
    found = result.test_predictions
    run = Run(
        arm=task.arm.name,
        seed=task.config.seed,
        seconds=time.monotonic() - started,
        num_steps=result.num_steps,
        samples_per_second=result.samples_per_second,
        valid_metrics=defined_metrics(result.valid_metrics),
        metrics=defined_metrics(result.metrics),
        logits_NT=found.logits_NT.numpy(),
    )
    return run, test_rows(found)


def test_rows(found: Predictions) -> Rows:
    """Return what runs on the same rows share of their predictions."""
    return Rows(
        labels_NT=found.labels_NT.numpy() > 0.5,
        user_ids_N=found.user_ids_N.numpy(),
        slices_N=found.slices_N.numpy(),
    )

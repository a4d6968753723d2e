"""What a refresh of encoder and codebook does to a ranker that was trained on the older codes.

    uv run --frozen --extra cpu python benchmarks/refresh.py [--data DIR] [--seeds N] [--quick]

It runs on a planted drift with known truth (``_drift``), on the quickstart's ML-100K (``_ml100k``),
and with ``--data`` on that directory (its name up to the first underscore: ``_amazon``). The text
model is the one that `make quickstart` fetches.

Encoder, codebook and ranker of version 1 learn from train rows, the ranker stops early on valid
rows. The refresh learns from train and valid rows: the one named exception to the train-only rule.
Its encoder goes on from that of version 1 (``--fresh-encoder``: it starts from the content again).
All arms rank the same test rows, with histories up to each label, and differ in codes alone:

    stale   codes of version 1
    naive   codes of a codebook trained anew; equal numbers are taken for equal codes
    kept    codes of a refresh that keeps labels; tables go on through its label map

each as the ranker is (``auc_<arm>``), and after one short warm-started epoch over the valid rows
(``auc_<arm>_retrained``; the last twentieth of the users' valid rows is left out). Differences come
with 95 % intervals (``_low``, ``_high``) and their widths (``_width``) from drawing users, averaged
over the seeds. Progress goes to stderr, the last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from benchmarks.data import data_dir
from benchmarks.drift import planted_drift
from benchmarks.ranking_arms import Arm
from benchmarks.ranking_data import (
    RQ_SIZES,
    Vectors,
    align,
    coded_items,
    fitting_sizes,
    publish_coded_rows,
    say,
    train_codebook,
)
from benchmarks.ranking_runs import Rows, join_group_of_one, run_config, test_rows
from benchmarks.user_bootstrap import interval, seed_mean_aucs, user_weights
from examples.quickstart.layout import BACKBONE
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import content_features
from qarm_feast.codebook import Codebook, ItemVectors
from qarm_feast.codebook_config import ContinuityConfig
from qarm_feast.continuity import ParentCodes, refresh_codebook
from qarm_feast.encode import content_hashes
from qarm_feast.input_data import SPLIT, DataConfig, InputData, load_input_data
from qarm_feast.quantizers import RqConfig
from qarm_feast.schema import ITEM_ID
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.inputs import TrainInputs
from torchrec_models.label_maps import NO_ROW, LabelMap, label_map
from torchrec_models.sharding import process_group
from torchrec_models.training import train
from torchrec_models.warm_start import WarmStart

STALE, NAIVE, KEPT = "stale", "naive", "kept"
ARMS = (STALE, NAIVE, KEPT)
RETRAINED = "_retrained"
RANKER = Arm(
    "refresh",
    "v1",
    (
        "user_id",
        "item_id",
        "user_columns",
        "history_item_id",
        "rq_code",
        "history_rq_code",
        "vq_code",
    ),
)
"""Codes are read through tables alone: cross features do not depend on what a code is called."""
DRIFT_SIZES = {False: (1500, 800), True: (400, 150)}
"""Items and users of the planted drift; shortened runs take the second."""
DRIFT_LEVELS = (24, 16, 16)
DIFFERENCES = ((KEPT, STALE), (NAIVE, STALE), (KEPT, NAIVE))
HELD_OUT_SHARE = 0.05
NUM_DRAWS = {False: 1000, True: 100}
TARGETS = {"kept_minus_stale_auc_drift": 0.0}
TARGET_ON_REAL_DATA = "kept_minus_stale_auc_high"


@dataclass(frozen=True)
class Case:
    """One data set: rows of version 1, and those of each arm with the older code of each code."""

    name: str
    first: TrainInputs
    arms: Mapping[str, tuple[TrainInputs, LabelMap]]
    churn: Mapping[str, float]


@dataclass(frozen=True)
class Ranked:
    """Logits of the first task on the test rows, per arm, of one seed."""

    logits: Mapping[str, npt.NDArray[np.float32]]
    rows: Rows


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    started = time.monotonic()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in _cases(arguments, Path(folder)):
            say(f"{case.name}: prepared after {time.monotonic() - started:.0f} s")
            ranked = _ranked(case, arguments, Path(folder) / "checkpoints")
            found = _figures(ranked, NUM_DRAWS[arguments.quick]) | case.churn
            figures |= {f"{name}_{case.name}": value for name, value in found.items()}
            for name, value in found.items():
                say(f"{case.name}: {name:<44} {value:+.4f}")
    names = {name.rpartition("_")[2] for name in figures}
    targets = TARGETS | {f"{TARGET_ON_REAL_DATA}_{name}": 0.0 for name in sorted(names - {"drift"})}
    print(
        json.dumps(
            {
                "benchmark": "refresh",
                "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "figures": {name: round(float(value), 5) for name, value in figures.items()},
                "targets": {name: {"op": "ge", "value": value} for name, value in targets.items()},
                "settings": {
                    "seeds": 1 if arguments.quick else arguments.seeds,
                    "quick": arguments.quick,
                    "seconds": round(time.monotonic() - started),
                },
            }
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Folder in the input contract, beside the other two.")
    parser.add_argument("--seeds", type=int, default=5, help="Rankers per data set.")
    parser.add_argument("--cases", default="drift,ml100k,data", help="Only these, by comma.")
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    parser.add_argument(
        "--fresh-encoder", action="store_true", help="The refreshed encoder has no parent."
    )
    parser.add_argument("--features", help="Folder to keep outputs of the text model in.")
    parser.add_argument("--processes", type=int, default=2, help="Seeds that go at a time.")
    parser.add_argument("--quick", action="store_true", help="One seed, one epoch, a small drift.")
    return parser.parse_args()


def _cases(arguments: argparse.Namespace, folder: Path) -> Sequence[Case]:
    wanted = arguments.cases.split(",")
    cases = []
    if "drift" in wanted:
        drift = planted_drift(folder / "made", *DRIFT_SIZES[arguments.quick])
        cases.append(
            prepared_case(
                "drift", drift.checked, (drift.before, drift.after), DRIFT_LEVELS, folder / "drift"
            )
        )
    directories = {}
    if "ml100k" in wanted:
        directories["ml100k"] = data_dir(None, str(folder))
    if "data" in wanted and arguments.data:
        directories[Path(arguments.data).name.partition("_")[0]] = Path(arguments.data)
    for name, directory in directories.items():
        checked = load_input_data(DataConfig(input_dir=str(directory)))
        config = AlignmentConfig(
            backbone=arguments.backbone,
            features_uri=arguments.features or str(folder / "features"),
        )
        vectors = vectors_of_both(checked, config, goes_on=not arguments.fresh_encoder)
        cases.append(prepared_case(name, checked, vectors, RQ_SIZES, folder / name))
    return cases


def vectors_of_both(
    checked: InputData, config: AlignmentConfig, *, goes_on: bool
) -> tuple[Vectors, Vectors]:
    """Return the vectors of version 1 and of the refresh.

    Args:
        checked: The data.
        config: How encoders are trained.
        goes_on: Whether the refreshed encoder goes on from the first.
    """
    features = content_features(checked.items, config, checked.directory)
    head, before = align(checked, features, config)
    later = refreshed_data(checked)
    return before, align(later, features, config, head if goes_on else None)[1]


def refreshed_data(checked: InputData) -> InputData:
    """Return the data as the refresh sees it: valid rows are train rows."""
    splits = pc.if_else(
        pc.equal(checked.interactions[SPLIT], "valid"), "train", checked.interactions[SPLIT]
    )
    place = checked.interactions.schema.get_field_index(SPLIT)
    interactions = checked.interactions.set_column(place, SPLIT, splits)
    return replace(checked, interactions=interactions, has_given_split=True)


def prepared_case(
    name: str,
    checked: InputData,
    vectors: tuple[Vectors, Vectors],
    sizes: tuple[int, ...],
    folder: Path,
) -> Case:
    """Return the rows of version 1 and of each arm.

    Args:
        name: Suffix of the figures.
        checked: The data.
        vectors: Those of version 1 and of the refresh.
        sizes: Codes per level.
        folder: Where rows are kept.
    """
    later = refreshed_data(checked)
    first, naive, kept = _codebooks(checked, later, vectors, sizes)
    before, after = vectors
    splits = _fit_splits(checked)
    coded = {
        STALE: coded_items(checked, first, before.aligned_ND),
        NAIVE: coded_items(checked, naive, after.aligned_ND),
        KEPT: coded_items(checked, kept, after.aligned_ND),
    }
    rows = {
        arm: publish_coded_rows(later, each, after, arm, folder, fit_splits=splits)
        for arm, each in coded.items()
    }
    manifests = {"v1": first.manifest, "v2": kept.manifest}
    labels = {
        STALE: LabelMap.same_numbers(first.manifest.level_sizes, first.manifest.pool_size),
        NAIVE: _same_numbers(naive, first),
        KEPT: label_map(manifests, old="v1", new="v2"),
    }
    report = kept.manifest.continuity
    return Case(
        name=name,
        first=publish_coded_rows(checked, coded[STALE], before, "v1", folder),
        arms={arm: (rows[arm], labels[arm]) for arm in ARMS},
        churn={
            "churn_kept": report["churn"]["full"],
            "churn_naive": report["naive_churn"]["full"],
            "churn_level1_kept": report["churn"]["levels"][0],
            "churn_lists_kept": report["lists"]["churn"],
            "churn_lists_nearest": report["lists"]["naive_churn"],
            "list_neighbor_recall_kept": report["lists"]["neighbor_recall"],
            "quantization_mse_kept_vs_naive": report["quantization_mse"]
            / report["naive_quantization_mse"],
        },
    )


def _codebooks(
    checked: InputData,
    later: InputData,
    vectors: tuple[Vectors, Vectors],
    sizes: tuple[int, ...],
) -> tuple[Codebook, Codebook, Codebook]:
    """Return version 1, the codebook trained anew, and the refresh that keeps labels."""
    before_ND, after_ND = (each.aligned_ND for each in vectors)
    item_ids_N, hashes = checked.items[ITEM_ID].to_numpy(), content_hashes(checked.items)
    is_train_N = np.isin(item_ids_N, checked.train_item_ids())
    sizes = fitting_sizes(before_ND[is_train_N], sizes)
    first = train_codebook(checked, before_ND, "v1", sizes)
    naive = train_codebook(later, after_ND, "v2", sizes)
    parent = ParentCodes.served_by(first, ItemVectors(item_ids_N, hashes, before_ND))
    kept = refresh_codebook(
        naive,
        ItemVectors(item_ids_N, hashes, after_ND),
        later.train_item_ids(),
        parent,
        ContinuityConfig(),
        RqConfig(codebook_size=sizes),
    )
    return first, naive, kept


def _same_numbers(naive: Codebook, first: Codebook) -> LabelMap:
    """Return equal numbers as equal codes; pool rows that version 1 lacks start anew."""
    same = LabelMap.same_numbers(naive.manifest.level_sizes, naive.manifest.pool_size)
    is_known_P = same.pool_P < first.manifest.pool_size
    return replace(same, pool_P=np.where(is_known_P, same.pool_P, NO_ROW))


def _fit_splits(checked: InputData) -> list[str]:
    """Return what the retrained ranker takes each row for: valid rows train it, few are held out.

    Train rows are left out: the ranker has seen them.
    """
    names = {"train": "none", "valid": "train", "test": "test"}
    splits = np.array([names[name] for name in checked.interactions[SPLIT].to_pylist()])
    valid = np.flatnonzero(splits == "train")
    splits[valid[-max(1, round(HELD_OUT_SHARE * len(valid))) :]] = "valid"
    return [str(name) for name in splits]


def _ranked(case: Case, arguments: argparse.Namespace, folder: Path) -> list[Ranked]:
    seeds = range(1 if arguments.quick else arguments.seeds)
    jobs = [(case, seed, arguments.quick, folder / case.name / str(seed)) for seed in seeds]
    if arguments.processes == 1:
        with process_group():
            return [rank_all(*job) for job in jobs]
    executor = ProcessPoolExecutor(
        min(arguments.processes, len(jobs)),
        mp_context=get_context("spawn"),
        initializer=join_group_of_one,
        initargs=(max(1, (os.cpu_count() or 1) // arguments.processes),),
    )
    with executor:
        return list(executor.map(rank_all, *zip(*jobs, strict=True)))


def rank_all(case: Case, seed: int, quick: bool, folder: Path) -> Ranked:
    """Train the ranker of version 1 and let each arm go on from it; in a joined process group.

    Args:
        case: The data set.
        seed: Seed of the ranker.
        quick: One epoch only.
        folder: Where checkpoints are kept.
    """
    config = run_config(RANKER, case.first, seed)
    limits = {"num_epochs": 1} if quick else {}
    config = config.model_copy(update={"checkpoint_dir": str(folder), **limits})
    first = train(config, case.first)
    assert first.checkpoint is not None, "checkpoints are on"
    logits = {}
    for arm, (inputs, labels) in case.arms.items():
        start = WarmStart(Checkpoint.at(first.checkpoint), labels)
        for suffix, num_epochs in (("", 0), (RETRAINED, 1)):
            keys = {"num_epochs": num_epochs, "early_stopping_patience": 0}
            result = train(
                config.model_copy(update=keys), inputs, enable_checkpoint=False, warm_start=start
            )
            logits[f"{arm}{suffix}"] = result.test_predictions.logits_NT[:, 0].numpy()
    return Ranked(logits, test_rows(result.test_predictions))


def _figures(ranked: Sequence[Ranked], num_draws: int) -> dict[str, float]:
    rows = ranked[0].rows
    weights_NB = user_weights(rows.user_ids_N, num_draws)
    draws = {
        arm: seed_mean_aucs([each.logits[arm] for each in ranked], rows.labels_NT[:, 0], weights_NB)
        for arm in ranked[0].logits
    }
    figures = {f"auc_{arm}": float(found_B[0]) for arm, found_B in draws.items()}
    for suffix in ("", RETRAINED):
        for first, second in DIFFERENCES:
            difference_B = draws[first + suffix] - draws[second + suffix]
            key = f"{first}_minus_{second}{suffix}_auc"
            low, high = interval(difference_B)
            figures |= {key: float(difference_B[0]), f"{key}_low": low, f"{key}_high": high}
            figures[f"{key}_width"] = high - low
    return figures


if __name__ == "__main__":
    main()

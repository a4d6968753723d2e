"""How much of a codebook's meaning survives a refresh, on real items and re-trained encoders.

    uv run --frozen --extra cpu python benchmarks/continuity.py [--data DIR] [--quick]

Without ``--data`` it runs on the quickstart's ML-100K. The text model is the one that
`make quickstart` fetches.

The encoder is trained on the earlier half of the train rows; then it goes on to more and more of
them, up to all, as `qarm refresh` does. Churn and error of the refreshed codebook stand beside
those of the naive refit, plain and with its labels matched; once for the step from the half to all,
and over a chain of five steps. ``…_fresh_encoder`` is that step with an encoder that has no parent.
Progress goes to stderr, the last line of stdout is one JSON object.

Shape letters in this file: N items, D embedding width, L levels, Q sampled items, k neighbours.
"""

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import data_dir
from benchmarks.ranking_data import align
from examples.quickstart.layout import BACKBONE
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import content_features
from qarm_feast.alignment.fusion import ContentFusion
from qarm_feast.codebook import Codebook, EncoderFacts, ItemVectors, QuantizerConfig
from qarm_feast.codebook_config import ContinuityConfig
from qarm_feast.continuity import NO_CODE, ParentCodes, codes_churn, match_labels, refresh_codebook
from qarm_feast.encode import content_hashes
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.search import nearest
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CREATED = datetime(2024, 1, 1, tzinfo=UTC)
NUM_NEIGHBORS = 10
TARGETS = {
    "churn_level1_kept": 0.12,
    "churn_full_kept": 0.40,
    "mse_over_naive_kept": 0.05,
    "chain_max_mse_over_naive": 0.05,
    "churn_full_same_space": 0.01,
    "churn_full_rotated_space": 0.01,
}
BESIDE = ("neighbor_overlap", "churn_level1_kept", "churn_full_kept", "churn_lists_kept")
"""Figures that are printed of an encoder without a parent, too."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One encoder: vectors of every item, and the items with a train row until then."""

    vectors: ItemVectors
    train_item_ids: np.ndarray


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    config = AlignmentConfig(backbone=arguments.backbone, num_epochs=arguments.epochs)
    with tempfile.TemporaryDirectory() as folder:
        uri = arguments.features or folder
        config = config.model_copy(update={"features_uri": uri})
        checked = load_input_data(DataConfig(input_dir=str(data_dir(arguments.data, folder))))
        encoders = _Encoders(checked, config)
        head, first = encoders.step(SHARES[0], None)
        _, last = encoders.step(SHARES[-1], head)
        _, fresh = encoders.step(SHARES[-1], None)
        steps = [first, last] if arguments.quick else [first, *encoders.chain(SHARES[1:], head)]
    # ML-100K's 1,600 items are too few for larger levels.
    sizes_text = arguments.sizes or ("256x256x256" if arguments.data else "32x32x32")
    sizes = tuple(int(size) for size in sizes_text.split("x"))
    rq = RqConfig(codebook_size=sizes, last_level=arguments.last_level)
    settings = QuantizerConfig(rq=rq, vq=VqConfig())
    continuity = ContinuityConfig(hysteresis=arguments.hysteresis)
    figures = _one_refresh(first, last, settings, continuity)
    without_parent = _one_refresh(first, fresh, settings, continuity)
    figures |= {f"{name}_fresh_encoder": without_parent[name] for name in BESIDE}
    figures |= _same_space(steps[0], settings, continuity)
    figures |= _chain(steps, settings, continuity)
    print(
        json.dumps(
            {
                "benchmark": "continuity",
                "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "figures": {name: round(float(value), 5) for name, value in figures.items()},
                "targets": {name: {"op": "le", "value": value} for name, value in TARGETS.items()},
                "settings": {
                    "data": Path(arguments.data).name if arguments.data else "ml-100k",
                    "sizes": list(sizes),
                    "last_level": arguments.last_level,
                    "num_items": len(steps[0].vectors.item_ids_N),
                    "num_train_items": [len(step.train_item_ids) for step in steps],
                    **continuity.model_dump(),
                },
            }
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Folder in the input contract; default: ML-100K.")
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    parser.add_argument("--features", help="Folder to keep backbone features in.")
    parser.add_argument(
        "--sizes", help="Codebook size per level; by default 256x256x256, without --data 32x32x32."
    )
    parser.add_argument("--last-level", choices=("kmeans", "fsq"), default="kmeans")
    parser.add_argument("--hysteresis", type=float, default=ContinuityConfig().hysteresis)
    parser.add_argument("--epochs", type=int, default=AlignmentConfig().num_epochs)
    parser.add_argument("--quick", action="store_true", help="Two encoders, one step.")
    return parser.parse_args()


class _Encoders:
    """Trains encoders on parts of the train rows."""

    def __init__(self, checked: InputData, config: AlignmentConfig) -> None:
        self._checked = checked
        self._config = config
        self._features = content_features(checked.items, config, checked.directory)
        self._hashes = content_hashes(checked.items)
        self._times = checked.train_interactions()[EVENT_TIMESTAMP].to_numpy().astype(np.int64)

    def step(self, share: float, parent: ContentFusion | None) -> tuple[ContentFusion, Step]:
        """Train on the first rows in time; from a parent's head if there is one."""
        part = _until(self._checked, np.quantile(self._times, share))
        head, vectors = align(part, self._features, self._config, parent)
        item_ids_N = self._checked.items[ITEM_ID].to_numpy()
        items = ItemVectors(item_ids_N, self._hashes, vectors.aligned_ND)
        step = Step(items, part.train_item_ids())
        _say(f"encoder of {share:.0%} of the train rows: {len(step.train_item_ids)} items")
        return head, step

    def chain(self, shares: Sequence[float], parent: ContentFusion) -> Iterator[Step]:
        """Train on ever more rows, each encoder from the one before."""
        for share in shares:
            parent, step = self.step(share, parent)
            yield step


def _until(checked: InputData, last_microsecond: float) -> InputData:
    """Return the data without the interactions after that time."""
    times = checked.interactions[EVENT_TIMESTAMP].to_numpy().astype(np.int64)
    return dataclasses.replace(
        checked, interactions=checked.interactions.filter(times <= last_microsecond)
    )


def _train(step: Step, version: str, settings: QuantizerConfig) -> Codebook:
    is_train_N = np.isin(step.vectors.item_ids_N, step.train_item_ids)
    return Codebook.train(
        version,
        step.vectors.item_ids_N[is_train_N],
        step.vectors.x_ND[is_train_N],
        config=settings,
        encoder=EncoderFacts("e", "0" * 64, None),
        created=CREATED,
    )


def _refresh(
    step: Step,
    version: str,
    parent: ParentCodes,
    settings: QuantizerConfig,
    continuity: ContinuityConfig,
) -> Codebook:
    naive = _train(step, version, settings)
    return refresh_codebook(
        naive, step.vectors, step.train_item_ids, parent, continuity, settings.rq
    )


def _one_refresh(
    old: Step, new: Step, settings: QuantizerConfig, continuity: ContinuityConfig
) -> dict[str, float]:
    parent = ParentCodes.served_by(_train(old, "v1", settings), old.vectors)
    kept = _refresh(new, "v2", parent, settings, continuity).manifest.continuity
    warm_only = continuity.model_copy(update={"hysteresis": 0.0})
    warm = _refresh(new, "v2", parent, settings, warm_only).manifest.continuity
    naive_NL = _train(new, "v2", settings).rq.encode(new.vectors.x_ND)
    matched = codes_churn(parent.rq_NL, naive_NL, _matched_maps(parent, naive_NL, settings))
    overlap = _neighbor_overlap(old.vectors.x_ND, new.vectors.x_ND)
    arms = {"kept": kept["churn"], "warm": warm["churn"], "naive": kept["naive_churn"]}
    figures = {"neighbor_overlap": overlap}
    for arm, churn in {**arms, "naive_matched": matched}.items():
        _say(f"{arm:<14} level 1 {churn['levels'][0]:.3f}, full {churn['full']:.3f}")
        figures |= {f"churn_level1_{arm}": churn["levels"][0], f"churn_full_{arm}": churn["full"]}
        figures |= {f"churn_c1c2_{arm}": churn["prefixes"][1]}
    for arm, report in {"kept": kept, "warm": warm}.items():
        figures |= {
            f"mse_over_naive_{arm}": _excess(report),
            f"catalogue_mse_over_naive_{arm}": report["catalogue_mse"]
            / report["naive_catalogue_mse"]
            - 1,
        }
    _say(f"10-NN overlap {overlap:.3f}, MSE over naive {_excess(kept):+.4f}: {kept}")
    return {
        **figures,
        "mse_kept": kept["quantization_mse"],
        "mse_naive": kept["naive_quantization_mse"],
        "churn_lists_kept": kept["lists"]["churn"],
        "churn_lists_nearest": kept["lists"]["naive_churn"],
        "list_neighbor_recall_kept": kept["lists"]["neighbor_recall"],
        "list_distance_over_nearest_kept": kept["lists"]["distance_over_nearest"],
        "pool_churn_kept": kept["pool"]["churn"],
        "pool_churn_naive": kept["pool"]["naive_churn"],
        "hysteresis_used": kept["hysteresis"],
        "num_iterations_used": kept["num_iterations"],
    }


def _same_space(
    step: Step, settings: QuantizerConfig, continuity: ContinuityConfig
) -> dict[str, float]:
    parent = ParentCodes.served_by(_train(step, "v1", settings), step.vectors)
    width = step.vectors.x_ND.shape[1]
    rotation_DD = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0]
    rotated_ND = (step.vectors.x_ND @ rotation_DD).astype(np.float32)
    figures = {}
    for name, x_ND in {"same": step.vectors.x_ND, "rotated": rotated_ND}.items():
        moved = dataclasses.replace(step, vectors=dataclasses.replace(step.vectors, x_ND=x_ND))
        report = _refresh(moved, "v2", parent, settings, continuity).manifest.continuity
        figures[f"churn_full_{name}_space"] = report["churn"]["full"]
    return figures


def _chain(
    steps: list[Step], settings: QuantizerConfig, continuity: ContinuityConfig
) -> dict[str, float]:
    codebook = _train(steps[0], "v1", settings)
    first = parent = ParentCodes.served_by(codebook, steps[0].vectors)
    maps = [np.arange(size) for size in codebook.manifest.level_sizes]
    figures, excesses = {}, []
    for number, step in enumerate(steps[1:], start=1):
        codebook = _refresh(step, f"v{number + 1}", parent, settings, continuity)
        report = codebook.manifest.continuity
        parent = ParentCodes.served_by(codebook, step.vectors)
        # A row that started anew on the way says nothing of the first version's.
        maps = [
            np.append(before, NO_CODE)[np.array(step_map)]
            for before, step_map in zip(maps, codebook.manifest.label_map or (), strict=True)
        ]
        since_first = codes_churn(first.rq_NL, parent.rq_NL, maps)
        excesses.append(_excess(report))
        figures |= {
            f"chain{number}_mse_over_naive": excesses[-1],
            f"chain{number}_churn_full": report["churn"]["full"],
            f"chain{number}_churn_level1": report["churn"]["levels"][0],
            f"chain{number}_churn_full_since_first": since_first["full"],
            f"chain{number}_churn_level1_since_first": since_first["levels"][0],
        }
        _say(
            f"chain {number}: full {report['churn']['full']:.3f}, since first "
            f"{since_first['full']:.3f}, MSE over naive {excesses[-1]:+.4f}, hysteresis "
            f"{report['hysteresis']}, iterations {report['num_iterations']}, overlap "
            f"{_neighbor_overlap(steps[number - 1].vectors.x_ND, step.vectors.x_ND):.3f}"
        )
    return {**figures, "chain_max_mse_over_naive": max(excesses)}


def _matched_maps(parent: ParentCodes, codes_NL: Codes, settings: QuantizerConfig) -> list[Codes]:
    sizes = settings.rq.codebook_size
    assert isinstance(sizes, tuple)
    return [
        match_labels(parent.rq_NL[:, level], codes_NL[:, level], parent.level_sizes[level], size)
        for level, size in enumerate(sizes)
    ]


def _excess(report: dict) -> float:
    return float(report["quantization_mse"] / report["naive_quantization_mse"] - 1)


def _neighbor_overlap(x_ND: Embeddings, y_ND: Embeddings) -> float:
    """Return the mean share of an item's nearest items that two spaces agree on."""
    first_Nk, second_Nk = (nearest(z_ND, z_ND, NUM_NEIGHBORS + 1)[:, 1:] for z_ND in (x_ND, y_ND))
    shared = [len(np.intersect1d(a, b)) for a, b in zip(first_Nk, second_Nk, strict=True)]
    return float(np.mean(shared)) / NUM_NEIGHBORS


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

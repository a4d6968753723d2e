"""Do aligned vectors place items as users later do: raw, aligned, decoded codes; text and picture.

    uv run --frozen --extra cpu python benchmarks/alignment_quality.py [--data DIR] [--seeds N]
        [--lora-seeds N] [--emoji-seeds N] [--quick] [--features DIR]

Without ``--data`` it runs on the quickstart's ML-100K. Encoders learn from train rows; test rows
are read once, for the figures. Every setting is the default of ``qarm.yaml``; these were chosen on
validation rows. Kinds of vectors: ``raw`` (content features as they are), ``aligned`` (frozen
backbone, trained head), ``lora`` (the text model tuned too; on a CPU that is slow, so it reads
fewer tokens and takes fewer passes, see ``LORA_SETTINGS``, for the first ``--lora-seeds``),
``decoded_rq`` and ``decoded_vq`` (what codes of the aligned vectors stand for). Figures, all over
test rows:

- ``neighbour_auc_<kind>``: chance that one of the five items that share most users with an item is
  nearer to it than a random other item; ``popular_neighbour_auc_<kind>`` draws the other item by
  its number of positives, so that popularity alone wins nothing.
- ``zero_shot_recall_at_10_<kind>``, ``item_cf_recall_at_10_<kind>``: AlignRec's protocols.
- ``warm_…``, ``cold_…``: of items (users: next items) with and without a train row.
- ``<kind>_minus_raw_<figure>``, ``lora_minus_aligned_<figure>``, with ``…_low`` and ``…_high``:
  paired difference and its 95 % interval, seeds and items (or users) drawn with replacement.

The emoji task (``emoji_…``, see alignment_emoji.py) does not depend on ``--data``. Progress goes to
stderr, the last line of stdout is one JSON object.

Shape letters in this file: M items, D width, R seeds, S samples (items or users), B draws.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from benchmarks.alignment_emoji import emoji_figures
from benchmarks.data import data_dir
from examples.quickstart.layout import BACKBONE, CACHE
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import project_features
from qarm_feast.alignment.evaluate import (
    RAW,
    Measured,
    bootstrap_means,
    interval,
    measure_vectors,
)
from qarm_feast.alignment.evaluation_job import decoded_vectors
from qarm_feast.alignment.features import ItemFeatures, content_features
from qarm_feast.alignment.later_behaviour import LaterBehaviour, read_behaviour
from qarm_feast.alignment.pairs import build_pairs
from qarm_feast.alignment.protocols import neighbor_auc
from qarm_feast.alignment.train import pair_rows, train_encoder, train_head
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.quantizers.base import Embeddings
from qarm_feast.quantizers.vq import VqConfig
from qarm_feast.schema import ITEM_ID

ALIGNED = "aligned"
LORA = "lora"
LORA_SETTINGS = {"tuning": "lora", "max_tokens": 32, "num_epochs": 3}
NUM_DRAWS = 1000
FIGURE_NAMES = {
    "neighbor_auc": "neighbour_auc",
    "popular_neighbor_auc": "popular_neighbour_auc",
}
TARGETS = {
    "aligned_minus_raw_neighbour_auc_low": ("ge", 0.0),
    "aligned_minus_raw_warm_neighbour_auc_low": ("ge", 0.0),
    "aligned_minus_raw_cold_neighbour_auc_low": ("ge", 0.0),
    "emoji_both_minus_text": ("ge", 0.0),
    "emoji_both_minus_image": ("ge", 0.0),
}

Figures = dict[str, float]
Vectors = dict[str, Embeddings]


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    seeds = 1 if arguments.quick else arguments.seeds
    lora_seeds = 0 if arguments.quick else min(arguments.lora_seeds, seeds)
    with tempfile.TemporaryDirectory() as folder:
        directory = data_dir(arguments.data, folder)
        config = AlignmentConfig(
            backbone=arguments.backbone, features_uri=arguments.features or folder
        )
        checked = load_input_data(DataConfig(input_dir=str(directory)))
        figures = behaviour_figures(checked, config, seeds, lora_seeds)
        emoji, skipped = {}, "not asked for"
        emoji_seeds = seeds if arguments.emoji_seeds is None else arguments.emoji_seeds
        if emoji_seeds:
            emoji, skipped = emoji_figures(CACHE, config, emoji_seeds, is_quick=arguments.quick)
    result = {
        "benchmark": "alignment_quality",
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "figures": {name: round(float(value), 5) for name, value in (figures | emoji).items()},
        "targets": {name: {"op": op, "value": value} for name, (op, value) in TARGETS.items()},
        "settings": {
            "data": Path(arguments.data).name if arguments.data else "ml-100k",
            "seeds": seeds,
            "lora": {**LORA_SETTINGS, "seeds": lora_seeds},
            "emoji": {"seeds": emoji_seeds, "left_out": skipped},
        },
    }
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Folder in the input contract; default: ML-100K.")
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    parser.add_argument("--features", help="Folder to keep backbone features in.")
    parser.add_argument("--seeds", type=int, default=3, help="Encoders of each kind.")
    parser.add_argument("--lora-seeds", type=int, default=1, help="Of these, tuned by LoRA.")
    parser.add_argument("--emoji-seeds", type=int, help="Splits of the emojis; 0: leave it out.")
    parser.add_argument(
        "--quick", action="store_true", help="One seed, no LoRA, a tenth of the emojis."
    )
    return parser.parse_args()


def behaviour_figures(
    checked: InputData, config: AlignmentConfig, seeds: int, lora_seeds: int
) -> Figures:
    """Return every figure of one data set, averaged over the seeds.

    Args:
        checked: The data; test rows are read here and nowhere else.
        config: Section ``alignment``; its seed is replaced.
        seeds: Encoders that are trained.
        lora_seeds: For so many seeds the text model is tuned, too.
    """
    features = content_features(checked.items, config, checked.directory)
    behaviour = read_behaviour(checked, "test")
    popularity_M = _popularity(checked)
    measured = []
    for seed in range(seeds):
        seeded = config.model_copy(update={"seed": seed})
        vectors = seed_vectors(checked, features, seeded)
        if seed < lora_seeds:
            vectors[LORA] = lora_vectors(checked, seeded)
        measured.append(_measure(behaviour, vectors, popularity_M))
        _say_seed(seed, measured[-1])
    return {
        "num_items": checked.items.num_rows,
        "num_query_items": len(behaviour.query_items_Q),
        "num_cold_query_items": int(behaviour.is_cold_M[behaviour.query_items_Q].sum()),
        "num_users": len(behaviour.next_items_U),
        **figures_over_seeds(measured),
    }


def seed_vectors(checked: InputData, features: ItemFeatures, config: AlignmentConfig) -> Vectors:
    """Return every kind of vectors of all items for one seed.

    Args:
        checked: The data; its train rows are read.
        features: Content features of its items.
        config: Section ``alignment`` with the seed.
    """
    item_ids_M = checked.items[ITEM_ID].to_numpy()
    is_train_M = np.isin(item_ids_M, checked.train_item_ids())
    pairs = build_pairs(checked, config.pairs, config.seed)
    rows = pair_rows(pairs, item_ids_M[is_train_M])
    head, run = train_head(features.take(is_train_M), rows, config)
    _say(f"seed {config.seed}: {run.num_train_pairs} pairs, best epoch {run.best_epoch}")
    aligned_MD = project_features(head, features, head.linear.out_features)
    num_neighbors = min(VqConfig().num_neighbors, int(is_train_M.sum()) - 1)
    codebook = Codebook.train(
        "c1",
        item_ids_M[is_train_M],
        aligned_MD[is_train_M],
        config=QuantizerConfig(vq=VqConfig(num_neighbors=num_neighbors)),
        encoder=EncoderFacts("e1", "", checked.behaviour_cutoff()),
        created=datetime.now(UTC),
    )
    codes = decoded_vectors(checked.items, codebook, aligned_MD)
    return {RAW: features.raw_vectors(), ALIGNED: aligned_MD, **codes}


def lora_vectors(checked: InputData, config: AlignmentConfig) -> Embeddings:
    """Return vectors of all items by an encoder whose text model was tuned."""
    config = config.model_copy(update=LORA_SETTINGS)
    pairs = build_pairs(checked, config.pairs, config.seed)
    encoder = train_encoder(checked, pairs, config, datetime.now(UTC))
    run = encoder.manifest.training
    _say(f"seed {config.seed}: lora, best epoch {run['best_epoch']}, {run['seconds']:.0f} s")
    return encoder.encode(checked.items)


def _popularity(checked: InputData) -> np.ndarray:
    rows = pc.index_in(checked.positives()[ITEM_ID], checked.items[ITEM_ID].combine_chunks())
    counts_M = np.bincount(rows.to_numpy(), minlength=checked.items.num_rows)
    return counts_M.astype(np.float32)


def _measure(
    behaviour: LaterBehaviour, vectors: Vectors, popularity_M: np.ndarray
) -> dict[str, Measured]:
    by_popularity = Measured(
        {name: neighbor_auc(behaviour, x_MD, popularity_M) for name, x_MD in vectors.items()},
        behaviour.is_cold_M[behaviour.query_items_Q],
    )
    return measure_vectors(behaviour, vectors) | {"popular_neighbor_auc": by_popularity}


def figures_over_seeds(measured: Sequence[Mapping[str, Measured]]) -> Figures:
    """Return means over seeds and samples, and differences to raw vectors with intervals.

    Args:
        measured: Per seed each measure; the same samples every time. Of a kind of vectors that
            only the first seeds have, the figures are those of these seeds.

    Returns:
        Figures by name, see the top of this file.
    """
    figures: Figures = {}
    for measure, first in measured[0].items():
        name = FIGURE_NAMES.get(measure, measure)
        for key, mask_S in first.slices().items():
            name_of_slice = name if key == "all" else f"{key}_{name}"
            values = {
                kind: _values_of_seeds(measured, measure, kind)[:, mask_S]
                for kind in first.values_by_name
            }
            figures |= {f"{name_of_slice}_{kind}": each.mean() for kind, each in values.items()}
            for kind, base in _comparisons(values):
                # The same seeds of both: raw vectors are equal in all.
                gains_RS = values[kind] - values[base][: len(values[kind])]
                low, high = seed_and_sample_interval(gains_RS)
                gain = f"{kind}_minus_{base}_{name_of_slice}"
                figures |= {gain: gains_RS.mean(), f"{gain}_low": low, f"{gain}_high": high}
    return figures


def _values_of_seeds(
    measured: Sequence[Mapping[str, Measured]], measure: str, kind: str
) -> np.ndarray:
    by_seed = [each[measure].values_by_name for each in measured]
    return np.stack([values_by_name[kind] for values_by_name in by_seed if kind in values_by_name])


def _comparisons(kinds: Iterable[str]) -> list[tuple[str, str]]:
    against_raw = [(kind, RAW) for kind in kinds if kind != RAW]
    return [*against_raw, *((kind, ALIGNED) for kind in kinds if kind == LORA)]


def seed_and_sample_interval(values_RS: np.ndarray) -> list[float]:
    """Return the 95 % interval of the mean when seeds and samples are drawn with replacement.

    Args:
        values_RS: One row per seed.
    """
    draws_BR = bootstrap_means(values_RS.T, NUM_DRAWS)
    num_seeds = len(values_RS)
    picked_BR = np.random.default_rng(0).integers(num_seeds, size=(NUM_DRAWS, num_seeds))
    return interval(np.take_along_axis(draws_BR, picked_BR, axis=1).mean(axis=1))


def _say_seed(seed: int, measured: Mapping[str, Measured]) -> None:
    for measure, each in measured.items():
        for key, mask_S in each.slices().items():
            means = {name: values[mask_S].mean() for name, values in each.values_by_name.items()}
            told = "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            _say(f"seed {seed} {measure} {key}: {told}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

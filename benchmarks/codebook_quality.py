"""How good our codes are next to those of libraries and other projects, on real items.

    uv run --frozen --extra cpu python benchmarks/codebook_quality.py [--data DIR] [--seeds N]
        [--quick] [--features DIR] [--sizes 32,64,256] [--cap 1]

Without ``--data`` it runs on the quickstart's ML-100K. The text model is the one that
`make quickstart` fetches. A file ``third_party_codes.parquet`` in the data folder (``item_id``,
``rq_code``) is measured in a block of its own, as far as that needs no decoding.

All methods train on the same vectors (items with a train row, exact duplicates left out), code the
same items and are measured by the functions of the quality report. Nothing is chosen here:
behavioural neighbours are read from test rows. Blocks: raw vectors; the same with at most ``--cap``
items per full code, for methods whose codes add up to the vector; vectors of an encoder aligned on
train rows (prefix ``aligned_``). ``<measure>_minus_best_peer`` sets our default against the best of
the others in that measure, at the size where it does worst; ``mse_over_best_peer`` is a ratio - 1.
Few or uneven cells bring many behavioural neighbours together for no merit, so the share less that
of chance stands beside it (``behaviour_excess``). Deviations (``_std``) are over seeds. Progress
goes to stderr, the last line of stdout is one JSON object.

Shape letters in this file: N items, D width, L levels.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from peer_quantizers import NUM_LEVELS, OURS, PEERS, Coded

from benchmarks.data import data_dir
from examples.quickstart.layout import BACKBONE
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import content_features
from qarm_feast.alignment.pairs import build_pairs
from qarm_feast.alignment.train import pair_rows, train_head
from qarm_feast.behaviour import BehaviourPairs, behaviour_figures, follow_up_pairs
from qarm_feast.caps import capped_codes
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.quality import (
    code_use,
    full_code_figures,
    hit_rates,
    mean_cosine_by_shared_prefix,
    residual_figures,
)
from qarm_feast.quantizers.base import Codes, Embeddings, unit_rows
from qarm_feast.quantizers.rq import ResidualQuantizer
from qarm_feast.schema import ITEM_ID

THIRD_PARTY = "third_party_codes.parquet"
HIGHER_IS_BETTER = {
    "collision_rate": False,
    "code_entropy_bits": True,
    "singleton_share": True,
    "hr10": True,
    "behaviour_share_c1": True,
    "behaviour_share_c1c2": True,
    "behaviour_excess_c1": True,
}
TARGETS = {
    "collision_rate_minus_best_peer": ("le", 0.0),
    "hr10_minus_best_peer": ("ge", 0.0),
    "behaviour_share_minus_best_peer": ("ge", 0.0),
    "code_entropy_bits_minus_best_peer": ("ge", 0.0),
    "singleton_share_minus_best_peer": ("ge", 0.0),
    "behaviour_share_c1c2_minus_best_peer": ("ge", 0.0),
    "mse_over_best_peer": ("le", 0.0),
}

Figures = dict[str, float]
Runs = dict[tuple[str, int], list[Figures]]
"""Figures of each seed by method and size."""


@dataclass(frozen=True)
class Items:
    """Items without exact duplicates: ids, vectors of length 1, which have a train row."""

    item_ids_N: np.ndarray
    unit_ND: Embeddings
    is_train_N: np.ndarray
    pairs: BehaviourPairs


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    seeds = arguments.seeds
    if arguments.quick:
        sizes, seeds = sizes[:1], 1
    with tempfile.TemporaryDirectory() as folder:
        directory = data_dir(arguments.data, folder)
        checked = load_input_data(DataConfig(input_dir=str(directory)))
        raw_ND, aligned_ND = _vectors(checked, arguments, folder)
        raw = _items(checked, raw_ND)
        figures = {
            "num_items": len(raw.item_ids_N),
            "num_duplicates": len(raw_ND) - len(raw.unit_ND),
        }
        figures |= _block("", raw, sizes, seeds, arguments.cap)
        figures |= _third_party(directory / THIRD_PARTY, raw)
        if not arguments.quick:
            figures |= _block("aligned_", _items(checked, aligned_ND), sizes, seeds, None)
    print(json.dumps(_result(figures, arguments, sizes, seeds)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="Folder in the input contract; default: ML-100K.")
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    parser.add_argument("--features", help="Folder to keep backbone features in.")
    parser.add_argument("--sizes", default="32,64,256", help="Codes per level, powers of two.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs per method and size.")
    parser.add_argument("--cap", type=int, default=1, help="Most items per full code, caps on.")
    parser.add_argument(
        "--quick", action="store_true", help="First size, one seed, raw vectors only."
    )
    return parser.parse_args()


def _vectors(
    checked: InputData, arguments: argparse.Namespace, folder: str
) -> tuple[Embeddings, Embeddings]:
    """Return the text model's vectors, and those of a head aligned on train rows."""
    config = AlignmentConfig(backbone=arguments.backbone, features_uri=arguments.features or folder)
    features = content_features(checked.items, config, checked.directory)
    raw_NE = features.raw_vectors()
    if arguments.quick:
        return raw_NE, raw_NE
    item_ids_N = checked.items[ITEM_ID].to_numpy()
    is_train_N = np.isin(item_ids_N, checked.train_item_ids())
    rows = pair_rows(build_pairs(checked, config.pairs, config.seed), item_ids_N[is_train_N])
    head, _ = train_head(features.take(is_train_N), rows, config)
    with torch.no_grad():
        return raw_NE, head(*features.tensors()).numpy()


def _items(checked: InputData, x_ND: Embeddings) -> Items:
    unit_ND = unit_rows(x_ND)
    # The first of equal vectors stays: no method could tell them apart.
    kept = np.sort(np.unique(unit_ND, axis=0, return_index=True)[1])
    item_ids_N = checked.items[ITEM_ID].to_numpy()[kept]
    is_train_N = np.isin(item_ids_N, checked.train_item_ids())
    return Items(item_ids_N, unit_ND[kept], is_train_N, follow_up_pairs(checked))


def _block(prefix: str, items: Items, sizes: list[int], seeds: int, cap: int | None) -> Figures:
    """Return the figures of one kind of vectors, caps off and, with a cap, on."""
    free: Runs = {}
    capped: Runs = {}
    for size in sizes:
        for name, method in {**OURS, **PEERS}.items():
            coded = [
                method(items.unit_ND[items.is_train_N], items.unit_ND, size, seed)
                for seed in range(seeds)
            ]
            free[name, size] = [_measured(each, items) for each in coded]
            _say_row(f"{prefix}{name} 3x{size}", free[name, size])
            if cap is not None and coded[0].codebooks:
                capped[name, size] = [_measured(_capped(each, items, cap), items) for each in coded]
    figures = _means(prefix, free) | _against_peers(prefix, free, sizes)
    return figures | _means(f"{prefix}capped_", capped)


def _measured(coded: Coded, items: Items) -> Figures:
    use = [code_use(np.bincount(codes_N, minlength=2)) for codes_N in coded.rq_NL.T]
    full = full_code_figures(coded.rq_NL)
    behaviour = behaviour_figures(items.pairs, items.item_ids_N, coded.rq_NL)["levels"]
    return {
        "collision_rate": full["collision_rate"],
        "singleton_share": full["singleton_share"],
        "code_entropy_bits": float(np.mean([level["code_entropy_bits"] for level in use])),
        "hr10": hit_rates(coded.rq_NL, coded.decoded_ND, items.unit_ND)[1],
        "mse": residual_figures(items.unit_ND, coded.decoded_ND)["quantization_mse"],
        **_behaviour(behaviour),
    }


def _behaviour(levels: list[dict[str, float]]) -> Figures:
    figures: Figures = {}
    for name, level in zip(("c1", "c1c2"), levels, strict=False):
        figures[f"behaviour_share_{name}"] = level["share"]
        figures[f"behaviour_chance_{name}"] = level["chance"]
        figures[f"behaviour_excess_{name}"] = level["share"] - level["chance"]
    return figures


def _capped(coded: Coded, items: Items, cap: int) -> Coded:
    quantizer = ResidualQuantizer(codebooks=coded.codebooks)
    is_held_N = np.zeros(len(items.item_ids_N), dtype=np.bool_)
    rq_NL = capped_codes(
        quantizer, items.item_ids_N, items.unit_ND, coded.rq_NL, is_held_N, cap
    ).rq_NL
    return Coded(rq_NL, quantizer.decode(rq_NL), coded.codebooks)


def _means(prefix: str, runs: Runs) -> Figures:
    figures: Figures = {}
    for (name, size), seeds in runs.items():
        for measure in seeds[0]:
            values = [run[measure] for run in seeds]
            figures[f"{prefix}{measure}_{name}_{size}"] = float(np.mean(values))
            figures[f"{prefix}{measure}_{name}_{size}_std"] = float(np.std(values))
    return figures


def _against_peers(prefix: str, runs: Runs, sizes: list[int]) -> Figures:
    """Return our default minus the best peer, per measure at the size where it does worst."""
    figures = {}
    for measure, is_higher_better in HIGHER_IS_BETTER.items():
        sign = 1 if is_higher_better else -1
        gaps = [_gap(runs, measure, size, sign) for size in sizes]
        name = measure.removesuffix("_c1")
        figures[f"{prefix}{name}_minus_best_peer"] = sign * min(sign * gap for gap in gaps)
    ratios = [
        1 / (1 - _gap(runs, "mse", size, -1) / _mean(runs, "ours", "mse", size)) - 1
        for size in sizes
    ]
    return figures | {f"{prefix}mse_over_best_peer": max(ratios)}


def _gap(runs: Runs, measure: str, size: int, sign: int) -> float:
    best = max(sign * _mean(runs, peer, measure, size) for peer in PEERS)
    return _mean(runs, "ours", measure, size) - sign * best


def _mean(runs: Runs, name: str, measure: str, size: int) -> float:
    return float(np.mean([run[measure] for run in runs[name, size]]))


def _third_party(path: Path, items: Items) -> Figures:
    if not path.is_file():
        return {}
    table = pq.read_table(path)
    rows = pc.index_in(pa.array(items.item_ids_N), table[ITEM_ID].combine_chunks())
    rq_NL: Codes = np.array(table["rq_code"].take(rows).to_pylist(), dtype=np.int64)
    use = [code_use(np.bincount(codes_N)) for codes_N in rq_NL.T]
    full = full_code_figures(rq_NL)
    cosines = mean_cosine_by_shared_prefix(rq_NL, items.unit_ND)
    levels = behaviour_figures(items.pairs, items.item_ids_N, rq_NL)["levels"]
    figures = {
        "collision_rate": full["collision_rate"],
        "singleton_share": full["singleton_share"],
        "code_entropy_bits": float(np.mean([level["code_entropy_bits"] for level in use])),
        **{f"cosine_of_{n}_shared": c for n, c in enumerate(cosines) if c is not None},
        **_behaviour(levels),
    }
    _say_row("third-party codes", [figures])
    return {f"third_party_{name}": value for name, value in figures.items()}


def _result(
    figures: Figures, arguments: argparse.Namespace, sizes: list[int], seeds: int
) -> dict[str, object]:
    targets = {name: {"op": op, "value": value} for name, (op, value) in TARGETS.items()}
    return {
        "benchmark": "codebook_quality",
        "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "figures": {name: round(float(value), 5) for name, value in figures.items()},
        "targets": targets,
        "settings": {
            "data": Path(arguments.data).name if arguments.data else "ml-100k",
            "num_levels": NUM_LEVELS,
            "sizes": sizes,
            "seeds": seeds,
            "cap": arguments.cap,
        },
    }


def _say_row(name: str, seeds: list[Figures]) -> None:
    means: Mapping[str, float] = {
        key: float(np.mean([run[key] for run in seeds])) for key in seeds[0]
    }
    _say(f"{name:<28}" + "  ".join(f"{key} {value:.4f}" for key, value in means.items()))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

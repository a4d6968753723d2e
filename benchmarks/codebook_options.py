"""What the options of a codebook do to its codes: FSQ, balanced training, caps.

    uv run --frozen --extra cpu python benchmarks/codebook_options.py [--vectors DIR] [--quick]

Without ``--vectors`` (a folder that `qarm align export` wrote) it runs on made-up clusters whose
sizes fall like 1 / rank. Every fifth item is held out of training: ``mse_...`` is the squared error
of those as a share of their squared length. Collisions are of all items; exact-duplicate vectors
are left out and counted. Times are ratios inside this run, one thread. Progress goes to stderr,
the last line of stdout is one JSON object.

Shape letters in this file: N items, D embedding width, L levels.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from qarm_feast.caps import NO_PUBLISHED_CODE, capped_codes
from qarm_feast.quality import code_use, full_code_figures
from qarm_feast.quantizers import ResidualQuantizer, RqConfig
from qarm_feast.quantizers.base import Embeddings, unit_rows
from qarm_feast.quantizers.rq import level_sizes
from qarm_feast.vector_files import VectorFiles

CAPS = (1, 5, 20)
TARGETS = {"balanced_train_time_vs_kmeans": {"op": "le", "value": 3.0}}


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    torch.set_num_threads(1)
    unit_ND, num_duplicates = _vectors(arguments)
    rows_N = np.arange(len(unit_ND))
    auto = level_sizes(RqConfig(), int((rows_N % 5 > 0).sum()))
    arms = {
        "kmeans": RqConfig(codebook_size=auto),
        "balanced": RqConfig(codebook_size=auto, enable_balance=True),
        "fsq": RqConfig(codebook_size=auto, last_level="fsq"),
        "fsq_auto": RqConfig(last_level="fsq"),
        "fsq_auto_balanced": RqConfig(last_level="fsq", enable_balance=True),
    }
    figures: dict[str, float] = {}
    trained = {}
    for name, config in arms.items():
        trained[name], seconds = _trained(config, unit_ND[rows_N % 5 > 0])
        figures |= {
            f"{key}_{name}": value for key, value in _judged(trained[name], unit_ND).items()
        }
        figures[f"{name}_train_time_vs_kmeans"] = seconds / figures.setdefault("seconds", seconds)
    del figures["seconds"], figures["kmeans_train_time_vs_kmeans"]
    figures |= _capped(trained["kmeans"], unit_ND)
    print(
        json.dumps(
            {
                "benchmark": "codebook_options",
                "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "figures": {name: round(float(value), 5) for name, value in figures.items()},
                "targets": TARGETS,
                "settings": {
                    "vectors": Path(arguments.vectors).name if arguments.vectors else "made up",
                    "num_items": len(unit_ND),
                    "num_duplicates_left_out": num_duplicates,
                    "level_sizes": {name: arm.level_sizes for name, arm in trained.items()},
                },
            }
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", help="Folder of exported vectors; default: made-up clusters.")
    parser.add_argument("--quick", action="store_true", help="Fewer made-up items.")
    return parser.parse_args()


def _vectors(arguments: argparse.Namespace) -> tuple[Embeddings, int]:
    if arguments.vectors:
        unit_ND = unit_rows(VectorFiles.open(Path(arguments.vectors)).read().x_ND)
    else:
        unit_ND = _clusters(10_000 if arguments.quick else 100_000, 64)
    distinct_ND = np.unique(unit_ND, axis=0)
    # Shuffled, so that every fifth is a fair sample.
    order_N = np.random.default_rng(0).permutation(len(distinct_ND))
    return distinct_ND[order_N], len(unit_ND) - len(distinct_ND)


def _clusters(num_items: int, embedding_dim: int) -> Embeddings:
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 1001)
    cluster_N = rng.choice(1000, size=num_items, p=shares / shares.sum())
    centres_CD = unit_rows(rng.standard_normal((1000, embedding_dim)).astype(np.float32))
    noise_ND = rng.standard_normal((num_items, embedding_dim)) * (0.5 / np.sqrt(embedding_dim))
    return unit_rows((centres_CD[cluster_N] + noise_ND).astype(np.float32))


def _trained(config: RqConfig, x_ND: Embeddings) -> tuple[ResidualQuantizer, float]:
    quantizer = ResidualQuantizer(config)
    start = time.monotonic()
    quantizer.train(x_ND)
    seconds = time.monotonic() - start
    print(f"trained {quantizer.level_sizes} in {seconds:.1f} s", file=sys.stderr)
    return quantizer, seconds


def _judged(quantizer: ResidualQuantizer, unit_ND: Embeddings) -> dict[str, float]:
    rq_NL = quantizer.encode(unit_ND)
    is_held_out_N = np.arange(len(unit_ND)) % 5 == 0
    left_ND = unit_ND[is_held_out_N] - quantizer.decode(rq_NL[is_held_out_N])
    full = full_code_figures(rq_NL)
    use = [
        code_use(np.bincount(codes_N, minlength=size))
        for codes_N, size in zip(rq_NL.T, quantizer.level_sizes, strict=True)
    ]
    return {
        "collision_rate": full["collision_rate"],
        "singleton_share": full["singleton_share"],
        "mse": float(np.square(left_ND, dtype=np.float64).sum(axis=1).mean()),
        **{f"gini_c{number}": level["gini"] for number, level in enumerate(use, start=1)},
        **{
            f"bits_c{number}": level["code_entropy_bits"]
            for number, level in enumerate(use, start=1)
        },
    }


def _capped(quantizer: ResidualQuantizer, unit_ND: Embeddings) -> dict[str, float]:
    start = time.monotonic()
    rq_NL = quantizer.encode(unit_ND)
    encode_seconds = time.monotonic() - start
    unpublished_N = np.full(len(unit_ND), NO_PUBLISHED_CODE)
    figures = {}
    for cap in CAPS:
        start = time.monotonic()
        capped = capped_codes(
            quantizer, np.arange(len(unit_ND)), unit_ND, rq_NL, unpublished_N, cap
        )
        figures[f"cap{cap}_time_vs_encode"] = (time.monotonic() - start) / encode_seconds
        figures[f"cap{cap}_moved_share"] = capped.num_moved / len(unit_ND)
        figures[f"cap{cap}_without_room"] = capped.num_without_room
        figures[f"cap{cap}_collision_rate"] = full_code_figures(capped.rq_NL)["collision_rate"]
    return figures


if __name__ == "__main__":
    main()

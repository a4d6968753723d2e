"""How fast the item encoder trains and exports, and what gradient caching saves in memory.

    uv run --frozen --extra cpu python benchmarks/alignment.py [--quick] [--backbone DIR]

Items are made up (titles of 4 to 20 words), and so are their pairs; the text model is MiniLM. On a
machine with a GPU everything runs there.

    train_vs_bare_loop         the lower one of the two below
    train_vs_bare_loop_head    steps per second of the whole trainer (batches drawn, items made
                               unique, false negatives found, progress) by those of a bare loop of
                               the same model and losses over the same batches, which lie in memory;
                               a head over frozen features, 1,024 pairs per step
    train_vs_bare_loop_lora    the same for LoRA over MiniLM; the bare loop's texts are tokens
    export_vs_backbone         items per second of an export (items from parquet, tokens, hashes,
                               head, parquet) by those of the backbone's forward passes alone
    cached_memory_vs_small_batch  what a step of 4,096 pairs with gradient caching takes in memory
                               by what a plain one of 256 pairs does; LoRA, a process for each

Ratios of speeds are medians over three rounds, the two arms in turns; on a CPU a second is one of
CPU time, so that other work on the machine does not count. Progress goes to stderr, the last line
of stdout is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.alignment_export import ExportArms
from benchmarks.alignment_memory import step_bytes
from benchmarks.alignment_steps import WHOLE_STEP, HeadArms, LoraArms, Sizes
from examples.quickstart.layout import BACKBONE

TARGETS = {
    "train_vs_bare_loop": {"op": "ge", "value": 0.9},
    "export_vs_backbone": {"op": "ge", "value": 0.9},
    "cached_memory_vs_small_batch": {"op": "le", "value": 1.3},
}
NUM_ROUNDS = 3
MIB = 1 << 20
FULL = Sizes(
    head_items=20_000, head_steps=40, lora_items=400, lora_steps=4, export_items=2_000,
    memory_items=4_000,
)  # fmt: skip
QUICK = Sizes(
    head_items=5_000, head_steps=12, lora_items=64, lora_steps=1, export_items=150,
    memory_items=600,
)  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    parser.add_argument("--quick", action="store_true", help="Fewer items and steps.")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    backbone = str(Path(arguments.backbone).resolve())
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(sizes, backbone, Path(folder))
    print(
        json.dumps(
            {
                "benchmark": "alignment",
                "device": _device(),
                "figures": {name: round(value, 4) for name, value in figures.items()},
                "targets": TARGETS,
                "settings": {"quick": arguments.quick, **asdict(sizes)},
            }
        )
    )


def measured(sizes: Sizes, backbone: str, folder: Path) -> dict[str, float]:
    """Return all figures.

    Args:
        sizes: Numbers of items and steps.
        backbone: Folder of the text model.
        folder: For files that live as long as the run.

    Returns:
        Ratios, speeds in steps and items per second, and memory in MiB.
    """
    figures: dict[str, float] = {}
    for name, arms in (("head", HeadArms(sizes)), ("lora", LoraArms(sizes, backbone))):
        _tell(f"training, {name}")
        ratio, speeds = _compare(arms.trainer, arms.bare_loop)
        figures[f"train_vs_bare_loop_{name}"] = ratio
        figures[f"steps_per_second_{name}"] = speeds
    kinds = ("train_vs_bare_loop_head", "train_vs_bare_loop_lora")
    figures["train_vs_bare_loop"] = min(figures[kind] for kind in kinds)
    _tell("export")
    export = ExportArms(sizes, backbone, folder)
    figures["export_vs_backbone"], figures["items_per_second_export"] = _compare(
        export.export, export.backbone_alone
    )
    _tell("memory")
    cached = step_bytes(backbone, sizes.memory_items, 4096, 128)
    plain = step_bytes(backbone, sizes.memory_items, 256, WHOLE_STEP)
    figures["cached_memory_vs_small_batch"] = cached / plain
    return figures | {"cached_4096_mib": cached / MIB, "plain_256_mib": plain / MIB}


def _compare(ours: Callable[[], float], bare: Callable[[], float]) -> tuple[float, float]:
    """Return the median ratio of two speeds measured in turns, and the median of ours."""
    ours()
    bare()
    rounds = [(ours(), bare()) for _ in range(NUM_ROUNDS)]
    ratio = statistics.median(one / other for one, other in rounds)
    return ratio, statistics.median(one for one, _ in rounds)


def _device() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _tell(what: str) -> None:
    print(f"alignment: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

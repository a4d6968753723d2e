"""How fast the ranker trains: the whole trainer, its input, and its rivals, in turns in one run.

    uv run --frozen --extra cpu python benchmarks/trainer.py [--quick] [--ranks N]

Rows are made up (random ids and codes, about 20 history items); the ranker has its default sizes.
Two ranks by torchrun; on a machine with GPUs one rank per GPU, and the model trains there.

    trainer_vs_bare_loop     rows per second of the whole trainer (rows from parquet, batches built
                             ahead, pipeline, progress) by those of a bare loop that steps the same
                             sharded model over batches that lie in memory
    input_vs_training        rows per second of reading, shuffling and batching alone, by those of
                             the whole trainer
    trainer_vs_plain_torch   rows per second of the whole trainer, by those of the same net on
                             nn.EmbeddingBag tables; there each rank trains alone, nothing is
                             exchanged
    time_share_*             lookups with their backward pass, dense parts, and input, one by one
    *_1e5_rows ... *_1e7_rows  a bare loop over an item table of so many rows: rows per second, and
                             the MiB that the memory of the first rank grew by

Before the first step the first window of rows (65,536 of a rank) is read. Of a pass over 480,000
rows on two ranks, 59 steps each, that is a small part; with few rows (``--rows``, ``--quick``) it
weighs more.
Each ratio is the median over three rounds. Progress goes to stderr, the last line of stdout is one
JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TARGETS = {"trainer_vs_bare_loop": 0.9, "input_vs_training": 10.0}
GROWTH = (100_000, 1_000_000, 10_000_000)
RANKS_SCRIPT = "benchmarks.trainer_ranks"


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    num_ranks = arguments.ranks or torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_ranks), "-m", RANKS_SCRIPT, "--folder", folder]
        for name in ("rows", "items", "batch_size", "growth"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        # Workers of torchrun do not take over "-W ignore".
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
        figures = json.loads((Path(folder) / "figures.json").read_text("utf-8"))
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        json.dumps(
            {
                "benchmark": "trainer",
                "device": f"{kind}, {num_ranks} ranks",
                "figures": {name: round(value, 4) for name, value in figures.items()},
                "targets": {name: {"op": "ge", "value": value} for name, value in TARGETS.items()},
                "settings": {
                    name: getattr(arguments, name)
                    for name in ("rows", "items", "batch_size", "growth", "quick")
                },
            }
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="Processes; default: 2, or one per GPU.")
    parser.add_argument("--rows", type=int, default=480_000, help="Train rows.")
    parser.add_argument("--items", type=int, default=100_000, help="Items, and users.")
    parser.add_argument("--batch-size", type=int, default=4096, help="Rows per rank and step.")
    parser.add_argument(
        "--growth", default=",".join(map(str, GROWTH)), help="Table rows, by comma."
    )
    parser.add_argument("--quick", action="store_true", help="Fewer rows, no table of 1e7 rows.")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows = min(arguments.rows, 40_000)
        arguments.growth = ",".join(
            size for size in arguments.growth.split(",") if size and int(size) < max(GROWTH)
        )
    return arguments


if __name__ == "__main__":
    main()

"""What our Feast stores gain over Feast's own on the same rows, and what a bare client takes.

    uv run --frozen --extra cpu python benchmarks/feature_store.py [--quick] [--only SECTION]

Rows of 6 RQ and 25 VQ codes with hashes and times; it makes its own. Real redis-server and sqlite
files; the arms take turns in one run, everything made before is frozen for the collector.

- ``redis`` and ``sqlite``: ``<store>_write_vs_feast`` is the time of ``write_to_online_store`` over
  that of our guarded write of the same rows, in one call; ``_100`` and ``_1000`` in calls of so
  many rows. ``<store>_read_vs_feast`` is the median time of ``get_online_features`` turned into
  int64 matrices over that of ``CodeReader.read_codes``, 1000 random items; ``_100`` 100 items.
  ``..._vs_bare_client`` is the time of the bare client with ready bytes over ours. Times
  per row are microseconds; ``cpu`` is the client's processor time, ``server`` the server's.
- ``offline``: ``join_vs_feast_duckdb`` and ``..._dask``, ``materialize_vs_feast_...``: the time of
  Feast's offline store over ours. The duckdb arm needs ``ibis``.

Progress goes to stderr, the last line of stdout is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import feature_store_offline as offline
from benchmarks import feature_store_online as online
from benchmarks.stream_bench import NUM_NEIGHBORS

TARGETS = {
    "redis_write_vs_feast": ("ge", 8.0),
    "sqlite_write_vs_feast": ("ge", 2.5),
    "redis_read_vs_feast": ("ge", 6.0),
    "sqlite_read_vs_feast": ("ge", 4.5),
    "redis_read_p99_over_p50": ("le", 3.0),
    "sqlite_read_p99_over_p50": ("le", 3.0),
}


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    online_scale = online.QUICK if arguments.quick else online.Scale()
    offline_scale = offline.QUICK if arguments.quick else offline.Scale()
    sections: dict[str, Callable[[Path], dict[str, float]]] = {
        "redis": lambda folder: online.redis_figures(folder, online_scale),
        "sqlite": lambda folder: online.sqlite_figures(folder, online_scale),
        "offline": lambda folder: offline.offline_figures(folder, offline_scale),
    }
    figures: dict[str, float] = {}
    for name in arguments.only or SECTIONS:
        print(f"section {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            figures |= sections[name](Path(folder))
    print(
        json.dumps(
            {
                "benchmark": "feature_store",
                "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
                "figures": {name: round(float(value), 4) for name, value in figures.items()},
                "targets": {
                    name: {"op": op, "value": value} for name, (op, value) in TARGETS.items()
                },
                "settings": {
                    "num_levels": online.NUM_LEVELS,
                    "num_neighbors": NUM_NEIGHBORS,
                    "load_average": os.getloadavg()[0],
                    **dataclasses.asdict(online_scale),
                    **dataclasses.asdict(offline_scale),
                },
            }
        )
    )


SECTIONS = ("redis", "sqlite", "offline")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fewer rows and repetitions.")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="Run this section.")
    return parser.parse_args()


if __name__ == "__main__":
    main()

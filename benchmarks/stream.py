"""What the streaming worker costs, as ratios to its own stages and to ``FeatureStore.push``.

    uv run --frozen --extra cpu python benchmarks/stream.py [--quick] [--only SECTION] [--items N]

Real Apache Kafka with 4 partitions and real redis, one worker with one compute thread; items with
ready 128-d vectors, RQ 3 x 4096 and VQ 25 over a pool of 50,000. It makes its own items.

- ``cpu``: ``cpu_per_item_vs_stages`` is a worker's processor time per item over the sum of its
  stages' times, each measured alone on the same records. Broker and redis stand apart.
- ``write``: ``write_path_vs_feast_push`` is the time of a push over that of our write path with
  the codes given, see ``stream_write``; ``sqlite_vs_feast`` that of the sqlite stores alone.
- ``freshness``: from sending an event to reading it online, at a tenth of the peak load;
  ``takedown_...`` and ``erasure_...``: from sending the tombstone of an item, or of a user, to
  reading it as absent, while that load runs.
- ``memory``: ``rss_growth`` is a worker's resident memory after all items over that after a tenth.

``whole_vs_feast_push`` is the time of a push over that of the whole chain, quantization included.
Figures that end in ``_json`` or ``_arrow`` are of one form of item events: one JSON object per
item, or Arrow records of 100 items. The names without an ending are of the slower form.
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

from benchmarks.stream_bench import EMBEDDING_DIM, QUICK, Bench, Scale, open_bench
from benchmarks.stream_chain import ROWS_PER_RECORD, Chain
from benchmarks.stream_write import is_duckdb, sqlite_figures, write_figures
from streaming.assembly import limit_threads

ITEMS_STEP = 2_000
"""So that every part of a section is made of whole Arrow records."""
FORMS = tuple(ROWS_PER_RECORD)
TARGETS = {
    "cpu_per_item_vs_stages": ("le", 1.25),
    "write_path_vs_feast_push": ("ge", 5.0),
    "freshness_p99_seconds": ("le", 1.0),
    "rss_growth": ("le", 1.1),
}
WORSE = {"le": max, "ge": min}


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    limit_threads(1)
    scale = QUICK if arguments.quick else Scale()
    if arguments.items:
        memory = {"num_items": arguments.items, "num_memory_items": 10 * arguments.items}
        scale = dataclasses.replace(scale, **memory)
    names = arguments.only or list(SECTIONS)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, open_bench(Path(folder), scale) as bench:
        chain = Chain(bench)
        for name in names:
            print(f"section {name}", file=sys.stderr, flush=True)
            figures |= SECTIONS[name](bench, chain, figures)
    figures |= whole_ratios(figures)
    targets = {
        figure: {"op": op, "value": value}
        for name, (op, value) in TARGETS.items()
        for figure in (name, *(f"{name}_{form}" for form in FORMS))
        if figure in figures or figure == name
    }
    print(
        json.dumps(
            {
                "benchmark": "stream",
                "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, 1 thread",
                "figures": {name: round(float(value), 4) for name, value in figures.items()},
                "targets": targets,
                "settings": {
                    "embedding_dim": EMBEDDING_DIM,
                    "is_duckdb": is_duckdb(),
                    "load_average": os.getloadavg()[0],
                    **dataclasses.asdict(scale),
                },
            }
        )
    )


def cpu_section(bench: Bench, chain: Chain, found: dict[str, float]) -> dict[str, float]:
    """Processor time per item of the chain and of its stages."""
    figures: dict[str, float] = {}
    for form in FORMS:
        figures |= chain.cpu_figures(form)
        _say(figures)
    return figures | slower_form(figures, "cpu_per_item_vs_stages")


def write_section(bench: Bench, chain: Chain, found: dict[str, float]) -> dict[str, float]:
    """Our write path against a push."""
    figures = write_figures(bench)
    figures |= sqlite_figures(bench)
    _say(figures)
    return figures | slower_form(figures, "write_path_vs_feast_push")


def freshness_section(bench: Bench, chain: Chain, found: dict[str, float]) -> dict[str, float]:
    """Time until an event is readable; the peak load is measured if it is not known yet."""
    peak = found if "whole_us_json" in found else chain.cpu_figures("json")
    figures = chain.freshness_figures(1e6 / peak["whole_us_json"])
    _say(figures)
    return figures


def memory_section(bench: Bench, chain: Chain, found: dict[str, float]) -> dict[str, float]:
    """Resident memory of a worker."""
    figures = chain.memory_figures()
    _say(figures)
    return figures


SECTIONS: dict[str, Callable[[Bench, Chain, dict[str, float]], dict[str, float]]] = {
    "write": write_section,
    "cpu": cpu_section,
    "freshness": freshness_section,
    "memory": memory_section,
}


def slower_form(figures: dict[str, float], name: str) -> dict[str, float]:
    """Return the figure without an ending: the one of the forms that is further from the target.

    Args:
        figures: ``<name>_<form>`` of both forms.
        name: A figure with a target.

    Returns:
        One figure.
    """
    return {name: WORSE[TARGETS[name][0]](figures[f"{name}_{form}"] for form in FORMS)}


def whole_ratios(figures: dict[str, float]) -> dict[str, float]:
    """Return ``whole_vs_feast_push`` by form and of the slower one, if both sections have run."""
    if "push_us" not in figures or "whole_us_json" not in figures:
        return {}
    ratios = {
        f"whole_vs_feast_push_{form}": figures["push_us"] / figures[f"whole_us_{form}"]
        for form in FORMS
    }
    return {"whole_vs_feast_push": min(ratios.values()), **ratios}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fewer items, smaller codebook.")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="Run this section.")
    parser.add_argument(
        "--items",
        type=int,
        help=f"Items, a multiple of {ITEMS_STEP:,}; ten times as many in section memory.",
    )
    arguments = parser.parse_args()
    if arguments.items is not None and (arguments.items <= 0 or arguments.items % ITEMS_STEP):
        parser.error(f"--items is {arguments.items}, not a multiple of {ITEMS_STEP}")
    return arguments


def _say(figures: dict[str, float]) -> None:
    rounded = {name: round(value, 3) for name, value in figures.items()}
    print(f"  {rounded}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

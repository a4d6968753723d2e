"""How the pairs job grows: time and memory at 1, 5 and 20 million generated interactions.

    uv run --frozen --extra cpu python benchmarks/pairs.py [--quick] [--sizes N ...] [--processes N]

The data is made up (``make_interactions``; its settings are printed): items drawn by Zipf's law,
users by log-normal activity, all rows positive train rows, and one more user with a tenth of the
rows, at most 100,000, one after the other. Each size is read and turned into pairs of all sources
by ``qarm align pairs``'s own functions in a process of its own, while this one looks at the
resident memory of that process and its workers every 50 ms; pages that they share count in each.

    seconds_<size>               whole job, the reading and checking of the data included
    rows_per_second_<size>       interactions by these seconds
    cpu_seconds_<size>           processor time of the job and its workers, which other work on the
                                 machine lengthens little
    peak_gib_<size>              most resident memory of the job and its workers together
    <source>_seconds_<size>      of these, the sources one by one
    cpu_seconds_growth           processor time per row at the largest size by that at the smallest
    peak_gib                     of the largest size

Progress goes to stderr, the last line of stdout is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.alignment.pairs import report_of, write_pairs
from qarm_feast.input_data import DataConfig, load_input_data

SIZES = (1_000_000, 5_000_000, 20_000_000)
SIZES_QUICK = (100_000, 300_000)
TARGETS = {"cpu_seconds_growth": ("le", 1.5), "peak_gib": ("le", 8.0)}
SOURCES = ("swing", "item_cf", "u2i")
START_SECONDS = 1_700_000_000
ROWS_PER_GROUP = 1_000_000


@dataclass(frozen=True)
class Shape:
    """What the interactions look like, whatever their number.

    Attributes:
        rows_per_user: Mean interactions of a user.
        rows_per_item: Mean interactions of an item.
        zipf_exponent: Item number r (from 1) is drawn proportionally to ``r ** -exponent``.
        activity_sigma: Standard deviation of the logarithm of a user's activity.
        most_of_one_user: Rows of the one very active user, at most.
        days: Events are spread evenly over so many days.
    """

    rows_per_user: int = 50
    rows_per_item: int = 100
    zipf_exponent: float = 1.0
    activity_sigma: float = 1.0
    most_of_one_user: int = 100_000
    days: int = 90


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Smaller sizes.")
    parser.add_argument("--sizes", type=int, nargs="+", help="Numbers of interactions, ascending.")
    parser.add_argument("--processes", type=int, help="Worker processes; default: one per core.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the made-up interactions.")
    arguments = parser.parse_args()
    sizes = arguments.sizes or (SIZES_QUICK if arguments.quick else SIZES)
    figures: dict[str, float] = {}
    for num_rows in sizes:
        figures |= _measure(num_rows, arguments.seed, arguments.processes)
    figures |= growth(figures, sizes)
    result = {
        "benchmark": "pairs",
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "targets": {name: {"op": op, "value": value} for name, (op, value) in TARGETS.items()},
        "settings": {"sizes": list(sizes), "sources": SOURCES, "processes": arguments.processes,
                     "seed": arguments.seed, "quick": arguments.quick, **asdict(Shape())},
    }  # fmt: skip
    print(json.dumps(result))


def suffix_of(num_rows: int) -> str:
    """Return a number of rows as figures name it: 20m, 100k."""
    return f"{num_rows // 10**6}m" if num_rows % 10**6 == 0 else f"{num_rows // 1000}k"


def growth(figures: dict[str, float], sizes: list[int] | tuple[int, ...]) -> dict[str, float]:
    """Return the figures that compare the sizes."""
    smallest, largest = suffix_of(sizes[0]), suffix_of(sizes[-1])
    per_row = [
        figures[f"cpu_seconds_{suffix}"] / num_rows
        for suffix, num_rows in ((smallest, sizes[0]), (largest, sizes[-1]))
    ]
    return {
        "cpu_seconds_growth": per_row[1] / per_row[0],
        "peak_gib": figures[f"peak_gib_{largest}"],
    }


def _measure(num_rows: int, seed: int, num_processes: int | None) -> dict[str, float]:
    suffix = suffix_of(num_rows)
    with tempfile.TemporaryDirectory() as name:
        print(f"pairs: writing {num_rows:,} interactions", file=sys.stderr, flush=True)
        write_input(Path(name), num_rows, Shape(), seed)
        print(f"pairs: building the pairs of {suffix}", file=sys.stderr, flush=True)
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_build, args=(name, num_processes))
        process.start()
        peak_bytes = _watch(process)
        if process.exitcode != 0:
            sys.exit(f"pairs: the job of {num_rows:,} rows ended with {process.exitcode}")
        measured = json.loads((Path(name) / "measured.json").read_text("utf-8"))
    figures = {f"{figure}_{suffix}": value for figure, value in measured.items()}
    figures[f"rows_per_second_{suffix}"] = num_rows / measured["seconds"]
    figures[f"peak_gib_{suffix}"] = peak_bytes / 2**30
    print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def write_input(folder: Path, num_rows: int, shape: Shape, seed: int) -> None:
    """Write items and interactions in the input contract."""
    num_items = num_rows // shape.rows_per_item
    stamp = pa.scalar(START_SECONDS * 1_000_000).cast(pa.timestamp("us", tz="UTC"))
    items = pa.table(
        {
            "item_id": np.arange(num_items),
            "upload_timestamp": pa.repeat(stamp, num_items),
            "title": pa.repeat(pa.scalar("made up"), num_items),
        }
    )
    pq.write_table(items, folder / "items.parquet")
    writer = None
    for columns in make_interactions(num_rows, shape, seed):
        size = len(columns["user_id"])
        table = pa.table(
            {
                **columns,
                "event_timestamp": pa.array(columns["event_timestamp"]).cast(stamp.type),
                "is_like": pa.repeat(pa.scalar(True), size),
                "split": pa.repeat(pa.scalar("train"), size),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "interactions.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None, "there is at least the very active user"
    writer.close()


def make_interactions(num_rows: int, shape: Shape, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield users, items and times of interactions, in random order, a part at a time.

    Args:
        num_rows: Interactions in all.
        shape: How users and items are drawn.
        seed: Seed.

    Yields:
        int64 columns ``user_id``, ``item_id`` and ``event_timestamp`` (microseconds).
    """
    generator = np.random.default_rng(seed)
    num_users, num_items = num_rows // shape.rows_per_user, num_rows // shape.rows_per_item
    users = np.cumsum(generator.lognormal(sigma=shape.activity_sigma, size=num_users))
    items = np.cumsum(np.arange(1.0, num_items + 1) ** -shape.zipf_exponent)
    names = generator.permutation(num_items)
    num_of_one = min(shape.most_of_one_user, num_rows // 10)
    span = shape.days * 86_400_000_000
    # The very active user goes through the items one after the other.
    yield {
        "user_id": np.full(num_of_one, num_users),
        "item_id": np.arange(num_of_one) % num_items,
        "event_timestamp": START_SECONDS * 1_000_000 + np.arange(num_of_one) * (span // num_of_one),
    }
    for first in range(num_of_one, num_rows, ROWS_PER_GROUP):
        size = min(ROWS_PER_GROUP, num_rows - first)
        yield {
            "user_id": np.searchsorted(users, generator.random(size) * users[-1]),
            "item_id": names[np.searchsorted(items, generator.random(size) * items[-1])],
            "event_timestamp": START_SECONDS * 1_000_000 + generator.integers(0, span, size),
        }


def _build(folder: str, num_processes: int | None) -> None:
    start = time.monotonic()
    checked = load_input_data(DataConfig(input_dir=folder))
    pairs = PairConfig(sources=SOURCES, num_processes=num_processes)
    _, table = write_pairs(checked, AlignmentConfig(pairs_uri=f"{folder}/pairs", pairs=pairs))
    report = report_of(table)
    print("\n".join(report.lines()), file=sys.stderr, flush=True)
    measured = {"seconds": time.monotonic() - start, "cpu_seconds": _cpu_seconds()}
    measured |= {f"{name}_seconds": counts.seconds for name, counts in report.sources.items()}
    measured |= {"pairs": report.num_pairs}
    (Path(folder) / "measured.json").write_text(json.dumps(measured))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _watch(process: BaseProcess) -> int:
    """Return the most resident memory of a process and its children until it ends, in bytes."""
    peak_bytes = 0
    while process.is_alive():
        assert process.pid is not None, "it has been started"
        peak_bytes = max(peak_bytes, resident_bytes_of_tree(process.pid))
        process.join(0.05)
    return peak_bytes


def resident_bytes_of_tree(pid: int) -> int:
    """Return the resident memory of a process and its descendants; 0 once it has ended."""
    try:
        resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own_bytes = resident_pages * os.sysconf("SC_PAGE_SIZE")
    return own_bytes + sum(resident_bytes_of_tree(child) for child in children)


if __name__ == "__main__":
    main()

"""The offline log: joins over many rows, over many parts, and a worker's day of parts.

    uv run --frozen --extra cpu python benchmarks/offline_store.py [--quick] [--only SECTION]

It makes its own rows: 6 RQ and 25 VQ codes, as ``item_codes_<version>`` has them.

- ``join``: 10 M code rows of 5 M items in 100 parts, compacted; then a point-in-time join of 1 M
  label rows and a ``pull_latest``. Compaction and reading are processes of their own;
  ``..._peak_gib`` are their resident peaks, ``pull_latest_peak_gib`` that of both reads.
- ``parts``: 10,000 parts of 100 rows each, and the same rows after a compaction. A join of a
  tenth as many label rows and a ``pull_latest``; ``..._parts_vs_compacted`` is time over time, the
  two by turns, medians. ``..._tiny``: parts of 10 rows, where what a file costs by itself shows.
- ``day``: one worker appends 10 parts a second, 864,000 a day, of 20 rows; the run takes the first
  tenth of the day (``day_fraction``). A compaction after each simulated minute, the grace period
  is ten. ``day_most_parts`` is the most that a reader met, ``day_most_files`` the most that lay in
  the folder, ``day_write_amplification`` how often a row is written, the append among it, and
  ``day_compaction_vs_append`` the time of the compactions over that of the appends.
- ``object_store``: the same parts of 100 rows in a folder and in an S3 server on this machine
  (s3proxy over a folder, fetched by ``make bench``). ``..._s3_vs_disk`` is time over time, of
  joins medians of turns: appends one after the other (``append``) and four at a time as a worker
  does (``append4``), the join of section ``parts`` over all parts and after a compaction.
  ``..._requests`` are those that one such operation sends.

Times are wall times on the cores that the machine has (``device``), rows come from the page cache.
Progress goes to stderr, the last line of stdout is one JSON object.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast import view_tags
from qarm_feast.code_log import CodeLog
from qarm_feast.compaction import CompactionRules, Compactor
from qarm_feast.object_store import Place
from qarm_feast.schema import CODE_ROWS, TIMESTAMP, code_view_name
from qarm_feast.source_rows import FeatureRows, TimeRange
from tests.object_store_cases import client_of, count_requests
from tests.object_store_server import ObjectStoreServer

LOG_NAME = code_view_name("v1")
DEDUP_KEY = "item_id,event_timestamp,content_hash"
CODES = ["rq_code", "vq_code"]
NUM_LEVELS, CODEBOOK_SIZE = 6, 4096
NUM_NEIGHBORS, POOL_SIZE = 25, 50_000
START = datetime(2026, 1, 1, tzinfo=UTC)
START_US = int(START.timestamp()) * 1_000_000
DAY_US = 86_400_000_000
SECONDS_PER_DAY = 86_400
SECONDS_PER_COMPACTION = 60
PARTS_PER_MINUTE = 600
ROWS_PER_APPEND = 100_000
"""Of section ``join``; such appends are parquet at once."""
GRACE_SECONDS = 600.0
LONG_AFTER = 1e6
TARGETS = {
    "join_seconds": ("le", 60.0),
    "join_peak_gib": ("le", 8.0),
    "join_parts_vs_compacted": ("le", 1.5),
    "pull_latest_parts_vs_compacted": ("le", 1.5),
}


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    num_rows: int = 10_000_000
    num_labels: int = 1_000_000
    num_parts: int = 10_000
    rows_per_part: int = 100
    rows_per_tiny_part: int = 10
    num_rounds: int = 5
    day_fraction: int = 10
    rows_per_day_part: int = 20
    num_store_parts: int = 2_000


QUICK = Scale(
    num_rows=500_000,
    num_labels=50_000,
    num_parts=1_000,
    num_rounds=3,
    day_fraction=200,
    num_store_parts=200,
)


def code_rows(num_rows: int, num_items: int, seed: int) -> pa.Table:
    """Return rows of random items, times within a day, and codes, in no order."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**63, (num_rows, 2))
    times = pa.array(START_US + generator.integers(0, DAY_US, num_rows)).cast(TIMESTAMP)
    columns = [
        pa.array(generator.integers(0, num_items, num_rows)),
        _lists(generator.integers(0, CODEBOOK_SIZE, (num_rows, NUM_LEVELS))),
        _lists(generator.integers(0, POOL_SIZE, (num_rows, NUM_NEIGHBORS))),
        pa.repeat("e1", num_rows),
        pa.array([f"{high:016x}{low:016x}" for high, low in hashes.tolist()]),
        pa.repeat(False, num_rows),
        times,
        times,
    ]
    return pa.table(columns, schema=CODE_ROWS)


def _lists(codes_NW: np.ndarray) -> pa.ListArray:
    num_rows, width = codes_NW.shape
    offsets = np.arange(0, num_rows * width + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes_NW.reshape(-1)))


def label_rows(num_labels: int, num_items: int) -> pa.Table:
    """Return random items and times of the day."""
    generator = np.random.default_rng(1_000_003)
    return pa.table(
        {
            "item_id": generator.integers(0, num_items, num_labels),
            "time_us": START_US + generator.integers(0, DAY_US, num_labels),
        }
    )


def source(root: Place) -> FeatureRows:
    """Return the rows of the log as the view's batch source reads them."""
    tags = {view_tags.DEDUP_KEY: DEDUP_KEY}
    return FeatureRows(root / LOG_NAME, "event_timestamp", "created", tags)


def join_section(scale: Scale, root: Path) -> dict[str, float]:
    """Join many labels to many rows, in a process of its own."""
    log = CodeLog(root)
    num_items = scale.num_rows // 2
    for first in range(0, scale.num_rows, ROWS_PER_APPEND):
        log.append(LOG_NAME, code_rows(ROWS_PER_APPEND, num_items, seed=first), written_at=START)
    _say(f"  {scale.num_rows:,} rows written")
    figures: dict[str, float] = {}
    # Spawned: a forked child would count its parent's memory; one each, for peaks of their own.
    for job, given in ((_compact, (root,)), (_join, (root, scale.num_labels, num_items))):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures |= pool.apply(job, given)
        _say(f"  {figures}")
    return figures | {"join_num_parts": len(log.row_parts(LOG_NAME))}


def _compact(root: Path) -> dict[str, float]:
    started = time.perf_counter()
    compact(CodeLog(root))
    return {
        "compaction_seconds": time.perf_counter() - started,
        "compaction_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _join(root: Path, num_labels: int, num_items: int) -> dict[str, float]:
    labels = label_rows(num_labels, num_items)
    rows = source(root)
    joined, seconds = _timed(lambda: rows.as_of(["item_id"], CODES, labels, 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    num_found = joined.num_rows - joined["rq_code"].null_count
    del joined
    _, pull_seconds = _timed(lambda: rows.latest(["item_id"], CODES, TimeRange()))
    return {
        "join_seconds": seconds,
        "join_peak_gib": peak,
        "join_share_found": num_found / num_labels,
        "pull_latest_seconds": pull_seconds,
        "pull_latest_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def parts_section(scale: Scale, root: Path) -> dict[str, float]:
    """Read logs as they were appended, and compacted."""
    figures = _parts_figures(scale, root / "hundred", scale.rows_per_part)
    tiny = _parts_figures(scale, root / "ten", scale.rows_per_tiny_part)
    return figures | {f"{name}_tiny": value for name, value in tiny.items()}


def _parts_figures(scale: Scale, root: Path, rows_per_part: int) -> dict[str, float]:
    num_rows = scale.num_parts * rows_per_part
    num_items = num_rows // 2
    roots = {"parts": root / "parts", "compacted": root / "compacted"}
    table = code_rows(num_rows, num_items, seed=0)
    for path in roots.values():
        log = CodeLog(path)
        for first in range(0, num_rows, rows_per_part):
            log.append(LOG_NAME, table.slice(first, rows_per_part), written_at=START)
        _say(f"  {scale.num_parts:,} parts of {rows_per_part} rows written")
    compact(CodeLog(roots["compacted"]))
    labels = label_rows(num_rows // 10, num_items)
    reads: dict[str, Callable[[FeatureRows], pa.Table | None]] = {
        "join": lambda rows: rows.as_of(["item_id"], CODES, labels, 0),
        "pull_latest": lambda rows: rows.latest(["item_id"], CODES, TimeRange()),
    }
    figures: dict[str, float] = {}
    for name, read in reads.items():
        medians = _medians(read, roots, scale.num_rounds)
        figures |= {f"{name}_seconds_{kind}": median for kind, median in medians.items()}
        figures[f"{name}_parts_vs_compacted"] = medians["parts"] / medians["compacted"]
    return figures


def _medians(
    read: Callable[[FeatureRows], pa.Table | None], roots: dict[str, Path], num_rounds: int
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {kind: [] for kind in roots}
    for _ in range(num_rounds + 1):
        for kind, path in roots.items():
            started = time.perf_counter()
            read(source(path))
            seconds[kind].append(time.perf_counter() - started)
    # The first round fills the page cache.
    return {kind: statistics.median(found[1:]) for kind, found in seconds.items()}


def day_section(scale: Scale, root: Path) -> dict[str, float]:
    """Append a part of one worker's day, compacting after each simulated minute."""
    log = CodeLog(root)
    # File times are real ones: simulated time is how far the day has come, on top of them.
    simulated = {"now": time.time()}
    compactor = Compactor(
        log, CompactionRules(grace_seconds=GRACE_SECONDS), clock=lambda: simulated["now"]
    )
    num_minutes = SECONDS_PER_DAY // SECONDS_PER_COMPACTION // scale.day_fraction
    rows = code_rows(PARTS_PER_MINUTE * scale.rows_per_day_part, 100_000, seed=0)
    sums = dict.fromkeys(["append_seconds", "compaction_seconds", "written_rows"], 0.0)
    most_parts = most_files = 0
    for minute in range(num_minutes):
        started = time.perf_counter()
        day = _append_minute(log, _at_minute(rows, minute), scale.rows_per_day_part)
        sums["append_seconds"] += time.perf_counter() - started
        most_parts = max(most_parts, len(log.row_parts(LOG_NAME)))
        most_files = max(most_files, len(os.listdir(day)))
        simulated["now"] += SECONDS_PER_COMPACTION
        started = time.perf_counter()
        counts = compactor.compact(is_full=False)
        sums["compaction_seconds"] += time.perf_counter() - started
        sums["written_rows"] += counts.num_written_rows
        if minute % 20 == 0:
            _say(f"  minute {minute} of {num_minutes}: {len(log.row_parts(LOG_NAME))} parts stand")
    num_rows = rows.num_rows * num_minutes
    assert log.read(LOG_NAME, ["item_id"]).num_rows == num_rows, "every row is read once"
    return {
        "day_num_appended_parts": PARTS_PER_MINUTE * num_minutes,
        "day_most_parts": most_parts,
        "day_most_files": most_files,
        "day_parts_at_end": len(log.row_parts(LOG_NAME)),
        "day_write_amplification": 1 + sums["written_rows"] / num_rows,
        "day_compaction_vs_append": sums["compaction_seconds"] / sums["append_seconds"],
    }


def object_store_section(scale: Scale, root: Path) -> dict[str, float]:
    """Write and read the same parts in a folder and in an S3 server."""
    with ObjectStoreServer(root / "s3") as server, client_of(server, root / "cache"):
        requests = count_requests()
        uris = {"disk": str(root / "disk"), "s3": server.add_bucket("benchmark")}
        return _object_store_figures(scale, uris, requests)


def _object_store_figures(
    scale: Scale, uris: dict[str, str], requests: list[str]
) -> dict[str, float]:
    num_parts = scale.num_store_parts
    table = code_rows(num_parts * scale.rows_per_part, 100_000, seed=0)
    parts = [
        table.slice(first, scale.rows_per_part)
        for first in range(0, table.num_rows, scale.rows_per_part)
    ]
    logs = {kind: CodeLog(uri) for kind, uri in uris.items()}
    for log in logs.values():
        log.append(LOG_NAME, parts[0], written_at=START)
    figures: dict[str, float] = {}
    for name, num_threads in (("append", 1), ("append4", 4)):
        append = functools.partial(_append_all, parts=parts, num_threads=num_threads)
        seconds, sent = _in_turns(logs, append, requests)
        figures |= _compared(name, seconds) | {f"{name}_requests": sent / num_parts}
        figures[f"{name}_parts_per_second_s3"] = num_parts / seconds["s3"]
        _say(f"  {figures}")
    labels = label_rows(table.num_rows // 10, 100_000)
    for name in ("join", "join_compacted"):
        join = functools.partial(_join_log, labels=labels)
        seconds, sent = _in_turns(logs, join, requests, scale.num_rounds)
        figures |= _compared(name, seconds) | {f"{name}_requests": float(sent)}
        _say(f"  {figures}")
        if name == "join":
            seconds, sent = _in_turns(logs, compact, requests)
            figures |= _compared("compact", seconds) | {"compact_requests": float(sent)}
    return {f"object_store_{name}": value for name, value in figures.items()}


def _in_turns(
    logs: dict[str, CodeLog],
    step: Callable[[CodeLog], None],
    requests: list[str],
    num_rounds: int = 1,
) -> tuple[dict[str, float], int]:
    """Return the median seconds of a step on each log, and the requests that one step sends."""
    seconds: dict[str, list[float]] = {kind: [] for kind in logs}
    for _ in range(num_rounds):
        requests.clear()
        for kind, log in logs.items():
            started = time.perf_counter()
            step(log)
            seconds[kind].append(time.perf_counter() - started)
    return {kind: statistics.median(found) for kind, found in seconds.items()}, len(requests)


def _compared(name: str, seconds: dict[str, float]) -> dict[str, float]:
    named = {f"{name}_seconds_{kind}": value for kind, value in seconds.items()}
    return named | {f"{name}_s3_vs_disk": seconds["s3"] / seconds["disk"]}


def _append_all(log: CodeLog, parts: list[pa.Table], num_threads: int) -> None:
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(lambda part: log.append(LOG_NAME, part, written_at=START), parts):
            pass


def _join_log(log: CodeLog, labels: pa.Table) -> None:
    source(log.root).as_of(["item_id"], CODES, labels, 0)


def _append_minute(log: CodeLog, rows: pa.Table, rows_per_part: int) -> Path:
    """Append rows by parts and return the day folder."""
    part = log.root
    for first in range(0, rows.num_rows, rows_per_part):
        part = log.append(LOG_NAME, rows.slice(first, rows_per_part), written_at=START)
    return part.parent


def _at_minute(rows: pa.Table, minute: int) -> pa.Table:
    """Return rows that no other minute has: the same, at times of their own."""
    place = rows.schema.get_field_index("event_timestamp")
    shift = pa.scalar(timedelta(microseconds=minute + 1), pa.duration("us"))
    times = pc.add(rows["event_timestamp"], shift)
    return rows.set_column(place, CODE_ROWS.field("event_timestamp"), times)


def compact(log: CodeLog) -> None:
    """Compact all there is, and delete what was replaced."""
    Compactor(log).compact(is_full=True)
    Compactor(log, clock=lambda: time.time() + LONG_AFTER).compact(is_full=True)


def _timed(read: Callable[[], pa.Table | None]) -> tuple[pa.Table, float]:
    started = time.perf_counter()
    table = read()
    assert table is not None, "the log has rows"
    return table, time.perf_counter() - started


SECTIONS: dict[str, Callable[[Scale, Path], dict[str, float]]] = {
    "parts": parts_section,
    "day": day_section,
    "join": join_section,
    "object_store": object_store_section,
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fewer rows and parts.")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="Run this section.")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    figures: dict[str, float] = {}
    for name in arguments.only or SECTIONS:
        _say(f"== {name}")
        with tempfile.TemporaryDirectory() as folder:
            found = SECTIONS[name](scale, Path(folder))
        _say(f"  { {key: round(value, 3) for key, value in found.items()} }")
        figures |= found
    result = {
        "benchmark": "offline_store",
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "figures": figures,
        "targets": {name: {"op": op, "value": value} for name, (op, value) in TARGETS.items()},
        "settings": asdict(scale) | {"quick": arguments.quick},
    }
    print(json.dumps(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

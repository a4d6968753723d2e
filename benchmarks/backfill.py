"""A codebook version filled from a content log: speed, and memory over the number of items.

    uv run --frozen --extra cpu python benchmarks/backfill.py [--quick]

It makes its own log, as a worker writes it: parts of 2048 events with ready vectors of 128 numbers
of the codebook's encoder; 6 RQ and 25 VQ codes, a pool of 4096. Both stores are written, online
sqlite. Each backfill is a process of its own.

- ``peak_mib_small`` and ``peak_mib_large`` are peaks of the memory that is the process's own over a
  log of 200,000 and of 1,000,000 items, looked at a hundred times a second;
  ``peak_large_vs_small`` is their ratio, ``start_mib`` what the imports alone hold.
  ``resident_mib_large`` counts mapped files as well: libraries, and up to 256 MiB of sqlite's file,
  which the system takes back when it needs them.
- ``peak_mib_compacted``: the smaller log after a compaction, where parts are parquet.
- ``items_per_second`` of the larger log, ``whole_vs_encode``: its time over the part of it that the
  codebook takes to encode; ``again_seconds``: a finished backfill once more.

Progress goes to stderr, the last line of stdout is one JSON object.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.generators import low_rank
from qarm_feast.backfill import backfill_codes
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook, EncoderFacts, ItemCodes, QuantizerConfig
from qarm_feast.compaction import CompactionRules, Compactor
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.registry import CodebookRegistry
from qarm_feast.schema import CONTENT_LOG, CONTENT_LOG_ROWS, TIMESTAMP

EMBEDDING_DIM = 128
NUM_TRAINING_ITEMS = 20_000
ROWS_PER_PART = 2048
NUM_PARTITIONS = 8
VERSION = "v1"
SECONDS_PER_LOOK = 0.01
START_US = 1_700_000_000_000_000
CREATED = datetime(2024, 1, 1, tzinfo=UTC)
TARGETS = {"peak_large_vs_small": ("le", 1.15)}


@dataclass(frozen=True)
class Fill:
    """What one backfill took: own memory before and at its peak, all resident memory, times."""

    start_mib: float
    peak_mib: float
    resident_mib: float
    seconds: float
    encode_seconds: float


@dataclass(frozen=True)
class Scale:
    """Items of the two logs."""

    num_small: int = 200_000
    num_large: int = 1_000_000


QUICK = Scale(num_small=60_000, num_large=180_000)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fewer items.")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), scale)
    result = {
        "benchmark": "backfill",
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "figures": figures,
        "targets": {name: {"op": op, "value": value} for name, (op, value) in TARGETS.items()},
        "settings": asdict(scale) | {"quick": arguments.quick},
    }
    print(json.dumps(result))


def measure(folder: Path, scale: Scale) -> dict[str, float]:
    """Return all figures.

    Args:
        folder: Empty; both repositories are made here.
        scale: Sizes of the logs.

    Returns:
        Figures by name.
    """
    small = _repository(folder / "small", scale.num_small)
    large = _repository(folder / "large", scale.num_large)
    of_small, of_large = _in_own_process(small), _in_own_process(large)
    again = _in_own_process(large)
    return {
        "start_mib": of_large.start_mib,
        "peak_mib_small": of_small.peak_mib,
        "peak_mib_large": of_large.peak_mib,
        "peak_large_vs_small": of_large.peak_mib / of_small.peak_mib,
        "resident_mib_large": of_large.resident_mib,
        "peak_mib_compacted": _fill_compacted(small).peak_mib,
        "items_per_second": scale.num_large / of_large.seconds,
        "whole_vs_encode": of_large.seconds / of_large.encode_seconds,
        "again_seconds": again.seconds,
    }


def _repository(directory: Path, num_items: int) -> Path:
    """Make a repository with a content log of so many items; return its ``qarm.yaml``."""
    # Not above: the measured processes import this module, and need no Kafka client.
    from tests.stream_repo import build_repo

    print(f"a log of {num_items:,} items", file=sys.stderr, flush=True)
    repo = build_repo(directory, {"data": {"input_dir": "data/input"}}, publish=_publish)
    log = CodeLog(directory / "data" / "offline")
    for first in range(0, num_items, ROWS_PER_PART):
        log.append(CONTENT_LOG, _events(first, min(ROWS_PER_PART, num_items - first)))
    return repo.config_path


def _publish(directory: Path, version: str) -> Codebook:
    uri = str(directory / "data" / "codebooks")
    codebook = Codebook.train(
        version,
        np.arange(NUM_TRAINING_ITEMS, dtype=np.int64),
        low_rank(NUM_TRAINING_ITEMS, EMBEDDING_DIM, seed=0),
        config=QuantizerConfig(
            rq=RqConfig(num_levels=6, codebook_size=256, num_iterations=5),
            vq=VqConfig(num_neighbors=25, pool_size=4096),
        ),
        encoder=EncoderFacts("e1", "0" * 64, None),
        created=CREATED,
    )
    codebook.save(uri)
    CodebookRegistry(uri).publish(version)
    return codebook


def _events(first: int, num_rows: int) -> pa.Table:
    """Return a batch of a worker: items from ``first`` on, spread over the partitions."""
    numbers = np.arange(first, first + num_rows)
    flat = pa.array(low_rank(num_rows, EMBEDDING_DIM, seed=1 + first).reshape(-1))
    offsets = pa.array(np.arange(num_rows + 1, dtype=np.int32) * np.int32(EMBEDDING_DIM))
    columns = {
        "item_id": pa.array(numbers),
        "content": pa.repeat("{}", num_rows),
        "content_hash": pa.array([f"{number:032x}" for number in numbers]),
        "embedding": pa.ListArray.from_arrays(offsets, flat),
        "encoder_version": pa.repeat("e1", num_rows),
        "is_deleted": pa.repeat(False, num_rows),
        "topic": pa.repeat("item-events", num_rows),
        "partition": pa.array(numbers % NUM_PARTITIONS, pa.int32()),
        "offset": pa.array(numbers // NUM_PARTITIONS),
        "event_timestamp": pa.array(START_US + numbers).cast(TIMESTAMP),
        "created": pa.repeat(pa.scalar(CREATED, TIMESTAMP), num_rows),
    }
    return pa.table(columns, schema=CONTENT_LOG_ROWS)


def _fill_compacted(config_path: Path) -> Fill:
    """Return what a second fill takes, after the content log was compacted."""
    root = config_path.parent / "data" / "offline"
    Compactor(CodeLog(root), CompactionRules(grace_seconds=0)).compact(is_full=True)
    (root / ".backfill" / f"{VERSION}.json").unlink()
    return _in_own_process(config_path)


def _in_own_process(config_path: Path) -> Fill:
    # Spawned: a forked child would count its parent's memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_fill, (str(config_path),))


def _fill(config_path: str) -> Fill:
    """Run one backfill and watch this process."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("qarm_feast.backfill").setLevel(logging.INFO)
    start_mib = _status_mib("RssAnon")
    is_over, peaks = threading.Event(), [start_mib]

    def watch() -> None:
        while not is_over.wait(SECONDS_PER_LOOK):
            peaks[0] = max(peaks[0], _status_mib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    encode, encode_seconds = Codebook.encode, [0.0]

    def timed(*arguments: Any) -> ItemCodes:
        started = time.perf_counter()
        codes = encode(*arguments)
        encode_seconds[0] += time.perf_counter() - started
        return codes

    Codebook.encode = timed  # type: ignore[method-assign]  # within this process only
    started = time.perf_counter()
    backfill_codes(config_path, VERSION)
    seconds = time.perf_counter() - started
    is_over.set()
    watcher.join()
    return Fill(start_mib, peaks[0], _status_mib("VmHWM"), seconds, encode_seconds[0])


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()

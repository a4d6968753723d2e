"""The memory section of ``quantize.py``: most memory that codebook training on files holds.

Shape letters in this file: N items, D embedding width.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.vector_files import VectorFiles

EMBEDDING_DIM = 128
NUM_ITEMS = 10_000_000
NUM_ITEMS_QUICK = 400_000
ROWS_PER_FILE = 1_000_000
ROWS_PER_GROUP = 100_000
NUM_DIRECTIONS = 32
CODEBOOK_SIZE = 1024
NUM_ITERATIONS = 4
CREATED = datetime(2024, 1, 1, tzinfo=UTC)


def memory_figures(*, quick: bool) -> dict[str, float]:
    """Return the peak resident memory of training on parquet files, and what it took.

    Every default of section ``quantizer`` holds (a sample of 2 M rows, a pool of 1 M), but for a
    smaller codebook and fewer iterations, which save time and no memory worth the name.

    Args:
        quick: Fewer items.

    Returns:
        ``train_peak_gib`` of a process that does nothing else, ``train_num_items``,
        ``train_file_gib`` and ``train_seconds``.
    """
    num_items = NUM_ITEMS_QUICK if quick else NUM_ITEMS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"memory: writing {num_items:,} vectors", file=sys.stderr)
        file_bytes = sum(
            _write(folder, start, min(ROWS_PER_FILE, num_items - start))
            for start in range(0, num_items, ROWS_PER_FILE)
        )
        print("memory: training in a process of its own", file=sys.stderr)
        # Spawned: a forked child would count its parent's memory.
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            seconds, peak_bytes = pool.apply(_train, (name,))
    return {
        "train_peak_gib": peak_bytes / 2**30,
        "train_num_items": num_items,
        "train_file_gib": file_bytes / 2**30,
        "train_seconds": seconds,
    }


def _write(folder: Path, start: int, num_items: int) -> int:
    """Write one file of vectors near a few directions and return its size in bytes."""
    generator = np.random.default_rng(start)
    directions = np.random.default_rng(0).standard_normal((NUM_DIRECTIONS, EMBEDDING_DIM))
    path = folder / f"part-{start:012d}.parquet"
    writer = None
    for first in range(start, start + num_items, ROWS_PER_GROUP):
        weights = generator.standard_normal((ROWS_PER_GROUP, NUM_DIRECTIONS), dtype=np.float32)
        noise_ND = generator.standard_normal((ROWS_PER_GROUP, EMBEDDING_DIM), dtype=np.float32)
        x_ND = weights @ directions.astype(np.float32) + noise_ND
        batch = pa.table(
            {
                "item_id": np.arange(first, first + ROWS_PER_GROUP),
                "embedding": pa.FixedSizeListArray.from_arrays(x_ND.reshape(-1), EMBEDDING_DIM),
                "content_hash": pa.array([f"{row:032x}" for row in range(ROWS_PER_GROUP)]),
            }
        )
        writer = writer or pq.ParquetWriter(path, batch.schema, compression="none")
        writer.write_table(batch)
    assert writer is not None, "a file has at least one group"
    writer.close()
    return path.stat().st_size


def _train(folder: str) -> tuple[float, int]:
    start = time.monotonic()
    Codebook.train_from(
        "v1",
        VectorFiles.open(Path(folder)),
        config=QuantizerConfig(
            rq=RqConfig(codebook_size=CODEBOOK_SIZE, num_iterations=NUM_ITERATIONS), vq=VqConfig()
        ),
        encoder=EncoderFacts("none", "0" * 64, None),
        created=CREATED,
    )
    seconds = time.monotonic() - start
    return seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

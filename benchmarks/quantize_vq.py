"""The VQ section of ``quantize.py``: how fast and how true the approximate searches of a pool are.

Top-25 in a pool of 128 columns, on one thread: ``ivf_flat`` over 1,000,000 rows, both kinds over
100,000 (names that end in ``_100k``), since only one thread links a graph. Four kinds of vectors:
those of ``generators``, and :func:`curved`, which has the spectrum of ``low_rank`` but
neighbourhoods of few dimensions, as text vectors have. ``--quick``: ``low_rank`` and ``curved``
only, 20,000 rows.

``vq_speedup_vs_exact`` is against what exact search costs elsewhere: the faster of faiss's flat
index and the bare float32 product of vectors and pool in torch, which picks no neighbours yet.
``vq_speedup_vs_own_exact`` is against our own exact search, the one that ``search: auto`` weighs
the lists against. Each is on the same batch of 2048 new vectors (the most that the streaming worker
reads at once), and again one vector at a time. Times are the process's own seconds, so another
process on the machine does not count, though it takes memory bandwidth and may share a core. So the
searches that are compared take turns, and of each the fewest seconds of three turns stand.

Shape letters in this file: N rows, P pool rows, D embedding width, Q queries, k neighbours,
M latent dimensions.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import torch

from benchmarks.generators import GENERATORS, MEAN_LENGTH, SPECTRUM_EXPONENT, SPECTRUM_SHIFT
from qarm_feast.quantizers import NeighborQuantizer, VqConfig
from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.search import NearestSearch

Kind = Literal["ivf_flat", "hnsw", "auto"]
Search = Callable[[Embeddings], Codes]

EMBEDDING_DIM = 128
NUM_NEIGHBORS = 25
BATCH_SIZE = 2048
NUM_SINGLES = 64
NUM_RUNS = 3
PRODUCT_ROWS = 4096
YARDSTICKS = ("faiss_flat", "product")
"""What exact search costs elsewhere, see the module."""
QUICK_VECTORS = ("low_rank", "curved")
POOLS: tuple[tuple[int, tuple[Kind, ...], str], ...] = (
    (1_000_000, ("ivf_flat",), ""),
    (100_000, ("ivf_flat", "hnsw"), "_100k"),
)
QUICK_POOLS: tuple[tuple[int, tuple[Kind, ...], str], ...] = ((20_000, ("ivf_flat", "hnsw"), ""),)
"""Rows, the searches of such a pool, and the ending of its figures' names."""
TARGETS = {"vq_recall_at_25": ("ge", 0.99), "vq_speedup_vs_exact": ("ge", 20.0)}
NUM_LATENT = 14
FREQUENCY = 0.3
"""The two constants of :func:`curved`. At 3,645 rows they put the 25th neighbour at .75 of the
median distance and make the median local dimension (maximum likelihood over 25 neighbours) 15;
MiniLM's vectors of amazon_industrial have .76 and 11 there, ``low_rank`` has .83 and 40."""


def vq_figures(quick: bool, only: str | None = None) -> dict[str, float]:
    """Return recall, times, speed-ups, build seconds and memory by name; runs on one thread.

    ``vq_recall_at_25`` and ``vq_speedup_vs_exact`` are of ``low_rank`` vectors under the search
    that ``search: auto`` takes (at 1,000,000 rows). ``..._<kind>_<vectors>`` are of one search;
    ``vq_single_speedup_vs_exact_...`` one vector at a time. Memory is the growth of the resident
    peak over what was resident before the build, the pool itself not counted.

    Args:
        quick: Whether to take the small pools.
        only: Kind of vectors; None for all of them.

    Returns:
        The figures.
    """
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    figures: dict[str, float] = {}
    try:
        for pool_size, kinds, ending in QUICK_POOLS if quick else POOLS:
            for vectors in [only] if only else QUICK_VECTORS if quick else VECTORS:
                x_ND = VECTORS[vectors](pool_size + BATCH_SIZE, EMBEDDING_DIM, 0)
                names: dict[Kind, str] = {kind: f"_{kind}_{vectors}{ending}" for kind in kinds}
                if vectors == "low_rank" and ending == "":
                    names["auto"] = ""
                figures |= _figures(x_ND[:pool_size], x_ND[pool_size:], names)
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
    return figures


def curved(num_rows: int, embedding_dim: int, seed: int) -> Embeddings:
    """Return rows of length 1 on a curved sheet of 14 dimensions, spectrum as in ``low_rank``."""
    # The sheet is the same for every seed; the seed draws points on it.
    rng = np.random.default_rng(0)
    weights_MD = FREQUENCY * rng.standard_normal((NUM_LATENT, embedding_dim), dtype=np.float32)
    phases_D = rng.uniform(0, 2 * np.pi, embedding_dim).astype(np.float32)

    def waves(size: int, generator: np.random.Generator) -> Embeddings:
        latent_NM = generator.standard_normal((size, NUM_LATENT), dtype=np.float32)
        return np.sin(latent_NM @ weights_MD + phases_D)

    sample_ND = waves(20_000, rng)
    mean_D = sample_ND.mean(axis=0)
    _, values_D, axes_DD = np.linalg.svd(sample_ND - mean_D, full_matrices=False)
    spectrum_D = (np.arange(1, embedding_dim + 1) + SPECTRUM_SHIFT) ** SPECTRUM_EXPONENT
    spectrum_D *= np.sqrt((1 - MEAN_LENGTH**2) / np.square(spectrum_D).sum())
    scale_D = spectrum_D / values_D * np.sqrt(len(sample_ND))
    x_ND = (waves(num_rows, np.random.default_rng([seed, 1])) - mean_D) @ (
        axes_DD.T * scale_D
    ).astype(np.float32)
    x_ND += np.float32(MEAN_LENGTH / np.sqrt(embedding_dim))
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND


VECTORS = {**GENERATORS, "curved": curved}


def _figures(
    pool_PD: Embeddings,
    x_QD: Embeddings,
    names: dict[Kind, str],
) -> dict[str, float]:
    """Return the figures of some searches of one pool; ``names`` are their suffixes."""
    exact = _exact_searches(pool_PD)
    exact_Qk = exact["ours"](x_QD)
    figures: dict[str, float] = {}
    for search, suffix in names.items():
        build = _Build()
        quantizer = NeighborQuantizer(VqConfig(search=search, seed=1), pool_PD)
        build.end()
        _say(
            f"{suffix or ' auto on low_rank'}: {quantizer.search_kind} "
            f"{quantizer.search_settings} recall at training {quantizer.search_recall:.4f}"
        )
        hits_Qkk = quantizer.encode(x_QD)[:, :, None] == exact_Qk[:, None, :]
        own = {
            "vq_recall_at_25": float(hits_Qkk.any(axis=2).mean()),
            "vq_build_seconds": build.seconds,
            "vq_build_peak_gib": build.peak_gib,
            **_times({**exact, "": quantizer.encode}, x_QD),
        }
        figures |= {f"{name}{suffix}": value for name, value in own.items()}
    _say(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    return figures


def _exact_searches(pool_PD: Embeddings) -> dict[str, Search]:
    """Return the exact searches by name; ours gives the canonical answer."""
    flat = faiss.IndexFlatL2(EMBEDDING_DIM)
    flat.add(pool_PD)
    ours = NearestSearch(pool_PD)
    # Prepared at first use, which is no part of a search.
    ours.search(pool_PD[:1], NUM_NEIGHBORS)
    return {
        "faiss_flat": lambda x_BD: flat.search(x_BD, NUM_NEIGHBORS)[1],
        "product": lambda x_BD: _product(x_BD, pool_PD),
        "ours": lambda x_BD: ours.search(x_BD, NUM_NEIGHBORS),
    }


def _times(searches: dict[str, Search], x_QD: Embeddings) -> dict[str, float]:
    """Return times and ratios of the exact searches and the one whose name is empty."""
    batch = _fewest_seconds(searches, x_QD)
    singles = [_fewest_seconds(searches, x_QD[row : row + 1]) for row in range(NUM_SINGLES)]
    single = {name: sum(seconds[name] for seconds in singles) for name in searches}
    for name in searches:
        _say(
            f"  {name or 'this one'}: {1e3 * batch[name] / len(x_QD):.3f} ms per vector, singly "
            f"{1e3 * single[name] / NUM_SINGLES:.3f}"
        )
    return {
        **{f"vq_exact_ms_{name}": 1e3 * batch[name] / len(x_QD) for name in searches if name},
        "vq_ms": 1e3 * batch[""] / len(x_QD),
        "vq_speedup_vs_exact": min(batch[name] for name in YARDSTICKS) / batch[""],
        "vq_speedup_vs_own_exact": batch["ours"] / batch[""],
        "vq_single_speedup_vs_exact": min(single[name] for name in YARDSTICKS) / single[""],
    }


def _fewest_seconds(searches: dict[str, Search], x_BD: Embeddings) -> dict[str, float]:
    """Return the fewest seconds of each search in a few turns."""
    fewest = dict.fromkeys(searches, np.inf)
    for _ in range(NUM_RUNS):
        for name, search in searches.items():
            start = time.process_time()
            search(x_BD)
            fewest[name] = min(fewest[name], time.process_time() - start)
    return fewest


def _product(x_BD: Embeddings, pool_PD: Embeddings) -> Codes:
    """Multiply vectors and pool, a block of the pool at a time, and find nothing."""
    scores_BR = torch.empty((len(x_BD), PRODUCT_ROWS))
    x = torch.from_numpy(x_BD)
    for start in range(0, len(pool_PD), PRODUCT_ROWS):
        block_RD = torch.from_numpy(pool_PD[start : start + PRODUCT_ROWS])
        torch.mm(x, block_RD.T, out=scores_BR[:, : len(block_RD)])
    return np.empty((len(x_BD), 0), dtype=np.int64)


class _Build:
    """Seconds and memory from construction to :meth:`end`."""

    def __init__(self) -> None:
        # Linux forgets the peak so far.
        Path("/proc/self/clear_refs").write_text("5")
        self._resident = _status_gib("VmRSS")
        self._start = time.process_time()

    def end(self) -> None:
        """Take both."""
        self.seconds = time.process_time() - self._start
        self.peak_gib = _status_gib("VmHWM") - self._resident


def _status_gib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

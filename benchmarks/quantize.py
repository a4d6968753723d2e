"""How fast codes are given and codebooks learnt, as ratios to bare products and to faiss.

    uv run --frozen --extra cpu python benchmarks/quantize.py [--quick] [--only SECTION]

It needs no data: the vectors are those of ``benchmarks/generators.py``. One thread, unless
``--threads`` says otherwise; both sides of a ratio run in turns in the same process, and the best
time of each counts: processor seconds with one thread, which other processes change least, else
seconds on the clock. The codes are compared with a plain float64 scan on a sample of rows. Targets
stand only where the compiled filter runs (a processor with AVX-512 bf16 and a C++ compiler).
Progress goes to stderr, the last line of stdout is one JSON object.

Shape letters in this file: N items, B items of a block, S sampled items, K centroids,
D embedding width.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.generators import GENERATORS
from benchmarks.quantize_memory import memory_figures
from benchmarks.quantize_vq import TARGETS as VQ_TARGETS
from benchmarks.quantize_vq import VECTORS as VQ_VECTORS
from benchmarks.quantize_vq import vq_figures
from qarm_feast.quantizers import ResidualQuantizer
from qarm_feast.quantizers.base import Embeddings, fold_sum
from qarm_feast.quantizers.devices import Gpu
from qarm_feast.quantizers.faiss_search import FaissSearch
from qarm_feast.quantizers.kmeans import lloyd, plus_plus_start
from qarm_feast.quantizers.native import kernels
from qarm_feast.quantizers.search import NearestSearch, nearest, squared_distances

EMBEDDING_DIM = 128
NUM_LEVELS = 3
CODEBOOK_ITERATIONS = 2
ENCODE_TARGETS = {4096: 0.8, 256: 1.3}
"""Most times the bare default float32 products, by codebook size."""
KMEANS_TIME_TARGET = 1.05
KMEANS_INERTIA_TARGET = 1.005
TRAIN_PEAK_GIB_TARGET = 4.0
_ITEMS_PER_TIMING = 20_000
_ROWS_PER_PRODUCT = 8192
"""The bare product fills one block of scores again and again: its best case."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run."""

    num_items: int = 200_000
    num_checked: int = 300
    num_repeats: int = 2
    kmeans_points: int = 100_000
    kmeans_size: int = 1024
    kmeans_iterations: int = 25
    is_quick: bool = False
    vq_vectors: str | None = None


QUICK = Scale(
    is_quick=True,
    num_items=20_000,
    num_checked=50,
    kmeans_points=20_000,
    kmeans_size=512,
    kmeans_iterations=10,
)


@dataclasses.dataclass
class Outcome:
    """What a section found: figures by name, and the targets of some of them."""

    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    targets: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    scale = QUICK if arguments.quick else Scale()
    scale = dataclasses.replace(scale, vq_vectors=arguments.vq_vectors)
    outcome = Outcome()
    for name in arguments.only or SECTIONS:
        _say(f"section {name}")
        section = SECTIONS[name](scale)
        outcome.figures |= section.figures
        outcome.targets |= section.targets
    print(
        json.dumps(
            {
                "benchmark": "quantize",
                "device": _device(),
                "figures": {name: round(float(v), 4) for name, v in outcome.figures.items()},
                "targets": {
                    name: {"op": op, "value": value}
                    for name, (op, value) in outcome.targets.items()
                },
                "settings": {
                    "num_threads": arguments.threads,
                    "is_native_filter": kernels() is not None,
                    "embedding_dim": EMBEDDING_DIM,
                    "num_levels": NUM_LEVELS,
                    **dataclasses.asdict(scale),
                },
            }
        )
    )


def encode_section(scale: Scale) -> Outcome:
    """Time of residual codes over the time of the bare products of the same shapes."""
    outcome = Outcome()
    num_mismatches = 0
    for size, target in ENCODE_TARGETS.items():
        suffix = "" if size == max(ENCODE_TARGETS) else f"_k{size}"
        for name in GENERATORS:
            ratios, mismatches = _encode_ratios(name, size, scale)
            num_mismatches += mismatches
            _say(f"  K={size} {name}: {ratios}, {mismatches} codes against the rule")
            for base, ratio in ratios.items():
                outcome.figures[f"rq_encode_vs_{base}{suffix}_{name}"] = ratio
        for base in ("gemm", "medium_gemm"):
            outcome.figures[f"rq_encode_vs_{base}{suffix}"] = max(
                outcome.figures[f"rq_encode_vs_{base}{suffix}_{name}"] for name in GENERATORS
            )
        if kernels() is not None:
            outcome.targets[f"rq_encode_vs_gemm{suffix}"] = ("le", target)
    outcome.figures["rq_encode_mismatches"] = num_mismatches
    outcome.targets["rq_encode_mismatches"] = ("le", 0)
    return outcome


def kmeans_section(scale: Scale) -> Outcome:
    """Time and inertia of k-means over those of faiss, from the same start."""
    outcome = Outcome()
    for name, generate in GENERATORS.items():
        x_ND = generate(scale.kmeans_points, EMBEDDING_DIM, seed=0)
        start_KD, start_seconds = _timed(
            lambda x=x_ND: plus_plus_start(x, scale.kmeans_size, np.random.default_rng(0))
        )
        arms = {
            "ours": lambda x=x_ND, s=start_KD: lloyd(x, s, scale.kmeans_iterations),
            "faiss": lambda x=x_ND, s=start_KD: _faiss_kmeans(x, s, scale.kmeans_iterations),
        }
        best, centroids = _best_seconds(arms, scale.num_repeats)
        inertia = {arm: _inertia(x_ND, centroids_KD) for arm, centroids_KD in centroids.items()}
        _say(f"  {name}: start {start_seconds:.2f} s, {best} s, inertia {inertia}")
        outcome.figures |= {
            f"kmeans_vs_faiss_time_{name}": best["ours"] / best["faiss"],
            f"kmeans_inertia_vs_faiss_{name}": inertia["ours"] / inertia["faiss"],
            f"kmeans_start_iterations_{name}": start_seconds
            / (best["ours"] / scale.kmeans_iterations),
        }
    for figure in ("kmeans_vs_faiss_time", "kmeans_inertia_vs_faiss", "kmeans_start_iterations"):
        outcome.figures[figure] = max(outcome.figures[f"{figure}_{name}"] for name in GENERATORS)
    outcome.targets["kmeans_inertia_vs_faiss"] = ("le", KMEANS_INERTIA_TARGET)
    if kernels() is not None:
        outcome.targets["kmeans_vs_faiss_time"] = ("le", KMEANS_TIME_TARGET)
    return outcome


def gpu_section(scale: Scale, device: str = "cuda") -> Outcome:
    """Time of the nearest search on a GPU over that of its bare float32 product, by backend.

    The search takes its vectors from the host and gives its codes back there; the bare product has
    everything on the device.
    """
    outcome = Outcome()
    if device == "cuda" and not torch.cuda.is_available():
        _say("  no GPU: skipped")
        return outcome
    for name, generate in GENERATORS.items():
        x_ND = generate(scale.num_items, EMBEDDING_DIM, seed=0)
        centroids_KD = _codebooks(x_ND, max(ENCODE_TARGETS))[0]
        on_torch = NearestSearch(centroids_KD, device)
        on_faiss = FaissSearch(centroids_KD, Gpu() if device == "cuda" else None)
        arms = {
            "gemm": lambda x=x_ND, c=centroids_KD: _device_product(x, c, device),
            "torch": lambda x=x_ND, search=on_torch: search.search(x),
            "faiss": lambda x=x_ND, search=on_faiss: search.search(x),
        }
        best, results = _best_seconds(arms, scale.num_repeats, is_on_gpu=True)
        on_faiss.close()
        on_cpu_N1 = nearest(x_ND, centroids_KD)
        for backend in ("torch", "faiss"):
            ratio = best[backend] / results["gemm"]
            outcome.figures |= {
                f"gpu_{backend}_vs_gemm_{name}": ratio,
                f"gpu_{backend}_mismatches_{name}": (results[backend] != on_cpu_N1).sum(),
            }
            outcome.targets[f"gpu_{backend}_mismatches_{name}"] = ("le", 0)
        _say(f"  {name}: product {results['gemm']:.3f} s, {best} s")
    return outcome


def vq_section(scale: Scale) -> Outcome:
    """Recall and speed of the approximate VQ search, see ``quantize_vq``."""
    return Outcome(vq_figures(scale.is_quick, scale.vq_vectors), dict(VQ_TARGETS))


def memory_section(scale: Scale) -> Outcome:
    """Most memory that training on files holds, see ``quantize_memory``."""
    return Outcome(
        memory_figures(quick=scale.is_quick), {"train_peak_gib": ("le", TRAIN_PEAK_GIB_TARGET)}
    )


SECTIONS: dict[str, Callable[[Scale], Outcome]] = {
    "encode": encode_section,
    "kmeans": kmeans_section,
    "vq": vq_section,
    "memory": memory_section,
    "gpu": gpu_section,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fewer items, repeats, iterations.")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="Run this section.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vq-vectors", choices=sorted(VQ_VECTORS), help="Only these, section vq.")
    return parser.parse_args()


def _encode_ratios(name: str, size: int, scale: Scale) -> tuple[dict[str, float], int]:
    generate = GENERATORS[name]
    x_ND = generate(scale.num_items, EMBEDDING_DIM, seed=0)
    num_train = min(scale.num_items, 16 * size)
    codebooks = _codebooks(generate(num_train, EMBEDDING_DIM, seed=1), size)
    quantizer = ResidualQuantizer(codebooks=codebooks)
    best: dict[str, float] = {}
    codes = []
    # In parts: on a shared machine the best time of a second says more than that of ten.
    for part_ND in np.array_split(x_ND, max(1, len(x_ND) // _ITEMS_PER_TIMING)):
        arms = {
            "gemm": lambda x=part_ND: _bare_products(x, codebooks),
            "medium_gemm": lambda x=part_ND: _bare_products(x, codebooks, precision="medium"),
            "encode": lambda x=part_ND: quantizer.encode(x),
        }
        seconds, results = _best_seconds(arms, scale.num_repeats)
        codes.append(results["encode"])
        best = {arm: best.get(arm, 0.0) + seconds[arm] for arm in arms}
    sample_S = np.random.default_rng(2).choice(len(x_ND), scale.num_checked, replace=False)
    expected_SL = _rule(x_ND[sample_S], codebooks)
    mismatches = int((np.concatenate(codes)[sample_S] != expected_SL).sum())
    return {base: best["encode"] / best[base] for base in ("gemm", "medium_gemm")}, mismatches


def _codebooks(x_ND: Embeddings, size: int) -> list[Embeddings]:
    """Return roughly trained codebooks: the speed of encoding does not need the last per cent."""
    residual_ND = x_ND.copy()
    codebooks = []
    for level in range(NUM_LEVELS):
        rows_K = np.random.default_rng(level).choice(len(x_ND), size, replace=False)
        codebooks.append(lloyd(residual_ND, residual_ND[rows_K], CODEBOOK_ITERATIONS))
        NearestSearch(codebooks[-1]).subtract_nearest(residual_ND)
    return codebooks


def _bare_products(
    x_ND: Embeddings, codebooks: list[Embeddings], precision: str = "highest"
) -> None:
    with _matmul_precision(precision):
        for codebook_KD in codebooks:
            centroids_DK = torch.from_numpy(codebook_KD).T
            scores_BK = torch.empty(_ROWS_PER_PRODUCT, len(codebook_KD))
            for x_BD in torch.from_numpy(x_ND).split(_ROWS_PER_PRODUCT):
                torch.mm(x_BD, centroids_DK, out=scores_BK[: len(x_BD)])


def _device_product(x_ND: Embeddings, centroids_KD: Embeddings, device: str) -> float:
    """Return the seconds of the product alone, with everything on the device."""
    x = torch.from_numpy(x_ND).to(device)
    centroids_DK = torch.from_numpy(centroids_KD).to(device).T
    scores_BK = torch.empty(_ROWS_PER_PRODUCT, len(centroids_KD), device=device)
    _wait_for(device)
    start = time.perf_counter()
    for x_BD in x.split(_ROWS_PER_PRODUCT):
        torch.mm(x_BD, centroids_DK, out=scores_BK[: len(x_BD)])
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield
    torch.set_float32_matmul_precision(before)


def _rule(x_SD: Embeddings, codebooks: list[Embeddings]) -> np.ndarray:
    """Return the codes by a float64 scan of every centroid, one row at a time."""
    rows = []
    for x_D in x_SD:
        residual_D, codes = x_D, []
        for codebook_KD in codebooks:
            differences_KD = residual_D.astype(np.float64) - codebook_KD.astype(np.float64)
            distances_K = fold_sum(np.square(differences_KD)).astype(np.float32)
            codes.append(int(distances_K.argmin()))
            residual_D = residual_D - codebook_KD[codes[-1]]
        rows.append(codes)
    return np.array(rows)


def _faiss_kmeans(x_ND: Embeddings, start_KD: Embeddings, num_iterations: int) -> Embeddings:
    kmeans = faiss.Kmeans(
        x_ND.shape[1],
        len(start_KD),
        niter=num_iterations,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x_ND),
    )
    kmeans.train(x_ND, init_centroids=start_KD)
    centroids_KD: Embeddings = kmeans.centroids
    return centroids_KD


def _inertia(x_ND: Embeddings, centroids_KD: Embeddings) -> float:
    codes_N = nearest(x_ND, centroids_KD)[:, 0]
    return float(squared_distances(x_ND, centroids_KD[codes_N]).sum(dtype=np.float64))


def _best_seconds(
    arms: dict[str, Callable[[], object]], num_repeats: int, *, is_on_gpu: bool = False
) -> tuple[dict[str, float], dict[str, object]]:
    """Run the arms in turns; return the best time and the last result of each."""
    best = dict.fromkeys(arms, float("inf"))
    results: dict[str, object] = {}
    for _ in range(num_repeats):
        for name, arm in arms.items():
            results[name], seconds = _timed(arm, is_on_gpu=is_on_gpu)
            best[name] = min(best[name], seconds)
    return best, results


def _timed(arm: Callable[[], object], *, is_on_gpu: bool = False) -> tuple[object, float]:
    is_one_thread = torch.get_num_threads() == 1 and not is_on_gpu
    clock = time.process_time if is_one_thread else time.perf_counter
    start = clock()
    result = arm()
    return result, clock() - start


def _device() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    search = "bf16 filter in C++" if kernels() is not None else "float32 filter in torch"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, {search}; {gpu}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

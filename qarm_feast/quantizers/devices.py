"""Where nearest searches run: on the processor, or on a GPU through faiss or torch.

faiss's GPU indexes are not thread-safe, not even for readers, and share the memory of their
resources; so one thread of the process makes, asks and frees all of them.

Shape letters in this file: N items, K centroids, D embedding width.
May import: torch, the nearest search. The one file that imports faiss.
"""

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from qarm_feast.errors import ConfigError, GpuLostError, MissingDependencyError
from qarm_feast.observability import GPU_LOST
from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.search import NearestSearch

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
GpuBackend = Literal["faiss", "torch"]


class Search(Protocol):
    """A search of one set of centroids by the canonical rule."""

    def search(self, x_ND: Embeddings, k: int = 1) -> Codes:
        """Return the k nearest centroids of each row, int64 ``[N, k]``, nearest first."""

    def subtract_nearest(self, residual_ND: Embeddings) -> Codes:
        """Replace each row by what its nearest centroid leaves over; return those, ``[N]``."""


@dataclass(frozen=True)
class Gpu:
    """One of the machine's GPUs.

    Attributes:
        number: Its number, from 0.
        scratch_mib: Memory that faiss sets aside there for searches, MiB; None: faiss's own choice.
    """

    number: int = 0
    scratch_mib: int | None = None


@dataclass(frozen=True)
class Placement:
    """The device of a process's searches, and what drives a GPU.

    Attributes:
        device: See ``quantizer.device``.
        gpu_backend: See ``quantizer.gpu_backend``.
        gpu: Which GPU.
        enable_cpu_fallback: Whether the CPU takes over when the GPU is lost.
    """

    device: Device = "cpu"
    gpu_backend: GpuBackend = "faiss"
    gpu: Gpu = Gpu()
    enable_cpu_fallback: bool = False

    def open(self, centroids_KD: Embeddings) -> Search:
        """Return a search of the centroids on this device; codes do not depend on it.

        Args:
            centroids_KD: Centroids, float32.

        Returns:
            The search.

        Raises:
            ConfigError: If the device is cuda, and there is no GPU for the backend.
            CodebookError: If there are no centroids.
        """
        if not self.has_gpu():
            return NearestSearch(centroids_KD)
        return GuardedSearch(self._open_on_gpu(centroids_KD), self, centroids_KD)

    def _open_on_gpu(self, centroids_KD: Embeddings) -> Search:
        if self.gpu_backend == "torch":
            return NearestSearch(centroids_KD, f"cuda:{self.gpu.number}")
        # Imports this module: only a process that has a GPU gets here.
        from qarm_feast.quantizers.faiss_search import FaissSearch

        return FaissSearch(centroids_KD, gpu=self.gpu)

    def gpu_lost(self, error: RuntimeError) -> None:
        """Say that the GPU has failed, and whether the CPU may take over.

        Args:
            error: What the backend raised.

        Raises:
            GpuLostError: If the CPU may not.
        """
        GPU_LOST.set(1)
        number, reason = self.gpu.number, str(error).strip().partition("\n")[0]
        if not self.enable_cpu_fallback:
            raise GpuLostError(
                f"GPU {number} failed in a search of codes ({reason}); start the process again, or "
                "set quantizer.enable_cpu_fallback to let the processor take over"
            ) from error
        logger.error("gpu_lost number=%d reason=%s; the processor takes over", number, reason)

    def has_gpu(self) -> bool:
        """Return whether searches run on a GPU.

        Returns:
            False for cpu; for auto, whether the backend sees a GPU.

        Raises:
            ConfigError: If the device is cuda and the backend sees none.
        """
        if self.device == "cpu":
            return False
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if num_gpus and self.gpu_backend == "faiss":
            faiss = load_faiss()
            has_builds = hasattr(faiss, "StandardGpuResources")
            num_gpus = min(num_gpus, faiss.get_num_gpus()) if has_builds else 0
        if num_gpus and self.gpu.number >= num_gpus:
            raise ConfigError(
                f"quantizer.gpu_number is {self.gpu.number}, but {self.gpu_backend} sees "
                f"{num_gpus} GPU(s), numbered from 0; lower it"
            )
        if self.device == "cuda" and not num_gpus:
            raise ConfigError(
                f"quantizer.device is cuda, but {self.gpu_backend} sees no GPU; set it to auto or "
                'cpu, or install the builds for GPUs with `pip install "qarm-feast[gpu]"`'
            )
        return num_gpus > 0


ON_CPU = Placement()


class GuardedSearch:
    """A search on a GPU; where that is lost, the processor's, or an error that says so.

    The codes are the same bits. Both backends report a lost or exhausted GPU as ``RuntimeError``,
    and neither changes its input before it has the codes.
    """

    def __init__(self, search: Search, placement: Placement, centroids_KD: Embeddings) -> None:
        self._search = search
        self._placement = placement
        self._centroids_KD = centroids_KD

    def search(self, x_ND: Embeddings, k: int = 1) -> Codes:
        """Return the k nearest centroids of each row, int64 ``[N, k]``, nearest first."""
        return self._guarded(lambda search: search.search(x_ND, k))

    def subtract_nearest(self, residual_ND: Embeddings) -> Codes:
        """Replace each row by what its nearest centroid leaves over; return those, ``[N]``."""
        return self._guarded(lambda search: search.subtract_nearest(residual_ND))

    def _guarded(self, call: Callable[[Search], Codes]) -> Codes:
        try:
            return call(self._search)
        except RuntimeError as error:
            self._placement.gpu_lost(error)
            self._search = NearestSearch(self._centroids_KD)
        return call(self._search)


class GpuOwner:
    """The thread that makes, asks and frees every faiss index of this process's GPU."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qarm-faiss-gpu")
        self._resources: dict[Gpu, Any] = {}

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what ``call`` returns in that thread; callers wait for each other."""
        return self._thread.submit(call, *arguments).result()

    def copy_to_gpu(self, index: Any, gpu: Gpu) -> Any:
        """Return a GPU's copy of a faiss index; all copies there share their scratch memory."""
        return self.run(self._copy, index, gpu)

    def _copy(self, index: Any, gpu: Gpu) -> Any:
        faiss = load_faiss()
        if gpu not in self._resources:
            self._resources[gpu] = faiss.StandardGpuResources()
            if gpu.scratch_mib is not None:
                self._resources[gpu].setTempMemory(gpu.scratch_mib * 2**20)
        return faiss.index_cpu_to_gpu(self._resources[gpu], gpu.number, index)


@functools.cache
def gpu_owner() -> GpuOwner:
    """Return the one owner of this process."""
    return GpuOwner()


def load_faiss() -> Any:
    """Return the module; imported when it is first needed, since exact searches need none.

    Returns:
        The module ``faiss``.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            package="faiss",
            needed_for="an approximate search of the VQ pool (quantizer.vq.search), or a GPU",
            command='pip install "qarm-feast[cpu]"` or `pip install "qarm-feast[gpu]"',
        ) from error
    return faiss

"""Where nearest searches run: on the processor, or on a GPU through faiss or torch.

faiss's GPU indexes are not thread-safe, not even for readers, and share the memory of their
resources; so one thread of the process makes, asks and frees all of them.

Shape letters in this file: N items, K centroids, D embedding width.
May import: torch, the nearest search. The one file that imports faiss.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from qarm_feast.errors import ConfigError, MissingDependencyError
from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.search import NearestSearch

Device = Literal["auto", "cpu", "cuda"]
GpuBackend = Literal["faiss", "torch"]


class Search(Protocol):
    """A search of one set of centroids by the canonical rule."""

    def search(self, x_ND: Embeddings, k: int = 1) -> Codes:
        """Return the k nearest centroids of each row, int64 ``[N, k]``, nearest first."""

    def subtract_nearest(self, residual_ND: Embeddings) -> Codes:
        """Replace each row by what its nearest centroid leaves over; return those, ``[N]``."""


@dataclass(frozen=True)
class Placement:
    """The device of a process's searches, and what drives a GPU."""

    device: Device = "cpu"
    gpu_backend: GpuBackend = "faiss"

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
        if self.gpu_backend == "torch":
            return NearestSearch(centroids_KD, "cuda")
        # Imports this module: only a process that has a GPU gets here.
        from qarm_feast.quantizers.faiss_search import FaissSearch

        return FaissSearch(centroids_KD)

    def has_gpu(self) -> bool:
        """Return whether searches run on a GPU.

        Returns:
            False for cpu; for auto, whether the backend sees a GPU.

        Raises:
            ConfigError: If the device is cuda and the backend sees none.
        """
        if self.device == "cpu":
            return False
        is_there = torch.cuda.is_available()
        if is_there and self.gpu_backend == "faiss":
            faiss = load_faiss()
            is_there = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
        if self.device == "cuda" and not is_there:
            raise ConfigError(
                f"quantizer.device is cuda, but {self.gpu_backend} sees no GPU; set it to auto or "
                'cpu, or install the builds for GPUs with `pip install "qarm-feast[gpu]"`'
            )
        return is_there


ON_CPU = Placement()


class GpuOwner:
    """The thread that makes, asks and frees every faiss index of this process's GPU."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qarm-faiss-gpu")
        self._resources: Any = None

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what ``call`` returns in that thread; callers wait for each other."""
        return self._thread.submit(call, *arguments).result()

    def copy_to_gpu(self, index: Any) -> Any:
        """Return the first GPU's copy of a faiss index; all copies share their scratch memory."""
        return self.run(self._copy, index)

    def _copy(self, index: Any) -> Any:
        faiss = load_faiss()
        if self._resources is None:
            self._resources = faiss.StandardGpuResources()
        return faiss.index_cpu_to_gpu(self._resources, 0, index)


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

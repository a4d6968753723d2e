"""The compiled kernels of this package: built once per machine, called without Python's lock.

``native_kernels.cpp`` is compiled with the machine's C++ compiler at first use, into the user's
cache folder (``$XDG_CACHE_HOME/qarm-feast``, else ``~/.cache/qarm-feast``). The file's name is a
hash of source, flags and processor features, and it appears there by a rename, so that any number
of processes may build it at once. Without a fitting processor, a compiler or a folder to write to,
:func:`kernels` says so once at INFO and gives nothing, and the callers take their torch path, which
returns the same codes.

Shape letters in this file: N items, K centroids, D embedding width, T tiles of 64 centroids.
May import: NumPy, torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qarm_feast.quantizers.base import Codes, Embeddings

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native_kernels.cpp")
CPU_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "avx512_vnni")
"""What the kernels need, by the names in ``/proc/cpuinfo``."""
CPU_INFO = Path("/proc/cpuinfo")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    # The rule rounds after each operation; a fused multiply-add would round once.
    "-ffp-contract=off",
    "-mprefer-vector-width=512",
    *(f"-m{feature.replace('_', '')}" for feature in CPU_FEATURES),
)
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_TIMEOUT_SECONDS = 120
_TILE = 64
MAX_TOP_DIM = 4096
"""Widest vectors of :class:`NativeTop`: up to here its bound covers what is flushed to zero."""
_LOCK = threading.Lock()


class _UnavailableError(Exception):
    """The kernels cannot be had on this machine; the message is the reason."""


class _CentroidSet(ctypes.Structure):
    """``struct Centroids`` of the source."""

    _fields_ = (
        ("num_centroids", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("centroids_KD", ctypes.c_void_p),
        ("centre_D", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm_T", ctypes.c_void_p),
        ("error_T", ctypes.c_void_p),
        ("slack_T", ctypes.c_void_p),
    )


def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where this machine cannot have them, said once."""
    with _LOCK:
        return _open_kernels()


class NativeSearch:
    """The nearest centroid by the canonical rule, with the fused filter.

    Holds the centroids as given and rounded to bfloat16. Safe to share between threads.
    """

    def __init__(
        self, library: ctypes.CDLL, centroids_KD: torch.Tensor, centre_D: torch.Tensor
    ) -> None:
        num_centroids, embedding_dim = centroids_KD.shape
        num_tiles = -(-num_centroids // _TILE)
        packed = torch.empty(num_tiles * -(-embedding_dim // 2) * _TILE, dtype=torch.int32)
        tiles = [torch.empty(num_tiles) for _ in range(3)]
        # The structure holds bare addresses: these references keep the memory alive.
        self._arrays = [centroids_KD, centre_D, packed, torch.empty(num_tiles * _TILE), *tiles]
        addresses = [array.data_ptr() for array in self._arrays]
        self._set = _CentroidSet(num_centroids, embedding_dim, *addresses)
        self._library = library
        library.prepare(ctypes.byref(self._set))

    def search(self, x_ND: torch.Tensor, *, is_subtracted: bool = False) -> torch.Tensor:
        """Return the nearest centroid of each row.

        Args:
            x_ND: Checked vectors, float32, contiguous.
            is_subtracted: Whether each row is replaced by what its centroid leaves over.

        Returns:
            Indices of shape ``[N]``, int64.
        """
        # The kernel sees a bare address: callers have checked, this is the last line.
        assert x_ND.is_contiguous(), "rows must lie one after the other"
        assert (x_ND.dtype, x_ND.shape[1]) == (torch.float32, self._set.dim)
        codes_N = torch.empty(len(x_ND), dtype=torch.int64)
        self._library.search(
            ctypes.byref(self._set),
            ctypes.c_void_p(x_ND.data_ptr()),
            ctypes.c_int64(len(x_ND)),
            ctypes.c_void_p(codes_N.data_ptr()),
            ctypes.c_int64(is_subtracted),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return codes_N

    def choose(self, x_ND: torch.Tensor, k: int) -> torch.Tensor:
        """Return the k nearest centroids of each row, in no particular order.

        Args:
            x_ND: Vectors, float32, contiguous, finite.
            k: How many to return per row.

        Returns:
            Indices of shape ``[N, k]``, int64.
        """
        codes_Nk = torch.empty((len(x_ND), k), dtype=torch.int64)
        self._library.choose(
            ctypes.byref(self._set),
            ctypes.c_void_p(x_ND.data_ptr()),
            ctypes.c_int64(len(x_ND)),
            ctypes.c_int64(k),
            ctypes.c_void_p(codes_Nk.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return codes_Nk


class _ListSet(ctypes.Structure):
    """``struct Lists`` of the source."""

    _fields_ = (
        ("num_lists", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("size_I", ctypes.c_void_p),
        ("first_tile_I", ctypes.c_void_p),
        ("vectors_I", ctypes.c_void_p),
        ("numbers_I", ctypes.c_void_p),
        ("centre_D", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("list_T", ctypes.c_void_p),
        ("norm_T", ctypes.c_void_p),
        ("error_T", ctypes.c_void_p),
        ("slack_T", ctypes.c_void_p),
    )


class NativeTop:
    """The k nearest vectors of all lists, or of some, by the canonical rule.

    Holds the vectors as given, where they lie, and rounded to 8 bits (a quarter of their size, in
    tiles of 64 per list). Safe to share between threads.

    Args:
        library: The kernels.
        vectors: The vectors of each list, float32 ``[size, D]``, contiguous. Must not move.
        numbers: Their numbers, int64 ``[size]``; None: their places in the one list there is.
        centre_D: What is subtracted before rounding, float32: any point in their midst.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        vectors: Sequence[Embeddings],
        numbers: Sequence[npt.NDArray[np.int64]] | None,
        centre_D: Embeddings,
    ) -> None:
        embedding_dim = len(centre_D)
        size_I = np.array([len(rows) for rows in vectors], dtype=np.int64)
        first_tile_I = np.concatenate([[0], np.cumsum(-(-size_I // _TILE))]).astype(np.int64)
        num_tiles = int(first_tile_I[-1])
        arrays: tuple[npt.NDArray[Any], ...] = (
            size_I,
            first_tile_I,
            np.array([rows.ctypes.data for rows in vectors], dtype=np.uintp),
            np.array([own.ctypes.data for own in numbers or ()] or [0], dtype=np.uintp),
            centre_D,
            np.empty((num_tiles, -(-embedding_dim // 4), _TILE), dtype=np.uint32),
            np.empty(num_tiles * _TILE, dtype=np.int32),
            np.empty(num_tiles * _TILE, dtype=np.float32),
            np.empty(num_tiles * _TILE, dtype=np.float32),
            np.empty(num_tiles, dtype=np.int32),
            *(np.empty(num_tiles, dtype=np.float32) for _ in range(3)),
        )
        # The structure holds bare addresses: these references keep the memory alive.
        self._arrays = (arrays, vectors, numbers)
        addresses = [array.ctypes.data for array in arrays]
        self._set = _ListSet(len(vectors), embedding_dim, *addresses)
        self._library = library
        library.prepare_lists(ctypes.byref(self._set))

    def search(
        self, x_ND: Embeddings, k: int, lists_NI: Codes | None = None
    ) -> tuple[Codes, Embeddings]:
        """Return the k nearest vectors of each row, nearest first, lower number before higher.

        Args:
            x_ND: Vectors, float32, contiguous, finite.
            k: How many to return per row.
            lists_NI: The lists that each row is searched in, each once; None for all.

        Returns:
            Their numbers, int64 ``[N, k]``, and canonical distances, float32 ``[N, k]``; where the
            lists hold too few, -1 and infinity.
        """
        lists_NI = None if lists_NI is None else np.ascontiguousarray(lists_NI)
        numbers_Nk = np.empty((len(x_ND), k), dtype=np.int64)
        distances_Nk = np.empty((len(x_ND), k), dtype=np.float32)
        self._library.search_top(
            ctypes.byref(self._set),
            ctypes.c_void_p(x_ND.ctypes.data),
            ctypes.c_int64(len(x_ND)),
            ctypes.c_int64(k),
            ctypes.c_void_p(None if lists_NI is None else lists_NI.ctypes.data),
            ctypes.c_int64(0 if lists_NI is None else lists_NI.shape[1]),
            ctypes.c_void_p(numbers_Nk.ctypes.data),
            ctypes.c_void_p(distances_Nk.ctypes.data),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return numbers_Nk, distances_Nk


def cell_sums(
    library: ctypes.CDLL, x_ND: Embeddings, codes_N: Codes, num_cells: int, block_rows: int
) -> npt.NDArray[np.float64]:
    """Return the sum of the rows of each cell.

    Args:
        library: The kernels.
        x_ND: Rows, float32.
        codes_N: The cell of each row, int64 in ``[0, K)``.
        num_cells: K.
        block_rows: Rows are added in their order within blocks of so many, then the blocks' sums.

    Returns:
        Sums of shape ``[K, D]``, float64.
    """
    x_ND, codes_N = np.ascontiguousarray(x_ND), np.ascontiguousarray(codes_N)
    sums_KD = np.zeros((num_cells, x_ND.shape[1]))
    library.cell_sums(
        ctypes.c_void_p(x_ND.ctypes.data),
        ctypes.c_int64(len(x_ND)),
        ctypes.c_int64(x_ND.shape[1]),
        ctypes.c_void_p(codes_N.ctypes.data),
        ctypes.c_int64(num_cells),
        ctypes.c_int64(block_rows),
        ctypes.c_void_p(sums_KD.ctypes.data),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return sums_KD


@functools.cache
def _open_kernels() -> ctypes.CDLL | None:
    try:
        _check_processor()
        path = _library_path()
        if not path.exists():
            _build(path)
        return ctypes.CDLL(str(path))
    except (_UnavailableError, OSError) as error:
        logger.info("native_kernels_off reason=%s; torch searches instead", error)
        return None


def _check_processor() -> None:
    try:
        lines = CPU_INFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise _UnavailableError(f"{CPU_INFO} cannot be read") from error
    present = next((line.split() for line in lines if line.startswith("flags")), [])
    missing = [feature for feature in CPU_FEATURES if feature not in present]
    if missing:
        raise _UnavailableError(f"the processor lacks {', '.join(missing)}")


def _library_path() -> Path:
    recipe = "\n".join((*_FLAGS, *CPU_FEATURES)).encode()
    name = hashlib.sha256(SOURCE.read_bytes() + recipe).hexdigest()[:20]
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(root) / "qarm-feast"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise _UnavailableError(f"{folder} belongs to another user")
    return folder / f"kernels-{name}.so"


def _build(path: Path) -> None:
    """Compile to a name of this process's own, then rename: a half-written file is never seen."""
    candidates = (os.environ.get("CXX"), *_COMPILERS)
    compiler = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise _UnavailableError(f"no C++ compiler ({', '.join(_COMPILERS)}) on PATH")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-o", str(built), str(SOURCE)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise _UnavailableError(f"{compiler} took more than {error.timeout} s") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise _UnavailableError(f"{compiler} failed: {last}") from error
        os.replace(built, path)
    logger.info("native_kernels_built seconds=%.1f path=%s", time.monotonic() - started, path)

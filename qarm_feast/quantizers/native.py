"""The compiled kernels of this package: built once per machine, called without Python's lock.

Their sources are compiled with the machine's C++ compiler at first use, into the user's cache
folder (``$XDG_CACHE_HOME/qarm-feast``, else ``~/.cache/qarm-feast``). The file's name is a hash of
sources, flags and processor features, and it appears there by a rename, so that any number
of processes may build it at once. Without a fitting processor, a compiler or a folder to write to,
:func:`kernels` says so once at INFO and gives nothing, and the callers take their torch path, which
returns the same codes.

Shape letters in this file: N items, K centroids, P vectors, D embedding width, T tiles of 64
centroids, L leaves, U distinct vectors, M nearest lists, I probed lists, k neighbours.
May import: NumPy, torch, ``sketch``.
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
from qarm_feast.quantizers.sketch import LEAF_SIZE, SCORE_DIGITS, Digits, Margins, SketchedLists

logger = logging.getLogger(__name__)

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("native_kernels.cpp", "native_sketch.cpp")
)
HEADER = Path(__file__).with_name("native_distance.h")
CPU_FEATURES = (
    "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "avx512_vnni",
    "avx512_vbmi2",
)  # fmt: skip
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
_CACHE_LINE = 64
_EMPTY_SLOT = -(1 << 30)
"""Minus half the square of a vector that is not there: below every limit."""
MAX_TOP_DIM = 4096
"""Widest vectors of both searches of k: up to here the bounds cover what is flushed to zero."""
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

    def choose(self, x_ND: torch.Tensor, sizes: Sequence[int]) -> list[Codes]:
        """Return the nearest centroids of each row, in no particular order.

        Args:
            x_ND: Vectors, float32, contiguous, finite.
            sizes: How many to return per row; one product serves them all.

        Returns:
            For each size k indices of shape ``[N, k]``, int64.
        """
        sizes_array = np.array(sizes, dtype=np.int64)
        codes = [np.empty((len(x_ND), k), dtype=np.int64) for k in sizes]
        addresses = np.array([one.ctypes.data for one in codes], dtype=np.uintp)
        self._library.choose(
            ctypes.byref(self._set),
            ctypes.c_void_p(x_ND.data_ptr()),
            ctypes.c_int64(len(x_ND)),
            ctypes.c_void_p(sizes_array.ctypes.data),
            ctypes.c_int64(len(sizes)),
            ctypes.c_void_p(addresses.ctypes.data),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return codes


class _VectorSet(ctypes.Structure):
    """``struct Vectors`` of the source."""

    _fields_ = (
        ("num_vectors", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("vectors_PD", ctypes.c_void_p),
        ("centre_D", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm_T", ctypes.c_void_p),
        ("error_T", ctypes.c_void_p),
        ("slack_T", ctypes.c_void_p),
    )


class NativeTop:
    """The k nearest of a set of vectors by the canonical rule.

    Holds the vectors as given, where they lie, and rounded to 8 bits (a quarter of their size, in
    tiles of 64). Safe to share between threads.

    Args:
        library: The kernels.
        vectors_PD: The vectors, float32, contiguous. Must not move.
        centre_D: What is subtracted before rounding, float32: any point in their midst.
    """

    def __init__(self, library: ctypes.CDLL, vectors_PD: Embeddings, centre_D: Embeddings) -> None:
        num_vectors, embedding_dim = vectors_PD.shape
        num_tiles = -(-num_vectors // _TILE)
        arrays: tuple[npt.NDArray[Any], ...] = (
            vectors_PD,
            centre_D,
            np.empty((num_tiles, -(-embedding_dim // 4), _TILE), dtype=np.uint32),
            np.empty(num_tiles * _TILE, dtype=np.int32),
            np.empty(num_tiles * _TILE, dtype=np.float32),
            np.empty(num_tiles * _TILE, dtype=np.float32),
            *(np.empty(num_tiles, dtype=np.float32) for _ in range(3)),
        )
        # The structure holds bare addresses: these references keep the memory alive.
        self._arrays = arrays
        addresses = [array.ctypes.data for array in arrays]
        self._set = _VectorSet(num_vectors, embedding_dim, *addresses)
        self._library = library
        library.prepare_top(ctypes.byref(self._set))

    def search(self, x_ND: Embeddings, k: int) -> Codes:
        """Return the k nearest vectors of each row, nearest first, lower index before higher.

        Args:
            x_ND: Vectors, float32, contiguous, finite.
            k: How many to return per row, at most P.

        Returns:
            Indices of shape ``[N, k]``, int64.
        """
        numbers_Nk = np.empty((len(x_ND), k), dtype=np.int64)
        distances_Nk = np.empty((len(x_ND), k), dtype=np.float32)
        self._library.search_top(
            ctypes.byref(self._set),
            ctypes.c_void_p(x_ND.ctypes.data),
            ctypes.c_int64(len(x_ND)),
            ctypes.c_int64(k),
            ctypes.c_void_p(numbers_Nk.ctypes.data),
            ctypes.c_void_p(distances_Nk.ctypes.data),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return numbers_Nk


class _SketchedSet(ctypes.Structure):
    """``struct Sketched`` of the source."""

    _fields_ = (
        ("num_lists", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("rest_width", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("leaf_margin", ctypes.c_int32),
        ("score_margin", ctypes.c_int32),
        ("full_margin", ctypes.c_int32),
        ("first_leaf_I", ctypes.c_void_p),
        ("first_head_I", ctypes.c_void_p),
        ("leaves", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("heads", ctypes.c_void_p),
        ("head_bias", ctypes.c_void_p),
        ("rest", ctypes.c_void_p),
        ("vectors_I", ctypes.c_void_p),
        ("numbers_I", ctypes.c_void_p),
        ("list_L", ctypes.c_void_p),
    )


class NativeSketch:
    """The k nearest, by the canonical rule, of the vectors that count for each row.

    Holds the vectors as given, where they lie, and a copy of their digits in leaves of 16. Safe to
    share between threads.

    Args:
        library: The kernels.
        lists: The digits; not needed any more afterwards.
        vectors_I: The vectors of each list, float32 ``[size, D]``, contiguous. Must not move.
        numbers_I: Their numbers, int64 ``[size]``. Must not move.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        lists: SketchedLists,
        vectors_I: Sequence[Embeddings],
        numbers_I: Sequence[npt.NDArray[np.int64]],
    ) -> None:
        self._sketch = lists.sketch
        num_lists, embedding_dim = len(vectors_I), lists.digits_UD.shape[1]
        self._rest_width = -(-max(0, embedding_dim - SCORE_DIGITS) // SCORE_DIGITS) * SCORE_DIGITS
        num_leaves_I = np.diff(lists.first_leaf_I)
        num_heads_I = -(-num_leaves_I // LEAF_SIZE)
        first_head_I = np.concatenate([[0], np.cumsum(num_heads_I)])
        slots_U = _slots(lists.leaf_U)
        slots_L = _slots(np.repeat(np.arange(len(num_leaves_I)), num_leaves_I), first_head_I)
        num_leaves, num_heads = int(lists.first_leaf_I[-1]), int(first_head_I[-1])
        arrays: tuple[npt.NDArray[Any], ...] = (
            lists.first_leaf_I,
            first_head_I,
            _transposed(lists.digits_UD, slots_U, num_leaves),
            _bias(lists.halves_U, slots_U, num_leaves),
            _transposed(lists.head_digits_LD, slots_L, num_heads),
            _bias(lists.head_halves_L, slots_L, num_heads),
            self._rest(lists.digits_UD, slots_U, num_leaves),
            np.array([rows.ctypes.data for rows in vectors_I], dtype=np.uintp),
            np.array([own.ctypes.data for own in numbers_I], dtype=np.uintp),
            np.repeat(np.arange(num_lists, dtype=np.int32), num_leaves_I),
        )
        # The structure holds bare addresses: these references keep the memory alive.
        self._arrays = (arrays, vectors_I, numbers_I)
        self._addresses = [array.ctypes.data for array in arrays]
        self._shape = (num_lists, embedding_dim, self._rest_width)
        self._library = library

    def search(
        self, x_ND: Embeddings, k: int, probes_NI: Codes, near_NM: Codes, margins: Margins
    ) -> tuple[Codes, Embeddings]:
        """Return the k nearest of what counts for each row, nearest first, low numbers first.

        Args:
            x_ND: Vectors, float32, contiguous, finite.
            k: How many to return per row.
            probes_NI: The lists that each row is searched in, each once.
            near_NM: The nearest of these.
            margins: What counts.

        Returns:
            Their numbers, int64 ``[N, k]``, and canonical distances, float32 ``[N, k]``; where too
            few count, -1 and infinity.
        """
        digits_ND, _ = self._sketch.digits(x_ND)
        arrays = (
            _widened(digits_ND[:, :SCORE_DIGITS], SCORE_DIGITS),
            _widened(digits_ND[:, SCORE_DIGITS:], self._rest_width),
            x_ND,
        )
        probes_NI, near_NM = np.ascontiguousarray(probes_NI), np.ascontiguousarray(near_NM)
        numbers_Nk = np.empty((len(x_ND), k), dtype=np.int64)
        distances_Nk = np.empty((len(x_ND), k), dtype=np.float32)
        own = (margins.rank, margins.leaf, margins.score, margins.full)
        self._library.search_sketched(
            ctypes.byref(_SketchedSet(*self._shape, *own, *self._addresses)),
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
            ctypes.c_int64(len(x_ND)),
            ctypes.c_int64(k),
            ctypes.c_void_p(probes_NI.ctypes.data),
            ctypes.c_int64(probes_NI.shape[1]),
            ctypes.c_void_p(near_NM.ctypes.data),
            ctypes.c_int64(near_NM.shape[1]),
            ctypes.c_void_p(numbers_Nk.ctypes.data),
            ctypes.c_void_p(distances_Nk.ctypes.data),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return numbers_Nk, distances_Nk

    def _rest(
        self, digits_UD: Digits, slots_U: npt.NDArray[np.int64], num_leaves: int
    ) -> npt.NDArray[np.uint8]:
        """Return the digits that a score leaves out, row by row."""
        rest = _aligned((num_leaves * LEAF_SIZE, self._rest_width))
        width = max(0, digits_UD.shape[1] - SCORE_DIGITS)
        rest[slots_U, :width] = _unsigned(digits_UD[:, SCORE_DIGITS:])
        return rest


def _slots(
    group_U: npt.NDArray[np.int64], first_I: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """Return each row's slot: groups begin at a multiple of 16, rows of one follow each other."""
    within_U = np.arange(len(group_U)) - np.searchsorted(group_U, group_U)
    first_U = group_U if first_I is None else first_I[group_U]
    slots_U: npt.NDArray[np.int64] = first_U * LEAF_SIZE + within_U
    return slots_U


def _transposed(
    digits_UD: Digits, slots_U: npt.NDArray[np.int64], num_leaves: int
) -> npt.NDArray[np.uint8]:
    """Return the first 64 digits in leaves, ``[L, 16 groups, 16 vectors, 4 digits]``."""
    leaves = _aligned((num_leaves, SCORE_DIGITS // 4, LEAF_SIZE, 4))
    first = _unsigned(_widened(digits_UD[:, :SCORE_DIGITS], SCORE_DIGITS))
    leaves[slots_U // LEAF_SIZE, :, slots_U % LEAF_SIZE] = first.reshape(len(first), -1, 4)
    return leaves


def _aligned(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Return zeros that begin with a cache line, so that no register is loaded from two."""
    size = int(np.prod(shape))
    # Of `empty` NumPy asks for huge pages, of `zeros` it does not.
    room = np.empty(size + _CACHE_LINE, dtype=np.uint8)
    room.fill(0)
    start = -room.ctypes.data % _CACHE_LINE
    return room[start : start + size].reshape(shape)


def _bias(
    halves_U: npt.NDArray[np.int32], slots_U: npt.NDArray[np.int64], num_leaves: int
) -> npt.NDArray[np.int32]:
    bias = np.full(num_leaves * LEAF_SIZE, _EMPTY_SLOT, dtype=np.int32)
    bias[slots_U] = -halves_U
    return bias


def _unsigned(digits_UD: Digits) -> npt.NDArray[np.uint8]:
    # Adding 128 to a signed byte flips its highest bit.
    unsigned_UD: npt.NDArray[np.uint8] = digits_UD.view(np.uint8) ^ np.uint8(0x80)
    return unsigned_UD


def _widened(digits_ND: Digits, width: int) -> Digits:
    widened_ND = np.zeros((len(digits_ND), width), dtype=np.int8)
    widened_ND[:, : digits_ND.shape[1]] = digits_ND
    return widened_ND


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
    code = b"".join(source.read_bytes() for source in (*SOURCES, HEADER))
    name = hashlib.sha256(code + recipe).hexdigest()[:20]
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
        command = [compiler, *_FLAGS, "-o", str(built), *map(str, SOURCES)]
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

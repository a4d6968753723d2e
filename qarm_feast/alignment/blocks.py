"""Numeric work over blocks of rows, in this process or in several, with equal results.

A block function depends on its arrays and block alone, so neither the number of processes nor
their order can change what comes out. May import: the standard library, numpy.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np

Arrays = Mapping[str, np.ndarray]
ResultT = TypeVar("ResultT")
BlockFunction = Callable[[Arrays, int, int], ResultT]

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_arrays: dict[str, np.ndarray] = {}
"""What a worker process has opened: arrays by name."""


def cut_blocks(work: np.ndarray, work_per_block: int) -> np.ndarray:
    """Return where blocks of consecutive rows begin, and behind them the number of rows.

    Args:
        work: Work of each row, any unit.
        work_per_block: Work at which a block is full; a row that takes more stands alone or ends
            a block.

    Returns:
        int64, ascending, from 0 to the number of rows.
    """
    before = np.cumsum(work) - work
    is_start = np.diff(before // work_per_block, prepend=-1) > 0
    return np.append(np.flatnonzero(is_start), len(work))


def map_blocks(
    function: BlockFunction[ResultT], arrays: Arrays, starts: np.ndarray, num_processes: int
) -> Iterator[ResultT]:
    """Yield ``function(arrays, begin, end)`` of each block, in the order of the blocks.

    Args:
        function: A module's own function, or a ``functools.partial`` of one.
        arrays: What it reads; several processes map one copy on disk into their memory.
        starts: Begin of each block, and the end of the last one.
        num_processes: Most worker processes; with 1, or one block, this process works itself.

    Yields:
        One result per block.
    """
    begins, ends = starts[:-1].tolist(), starts[1:].tolist()
    if min(num_processes, len(begins)) <= 1:
        yield from map(partial(function, arrays), begins, ends)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, values in arrays.items():
            np.save(Path(folder) / f"{name}.npy", values)
        # Spawned, not forked: a forked child of a process with threads can hang.
        executor = ProcessPoolExecutor(
            num_processes, get_context("spawn"), initializer=_open_arrays, initargs=(folder,)
        )
        with executor:
            with _one_thread_each():
                results = executor.map(partial(_run, function), begins, ends)
            yield from results


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that start now compute with one thread: BLAS reads this when it is loaded."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _open_arrays(folder: str) -> None:
    for path in Path(folder).glob("*.npy"):
        _arrays[path.stem] = np.asarray(np.load(path, mmap_mode="r"))


def _run(function: BlockFunction[ResultT], begin: int, end: int) -> ResultT:
    return function(_arrays, begin, end)

"""Reading ahead: parts are read by one thread and made ready by others, in their order.

NumPy, Arrow and torch leave the interpreter's lock during long work, so threads are enough, and
they hand over memory instead of copies.
May import: the standard library.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, Full, Queue
from typing import TypeVar

PartT = TypeVar("PartT")
ReadyT = TypeVar("ReadyT")

_STOP_CHECK_SECONDS = 0.1


def prefetched(
    parts: Iterator[PartT], prepare: Callable[[int, PartT], ReadyT], num_workers: int
) -> Iterator[ReadyT]:
    """Yield ``prepare(number, part)`` of each part, computed ahead of the caller.

    Args:
        parts: Read by a thread of its own.
        prepare: Called with the part's number, by worker threads: by several at once.
        num_workers: Worker threads; twice as many parts are held. 0: all work is done by the
            caller's thread, nothing ahead.

    Yields:
        Results in the order of the parts, whatever the number of workers.
    """
    if num_workers == 0:
        for number, part in enumerate(parts):
            yield prepare(number, part)
        return
    waiting: Queue[Future[ReadyT] | BaseException | None] = Queue(maxsize=2 * num_workers)
    stopped = threading.Event()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prepare-batches") as pool:

        def read() -> None:
            last: BaseException | None = None
            try:
                for number, part in enumerate(parts):
                    if not _put(waiting, pool.submit(prepare, number, part), stopped):
                        return
            except Exception as error:  # noqa: BLE001 - raised again by the thread that waits for it
                last = error
            _put(waiting, last, stopped)

        reader = threading.Thread(target=read, name="read-rows", daemon=True)
        reader.start()
        try:
            while (entry := waiting.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                yield entry.result()
        finally:
            stopped.set()
            _drain(waiting)
            reader.join()


def _put(waiting: "Queue[ReadyT]", entry: ReadyT, stopped: threading.Event) -> bool:
    """Wait for a place in the queue; return False if nobody takes from it any more."""
    while not stopped.is_set():
        try:
            waiting.put(entry, timeout=_STOP_CHECK_SECONDS)
        except Full:
            continue
        return True
    return False


def _drain(waiting: "Queue[ReadyT]") -> None:
    while True:
        try:
            waiting.get_nowait()
        except Empty:
            return

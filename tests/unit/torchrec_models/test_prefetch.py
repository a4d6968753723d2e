import threading
from collections.abc import Iterator

import pytest

from torchrec_models.prefetch import prefetched


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_parts(num_workers: int) -> None:
    results = prefetched(iter("abcdefgh"), lambda number, part: f"{number}{part}", num_workers)

    assert list(results) == ["0a", "1b", "2c", "3d", "4e", "5f", "6g", "7h"]


def test_parts_are_made_ready_before_they_are_asked_for() -> None:
    second_done = threading.Event()

    def prepare(number: int, part: int) -> int:
        if number == 1:
            second_done.set()
        return part

    results = prefetched(iter(range(3)), prepare, num_workers=1)

    assert next(results) == 0
    assert second_done.wait(timeout=10)
    results.close()


def test_no_more_parts_are_read_than_are_held_ahead() -> None:
    num_read = 0
    is_waiting = threading.Event()

    def parts() -> Iterator[int]:
        nonlocal num_read
        for number in range(1000):
            num_read += 1
            if num_read == 5:
                is_waiting.set()
            yield number

    results = prefetched(parts(), lambda number, part: part, num_workers=2)
    next(results)
    is_waiting.wait(timeout=10)
    num_held = num_read
    results.close()

    # Four in the queue, one on its way into it, and the one that was taken.
    assert 5 <= num_held <= 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_while_reading_or_preparing_reaches_the_caller(num_workers: int) -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("no such file")

    def divide(_: int, part: int) -> float:
        return 1 / part

    with pytest.raises(OSError, match="no such file"):
        list(prefetched(failing(), divide, num_workers))
    with pytest.raises(ZeroDivisionError):
        list(prefetched(iter([1, 0]), divide, num_workers))


def test_a_caller_that_stops_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    results = prefetched(iter(range(1000)), lambda number, part: part, num_workers=2)
    next(results)

    results.close()

    assert threading.active_count() == before

import os
import signal
import threading
import time

import pytest

from streaming import daemon
from streaming.worker import Drain


def test_a_batch_that_hangs_past_the_time_to_drain_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(daemon, "LAST_BATCH_GRACE_SECONDS", 0.02)
    monkeypatch.setattr("os._exit", statuses.append)
    drain = Drain(timeout_seconds=0.03)
    drain.requested.set()
    began = time.monotonic()

    daemon._end_late_drain(drain, is_over=threading.Event())

    assert statuses == [6]
    assert time.monotonic() - began >= 0.05


def test_a_process_that_ran_a_worker_outlives_its_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(daemon, "LAST_BATCH_GRACE_SECONDS", 0.0)
    monkeypatch.setattr("os._exit", statuses.append)
    drain = Drain(timeout_seconds=0.2)
    before = set(threading.enumerate())

    with daemon._drain_on_signals(drain):
        watchdogs = set(threading.enumerate()) - before
        drain.requested.set()
    for watchdog in watchdogs:
        watchdog.join(5)

    assert [watchdog.is_alive() for watchdog in watchdogs] == [False]
    assert statuses == []


def test_sigterm_only_sets_the_flag_and_the_old_handler_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(daemon, "_end_late_drain", lambda drain, is_over: None)
    drain = Drain(timeout_seconds=30)
    before = signal.getsignal(signal.SIGTERM)

    with daemon._drain_on_signals(drain):
        os.kill(os.getpid(), signal.SIGTERM)
        is_set = drain.requested.wait(5)

    assert is_set
    assert signal.getsignal(signal.SIGTERM) is before

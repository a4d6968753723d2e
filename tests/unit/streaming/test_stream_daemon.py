import os
import signal

import pytest

from streaming import daemon
from streaming.worker import Drain


def test_a_batch_that_hangs_past_the_time_to_drain_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    statuses: list[int] = []
    drain = Drain(timeout_seconds=30)
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("os._exit", statuses.append)
    drain.requested.set()

    daemon._end_late_drain(drain)

    assert waits == [30 + daemon.LAST_BATCH_GRACE_SECONDS]
    assert statuses == [6]


def test_sigterm_only_sets_the_flag_and_the_old_handler_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(daemon, "_end_late_drain", lambda drain: None)
    drain = Drain(timeout_seconds=30)
    before = signal.getsignal(signal.SIGTERM)

    with daemon._drain_on_signals(drain):
        os.kill(os.getpid(), signal.SIGTERM)
        is_set = drain.requested.wait(5)

    assert is_set
    assert signal.getsignal(signal.SIGTERM) is before

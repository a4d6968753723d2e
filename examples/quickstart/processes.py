"""Child processes of the main job: each in a group of its own, none left behind.

A child that fails ends the job with the end of its log; leaving the ``with`` block, by whatever
way, terminates every group that still runs, and kills what does not go. May import: the standard
library and qarm_feast.errors.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from qarm_feast.errors import QarmError

_STOP_SECONDS = 40.0
_SILENCE_SECONDS = 10.0
_LAST_EXIT_CODE = 6
"""Longer than torchrun waits for its ranks (30 s) and a worker for its last batch (35 s)."""
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOG_TAIL_LINES = 25


class ChildFailedError(QarmError):
    """A child process ended with a status other than 0, which becomes ours if it is an error's."""

    def __init__(self, arguments: Sequence[str], status: int, log_path: Path) -> None:
        if 0 < status <= _LAST_EXIT_CODE:
            self.exit_code = status
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
        super().__init__(
            f"`{' '.join(arguments)}` ended with status {status}; the end of {log_path}:\n{tail}"
        )


class Processes:
    """Starts, waits for and ends the children of one run; use as a context manager."""

    def __init__(self, log_dir: Path, environment: Mapping[str, str]) -> None:
        self._log_dir = log_dir
        self._environment = {**os.environ, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        log_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A second Ctrl-C must not leave a child behind; each is killed after its deadline anyway.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING_SIGNALS}
        try:
            self.stop_all()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(
        self,
        name: str,
        arguments: Sequence[str],
        extra_environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a child whose output goes to ``<log_dir>/<name>.log``."""
        with (self._log_dir / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environment, **(extra_environment or {})},
                start_new_session=True,
            )
        self._running[name] = child
        return child

    def check_running(self, name: str, arguments: Sequence[str] = ()) -> None:
        """Raise if a child that should run has ended.

        Raises:
            ChildFailedError: With the end of the child's log.
        """
        status = self._running[name].poll()
        if status is not None:
            raise ChildFailedError(arguments or [name], status, self._log_dir / f"{name}.log")

    def run(
        self,
        name: str,
        arguments: Sequence[str],
        on_line: Callable[[str], None] | None = None,
        extra_environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run a child to its end and return what it wrote.

        Args:
            name: Name of the log file.
            arguments: The command.
            on_line: Called with each new line while the child runs, and now and then when it is
                silent, to show progress.
            extra_environment: Variables for this child alone.

        Raises:
            ChildFailedError: If it ends with a status other than 0.
        """
        child = self.start(name, arguments, extra_environment)
        log_path = self._log_dir / f"{name}.log"
        with log_path.open(errors="replace") as log:
            started = spoke_at = time.monotonic()
            while True:
                ended = child.poll() is not None
                for line in log:
                    spoke_at = time.monotonic()
                    if on_line is not None:
                        on_line(line.rstrip("\n"))
                if ended:
                    break
                if on_line is not None and time.monotonic() - spoke_at > _SILENCE_SECONDS:
                    spoke_at = time.monotonic()
                    on_line(f"{name}: {spoke_at - started:.0f} s so far")
                time.sleep(0.05)
        status = self.stop(name)
        if status != 0:
            raise ChildFailedError(arguments, status, log_path)
        return log_path.read_text(errors="replace")

    def stop(self, name: str, stop_seconds: float = _STOP_SECONDS) -> int:
        """Send SIGTERM to a child's group, after the deadline SIGKILL, and return its status."""
        signal_group(self._running[name], signal.SIGTERM)
        return self._reap(name, stop_seconds)

    def stop_all(self) -> None:
        """Stop every child that still runs; all of them drain at the same time."""
        for child in self._running.values():
            signal_group(child, signal.SIGTERM)
        for name in list(self._running):
            self._reap(name, _STOP_SECONDS)

    def _reap(self, name: str, stop_seconds: float) -> int:
        status = reap_group(self._running[name], stop_seconds)
        del self._running[name]
        return status


def signal_group(child: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Signal a child and its own children; nothing happens if the child has ended."""
    if child.poll() is None:
        os.killpg(child.pid, number)


def reap_group(child: "subprocess.Popen[bytes]", stop_seconds: float) -> int:
    """Wait for a child, kill what is left of its group, and return the child's status.

    Args:
        child: Started with ``start_new_session``.
        stop_seconds: How long it may take; then it is killed as well.
    """
    try:
        child.wait(stop_seconds)
    except subprocess.TimeoutExpired:
        # The status, -9, tells.
        pass
    finally:
        # Also when a second Ctrl-C cuts the wait short.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode

"""Child processes of the main job: each in a group of its own, none left behind.

A child that fails ends the job with the end of its log; leaving the ``with`` block, by whatever
way, terminates every group that still runs, and kills what does not go.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from qarm_feast.errors import QarmError

_STOP_SECONDS = 20.0
_LOG_TAIL_LINES = 25


class ChildFailedError(QarmError):
    """A child process ended with a status other than 0."""

    def __init__(self, arguments: Sequence[str], status: int, log_path: Path) -> None:
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
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for name in list(self._running):
            self.stop(name)

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
    ) -> str:
        """Run a child to its end and return what it wrote.

        Args:
            name: Name of the log file.
            arguments: The command.
            on_line: Called with each new line while the child runs, to show progress.

        Raises:
            ChildFailedError: If it ends with a status other than 0.
        """
        child = self.start(name, arguments)
        log_path = self._log_dir / f"{name}.log"
        with log_path.open(errors="replace") as log:
            while True:
                ended = child.poll() is not None
                for line in log:
                    if on_line is not None:
                        on_line(line.rstrip("\n"))
                if ended:
                    break
                time.sleep(0.05)
        del self._running[name]
        if child.returncode != 0:
            raise ChildFailedError(arguments, child.returncode, log_path)
        return log_path.read_text(errors="replace")

    def stop(self, name: str, stop_seconds: float = _STOP_SECONDS) -> int:
        """Send SIGTERM to a child's group, after the deadline SIGKILL, and return its status."""
        child = self._running.pop(name)
        if child.poll() is None:
            _signal_group(child.pid, signal.SIGTERM)
        try:
            child.wait(stop_seconds)
        except subprocess.TimeoutExpired:
            print(f"{name} did not stop in {stop_seconds:.0f} s: killed", file=sys.stderr)
        _signal_group(child.pid, signal.SIGKILL)
        return child.wait()


def _signal_group(group_id: int, number: signal.Signals) -> None:
    try:
        os.killpg(group_id, number)
    except ProcessLookupError:
        # The whole group has already gone: nothing is left to end.
        return

"""What a run starts and hurts: workers, redis, a small disk. Nothing outlives its block."""

import contextlib
import ctypes
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from qarm_feast.errors import ServiceUnavailableError

_START_SECONDS = 30.0
_END_SECONDS = 45.0
_PR_SET_PDEATHSIG = 1
_DISK_BYTES = 64 * 1024 * 1024
_SMALLEST_FILE_LIMIT = 512
"""Every parquet part is larger."""

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["streaming.cli", "streaming.daemon"])


class Worker:
    """One ``qarm-stream run`` process with a log of its own.

    Args:
        config_path: Path of ``qarm.yaml``.
        log_path: Where its output goes.
    """

    def __init__(self, config_path: Path, log_path: Path) -> None:
        self.log_path = log_path
        log_path.touch()
        self._process: BaseProcess = _forkserver.Process(
            target=_run_worker, args=(str(config_path), str(log_path))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Its status; None while it runs."""
        return self._process.exitcode

    def log(self) -> str:
        """Return everything it has logged so far."""
        return self.log_path.read_text(errors="replace")

    def has_started(self) -> bool:
        """Say whether it has come to its work, and so handles signals."""
        return " worker_started " in self.log()

    def num_batches(self) -> int:
        """Return how many batches it has taken through all steps."""
        return self.log().count(" batch_stored ")

    def num_retries(self, store: str) -> int:
        """Return how many writes to a store failed, by its /metrics.

        A worker whose files may not grow cannot log it.
        """
        port = re.search(r"worker_started pid=\d+ metrics_port=(\d+)", self.log())
        if port is None:
            return 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics", timeout=5) as page:
            text = page.read().decode()
        name = f'qarm_stream_write_retries_total{{store="{store}"}}'
        count = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return 0 if count is None else int(float(count[1]))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it at once."""
        self._process.kill()
        self._process.join()

    def stop(self) -> int | None:
        """Let it drain after SIGTERM and return its status; killed if it takes too long."""
        self._process.terminate()
        self._process.join(_END_SECONDS)
        if self._process.exitcode is None:
            self.kill()
        return self._process.exitcode

    def limit_file_size(self, num_bytes: int) -> None:
        """Let the kernel refuse what would make any of its files longer than this."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def _run_worker(config_path: str, log_path: str) -> None:
    """Become a worker: the body of the forked process."""
    # The fork server ends with the run, however that ends; its workers must end with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(log, stream)
    sys.argv = ["qarm-stream", "run", "--config", config_path, "--metrics-port", "0"]
    from streaming.cli import main

    main()


class RedisServer:
    """A redis-server; by default it keeps what it acknowledged through a crash.

    Args:
        directory: Its data and its log.
        is_durable: Whether each write goes to an append-only file on the disk.
    """

    def __init__(self, directory: Path, is_durable: bool = True) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._is_durable = is_durable
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, or start it again with the data it had; return once it answers."""
        options = ["--bind", "127.0.0.1", "--save", "", "--dir", str(self._directory)]
        if self._is_durable:
            options += ["--appendonly", "yes", "--appendfsync", "always"]
        with (self._directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["redis-server", "--port", str(self.port), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + _START_SECONDS
        with contextlib.closing(redis.Redis(port=self.port)) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    return
                time.sleep(0.05)
        raise ServiceUnavailableError(f"redis-server on port {self.port} did not answer")

    def kill(self) -> None:
        """Kill it at once; safe to call twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server."""
        assert self._process is not None
        self._process.send_signal(number)


class SmallDisk:
    """A folder below which the kernel refuses to store more: ENOSPC on a small tmpfs.

    Mounting one needs the right to; without it ``is_mounted`` is False and the caller limits the
    size of the workers' files instead.

    Args:
        directory: The folder; made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filler = directory / "filler"
        self.is_mounted = False

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs"]
        try:
            done = subprocess.run([*command, str(self.directory)], capture_output=True, check=False)
            self.is_mounted = done.returncode == 0
        except FileNotFoundError:
            self.is_mounted = False
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.directory)], check=True)

    def fill(self) -> None:
        """Write until the kernel refuses."""
        with self._filler.open("wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(65536))
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(1))

    def free(self) -> None:
        """Give the space back."""
        self._filler.unlink()


def limit_files(workers: list[Worker]) -> None:
    """Stand in for a full disk: no file of these workers may grow past some bytes."""
    for worker in workers:
        worker.limit_file_size(_SMALLEST_FILE_LIMIT)


def unlimit_files(workers: list[Worker]) -> None:
    """Take the limit away."""
    for worker in workers:
        worker.limit_file_size(resource.RLIM_INFINITY)

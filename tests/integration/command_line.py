"""Installed commands and servers in processes of their own, for the integration tests."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEAST = "feast.cli.cli:cli"
QARM = "qarm_feast.cli:main"
_START_SECONDS = 120.0


@dataclass(frozen=True)
class CommandLine:
    """Runs entry points as their installed scripts do, from one folder."""

    folder: Path

    def run(self, entry_point: str, *arguments: str | Path, status: int = 0) -> str:
        """Run to the end and return what was printed, on whichever stream."""
        with self.start(entry_point, *arguments) as process:
            printed = process.communicate(timeout=240)[0].decode()
        assert process.returncode == status, printed
        return printed

    @contextlib.contextmanager
    def start(
        self, entry_point: str, *arguments: str | Path
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a process with a group of its own, which is gone when the block ends."""
        module, _, name = entry_point.partition(":")
        program = f"import sys; from {module} import {name}; sys.exit({name}())"
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            # The group: a server's workers outlive a master that is killed alone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    @contextlib.contextmanager
    def serving(self, path: str, *arguments: str | Path) -> Iterator[str]:
        """Start a Feast server on a free loopback port; yield its address once ``path`` answers."""
        port = _free_port()
        address = f"http://127.0.0.1:{port}"
        with self.start(FEAST, *arguments, "-h", "127.0.0.1", "-p", str(port)) as process:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(address + path):
                assert process.poll() is None, process.communicate()[0].decode()
                assert time.monotonic() < deadline, f"no answer from {address}{path}"
                time.sleep(0.1)
            yield address


def post_json(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Return the status and the parsed body of the answer."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def get_text(url: str) -> str:
    """Return the body of an answer with status 200."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.status == 200
        text: str = answer.read().decode()
        return text


def _answers(url: str) -> bool:
    try:
        get_text(url)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port

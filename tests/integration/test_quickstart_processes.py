"""The main job leaves no process behind, whatever way it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.quickstart.processes import ChildFailedError, Processes

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
# A child with a child of its own, which ignores SIGTERM, as a rank of torchrun may.
STUBBORN = "trap '' TERM; sleep 600 & echo $! > {0}; exec sleep 600"
JOB = """
import signal, sys, time
from pathlib import Path
# Tests that run under nohup, or behind a shell's &, pass ignored signals on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from examples.quickstart import run
from examples.quickstart.processes import Processes

def job(arguments):
    folder = Path(sys.argv.pop())
    with Processes(folder, {}) as processes:
        processes.start("quick", ["sleep", "600"])
        ready = folder / "ready"
        slow = f"trap 'sleep 2; exit' TERM; touch {ready}; sleep 600 & wait"
        processes.start("slow", ["sh", "-c", slow])
        while not ready.exists():
            time.sleep(0.01)
        print(*(child.pid for child in processes._running.values()), flush=True)
        time.sleep(600)

run._parse_arguments = lambda: None
run._run = job
run.main()
"""


def _wait_for_end(pid: int) -> None:
    """Wait until a killed process is gone, or a zombie that init has not reaped yet."""
    deadline = time.monotonic() + 10
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def _wait_for_file(path: Path) -> int:
    deadline = time.monotonic() + 10
    while not (path.is_file() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)
    return int(path.read_text())


def test_a_group_that_ignores_sigterm_is_killed_after_the_deadline(tmp_path: Path) -> None:
    with Processes(tmp_path, {}) as processes:
        processes.start("stubborn", ["sh", "-c", STUBBORN.format(tmp_path / "pid")])
        grandchild = _wait_for_file(tmp_path / "pid")

        status = processes.stop("stubborn", stop_seconds=0.1)

    assert status == -signal.SIGKILL
    _wait_for_end(grandchild)


def test_a_child_that_fails_is_reported_and_its_own_children_end(tmp_path: Path) -> None:
    command = ["sh", "-c", f"sleep 600 & echo $! > {tmp_path / 'pid'}; echo why; exit 3"]

    with (
        Processes(tmp_path, {}) as processes,
        pytest.raises(ChildFailedError, match="status 3") as caught,
    ):
        processes.run("failing", command)

    assert "why" in str(caught.value)
    assert caught.value.exit_code == 3
    _wait_for_end(_wait_for_file(tmp_path / "pid"))


def test_leaving_gives_signal_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    with Processes(tmp_path, {}):
        pass

    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_child_outlives_the_job_even_when_it_is_signalled_twice(
    number: signal.Signals, tmp_path: Path
) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert job.stdout is not None
    children = [int(pid) for pid in job.stdout.readline().split()]

    job.send_signal(number)
    time.sleep(0.5)
    job.send_signal(number)

    assert job.wait(20) == 130
    job.stdout.close()
    assert len(children) == 2
    for child in children:
        _wait_for_end(child)

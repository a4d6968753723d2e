"""`qarm refresh` as cron calls it: one process at a time, killed, and called again."""

import json
import os
import signal
from pathlib import Path

import pytest

from qarm_feast.registry import CodebookRegistry, VersionState
from tests.integration.command_line import QARM, CommandLine
from tests.refresh_repo import write_repo

pytestmark = pytest.mark.integration


def test_a_second_refresh_is_told_who_is_at_work_and_a_killed_one_is_gone_on_with(
    tmp_path: Path,
) -> None:
    command = ("refresh", "--config", write_repo(tmp_path, num_days=20), "--log-level", "error")
    shell = CommandLine(tmp_path)

    with shell.start(QARM, *command) as first:
        assert first.stdout is not None
        printed = [first.stdout.readline().decode() for _ in range(4)]
        # It holds the lock as long as it is there, at work or not.
        os.kill(first.pid, signal.SIGSTOP)
        second = shell.run(QARM, *command, status=7)
        os.killpg(first.pid, signal.SIGKILL)
    third = shell.run(QARM, *command)

    assert [line.split()[0] for line in printed] == ["new:", "no", "pairs", "train"]
    assert f"at work: process {first.pid} on " in second
    assert "resume: the last run was stopped; done of it: pairs, train" in third
    facts = json.loads(third.splitlines()[-1])
    assert (facts["outcome"], facts["codebook_version"]) == ("published", "v1")
    registry = CodebookRegistry(str(tmp_path / "data" / "codebooks"))
    assert registry.states() == {"v1": VersionState.DEFAULT}

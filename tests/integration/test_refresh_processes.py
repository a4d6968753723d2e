"""`qarm refresh` as cron calls it: one process at a time, killed, and called again."""

import os
import re
import signal
from pathlib import Path

import pytest

from qarm_feast.errors import AlreadyRunningError
from qarm_feast.refresh.job import RefreshOptions, refresh
from qarm_feast.refresh.plan import RefreshRequest
from qarm_feast.registry import CodebookRegistry, VersionState
from tests.integration.command_line import QARM, CommandLine
from tests.refresh_repo import write_repo

pytestmark = pytest.mark.integration


def test_a_second_refresh_is_told_who_is_at_work_and_a_killed_one_is_gone_on_with(
    tmp_path: Path,
) -> None:
    config_path = write_repo(tmp_path, num_days=20)
    command = ("refresh", "--config", config_path, "--log-level", "error")
    lines: list[str] = []

    # One process is the command: a start costs seconds. The other refreshes are of this process.
    def refresh_here() -> dict[str, object]:
        return refresh(str(config_path), RefreshRequest(), RefreshOptions(), lines.append)

    with CommandLine(tmp_path).start(QARM, *command) as first:
        assert first.stdout is not None
        printed = [first.stdout.readline().decode() for _ in range(4)]
        # It holds the lock as long as it is there, at work or not.
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(AlreadyRunningError, match=re.escape(f"process {first.pid} on ")):
            refresh_here()
        os.killpg(first.pid, signal.SIGKILL)
        first.wait(timeout=60)
    report = refresh_here()

    assert [line.split()[0] for line in printed] == ["new:", "no", "pairs", "train"]
    assert lines[0].startswith("resume: the last run was stopped; done of it: pairs, train")
    assert (report["outcome"], report["codebook_version"]) == ("published", "v1")
    registry = CodebookRegistry(str(tmp_path / "data" / "codebooks"))
    assert registry.states() == {"v1": VersionState.DEFAULT}

"""``qarm offline``: compact the offline logs, and tell their state.

Parsing and printing only; the work is in ``compaction``, imported when a command runs, so that
``--help`` stays fast. May import: click.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qarm_feast.command import config_option, log_level_option, start_logging
from qarm_feast.config import load_section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qarm_feast.code_log import CodeLog
    from qarm_feast.compaction import LogState

_MIB = 2**20
_STATE_LINE = "{:<32}{:>8}{:>12}{:>10}{:>12}{:>13}"


@click.group("offline", epilog="Example: qarm offline compact --config feature_repo/qarm.yaml")
def offline_group() -> None:
    """Keep the offline store's logs in few files, and look at them."""


@offline_group.command(epilog="Example: qarm offline compact --grace-seconds 60")
@config_option
@log_level_option
@click.option(
    "--grace-seconds",
    type=click.FloatRange(min=0),
    default=None,
    help="Overrides compaction.grace_seconds; 0 deletes replaced parts at once and is for times "
    "without readers.",
)
@click.option(
    "--wait-seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="How long to wait for another compaction.",
)
def compact(
    config_path: str, log_level: str | None, grace_seconds: float | None, wait_seconds: float
) -> None:
    """Merge all small parts, and remove the raw rows of erased users."""
    from qarm_feast.compaction import CompactionConfig, Compactor

    start_logging(config_path, log_level)
    rules = load_section(config_path, "compaction", CompactionConfig).rules
    if grace_seconds is not None:
        rules = replace(rules, grace_seconds=grace_seconds)
    log = _open_log(config_path)
    counts = Compactor(log, rules).compact(is_full=True, wait_seconds=wait_seconds)
    click.echo(f"compacted {log.root}: {counts}")
    _print_states(log)


@offline_group.command(epilog="Example: qarm offline status --config feature_repo/qarm.yaml")
@config_option
@log_level_option
def status(config_path: str, log_level: str | None) -> None:
    """List each log's parts, those that wait to be deleted, and damaged ones in quarantine."""
    start_logging(config_path, log_level)
    _print_states(_open_log(config_path))


def _open_log(config_path: str) -> "CodeLog":
    from qarm_feast.offline_store import open_code_log
    from qarm_feast.repo_paths import open_feature_store

    return open_code_log(open_feature_store(Path(config_path).resolve().parent).config)


def _print_states(log: "CodeLog") -> None:
    from qarm_feast.compaction import log_states

    for line in state_lines(log_states(log)):
        click.echo(line)


def state_lines(states: "Sequence[LogState]") -> list[str]:
    """Return one line per log, and one per damaged part.

    Args:
        states: The logs.

    Returns:
        Lines of text.
    """
    titles = ("log", "parts", "MiB", "replaced", "MiB", "quarantined")
    lines = [_STATE_LINE.format(*titles)]
    for state in states:
        sizes = (f"{state.num_bytes / _MIB:.1f}", f"{state.num_replaced_bytes / _MIB:.1f}")
        lines.append(
            _STATE_LINE.format(
                state.name,
                state.num_parts,
                sizes[0],
                state.num_replaced_parts,
                sizes[1],
                len(state.quarantined),
            )
        )
    lines += [
        f"quarantined {path}: {reason}"
        for state in states
        for path, reason in state.quarantined.items()
    ]
    return lines

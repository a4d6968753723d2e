"""``qarm-stream``: the streaming daemon's command line."""

import sys

import click

from qarm_feast.command import config_option, log_level_option, run_command_line, start_logging
from qarm_feast.config import load_section
from streaming.config import StreamConfig
from streaming.limits import Reason

_REASONS = click.Choice([reason.value for reason in Reason])


@click.group(epilog="Example: qarm-stream run --config feature_repo/qarm.yaml")
@click.version_option(package_name="qarm-feast")
def qarm_stream() -> None:
    """Read item and interaction events from Kafka, write codes and recent items to Feast."""


@qarm_stream.command(
    epilog="Example: qarm-stream run --config feature_repo/qarm.yaml --metrics-port 0"
)
@config_option
@log_level_option
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=None,
    help="Overrides observability.metrics_port; 0 takes a free one.",
)
def run(config_path: str, log_level: str | None, metrics_port: int | None) -> None:
    """Run one worker until SIGTERM; start several to share the partitions."""
    start_logging(config_path, log_level)
    from streaming.daemon import run_worker

    run_worker(config_path, metrics_port)


@qarm_stream.command(epilog="Example: qarm-stream check --config feature_repo/qarm.yaml")
@config_option
@log_level_option
def check(config_path: str, log_level: str | None) -> None:
    """Test configuration, broker, topics, codebooks and stores; the exit status tells."""
    start_logging(config_path, log_level)
    from streaming.checks import exit_code_of, run_checks

    results = run_checks(config_path)
    for result in results:
        click.echo(result.line())
    sys.exit(exit_code_of(results))


@qarm_stream.group(epilog="Example: qarm-stream dlq list --config feature_repo/qarm.yaml")
def dlq() -> None:
    """Look at refused records, and send them to their topics once more."""


@dlq.command(
    "list",
    epilog="Example: qarm-stream dlq list --config feature_repo/qarm.yaml --reason undecodable",
)
@config_option
@log_level_option
@click.option("--reason", "reasons", type=_REASONS, multiple=True, help="Only this; may repeat.")
@click.option("--since", default=None, help="Only letters since then: ISO-8601 with an offset.")
@click.option(
    "--limit", type=click.IntRange(0), default=20, show_default=True, help="Newest letters shown."
)
@click.option("--json", "is_json", is_flag=True, help="One JSON object: counts and letters.")
def list_(
    config_path: str,
    log_level: str | None,
    reasons: tuple[str, ...],
    since: str | None,
    limit: int,
    is_json: bool,
) -> None:
    """Count the dead letters by reason and show the newest ones, without their payloads."""
    start_logging(config_path, log_level)
    from streaming.dlq import LetterFilter, list_letters, parse_since

    wanted = LetterFilter(reasons, since_ms=parse_since(since) if since else 0)
    letters = list_letters(load_section(config_path, "stream", StreamConfig), wanted, limit)
    click.echo(letters.json() if is_json else "\n".join(letters.lines()))


@dlq.command(
    epilog="Example: qarm-stream dlq replay --config feature_repo/qarm.yaml "
    "--reason encoder_mismatch --dry-run"
)
@config_option
@log_level_option
@click.option(
    "--reason",
    "reasons",
    type=_REASONS,
    multiple=True,
    help="Letters of this reason that were not replayed before; may repeat.",
)
@click.option(
    "--offsets",
    "ranges",
    multiple=True,
    metavar="PARTITION:FIRST-LAST",
    help="Letters at these places of the dead-letter topic, replayed before or not; may repeat.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be sent and what refused.")
def replay(
    config_path: str,
    log_level: str | None,
    reasons: tuple[str, ...],
    ranges: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Send dead letters back to the topics that they came from; exit status 4 if some cannot go."""
    if bool(reasons) == bool(ranges):
        raise click.UsageError("name the letters either by --reason or by --offsets")
    start_logging(config_path, log_level)
    from streaming.dlq import parse_range, replay_ranges, replay_reasons

    config = load_section(config_path, "stream", StreamConfig)
    if reasons:
        report = replay_reasons(config, reasons, dry_run)
    else:
        report = replay_ranges(config, [parse_range(text) for text in ranges], dry_run)
    click.echo("\n".join(report.lines(dry_run)))
    report.check()


def main() -> None:
    """Entry point of the installed command."""
    run_command_line(qarm_stream)


if __name__ == "__main__":
    main()

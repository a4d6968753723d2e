"""``qarm-stream``: the streaming daemon's command line."""

import sys

import click

from qarm_feast.command import config_option, log_level_option, run_command_line, start_logging


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


def main() -> None:
    """Entry point of the installed command."""
    run_command_line(qarm_stream)


if __name__ == "__main__":
    main()

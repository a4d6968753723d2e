"""``qarm refresh``: parsing and printing only. May import: click."""

import json
from typing import Any, Literal

import click

from qarm_feast.command import config_option, log_level_option, start_logging


@click.command("refresh", epilog="Example: qarm refresh --config feature_repo/qarm.yaml --dry-run")
@config_option
@click.option("--parent", help="Codebook version whose labels are kept.  [default: the default]")
@click.option("--encoder-version", help="Name of the new encoder.  [default: the next free one]")
@click.option("--codebook-version", help="Name of the new codebook.  [default: the next free one]")
@click.option("--raw", "include_raw", is_flag=True, help="Also export what the head reads.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where vectors are exported; ray: Ray Data.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@log_level_option
def refresh_command(
    config_path: str,
    include_raw: bool,
    engine: Literal["local", "ray"],
    dry_run: bool,
    log_level: str | None,
    **names: str | None,
) -> None:
    """Pairs, encoder, vectors and a codebook that keeps its labels, up to the data of today.

    Made for cron and Airflow: where nothing changed since the last run nothing is done; a run that
    was killed goes on when it is called again; two at once cannot be. What comes out is staged;
    `qarm rollout start` takes it to the readers.

    Exit status: 0 published, or nothing to do; 1 a bug; 2 settings; 3 codebook or registry;
    4 data; 5 a gate refused, nothing was published; 6 a service is away; 7 another refresh is at
    work.
    """
    from qarm_feast.refresh.job import RefreshOptions, planned, refresh
    from qarm_feast.refresh.plan import RefreshRequest

    start_logging(config_path, log_level)
    request = RefreshRequest(**names)
    if dry_run:
        for line in planned(config_path, request):
            click.echo(line)
        return
    report = refresh(config_path, request, RefreshOptions(engine, include_raw), click.echo)
    for line in _report_lines(report):
        click.echo(line)


def _report_lines(report: dict[str, Any]) -> list[str]:
    """Return what the command ends with; the last line is JSON, for a scheduler to read."""
    facts = {
        name: report[name]
        for name in ("was_made_now", "outcome", "codebook_version", "encoder_version", "report")
    }
    return [
        *(f"page to look at: {page}" for page in report["pages"]),
        f"report: {report['report']}",
        *(f"next: `{command}`" for command in report["next"]),
        json.dumps(facts),
    ]

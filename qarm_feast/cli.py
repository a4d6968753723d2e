"""``qarm``: the offline jobs' command line."""

import click

from qarm_feast.command import LazyGroup, run_command_line

_HOMES = {
    "align": "qarm_feast.alignment.cli:align_group",
    "audit": "qarm_feast.audit:audit_command",
    "check-data": "qarm_feast.input_data:check_data",
    "codebook": "qarm_feast.codebook_cli:codebook_group",
    "init": "qarm_feast.new_repo:init",
    "load-users": "qarm_feast.profiles:load_users",
    "offline": "qarm_feast.offline_cli:offline_group",
    "refresh": "qarm_feast.refresh.cli:refresh_command",
    # Named, not imported: it reads what workers keep in Kafka, and the core knows no worker.
    "rollout": "streaming.rollout_cli:rollout_group",
}


@click.group(
    cls=LazyGroup,
    homes=_HOMES,
    epilog="Example: qarm codebook train --config feature_repo/qarm.yaml --codebook-version v1",
)
@click.version_option(package_name="qarm-feast")
def qarm() -> None:
    """Align vectors; train, publish, roll out codebooks; fill, compact, audit the stores."""


def main() -> None:
    """Entry point of the installed command."""
    run_command_line(qarm)

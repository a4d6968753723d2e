"""What the three command lines share: lazy sub-commands, common options, exit statuses.

May import: click, pydantic-backed configuration. No logic of any command lives here.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import click

from qarm_feast.config import default_config_path, load_section
from qarm_feast.errors import QarmError
from qarm_feast.observability import ObservabilityConfig, configure_logging

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


class LazyGroup(click.Group):
    """A group whose commands are imported only when they are called or listed by name."""

    def __init__(self, *args: Any, homes: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, sorted."""
        return sorted(self._homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None if there is none of that name."""
        if cmd_name not in self._homes:
            return None
        module_name, _, attribute = self._homes[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module_name), attribute)
        return command


def config_option(command: CommandT) -> CommandT:
    """Add ``--config``, the path of ``qarm.yaml``, passed as ``config_path``."""
    return click.option(
        "--config",
        "config_path",
        type=click.Path(dir_okay=False),
        default=lambda: str(default_config_path()),
        show_default="$QARM_CONFIG or feature_repo/qarm.yaml",
        help="Path of qarm.yaml.",
    )(command)


def log_level_option(command: CommandT) -> CommandT:
    """Add ``--log-level``, passed as ``log_level`` (None: what ``qarm.yaml`` says)."""
    return click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default=None,
        help="Overrides observability.log_level.",
    )(command)


def start_logging(config_path: str, log_level: str | None = None) -> ObservabilityConfig:
    """Read section ``observability``, set logging up by it, and return it."""
    overrides = {"log_level": log_level} if log_level else None
    config = load_section(config_path, "observability", ObservabilityConfig, overrides)
    configure_logging(config)
    return config


def run_command_line(command: click.Command) -> None:
    """Run ``command`` and end the process with the exit status of the error tree."""
    try:
        command(standalone_mode=False)
    except QarmError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)

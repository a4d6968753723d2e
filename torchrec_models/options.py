"""Command-line options that the doors of this package share. May import: click."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from qarm_feast.config import load_section, parse_overrides
from qarm_feast.errors import ConfigError
from torchrec_models.config import RankerConfig

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def set_option(command: CommandT) -> CommandT:
    """Add ``--set ranker.key=value``, repeatable, passed as ``assignments``."""
    return click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="RANKER.KEY=VALUE",
        help="Overrides one key of section ranker; may be given many times.",
    )(command)


def load_ranker_config(config_path: str, assignments: tuple[str, ...] = ()) -> RankerConfig:
    """Return section ``ranker`` with the assignments of ``--set``.

    Args:
        config_path: Path of ``qarm.yaml``.
        assignments: Values of ``--set``, for example ``ranker.batch_size=64``.

    Returns:
        The validated section.

    Raises:
        ConfigError: If an assignment is of another section, or the section is wrong.
    """
    overrides = parse_overrides(assignments)
    if others := sorted(set(overrides) - {"ranker"}):
        raise ConfigError(f"--set takes keys of section ranker here, not of {others}")
    return load_section(config_path, "ranker", RankerConfig, overrides.get("ranker"))

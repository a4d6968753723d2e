"""Command-line options that the doors of this package share. May import: click."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click

from qarm_feast.config import load_section, parse_overrides
from qarm_feast.errors import ConfigError
from torchrec_models.config import RankerConfig

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


_NEWEST = "newest"


@dataclass(frozen=True)
class TrainedName:
    """Which trained ranker to score with; ``name`` None: the newest of its kind."""

    name: str | None = None
    is_export: bool = False


def trained_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--checkpoint`` and ``--export``, passed together as ``trained``."""

    @click.option("--checkpoint", help="Checkpoint folder name; default: the newest.")
    @click.option(
        "--export",
        "export_name",
        is_flag=False,
        flag_value=_NEWEST,
        help="Score with the newest int8 export, or with the one of this folder name.",
    )
    @wraps(command)
    def with_trained(checkpoint: str | None, export_name: str | None, **others: Any) -> None:
        if checkpoint and export_name:
            raise click.UsageError("--checkpoint and --export exclude each other; name one of them")
        name = checkpoint if export_name in (None, _NEWEST) else export_name
        command(trained=TrainedName(name, is_export=bool(export_name)), **others)

    return with_trained


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

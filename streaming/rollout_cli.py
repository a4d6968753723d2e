"""``qarm rollout``: take a codebook version from staged to default, and retire the one before.

The one command of ``qarm`` that lives here: it needs the core's steps and the acknowledgements
that workers keep in Kafka, and the core does not import the daemon. ``qarm`` knows it by name.
Parsing and printing only; the work is in ``qarm_feast.rollout``, imported when a command runs, so
that ``--help`` stays fast. May import: click.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from qarm_feast.command import config_option, log_level_option, start_logging
from qarm_feast.config import load_section
from qarm_feast.errors import DataError

if TYPE_CHECKING:
    from feast import FeatureStore

    from qarm_feast.rollout import Rollout
    from qarm_feast.rollout_sample import Comparison
    from qarm_feast.rollout_status import Partition, RolloutParts, RolloutStatus
    from streaming.config import StreamConfig

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
Engine = Literal["local", "ray"]
_STEP_LINE = "{:>3} {:<16}{:<9}{}"


def _version_option(command: CommandT) -> CommandT:
    return click.option(
        "--codebook-version", "version", required=True, help="The version to roll out, like v2."
    )(command)


def _wait_option(command: CommandT) -> CommandT:
    return click.option(
        "--wait-seconds",
        type=click.FloatRange(min=0),
        default=60.0,
        show_default=True,
        help="How long to wait for the workers that own the partitions.",
    )(command)


def _engine_option(command: CommandT) -> CommandT:
    return click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="What the backfill runs on.",
    )(command)


@click.group("rollout", epilog="Example: qarm rollout start --codebook-version v2")
def rollout_group() -> None:
    """Roll a published codebook version out, and take it back.

    plan looks, start makes the version live, waits for the workers, fills its view up, compares it
    with the old one and makes it the default; then a ranker is trained and services are switched,
    by you; finish retires the old version. Each command may be run again: it goes on where the
    last one ended, or was killed.
    """


@rollout_group.command(epilog="Example: qarm rollout plan --codebook-version v2")
@config_option
@log_level_option
@_version_option
def plan(config_path: str, log_level: str | None, version: str) -> None:
    """Say what `start` and `finish` would do, and what is done already; changes nothing."""
    start_logging(config_path, log_level)
    _print(_open(config_path).plan(version))


@rollout_group.command(epilog="Example: qarm rollout start --codebook-version v2")
@config_option
@log_level_option
@_version_option
@_wait_option
@_engine_option
def start(
    config_path: str, log_level: str | None, version: str, wait_seconds: float, engine: Engine
) -> None:
    """Take a staged version up to the default, after `feast apply` has declared its view."""
    start_logging(config_path, log_level)
    _print(_open(config_path, wait_seconds, engine).start(version))


@rollout_group.command(epilog="Example: qarm rollout status")
@config_option
@log_level_option
def status(config_path: str, log_level: str | None) -> None:
    """Show the rollout under way or the last one, each step as it is now, and the next command."""
    start_logging(config_path, log_level)
    _print(_open(config_path).status())


@rollout_group.command(epilog="Example: qarm rollout finish --yes")
@config_option
@log_level_option
@_wait_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def finish(config_path: str, log_level: str | None, wait_seconds: float, yes: bool) -> None:
    """Retire the old version once no service reads it any more. THIS CANNOT BE UNDONE.

    Workers stop writing its rows, so nothing can go back to them. Its files stay:
    `qarm codebook purge` removes those.
    """
    start_logging(config_path, log_level)
    rollout = _open(config_path, wait_seconds)
    record = rollout.check_finishable()
    question = (
        f"Retire {record.previous}: has every service that read it been switched to "
        f"{record.version}, and drained? There is no way back"
    )
    is_over = record.phase == "finished"
    if not (is_over or yes or click.confirm(question)):
        click.echo(f"kept {record.previous}")
        return
    _print(rollout.finish())


@rollout_group.command(epilog="Example: qarm rollout undo")
@config_option
@log_level_option
def undo(config_path: str, log_level: str | None) -> None:
    """Give the default back to the old version; the new one is staged again, its rows stay.

    Possible until `finish`. `start` with the same version begins anew.
    """
    start_logging(config_path, log_level)
    _print(_open(config_path).undo())


def status_lines(status: "RolloutStatus") -> list[str]:
    """Return what the commands print: a headline, one line per step, and what comes next.

    Args:
        status: A rollout, or none.

    Returns:
        Lines of text.
    """
    record = status.record
    if record is None:
        return ["no rollout was started here", f"next: {status.next_step}"]
    since = "" if record.phase == "planned" else f", started {record.started:%Y-%m-%d %H:%M} UTC"
    headline = f"rollout of {record.version} in place of {record.previous}: {record.phase.value}"
    lines = [headline + since]
    lines += [
        _STEP_LINE.format(number, step.name, step.state.value, step.detail)
        for number, step in enumerate(status.steps, start=1)
    ]
    if status.fault:
        lines.append(f"changed by somebody else: {status.fault}")
    return [*lines, f"next: {status.next_step}"]


def _print(status: "RolloutStatus") -> None:
    for line in status_lines(status):
        click.echo(line)


def _open(config_path: str, wait_seconds: float = 0.0, engine: Engine = "local") -> "Rollout":
    from qarm_feast.codebook_config import CodebookConfig
    from qarm_feast.registry import CodebookRegistry
    from qarm_feast.rollout import Patience, Rollout

    registry = CodebookRegistry(load_section(config_path, "codebook", CodebookConfig).uri)
    return Rollout(registry, open_parts(config_path, engine), Patience(wait_seconds))


def open_parts(config_path: str, engine: Engine = "local") -> "RolloutParts":
    """Return a repository's views, acknowledgements, encoders, backfill and comparison.

    Args:
        config_path: Path of ``qarm.yaml``.
        engine: What the backfill runs on.

    Returns:
        The parts; the broker is asked only when a step needs it.

    Raises:
        ConfigError: If the configuration is wrong.
    """
    from qarm_feast.alignment.config import AlignmentConfig
    from qarm_feast.feature_views import read_repository_facts
    from qarm_feast.repo_paths import open_feature_store
    from qarm_feast.rollout_status import RolloutParts
    from streaming.config import StreamConfig

    repo_dir = Path(config_path).resolve().parent
    stream = load_section(config_path, "stream", StreamConfig)
    encoder_dir = Path(load_section(config_path, "alignment", AlignmentConfig).encoder_uri)
    ranker_name = read_repository_facts(repo_dir).ranker_name
    return RolloutParts(
        has_view=partial(_has_view, open_feature_store(repo_dir)),
        first_offsets=partial(_first_offsets, stream),
        has_encoder=partial(_has_encoder, encoder_dir),
        backfill=partial(_backfill, config_path, engine),
        verify=partial(_verify, config_path),
        service_name=lambda version: f"{ranker_name}_{version}",
    )


def _has_view(store: "FeatureStore", version: str) -> bool:
    from qarm_feast.online_tables import FeastOnlineTables
    from qarm_feast.schema import code_view_name

    # Anew for each look: the tables remember a view that is dropped by now.
    return FeastOnlineTables(store).has_view(code_view_name(version))


def _first_offsets(stream: "StreamConfig", version: str) -> "dict[Partition, int | None]":
    from streaming.acknowledgements import read_acknowledgements

    return {
        (topic, partition): None if told is None else told.first_offsets.get(version)
        for (topic, partition), told in read_acknowledgements(stream).items()
    }


def _has_encoder(encoder_dir: Path, encoder_version: str) -> bool:
    from qarm_feast.artifact import MANIFEST_NAME

    return (encoder_dir / encoder_version / MANIFEST_NAME).is_file()


def _backfill(
    config_path: str, engine: Engine, version: str, up_to: "Mapping[Partition, int]"
) -> object:
    from qarm_feast.backfill import backfill_codes

    counts = backfill_codes(config_path, version, up_to=up_to, engine=engine)
    if counts.num_damaged_parts:
        # A takedown in it would be missed, and its item come back with the catalogue.
        raise DataError(
            f"{counts.num_damaged_parts} damaged parts of the content log were left out of the "
            f"backfill of {version!r}; `qarm offline status` lists those in quarantine: mend "
            "and move them back, or delete them, then run "
            f"`qarm rollout start --codebook-version {version}`"
        )
    return counts


def _verify(config_path: str, version: str, previous: str) -> "Comparison":
    from qarm_feast.rollout_sample import compare_versions

    return compare_versions(config_path, version, previous)

"""``qarm init``: a new feature repository with our stores.

The files come from ``repo_template``; ``feature_definitions.py`` there is the one that this
project's own repository uses. May import: click, pyyaml; nothing of Feast, so that it is fast.
"""

import re
import shlex
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

import click
import yaml

from qarm_feast.errors import ConfigError

OnlineKind = Literal["sqlite", "redis"]
_ONLINE_STORES: dict[OnlineKind, dict[str, str]] = {
    "sqlite": {
        "type": "qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore",
        "path": "data/online.db",
    },
    "redis": {
        "type": "qarm_feast.online_stores.redis.CodeRedisOnlineStore",
        "connection_string": "localhost:6379",
    },
}
_FILES = ("feature_store.yaml", "qarm.yaml", "feature_definitions.py")
_PROJECT_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")


@click.command("init", epilog="Example: qarm init feature_repo --online redis")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@click.option(
    "--online",
    type=click.Choice(list(_ONLINE_STORES)),
    default="sqlite",
    show_default=True,
    help="Online store; redis is looked for at localhost:6379, change it in feature_store.yaml.",
)
@click.option("--project", default=None, help="Feast project; default: the folder's name.")
def init(directory: str, online: OnlineKind, project: str | None) -> None:
    """Write a new feature repository into DIR, which must be empty or not there yet."""
    written = write_repository(Path(directory), online, project)
    click.echo(f"wrote {', '.join(path.name for path in written)} into {directory}")
    click.echo(_next_commands(Path(directory)))


def write_repository(
    directory: Path, online: OnlineKind = "sqlite", project: str | None = None
) -> list[Path]:
    """Write the three files of a feature repository; no file is ever replaced.

    Args:
        directory: A folder that is empty or not there yet.
        online: Kind of the online store.
        project: Name of the Feast project; None: the folder's name, other characters as ``_``.

    Returns:
        The paths written.

    Raises:
        ConfigError: If the directory holds something, is a file, or ``project`` is no legal name.
    """
    name = _project_name(directory) if project is None else project
    if not _PROJECT_PATTERN.fullmatch(name):
        raise ConfigError(
            f"project {name!r} is no legal name: a letter or digit, then letters, digits and "
            "underscores; pass --project NAME"
        )
    _check_is_free(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(_ONLINE_STORES[online], sort_keys=False).splitlines()
    values = {"project": name, "online_store": "\n".join(f"  {line}" for line in settings)}
    return [_write(directory / file_name, values) for file_name in _FILES]


def _project_name(directory: Path) -> str:
    return re.sub(r"\W+", "_", directory.resolve().name, flags=re.ASCII).strip("_") or "qarm"


def _check_is_free(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file; name a folder that is empty or not there yet")
    found = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    if found:
        shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise ConfigError(
            f"{directory} is not empty, it holds {shown}; nothing was written: run `qarm init` "
            "with another folder, or add the plug-in to a repository that stands there by hand "
            "(README, 'A repository of your own')"
        )


def _write(path: Path, values: dict[str, str]) -> Path:
    text = files("qarm_feast").joinpath("repo_template", path.name).read_text(encoding="utf-8")
    if path.name == "feature_store.yaml":
        text = Template(text).substitute(values)
    # Not "w": another process may have come first.
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return path


def _next_commands(directory: Path) -> str:
    repo = shlex.quote(str(directory))
    config = f"--config {shlex.quote(str(directory / 'qarm.yaml'))}"
    version = f"{config} --codebook-version v1"
    input_dir = directory / "data" / "input"
    return "\n".join(
        [
            "next:",
            f"  feast -c {repo} apply        # entities and the views of users",
            f"  # put items.parquet, interactions.parquet into {input_dir}, then",
            f"  qarm check-data {config}",
            *[f"  qarm align {verb} {config}" for verb in ("pairs", "train", "export")],
            *[f"  qarm codebook {verb} {version}" for verb in ("train", "evaluate", "publish")],
            f"  feast -c {repo} apply        # now with the view item_codes_v1",
            f"  qarm-stream check {config}",
            f"  qarm-stream run {config}",
        ]
    )

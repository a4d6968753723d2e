"""Configuration: frozen sections of ``qarm.yaml``, each owned by the module that reads it.

A section is read once, in an entry point, by :func:`load_section`; classes get plain arguments.
``QARM_<SECTION>__<KEY>`` in the environment wins over the file. A relative path is resolved
against the folder of ``qarm.yaml``, never against the working directory (Feast changes it).
May import: pydantic, pydantic-settings, pyyaml.
"""

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    create_model,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from qarm_feast.errors import ConfigError

SECTIONS = (
    "data",
    "codebook",
    "quantizer",
    "alignment",
    "stream",
    "ranker",
    "comparison",
    "observability",
)
"""Every section that a ``qarm.yaml`` may hold; each has one owner, which checks its keys."""


def _resolve(value: str, info: ValidationInfo) -> str:
    """Make a relative path absolute; leave ``scheme://`` URIs as they are."""
    base_dir = (info.context or {}).get("base_dir")
    if base_dir is None or "://" in value:
        return value
    return str((Path(base_dir) / Path(value).expanduser()).resolve())


ConfigPath = Annotated[str, AfterValidator(_resolve)]
"""A path or URI in ``qarm.yaml``; relative ones start at that file's folder."""


class Section(BaseModel):
    """Base of every configuration section: immutable, unknown keys refused, defaults checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


SectionT = TypeVar("SectionT", bound=Section)


class _Environment(BaseSettings):
    """``QARM_<SECTION>__<KEY>`` variables; one field per section is added by ``create_model``."""

    model_config = SettingsConfigDict(env_prefix="QARM_", env_nested_delimiter="__")


def read_yaml(config_path: str | Path) -> dict[str, Any]:
    """Return the sections of a ``qarm.yaml``, parsed and not yet validated.

    Args:
        config_path: Path of ``qarm.yaml``.

    Returns:
        Keys and values by section name.

    Raises:
        ConfigError: If the file is missing, is not YAML, is not a mapping of sections, or holds
            an unknown section.
    """
    path = Path(config_path)
    if not path.is_file():
        raise ConfigError(f"no configuration at {path.resolve()}; pass --config PATH/qarm.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is a {type(content).__name__}, it must be a mapping of sections")
    problems = [
        f"  - {name}: no such section; there are {', '.join(SECTIONS)}"
        if name not in SECTIONS
        else f"  - {name}: is {keys!r}, it must be a mapping of keys ({{}} for the defaults)"
        for name, keys in content.items()
        if name not in SECTIONS or not isinstance(keys, dict)
    ]
    if problems:
        raise ConfigError(f"{path} is wrong:\n" + "\n".join(problems))
    return content


def load_section(
    config_path: str | Path,
    name: str,
    section_type: type[SectionT],
    overrides: dict[str, Any] | None = None,
) -> SectionT:
    """Return one validated section: file, then environment, then ``overrides`` (``--set``).

    Args:
        config_path: Path of ``qarm.yaml``.
        name: Section name, for example ``"stream"``.
        section_type: The section's class.
        overrides: Keys of this section given on the command line; they win over everything.

    Returns:
        The section; paths in it are absolute.

    Raises:
        ConfigError: With every wrong key of the section at once.
    """
    values = dict(read_yaml(config_path).get(name, {}))
    values = _merge(values, _environment_values(name))
    values = _merge(values, overrides or {})
    context = {"base_dir": Path(config_path).resolve().parent}
    try:
        return section_type.model_validate(values, context=context)
    except ValidationError as error:
        lines = [
            f"  - {name}.{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            f" (got {problem.get('input')!r})"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigError(f"{config_path} is wrong:\n" + "\n".join(lines)) from error


def _environment_values(name: str) -> dict[str, Any]:
    section: dict[str, Any] = {name: (dict[str, Any], {})}
    environment = create_model("_SectionEnvironment", __base__=_Environment, **section)
    # A variable is text; a list or a number in it is written as it would stand in the file.
    return {
        key: _parse(value, f"QARM_{name}__{key}".upper()) if isinstance(value, str) else value
        for key, value in getattr(environment(), name).items()
    }


def parse_overrides(assignments: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return what ``--set`` options say, as keys and values by section.

    Args:
        assignments: Texts of the form ``section.key=value``, the value as in YAML.

    Returns:
        For example ``{"ranker": {"batch_size": 64}}`` for ``ranker.batch_size=64``.

    Raises:
        ConfigError: If an assignment is not of the form ``section.key=value``, or its value is
            not YAML.
    """
    result: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        section, dot, key = dotted.partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"--set {assignment!r} is not of the form section.key=value")
        result.setdefault(section, {})[key] = _parse(text, f"--set {dotted}")
    return result


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        # Neither the value nor the parser's excerpt of it: it may be a password.
        raise ConfigError(
            f"the value of {where} is not YAML; put text with signs in quotes, as in the file"
        ) from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def default_config_path() -> Path:
    """Return ``$QARM_CONFIG`` or ``feature_repo/qarm.yaml`` under the working directory."""
    return Path(os.environ.get("QARM_CONFIG", "feature_repo/qarm.yaml"))

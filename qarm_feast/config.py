"""Configuration: frozen sections of ``qarm.yaml``, each owned by the module that reads it.

A section is read once, in an entry point, by :func:`load_section`; classes get plain arguments.
``QARM_<SECTION>__<KEY>`` in the environment wins over the file; a misspelt section is refused there
too, and an error names the variable, not the file, where a variable gave the value. A relative path
is resolved against the folder of ``qarm.yaml``, never the working directory (Feast changes it).
May import: pydantic, pydantic-settings, pyyaml.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
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
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from qarm_feast.errors import ConfigError

SECTIONS = (
    "data",
    "codebook",
    "quantizer",
    "alignment",
    "stream",
    "ranker",
    "comparison",
    "refresh",
    "observability",
    "compaction",
    "serving",
    "serving_log",
)
"""Every section that a ``qarm.yaml`` may hold; each has one owner, which checks its keys."""

_ENV_PREFIX = "QARM_"
_ENV_DELIMITER = "__"


def _resolve(value: str, info: ValidationInfo) -> str:
    """Make a relative path absolute; leave ``scheme://`` URIs as they are."""
    base_dir = (info.context or {}).get("base_dir")
    if base_dir is None or "://" in value:
        return value
    return str((Path(base_dir) / Path(value).expanduser()).resolve())


def _resolve_local(value: str, info: ValidationInfo) -> str:
    if "://" in value:
        raise ValueError(
            f"{value} is no folder on this machine; of all places only codebook.uri, and "
            "offline_store.uri in feature_store.yaml, may lie in an object store"
        )
    return _resolve(value, info)


ConfigPath = Annotated[str, AfterValidator(_resolve_local)]
"""A path in ``qarm.yaml``; relative ones start at that file's folder."""
ConfigUri = Annotated[str, AfterValidator(_resolve)]
"""A path as :data:`ConfigPath`, or a URI."""


class Section(BaseModel):
    """Base of every configuration section: immutable, unknown keys refused, defaults checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


SectionT = TypeVar("SectionT", bound=Section)


class _Environment(BaseSettings):
    """``QARM_<SECTION>__<KEY>`` variables; one field per section is added by ``create_model``."""

    model_config = SettingsConfigDict(env_prefix=_ENV_PREFIX, env_nested_delimiter=_ENV_DELIMITER)


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
        # Not the parser's words, nor its excerpt of the line: that may hold a password.
        raise ConfigError(f"{path} is not YAML{_place_of(error)}; mend the file there") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is a {type(content).__name__}, it must be a mapping of sections")
    problems = [
        f"  - {name}: no such section; {_offer(str(name), SECTIONS)}"
        if name not in SECTIONS
        else f"  - {name}: is {_shown(keys)}, it must be a mapping of keys ({{}} for the defaults)"
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
        ConfigError: With every wrong key of the section at once, under the place that it came
            from; also if a variable names a section that does not exist.
    """
    values = dict(read_yaml(config_path).get(name, {}))
    _check_environment_sections()
    environment = _environment_values(name)
    values = _merge(_merge(values, environment), overrides or {})
    context = {"base_dir": Path(config_path).resolve().parent}
    try:
        return section_type.model_validate(values, context=context)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for problem in error.errors(include_url=False):
            keys = [str(part) for part in problem["loc"]]
            place, key = str(config_path), ".".join([name, *keys])
            if _holds(overrides or {}, keys):
                place = "the command line"
            elif _holds(environment, keys):
                place, key = "the environment", ", ".join(_variables_of(name, keys))
            elif not keys and environment:
                # Keys that contradict each other: each may stand in either place.
                place = f"{config_path} with {', '.join(_variables_of(name, keys))}"
            lines.setdefault(place, []).append(f"  - {key}: {_fault(section_type, problem)}")
        blocks = [f"{place} is wrong:\n" + "\n".join(found) for place, found in lines.items()]
        raise ConfigError("\n".join(blocks)) from error


def _fault(section_type: type[Section], problem: Mapping[str, Any]) -> str:
    """Return what is wrong with one value; for an unknown key which keys there are."""
    *parents, key = problem["loc"] or ("",)
    known = _known_keys(section_type, parents)
    if problem["type"] == "extra_forbidden" and known:
        return f"no such key; {_offer(str(key), known)}"
    # Of a whole section only the message: its value is every key that it has.
    if not problem["loc"]:
        return str(problem["msg"])
    field = section_type.model_fields.get(str(problem["loc"][0]))
    got = problem.get("input")
    # A field that may hold a password is declared with repr=False.
    shown = repr(got) if field is None or field.repr else f"a {type(got).__name__}"
    return f"{problem['msg']} (got {shown})"


def _known_keys(section_type: type[BaseModel], parents: Iterable[int | str]) -> list[str]:
    for parent in parents:
        field = section_type.model_fields.get(str(parent))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section_type = inner
    return list(section_type.model_fields)


def _place_of(error: yaml.YAMLError) -> str:
    """Return where the parser gave up, counted from 1; nothing if it does not say."""
    mark = getattr(error, "problem_mark", None)
    return f": line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _shown(keys: Any) -> str:
    # A list may hold the whole section, passwords among it.
    return "a list" if isinstance(keys, list) else repr(keys)


def _offer(name: str, known: Sequence[str]) -> str:
    """Return the names that there are, the one that is probably meant in front."""
    close = get_close_matches(name, known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}there are {', '.join(known)}"


def _holds(values: Any, keys: Sequence[str]) -> bool:
    """Return whether nested ``values`` hold ``keys``; below a value all belongs to that value."""
    for key in keys:
        if not isinstance(values, Mapping):
            return True
        if key not in values:
            return False
        values = values[key]
    return bool(keys)


def _variables_of(name: str, keys: Sequence[str]) -> list[str]:
    """Return the variables that gave the value at ``keys`` of a section, or a part of it."""
    wanted = [name, *keys]
    return [
        variable
        for variable, path in _variable_paths()
        if all(one == other for one, other in zip(path, wanted, strict=False))
    ]


def _check_environment_sections() -> None:
    """Refuse variables of sections that do not exist.

    Only names with a delimiter: for a service that is called ``qarm-stream`` Kubernetes sets
    ``QARM_STREAM_PORT`` and the like.
    """
    problems = [
        f"  - {variable}: no such section as {path[0]!r}; {_offer(path[0], SECTIONS)}"
        for variable, path in _variable_paths()
        if len(path) > 1 and path[0] not in SECTIONS
    ]
    if problems:
        raise ConfigError("the environment is wrong:\n" + "\n".join(problems))


def _variable_paths() -> Iterator[tuple[str, list[str]]]:
    """Yield each variable with our prefix, sorted, and the section and keys that it names."""
    for variable in sorted(os.environ):
        if variable.upper().startswith(_ENV_PREFIX):
            yield variable, variable[len(_ENV_PREFIX) :].lower().split(_ENV_DELIMITER)


def _environment_values(name: str) -> dict[str, Any]:
    section: dict[str, Any] = {name: (dict[str, Any], {})}
    create_environment = create_model("_SectionEnvironment", __base__=_Environment, **section)
    try:
        environment = create_environment()
    except SettingsError:
        # Without the cause, which holds the value: it may be a password.
        variable = f"{_ENV_PREFIX}{name}".upper()
        raise ConfigError(
            f"the value of {variable} is not JSON; give it as one object, or set single keys as "
            f"{variable}{_ENV_DELIMITER}KEY"
        ) from None
    # A variable is text; a list or a number in it is written as it would stand in the file.
    return {
        key: _parse(value, f"QARM_{name}__{key}".upper()) if isinstance(value, str) else value
        for key, value in getattr(environment, name).items()
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

"""What a refresh would do: nothing, go on with a run that was stopped, or begin a new one.

A run is known by its inputs (data, takedowns, settings) and its parent. Where both are those of
the last run, a finished run is not repeated and another one is gone on with; a parent that the
last run itself has made is no news. Gates are no input: after a refusal, other limits let the same
artifacts pass. May import: the configuration of all steps, the registry, the encoder's manifest.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import check_version_is_free
from qarm_feast.artifact import file_sha256, file_stamp, sha256
from qarm_feast.codebook import QuantizerConfig
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import Section, load_section
from qarm_feast.errors import ConfigError, DataError
from qarm_feast.input_data import INTERACTIONS_FILE, ITEMS_FILE, DataConfig
from qarm_feast.refresh.config import RefreshConfig
from qarm_feast.refresh.state import Inputs, Parent, RefreshState, read_state
from qarm_feast.registry import (
    CodebookRegistry,
    VersionState,
    check_version_name,
    drafts_uri,
    name_after,
    read_manifest,
    stored_versions,
)
from qarm_feast.takedowns import taken_down_items

Decision = Literal["nothing", "resume", "new"]

_FIRST_CODEBOOK = "v1"
_NO_INPUT = {
    "data": {"input_dir", "history_length"},
    "alignment": {
        "encoder_version", "encoder_uri", "vectors_uri", "pairs_uri", "features_uri",
        "export_rows_per_part", "evaluation", "gates",
    },
    "quantizer": {
        "device", "gpu_backend", "gpu_number", "gpu_scratch_mib", "enable_cpu_fallback",
    },
    "codebook": {"uri", "gates", "purge_rows_per_second"},
}  # fmt: skip
"""Keys that say where things lie, how fast they are made, or what is let pass."""


@dataclass(frozen=True)
class RefreshRequest:
    """What an operator asks for; None leaves the choice to the refresh."""

    parent: str | None = None
    encoder_version: str | None = None
    codebook_version: str | None = None


@dataclass(frozen=True)
class Sections:
    """The sections of ``qarm.yaml`` that a refresh reads."""

    config_path: str
    data: DataConfig
    alignment: AlignmentConfig
    quantizer: QuantizerConfig
    codebook: CodebookConfig
    refresh: RefreshConfig

    @classmethod
    def load(cls, config_path: str) -> "Sections":
        """Return all of them, checked.

        Args:
            config_path: Path of ``qarm.yaml``.

        Returns:
            The sections.

        Raises:
            ConfigError: If a key is wrong.
        """
        return cls(
            config_path=config_path,
            data=load_section(config_path, "data", DataConfig),
            alignment=load_section(config_path, "alignment", AlignmentConfig),
            quantizer=load_section(config_path, "quantizer", QuantizerConfig),
            codebook=load_section(config_path, "codebook", CodebookConfig),
            refresh=load_section(config_path, "refresh", RefreshConfig),
        )

    def alignment_of(self, encoder_version: str) -> AlignmentConfig:
        """Return section ``alignment`` for another encoder; a ConfigError: not a legal name."""
        own = {"encoder_version": encoder_version}
        return load_section(self.config_path, "alignment", AlignmentConfig, own)

    @property
    def state_folder(self) -> Path:
        """Where state and reports lie."""
        return Path(self.refresh.state_uri)


class DataFiles:
    """The files that a refresh reads, as they were when it began.

    Args:
        config: Section ``data``.

    Raises:
        DataError: If one is missing.
    """

    def __init__(self, config: DataConfig) -> None:
        folder = Path(config.input_dir)
        self._paths = [folder / name for name in (ITEMS_FILE, INTERACTIONS_FILE)]
        for path in self._paths:
            if not path.is_file():
                raise DataError(f"there is no {path}; set data.input_dir")
        # Before the hashes: what changes while they are made is seen as well.
        self._found = self._stamps()
        self.hashes = {path.name: file_sha256(path) for path in self._paths}

    def check_unchanged(self) -> None:
        """Refuse to go on with other data than that of the steps before.

        Raises:
            DataError: If a file was replaced or written to.
        """
        for path, before, now in zip(self._paths, self._found, self._stamps(), strict=True):
            if before != now:
                raise DataError(
                    f"{path} changed while the refresh ran: its steps would be of unequal data; "
                    "run `qarm refresh` again, which begins anew"
                )

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [file_stamp(path) for path in self._paths]


@dataclass(frozen=True)
class RefreshPlan:
    """What is to be done, and why; ``state`` is that of the run in question.

    ``waiting`` are versions that an earlier refresh has staged and nobody has rolled out.
    """

    decision: Decision
    reason: str
    state: RefreshState
    files: DataFiles
    waiting: tuple[str, ...]


def plan_refresh(sections: Sections, request: RefreshRequest, now: datetime) -> RefreshPlan:
    """Look at data, settings, registry and the last run, and decide; nothing is written.

    Args:
        sections: What ``qarm.yaml`` says.
        request: Wishes of the operator.
        now: Wall clock, aware UTC.

    Returns:
        The plan.

    Raises:
        DataError: If the data or the last run's state cannot be read.
        ConfigError: If a name is illegal or its encoder exists.
        CodebookError: If the parent is not published, or a wanted version is.
    """
    files = DataFiles(sections.data)
    inputs = Inputs(
        files=files.hashes,
        settings=_settings_hashes(sections),
        taken_down=sha256(taken_down_items(sections.config_path).tobytes()),
    )
    registry = CodebookRegistry(sections.codebook.uri)
    parent = _parent(registry, request.parent)
    last = read_state(sections.state_folder)
    decision, reason = _decide(last, inputs, parent, registry, request)
    if last is None or decision == "new":
        encoder_version, codebook_version = _names(sections, registry, parent, request)
        last = RefreshState(
            inputs=inputs,
            parent=parent,
            encoder_version=encoder_version,
            codebook_version=codebook_version,
            started=now,
            earlier_encoders=[] if last is None else last.encoders(),
        )
    waiting = set(registry.versions(VersionState.STAGED)) - {last.codebook_version}
    return RefreshPlan(decision, reason, last, files, tuple(sorted(waiting)))


def check_settings(sections: Sections, inputs: Inputs) -> None:
    """Refuse to go on with other settings than those of the steps before.

    Args:
        sections: What the run began with.
        inputs: The run's inputs.

    Raises:
        ConfigError: If ``qarm.yaml`` was changed where it decides what comes out.
    """
    path = sections.config_path
    now = _settings_hashes(Sections.load(path))
    changed = [name for name, found in now.items() if found != inputs.settings[name]]
    if changed:
        raise ConfigError(
            f"section {', '.join(changed)} of {path} changed while the refresh ran: its steps "
            "would be of unequal settings; run `qarm refresh` again, which begins anew"
        )


def _settings_hashes(sections: Sections) -> dict[str, str]:
    found: Mapping[str, Section] = {name: getattr(sections, name) for name in _NO_INPUT}
    return {
        name: _hash_of(section.model_dump(mode="json", exclude=_NO_INPUT[name]), sections)
        for name, section in found.items()
    }


def _hash_of(keys: Mapping[str, object], sections: Sections) -> str:
    # Paths as they stand in the file: a repository that is moved is not a changed one.
    base = f"{Path(sections.config_path).parent}{os.sep}"
    return sha256(json.dumps(keys, sort_keys=True).replace(base, "").encode())


def _parent(registry: CodebookRegistry, wanted: str | None) -> Parent | None:
    if wanted is None and not registry.versions():
        return None
    version = wanted or registry.default_version()
    registry.check_published(version)
    manifest = read_manifest(registry.uri, version)
    return Parent(
        codebook_version=version,
        encoder_version=manifest.encoder_version,
        encoder_hash=manifest.encoder_hash,
    )


def _decide(
    last: RefreshState | None,
    inputs: Inputs,
    parent: Parent | None,
    registry: CodebookRegistry,
    request: RefreshRequest,
) -> tuple[Decision, str]:
    if last is None:
        return "new", "no refresh has run here yet"
    if changes := inputs.changes_since(last.inputs):
        return "new", f"changed since the last run: {', '.join(changes)}"
    is_finished = last.outcome == "published"
    if is_finished and last.codebook_version not in registry.states():
        return "new", f"{last.codebook_version} of the last run is not in the registry any more"
    is_own_parent = parent is not None and parent.codebook_version == last.codebook_version
    # Also of a run that was killed between its publication and its end: in an empty registry the
    # version that it has published is the default, and so the parent, by now.
    if parent != last.parent and not is_own_parent:
        return "new", "the parent is another one than that of the last run"
    if is_finished:
        return "nothing", f"{last.codebook_version} was made from just this data and these settings"
    names = (
        (request.encoder_version, last.encoder_version),
        (
            request.codebook_version,
            last.codebook_version,
        ),
    )
    if any(wanted not in (None, had) for wanted, had in names):
        return "new", "other names are wanted than those of the last run"
    done = ", ".join(last.steps) or "nothing"
    return "resume", f"the last run was {_STOPPED[last.outcome]}; done of it: {done}"


_STOPPED = {"running": "stopped", "refused": "refused by a gate"}


def _names(
    sections: Sections, registry: CodebookRegistry, parent: Parent | None, request: RefreshRequest
) -> tuple[str, str]:
    """Return free names of the new encoder and the new codebook version."""
    codebook_version = request.codebook_version or _next_codebook(registry, parent)
    registry.check_unpublished(check_version_name(codebook_version))
    encoder_version = request.encoder_version or _next_encoder(sections, parent)
    alignment = sections.alignment_of(encoder_version)
    check_version_is_free(alignment.encoder_uri, encoder_version)
    return encoder_version, codebook_version


def _next_codebook(registry: CodebookRegistry, parent: Parent | None) -> str:
    if parent is None and _FIRST_CODEBOOK not in registry.taken_names():
        return _FIRST_CODEBOOK
    return registry.next_name(_FIRST_CODEBOOK if parent is None else parent.codebook_version)


def _next_encoder(sections: Sections, parent: Parent | None) -> str:
    alignment, uri = sections.alignment, sections.codebook.uri
    folders = (Path(alignment.encoder_uri), Path(alignment.vectors_uri))
    taken = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    for books in (uri, drafts_uri(uri)):
        taken |= {read_manifest(books, name).encoder_version for name in stored_versions(books)}
    if parent is None and alignment.encoder_version not in taken:
        return alignment.encoder_version
    return name_after(
        alignment.encoder_version if parent is None else parent.encoder_version, taken
    )

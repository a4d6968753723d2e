"""The codebook registry: which versions are stored, and the state of each.

Layout under a registry's ``uri``::

    registry.json              version -> state; the one file that changes
    v1/manifest.json           a published version, immutable
    v1/rq-<hash>.safetensors   its arrays, named after their content
    .drafts/v1/...             a trained version that is not published yet
    .reports/v1/quality.json   the last evaluation of a version; quality.html beside it

Where ``registry.json`` is missing, the registry is empty, unless a stored version shows that it was
published: then the file was lost, and everything that asks for states is refused, as a publication
would make a default anew. A version shows it by its manifest, into which publishing writes figures
or the gates that were forced, while no draft of its name is left: the draft goes last, so a first
publication that was killed still has it, and is gone on with. A codebook that was saved here
without a draft carries no such sign.

``uri`` is a folder or ``s3://BUCKET/PREFIX``. In an object store ``registry.json`` and the lock are
numbered objects (``registry.json/00000012.json``, see ``shared_state``), a version's arrays are put
before its manifest, and what is loaded is kept in a local cache by its hash (see ``artifact``).

The feature repository reads manifests and states, so this module stays light.
May import: pydantic, filelock, fsspec. Neither torch nor NumPy.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from qarm_feast.artifact import MANIFEST_NAME, create_file, read_verified, replace_file
from qarm_feast.codebook_config import GateConfig, LevelKind
from qarm_feast.errors import (
    CodebookError,
    CodebookNotFoundError,
    ConfigError,
    GateRefusedError,
    ServiceUnavailableError,
)
from qarm_feast.object_store import Place, names_in, place
from qarm_feast.shared_state import (
    WAIT_SECONDS,
    CheckHeld,
    LockTakenError,
    SharedDocument,
    Snapshot,
    exclusive,
)

_REGISTRY_NAME = "registry.json"
_LOCK_NAME = ".registry.lock"
_DRAFTS_NAME = ".drafts"
_REPORTS_NAME = ".reports"
_REPORT_NAME = "quality.json"
_VERSION_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,31}")
_PUBLISH_FIELDS = {"created", "quality", "forced_gates"}
"""Fields in which two manifests of one and the same codebook may differ."""


class VersionState(StrEnum):
    """Life of a published version: staged, live and default have views, workers write the last two.

    A purged version has lost its files; its name stays taken, because label maps and rows of
    codes may still name it.
    """

    STAGED = "staged"
    LIVE = "live"
    DEFAULT = "default"
    RETIRED = "retired"
    PURGED = "purged"


class Manifest(BaseModel):
    """What ``manifest.json`` says of one codebook version.

    ``behaviour_cutoff`` is the newest interaction that encoder, codebook or pool saw (None: they
    saw none). ``level_kinds`` is empty in manifests from when all levels were k-means.
    ``label_map`` names, per level and code, the parent's code whose learned row goes on here (-1:
    none); ``reset_pool_rows`` are pool rows that do not go on from the parent's: they hold another
    item, or the parent had no such row. ``continuity`` says what a refresh kept and what it cost,
    next to the naive refit. ``caps`` says what a cap per full code did when the version was
    published, how full codes were shared without it, and the churn against the parent as served
    (``continuity`` was measured before the cap). ``files`` is SHA-256 by file name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    version: str
    parent: str | None = None
    encoder_version: str
    encoder_hash: str
    behaviour_cutoff: AwareDatetime | None
    embedding_dim: int
    level_sizes: tuple[int, ...]
    level_kinds: tuple[LevelKind, ...] = ()
    num_neighbors: int
    pool_size: int
    metric: Literal["squared_l2"] = "squared_l2"
    normalisation: Literal["l2"] = "l2"
    search: Literal["exact", "ivf_flat", "hnsw"] = "exact"
    search_settings: dict[str, int] = {}
    search_recall: float = 1.0
    seed: int
    num_training_items: int
    num_overrides: int = 0
    num_list_overrides: int = 0
    label_map: tuple[tuple[int, ...], ...] | None = None
    reset_pool_rows: tuple[int, ...] = ()
    continuity: dict[str, Any] = {}
    caps: dict[str, Any] = {}
    quality: dict[str, Any] = {}
    forced_gates: tuple[str, ...] = ()
    files: dict[str, str]
    created: AwareDatetime

    @property
    def num_levels(self) -> int:
        """Length of an ``rq_code``."""
        return len(self.level_sizes)

    @property
    def kinds(self) -> tuple[LevelKind, ...]:
        """Kind of each level."""
        kmeans: LevelKind = "kmeans"
        return self.level_kinds or (kmeans,) * self.num_levels


class _RegistryContent(BaseModel):
    """What ``registry.json`` holds."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    versions: dict[str, VersionState] = {}


class GateReading(NamedTuple):
    """What a gate measures, and its limit (None: switched off)."""

    name: str
    value: float
    limit: float | None

    @property
    def missed_by(self) -> float:
        """How far the value lies beyond the limit; 0 if the gate is kept or off."""
        if self.limit is None:
            return 0.0
        over = self.value - self.limit
        return max(0.0, over if self.name.startswith("max_") else -over)


class CodebookRegistry:
    """States of the versions under one ``uri``; every change is made under a lock."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._document = SharedDocument(place(uri) / _REGISTRY_NAME)

    def states(self) -> dict[str, VersionState]:
        """Return the state of each published version, in the order of publishing.

        Returns:
            States by version; none if there is no registry yet.

        Raises:
            CodebookError: If the file is damaged, of another format, or lost: missing beside
                versions that were published.
        """
        return self._states_in(self._read())

    def versions(self, *states: VersionState) -> list[str]:
        """Return the versions in one of ``states`` (none given: all but purged), oldest first."""
        wanted = states or tuple(state for state in VersionState if state != VersionState.PURGED)
        return [version for version, state in self.states().items() if state in wanted]

    def default_version(self) -> str:
        """Return the version that new feature services are made from.

        Returns:
            Version name.

        Raises:
            CodebookError: If nothing is published.
        """
        found = self.versions(VersionState.DEFAULT)
        if not found:
            raise CodebookError(
                f"{self.uri} has no default codebook version; run "
                "`qarm codebook publish --codebook-version VERSION` first"
            )
        return found[0]

    def publish(self, version: str) -> VersionState:
        """Give a stored version its first state; a version that has one keeps it.

        Args:
            version: A version whose artifact is stored under the registry's ``uri``.

        Returns:
            The version's state: default in a registry that was empty, else staged.

        Raises:
            CodebookNotFoundError: If no artifact of that name is stored.
            CodebookError: If a version of that name was purged.
        """
        self.check_not_purged(version)
        with self._change() as states:
            # Under the lock, or a purge at the same time could take the files away.
            read_manifest(self.uri, version)
            first = VersionState.STAGED if states else VersionState.DEFAULT
            return states.setdefault(version, first)

    def set_state(self, version: str, state: VersionState) -> None:
        """Move a published version to ``state``; the default before it becomes live.

        :meth:`purge` is the one way to ``PURGED``.

        Args:
            version: Version name.
            state: The state to give it.

        Raises:
            CodebookNotFoundError: If the version is not published.
            CodebookError: If no default would be left, or the version is retired (it cannot become
                the default) or purged.
        """
        assert state is not VersionState.PURGED, "purge removes the files too"
        with self._change() as states:
            self.check_published(version)
            if states[version] is VersionState.DEFAULT and state is not VersionState.DEFAULT:
                raise CodebookError(
                    f"codebook version {version!r} is the default of {self.uri}; make another "
                    "version the default (`qarm rollout start --codebook-version OTHER` with all "
                    "that belongs to it, `qarm codebook default` the state alone) before "
                    f"{version!r} becomes {state.value}"
                )
            if states[version] is VersionState.RETIRED and state is VersionState.DEFAULT:
                raise CodebookError(
                    f"codebook version {version!r} is retired: nothing has written its rows since; "
                    f"publish a new version with `qarm codebook train --codebook-version "
                    f"{self.next_name(version)} --parent {version}`"
                )
            if state is VersionState.DEFAULT:
                for other in self._in_state(states, VersionState.DEFAULT):
                    states[other] = VersionState.LIVE
            states[version] = state

    def check_not_purged(self, version: str) -> None:
        """Refuse the name of a purged version.

        Args:
            version: Version name.

        Raises:
            CodebookError: If a version of that name was purged.
        """
        if self.states().get(version) is VersionState.PURGED:
            raise CodebookError(
                f"codebook version {version!r} was purged from {self.uri}, and its name is never "
                "used again; run `qarm codebook train --codebook-version "
                f"{self.next_name(version)}`"
            )

    def check_published(self, version: str) -> None:
        """Refuse a version that has no state yet, and a purged one.

        Args:
            version: Version name.

        Raises:
            CodebookNotFoundError: If it is not published; says whether it is trained.
            CodebookError: If it was purged.
        """
        self.check_not_purged(version)
        if version not in self.states():
            is_trained = version in stored_versions(trained_uri(self.uri, version))
            raise CodebookNotFoundError(
                version=version,
                uri=self.uri,
                known=self.versions(),
                drafts=stored_versions(drafts_uri(self.uri)),
                is_trained=is_trained,
            )

    def check_unpublished(self, version: str) -> None:
        """Refuse a name that training may not take any more.

        Args:
            version: Version name.

        Raises:
            CodebookError: If a version of that name is published or was purged.
        """
        self.check_not_purged(version)
        state = self.states().get(version)
        if state is not None:
            raise CodebookError(
                f"codebook version {version!r} is {state.value} in {self.uri}, and a published "
                "version never changes; run `qarm codebook train --codebook-version "
                f"{self.next_name(version)}`"
            )

    def next_name(self, version: str) -> str:
        """Return a free name that follows ``version``: v3 after v1 where v2 is taken."""
        return name_after(version, self.taken_names())

    def taken_names(self) -> set[str]:
        """Return the names of all versions that are or were there, drafts and purged ones too."""
        return {*self.states(), *stored_versions(self.uri), *stored_versions(drafts_uri(self.uri))}

    def purge(self, version: str) -> tuple[Place, ...]:
        """Remove the files of a retired version, or of one that was never published, for good.

        1. A published version's state becomes purged: from here on it is gone, its name taken.
        2. Artifact, draft and report are removed, each manifest before its arrays.

        Killed before the first step, everything is there; killed after it, what is left over is
        removed by another purge.

        Args:
            version: A retired or purged version, or a draft.

        Returns:
            The folders that were removed.

        Raises:
            CodebookNotFoundError: If there is nothing of that name.
            CodebookError: If the version is staged, live or the default.
        """
        self.check_purgeable(version)
        with self._change() as states:
            if version in states:
                self._refuse_in_use(version, states[version])
                states[version] = VersionState.PURGED
        with self._lock() as check_held:
            # Looked at again: somebody may have published a draft in the meantime.
            states = self.states()
            if version in states:
                self._refuse_in_use(version, states[version])
            found = self._folders_of(version)
            for folder in found:
                check_held()
                _remove_files(folder, keep=())
        return found

    def check_purgeable(self, version: str) -> None:
        """Refuse what :meth:`purge` would refuse; see there.

        Args:
            version: Version name.

        Raises:
            CodebookNotFoundError: If there is nothing of that name.
            CodebookError: If the version is staged, live or the default.
        """
        states = self.states()
        if version in states:
            self._refuse_in_use(version, states[version])
        elif not self._folders_of(version):
            raise CodebookNotFoundError(
                version=version,
                uri=self.uri,
                known=self.versions(),
                drafts=stored_versions(drafts_uri(self.uri)),
            )

    def _folders_of(self, version: str) -> tuple[Place, ...]:
        root, name = place(self.uri), check_version_name(version)
        parents = (root, root / _DRAFTS_NAME, root / _REPORTS_NAME)
        return tuple(parent / name for parent in parents if (parent / name).is_dir())

    def _refuse_in_use(self, version: str, state: VersionState) -> None:
        if state in (VersionState.RETIRED, VersionState.PURGED):
            return
        is_default = state is VersionState.DEFAULT
        first = "`qarm codebook default --codebook-version OTHER`, then " if is_default else ""
        raise CodebookError(
            f"codebook version {version!r} is {state.value} in {self.uri}, only a retired one can "
            f"be purged; run {first}`qarm codebook retire --codebook-version {version}` first"
        )

    @contextmanager
    def _change(self) -> Iterator[dict[str, VersionState]]:
        """Yield the states to edit in place; they are stored when the block ends without error."""
        with self._lock() as check_held:
            read = self._read()
            before = self._states_in(read)
            states = dict(before)
            yield states
            content = _RegistryContent(versions=states).model_dump_json(indent=2)
            # Files that were looked at may be gone: a purge of a draft changes no document.
            check_held()
            if states != before and self._document.replace(read, (content + "\n").encode()) is None:
                raise CodebookError(
                    f"another process changed {self._document.path} at the same time, and nothing "
                    "was changed by this one; look with `qarm codebook list`, then run the same "
                    "command again"
                )

    @contextmanager
    def _lock(self) -> Iterator[CheckHeld]:
        try:
            with exclusive(place(self.uri) / _LOCK_NAME, WAIT_SECONDS) as check_held:
                yield check_held
        except LockTakenError as error:
            raise ServiceUnavailableError(
                f"another process has been changing {self._document.path} for {WAIT_SECONDS:.0f} "
                f"s; {error}"
            ) from error

    def _read(self) -> Snapshot:
        read = self._document.read()
        if read.payload is not None:
            return read
        lost = _published_versions(self.uri)
        # Looked at again: a first publication may have come to its end in between.
        read = self._document.read()
        if lost and read.payload is None:
            raise CodebookError(_lost_registry_message(self._document.file(read), lost))
        return read

    def _states_in(self, read: Snapshot) -> dict[str, VersionState]:
        if read.payload is None:
            return {}
        try:
            return _RegistryContent.model_validate_json(read.payload).versions
        except ValidationError as error:
            raise CodebookError(
                f"{self._document.file(read)} is no registry that this version of qarm-feast "
                f"reads: {error}; put back a copy of it: the versions themselves lie beside it, "
                "untouched"
            ) from error

    @staticmethod
    def _in_state(states: Mapping[str, VersionState], state: VersionState) -> list[str]:
        return [version for version, found in states.items() if found is state]


def _published_versions(uri: str) -> list[str]:
    """Return the stored versions that were published to the end, whatever the registry says."""
    drafts = stored_versions(drafts_uri(uri))
    manifests = [read_manifest(uri, name) for name in stored_versions(uri) if name not in drafts]
    return [found.version for found in manifests if found.quality or found.forced_gates]


def _lost_registry_message(path: Place, lost: Sequence[str]) -> str:
    first, *others = lost
    states = {first: VersionState.DEFAULT, **dict.fromkeys(others, VersionState.STAGED)}
    example = _RegistryContent(versions=states).model_dump_json()
    return (
        f"{path} is missing, but {path.parent} holds {len(lost)} published version(s): "
        f"{', '.join(lost)}; their states, and the names of purged versions, stood in that file: "
        f"put back a copy of it. Without a copy write it by hand, like {example}, with one default "
        "and the state that each other version had (staged, live, retired, or purged), and look at "
        "it with `qarm codebook list`"
    )


def read_manifest(uri: str, version: str) -> Manifest:
    """Return the manifest of a stored version.

    Args:
        uri: Folder of codebook versions, or :func:`drafts_uri` of it.
        version: Version name.

    Returns:
        The manifest; its files are not looked at.

    Raises:
        CodebookNotFoundError: If no such version is stored.
        CodebookError: If the manifest is of another format.
        ConfigError: If the name is not legal.
    """
    path = place(uri) / check_version_name(version) / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        drafts = stored_versions(drafts_uri(uri))
        known = stored_versions(uri)
        raise CodebookNotFoundError(version=version, uri=uri, known=known, drafts=drafts) from error
    except ValidationError as error:
        raise CodebookError(
            f"{path} is no codebook manifest that this version of qarm-feast reads: {error}"
        ) from error


def damage_remedy(folder: Place, manifest: Manifest) -> str:
    """Return what is to be done about a missing or damaged file of a version.

    Args:
        folder: The version's own folder, beside published versions or among the drafts.
        manifest: The version's manifest.

    Returns:
        The end of a sentence, with a command.
    """
    if folder.parent.name == _DRAFTS_NAME:
        parent = f" --parent {manifest.parent}" if manifest.parent else ""
        command = f"qarm codebook train --codebook-version {manifest.version}{parent}"
        return f"run `{command}` again, which replaces the draft"
    return (
        "put back a copy of it: a published version is never made again; without a copy, run "
        "`qarm codebook train --codebook-version OTHER` for another version"
    )


def write_artifact(
    uri: str, manifest: Manifest, payloads: Mapping[str, bytes], *, replace: bool = False
) -> None:
    """Store one codebook version under ``uri``; killed at any point, it is there or it is not.

    1. The arrays go to files named after their own hash, so nothing is ever overwritten.
    2. The manifest is put beside them; it alone makes the version exist.

    Args:
        uri: Folder of codebook versions.
        manifest: Names every file with its hash.
        payloads: Bytes by file name.
        replace: Whether another manifest of that version may be replaced (drafts only).

    Raises:
        CodebookError: If the version is stored with other content.
    """
    folder = place(uri) / check_version_name(manifest.version)
    for name, payload in payloads.items():
        if replace:
            # The same bytes by name, unless a disk has damaged them: then this mends the draft.
            replace_file(folder / name, payload)
        else:
            create_file(folder / name, payload)
    content = (manifest.model_dump_json(indent=2) + "\n").encode()
    if replace:
        replace_file(folder / MANIFEST_NAME, content)
        _remove_files(folder, keep={*manifest.files, MANIFEST_NAME})
    elif not create_file(folder / MANIFEST_NAME, content):
        stored = read_manifest(uri, manifest.version)
        if _identity(stored) != _identity(manifest):
            raise CodebookError(
                f"codebook version {manifest.version!r} is already stored in {uri} with other "
                "content, and a stored version never changes; use another --codebook-version"
            )


@dataclass(frozen=True)
class ServedArtifact:
    """A trained codebook as it shall be served: a draft with its caps applied.

    The manifest holds the quality figures of just these bytes.
    """

    manifest: Manifest
    payloads: Mapping[str, bytes]


def publish_codebook(
    uri: str,
    version: str,
    gates: GateConfig,
    *,
    force: bool = False,
    served: ServedArtifact | None = None,
) -> VersionState:
    """Publish a trained and evaluated codebook; again for the same codebook, it changes nothing.

    1. The last evaluation (that of ``served`` if it is given) is held against the gates.
    2. The draft's arrays (or those of ``served``), then its manifest with the quality figures, go
       to ``<uri>/<version>``.
    3. The registry gives the version its state.
    4. The draft is removed.

    Args:
        uri: Folder of codebook versions.
        version: A version that was trained (a draft) or saved.
        gates: Limits for the figures.
        force: Publish against a gate; the manifest then says which.
        served: What to publish in place of the draft as it is.

    Returns:
        The version's state.

    Raises:
        GateRefusedError: If a gate is not kept, or nothing was evaluated; names which, how much.
        CodebookNotFoundError: If no such version was trained.
        CodebookError: If the version is published with other content, or was purged.
    """
    registry = CodebookRegistry(uri)
    registry.check_not_purged(version)
    has_draft = version in stored_versions(drafts_uri(uri))
    if version in registry.states() and (not has_draft or _is_left_over(uri, version)):
        _remove_draft(uri, version)
        return registry.states()[version]
    source_uri = drafts_uri(uri) if has_draft else uri
    trained = read_manifest(source_uri, version) if served is None else served.manifest
    quality = quality_of(uri, trained)
    refusals = gate_refusals(quality, gates)
    if refusals and not force:
        raise GateRefusedError(
            f"codebook version {version!r} was not published:\n"
            + "\n".join(f"  - {refusal}" for refusal in refusals)
            + "\ntrain it with other quantizer settings, change codebook.gates, or use --force"
        )
    if source_uri != uri:
        folder = place(source_uri) / version
        remedy = damage_remedy(folder, trained)
        payloads = (
            {name: read_verified(folder, name, trained.files, remedy) for name in trained.files}
            if served is None
            else served.payloads
        )
        update = {"quality": quality, "forced_gates": refusals}
        write_artifact(uri, trained.model_copy(update=update), payloads)
    state = registry.publish(version)
    _remove_draft(uri, version)
    return state


def gate_refusals(quality: Mapping[str, Any], gates: GateConfig) -> tuple[str, ...]:
    """Return one sentence per gate that ``quality`` does not keep; none means it may be published.

    Args:
        quality: Figures of ``codebook_quality``; empty if nothing was evaluated.
        gates: The limits.

    Returns:
        Sentences that hold gate, figure, limit, and the distance of the two.
    """
    if not quality:
        return ("it was not evaluated as it is; run `qarm codebook evaluate` first",)
    return tuple(
        f"{reading.name}: measured {reading.value:.4f}, limit {reading.limit:.4f}, "
        f"missed by {reading.missed_by:.4f}"
        for reading in gate_readings(quality, gates)
        if reading.missed_by > 0
    )


def gate_readings(quality: Mapping[str, Any], gates: GateConfig) -> list[GateReading]:
    """Return what each gate measures, whether it is switched on or not.

    Args:
        quality: Figures of ``codebook_quality``.
        gates: The limits.

    Returns:
        One reading per gate, in the order of ``GateConfig``.
    """
    coverage = min(level["codebook_coverage"] for level in quality["levels"])
    residual = quality["levels"][-1]["relative_residual_norm"]
    return [
        GateReading("max_collision_rate", quality["collision_rate"], gates.max_collision_rate),
        GateReading("min_codebook_coverage", coverage, gates.min_codebook_coverage),
        GateReading("min_hr10", quality["hr10"], gates.min_hr10),
        GateReading("max_relative_residual_norm", residual, gates.max_relative_residual_norm),
    ]


def name_after(version: str, taken: Iterable[str]) -> str:
    """Return a free name that follows ``version``: v3 after v1 where v2 is taken.

    Args:
        version: A name, as a rule with a number at its end.
        taken: Names that are no more free.

    Returns:
        The same letters with the next number that is larger than any taken.
    """
    stem = version.rstrip("0123456789")
    numbers = [
        int(name.removeprefix(stem))
        for name in {version, *taken}
        if name.startswith(stem) and name.removeprefix(stem).isdigit()
    ]
    return f"{stem}{max(numbers, default=1) + 1}"


def stored_versions(uri: str) -> list[str]:
    """Return the names of all versions stored under ``uri``, sorted, published or not."""
    folder = place(uri)
    names = [name for name in names_in(folder) if _VERSION_PATTERN.fullmatch(name)]
    return sorted(name for name in names if (folder / name / MANIFEST_NAME).is_file())


def drafts_uri(uri: str) -> str:
    """Return the folder of trained versions that are not published yet."""
    return str(place(uri) / _DRAFTS_NAME)


def trained_uri(uri: str, version: str) -> str:
    """Return where ``version`` is read: under ``uri`` once it is published, else as a draft.

    Args:
        uri: Folder of codebook versions.
        version: Version name.

    Returns:
        The folder of drafts, or ``uri`` where there is no draft, or none that still counts.

    Raises:
        CodebookError: If the version was purged.
    """
    registry = CodebookRegistry(uri)
    registry.check_not_purged(version)
    # A process killed at the end of publishing leaves the draft behind.
    is_published = version in registry.states()
    is_draft = not is_published and version in stored_versions(drafts_uri(uri))
    return drafts_uri(uri) if is_draft else uri


def report_path(uri: str, version: str) -> Place:
    """Return the file of the last evaluation of ``version``."""
    return place(uri) / _REPORTS_NAME / check_version_name(version) / _REPORT_NAME


def write_report(uri: str, manifest: Manifest, quality: Mapping[str, Any]) -> Place:
    """Store the figures of one evaluation with the hashes of what it saw, and return the file.

    ``forced_gates`` stand in it as well: a publication by force is told wherever figures are.
    """
    path = report_path(uri, manifest.version)
    report = {
        "version": manifest.version,
        "files": manifest.files,
        "forced_gates": manifest.forced_gates,
        "quality": quality,
    }
    replace_file(path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    return path


def quality_of(uri: str, manifest: Manifest) -> dict[str, Any]:
    """Return the figures of exactly this codebook: of its last evaluation, or stored in it.

    Args:
        uri: Folder of codebook versions.
        manifest: Manifest of the version.

    Returns:
        Figures of ``codebook_quality``; empty if these bytes were never evaluated.
    """
    path = report_path(uri, manifest.version)
    if not path.is_file():
        return manifest.quality
    report = json.loads(path.read_text(encoding="utf-8"))
    return dict(report["quality"]) if report["files"] == manifest.files else manifest.quality


def check_version_name(version: str) -> str:
    """Return ``version`` if it is a legal name.

    Args:
        version: Version name.

    Returns:
        The same name.

    Raises:
        ConfigError: If it is not: names stand in Feast views and folders.
    """
    if not _VERSION_PATTERN.fullmatch(version):
        raise ConfigError(
            f"codebook version {version!r} is no legal name: a small letter, then at most 31 small "
            "letters, digits and underscores ([a-z][a-z0-9_]{0,31}), like v1"
        )
    return version


def _identity(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(exclude=_PUBLISH_FIELDS)


def _is_left_over(uri: str, version: str) -> bool:
    """Return whether the draft is of the very training whose codebook is published.

    Caps may have given the two other files, and a training has its own time.
    """
    draft, published = (read_manifest(place, version) for place in (drafts_uri(uri), uri))
    return draft.created == published.created


def _remove_draft(uri: str, version: str) -> None:
    folder = place(drafts_uri(uri)) / version
    if folder.is_dir():
        _remove_files(folder, keep=())


def _remove_files(folder: Place, keep: Iterable[str]) -> None:
    # The manifest goes first: without it the rest is no version.
    for name in sorted(names_in(folder), key=lambda name: name != MANIFEST_NAME):
        if name not in keep:
            (folder / name).unlink(missing_ok=True)
    if not keep:
        folder.rmdir()

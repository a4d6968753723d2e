"""The codebooks that a worker writes, kept up with the registry while it runs.

A thread looks at the registry again and again; what became live is loaded and tried there, beside
the stream. The worker asks for :meth:`CodebookWatch.current` once per batch, so every batch is
encoded by one set of versions.

- A version is taken up once it is live (or the default), its view is applied, its files have
  passed their hashes and it has encoded a vector.
- One that cannot be loaded leaves the set as it was, and ``qarm_codebook_refresh_failed`` at 1
  until a later look finds everything in order. So does a registry that cannot be read.
- A retired one leaves the set with the next look; rows that are on their way to a store are held
  against the registry once more (:meth:`CodebookWatch.stopped`).

Only the newest set is kept, so changes in quick succession end in the last one.
May import: numpy; the registry and the codebook of qarm_feast.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from qarm_feast.errors import CodebookError, ConfigError, QarmError
from qarm_feast.item_vectors import Encoder
from qarm_feast.observability import CODEBOOK_INFO, CODEBOOK_REFRESH_FAILED
from qarm_feast.registry import VersionState
from streaming.rows import LiveCodebooks

if TYPE_CHECKING:
    from qarm_feast.codebook import Codebook

logger = logging.getLogger(__name__)

_STOP_SECONDS = 10.0
_STOPPED = (VersionState.RETIRED, VersionState.PURGED)


class VersionStates(Protocol):
    """States of versions; ``qarm_feast.registry.CodebookRegistry``."""

    def states(self) -> Mapping[str, VersionState]:
        """Return the state of each version; none if there is no registry."""
        ...


@dataclass(frozen=True)
class VersionParts:
    """What a version needs before it is written.

    Attributes:
        states: The registry.
        has_view: Whether ``feast apply`` has made the version's view, and its encoder's if rankers
            read vectors.
        load: Gives the codebook, its files' hashes verified.
    """

    states: VersionStates
    has_view: Callable[[str], bool]
    load: Callable[[str], "Codebook"]


class EncoderCache:
    """Encoders by version, loaded with the first content event: ready embeddings need none.

    The worker may ask for one at the moment in which the watching thread forgets it.

    Args:
        load: Loads an encoder; takes seconds.
    """

    def __init__(self, load: Callable[[str], Encoder]) -> None:
        self._load = load
        self._loaded: dict[str, Encoder] = {}

    def get(self, version: str) -> Encoder:
        """Return an encoder, loaded if need be."""
        encoder = self._loaded.get(version)
        if encoder is None:
            encoder = self._loaded[version] = self._load(version)
        return encoder

    def prepare(self, version: str) -> None:
        """Load an encoder beside the stream, if content events come at all."""
        if self._loaded:
            self.get(version)

    def keep_only(self, versions: Iterable[str]) -> None:
        """Forget all other encoders."""
        for version in set(self._loaded) - set(versions):
            del self._loaded[version]


def written_versions(states: Mapping[str, VersionState]) -> list[str]:
    """Return the versions that workers write: the default, then live ones, oldest first."""
    return [
        version
        for wanted in (VersionState.DEFAULT, VersionState.LIVE)
        for version, state in states.items()
        if state is wanted
    ]


class CodebookWatch:
    """Holds the set of codebooks to write; its thread runs for as long as its ``with`` block.

    Args:
        parts: Registry, views and files.
        encoders: The encoders of the codebooks.
        poll_seconds: Time between two looks at the registry.
    """

    def __init__(self, parts: VersionParts, encoders: EncoderCache, poll_seconds: float) -> None:
        self._parts = parts
        self._encoders = encoders
        self._poll_seconds = poll_seconds
        self._live = LiveCodebooks({}, encoders.get)
        self._states: Mapping[str, VersionState] = {}
        self._faults: dict[str, QarmError] = {}
        self._waiting: set[str] = set()
        self._wake = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._watch, name="codebooks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_closed = True
        self._wake.set()
        # A load that takes longer ends with the process.
        self._thread.join(_STOP_SECONDS)

    def current(self) -> LiveCodebooks:
        """Return the codebooks to encode the next batch with, the default version first."""
        return self._live

    def load_first(self) -> None:
        """Load what is to be written now; versions that cannot be are left out, and told.

        Raises:
            QarmError: If not one version can be written; the fault of the first.
        """
        self.poll()
        if self._live.codebooks:
            return
        for fault in self._faults.values():
            raise fault
        if self._waiting:
            raise ConfigError(
                f"the codebook version(s) {', '.join(sorted(self._waiting))} have no view yet; "
                "run `feast apply`"
            )
        raise CodebookError(
            "the codebook registry has no live version; run "
            "`qarm codebook publish --codebook-version VERSION` first"
        )

    def lagging(self, acknowledged: Iterable[str]) -> list[str]:
        """Return the acknowledged versions that shall be written and are not in the current set.

        If there are any, or there is no current set, the thread looks at once.

        Args:
            acknowledged: Versions that an owner of the same partitions has acknowledged.

        Returns:
            Versions without which no event may be stored.
        """
        live = self._live.codebooks
        missing = sorted(version for version in acknowledged if version not in live)
        if missing:
            missing = self._not_stopped(missing)
        if missing or not live:
            self._wake.set()
        return missing

    def stopped(self, versions: Iterable[str]) -> set[str]:
        """Return which of ``versions`` are not to be written any more, by a fresh look.

        Args:
            versions: Versions that rows are there for.

        Returns:
            Versions whose state is another than live and default. One that the registry does not
            name at all is none of them: that registry is damaged.
        """
        asked = list(versions)
        states = self._read_states_if_possible() if asked else {}
        written = written_versions(states)
        return {version for version in asked if version in states and version not in written}

    def poll(self) -> None:
        """Look once at the registry, and make a new set if another one is wanted."""
        try:
            wanted = self._wanted(self._read_states())
        except QarmError as error:
            self._report({"registry": error})
            return
        found: dict[str, Codebook] = {}
        faults: dict[str, QarmError] = {}
        for version in wanted:
            try:
                found[version] = self._live.codebooks.get(version) or self._open(version, found)
            except QarmError as error:
                faults[version] = error
        self._adopt(found)
        self._report(faults)

    def _wanted(self, states: Mapping[str, VersionState]) -> list[str]:
        """Return the versions to write; those without a view wait, and it is said once."""
        live = self._live.codebooks
        unknown = [version for version in live if version not in states]
        written = written_versions(states)
        waiting = {v for v in written if v not in live and not self._parts.has_view(v)}
        for version in waiting - self._waiting:
            logger.warning("codebook_waits version=%s for=view next=`feast apply`", version)
        self._waiting = waiting
        return [version for version in (*written, *unknown) if version not in waiting]

    def _open(self, version: str, others: Mapping[str, "Codebook"]) -> "Codebook":
        try:
            codebook = self._parts.load(version)
        except OSError as error:
            raise CodebookError(f"codebook version {version!r} cannot be read: {error}") from error
        _check_widths(codebook, others)
        sample_ND = np.eye(1, codebook.embedding_dim, dtype=np.float32)
        codebook.encode(np.zeros(1, dtype=np.int64), [""], sample_ND)
        self._encoders.prepare(codebook.manifest.encoder_version)
        return codebook

    def _adopt(self, codebooks: dict[str, "Codebook"]) -> None:
        before = self._live.codebooks
        self._encoders.keep_only(book.manifest.encoder_version for book in codebooks.values())
        if list(codebooks) == list(before):
            return
        # One assignment: the worker sees the set before or this one.
        self._live = LiveCodebooks(codebooks, self._encoders.get)
        for version in before.keys() - codebooks.keys():
            CODEBOOK_INFO.labels(version).set(0)
        for version in codebooks:
            CODEBOOK_INFO.labels(version).set(1)
        logger.info(
            "codebooks_changed versions=%s before=%s",
            ",".join(codebooks) or "none",
            ",".join(before) or "none",
        )

    def _report(self, faults: dict[str, QarmError]) -> None:
        CODEBOOK_REFRESH_FAILED.set(1 if faults else 0)
        for name, fault in faults.items():
            if str(fault) != str(self._faults.get(name)):
                logger.error("codebook_refused version=%s error=%s", name, fault)
        if self._faults and not faults:
            logger.info("codebooks_in_order versions=%s", ",".join(self._live.codebooks))
        self._faults = faults

    def _not_stopped(self, versions: Iterable[str]) -> list[str]:
        """Return which versions are to be written, or may be: that is not known at the moment."""
        try:
            written = written_versions(self._read_states())
        except QarmError:
            # What was staged at the last look may be live by now: its acknowledgement says so.
            return [version for version in versions if self._states.get(version) not in _STOPPED]
        return [version for version in versions if version in written]

    def _read_states(self) -> Mapping[str, VersionState]:
        try:
            states = self._parts.states.states()
        except OSError as error:
            raise CodebookError(f"the codebook registry cannot be read: {error}") from error
        if not states and self._states:
            # No process takes versions out, so a folder that is empty now is not mounted.
            raise CodebookError(
                f"the codebook registry is empty, it held {', '.join(self._states)} before"
            )
        self._states = states
        return states

    def _read_states_if_possible(self) -> Mapping[str, VersionState]:
        """Return the states now, or those of the last look; :meth:`poll` tells of the fault."""
        try:
            return self._read_states()
        except QarmError:
            return self._states

    def _watch(self) -> None:
        while True:
            self._wake.wait(self._poll_seconds)
            self._wake.clear()
            if self._is_closed:
                return
            try:
                self.poll()
            except Exception:
                # The thread's entry point: whatever it is, the stream goes on with what it has.
                CODEBOOK_REFRESH_FAILED.set(1)
                logger.exception("codebook_poll_failed")


def _check_widths(codebook: "Codebook", others: Mapping[str, "Codebook"]) -> None:
    encoder_version = codebook.manifest.encoder_version
    for version, other in others.items():
        if (
            other.manifest.encoder_version == encoder_version
            and other.embedding_dim != codebook.embedding_dim
        ):
            raise CodebookError(
                f"codebook version {codebook.version!r} takes vectors of {codebook.embedding_dim} "
                f"numbers, {version!r} of {other.embedding_dim}, and both name the encoder "
                f"{encoder_version!r}; train it again"
            )

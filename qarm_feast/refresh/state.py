"""How far a refresh has come: one small file, replaced as a whole after each step.

    <refresh.state_uri>/state.json               the run that is under way, or the last one
    <refresh.state_uri>/holder.json              who holds the lock
    <refresh.state_uri>/reports/<version>.json   what each run came to

May import: pydantic.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from qarm_feast.artifact import remove_file, replace_file
from qarm_feast.errors import AlreadyRunningError, DataError
from qarm_feast.object_store import place
from qarm_feast.shared_state import CheckHeld, LockTakenError, exclusive

Outcome = Literal["running", "refused", "published"]

_STATE_NAME = "state.json"
_HOLDER_NAME = "holder.json"
_REPORTS_NAME = "reports"
_LOCK_NAME = ".refresh.lock"


class Inputs(BaseModel):
    """Hashes of all that decides what a refresh makes, but for its parent.

    ``files`` by name, ``settings`` by section, ``taken_down`` of the items that were taken down.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, str]
    settings: dict[str, str]
    taken_down: str

    def changes_since(self, other: "Inputs") -> list[str]:
        """Return in words what differs from ``other``."""
        pairs = [(self.files, other.files, ""), (self.settings, other.settings, "section ")]
        changes = [
            f"{word}{name}"
            for ours, theirs, word in pairs
            for name in ours
            if ours[name] != theirs.get(name)
        ]
        return changes + ["takedowns"] * (self.taken_down != other.taken_down)


class Parent(BaseModel):
    """The codebook version that a refresh starts from, and its encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codebook_version: str
    encoder_version: str
    encoder_hash: str


class EncoderMade(BaseModel):
    """An encoder that a run was to make; ``started`` is what its manifest says it was created."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    started: AwareDatetime


class StepRecord(BaseModel):
    """A step that is done: ``summary`` for people, ``figures`` for programs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    summary: str
    figures: dict[str, Any]


class RefreshState(BaseModel):
    """What ``state.json`` holds. ``refusal`` is what a gate said.

    ``earlier_encoders`` are those of the runs before, oldest first; ``removed_encoders`` went when
    this one was over.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    inputs: Inputs
    parent: Parent | None
    encoder_version: str
    codebook_version: str
    started: AwareDatetime
    finished: AwareDatetime | None = None
    outcome: Outcome = "running"
    refusal: str = ""
    steps: dict[str, StepRecord] = {}
    earlier_encoders: list[EncoderMade] = []
    removed_encoders: list[str] = []

    def encoders(self) -> list[EncoderMade]:
        """Return all encoders that runs were to make, that of this one last."""
        own = EncoderMade(version=self.encoder_version, started=self.started)
        return [*self.earlier_encoders, own]

    def write(self, folder: Path) -> None:
        """Put this state in place of the one in ``folder``."""
        replace_file(folder / _STATE_NAME, self.model_dump_json(indent=2).encode() + b"\n")


def read_state(folder: Path) -> RefreshState | None:
    """Return the state in ``folder``; None if no refresh has run yet.

    Args:
        folder: ``refresh.state_uri``.

    Returns:
        The state.

    Raises:
        DataError: If the file is damaged.
    """
    path = folder / _STATE_NAME
    try:
        return RefreshState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(
            f"{path} is no state of a refresh: {error}; remove it and run `qarm refresh` again, "
            "which then begins anew"
        ) from error


def report_path(folder: Path, codebook_version: str) -> Path:
    """Return the file of the report of the run that made ``codebook_version``."""
    return folder / _REPORTS_NAME / f"{codebook_version}.json"


@contextmanager
def refresh_lock(codebooks_uri: str, folder: Path) -> Iterator[CheckHeld]:
    """Keep a second refresh of the same codebooks away.

    The lock lies beside the codebooks, as machines may share them; who holds it is noted in the
    state's folder.

    Args:
        codebooks_uri: ``codebook.uri``.
        folder: ``refresh.state_uri``.

    Yields:
        What to ask before a step that another refresh at the same time would spoil.

    Raises:
        AlreadyRunningError: If one is at work; says which process.
        ServiceUnavailableError: If the object store does not answer.
    """
    holder = folder / _HOLDER_NAME
    try:
        with exclusive(place(codebooks_uri) / _LOCK_NAME, wait_seconds=0) as check_held:
            own = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            }
            replace_file(holder, json.dumps(own).encode())
            try:
                yield check_held
            finally:
                remove_file(holder)
    except LockTakenError as error:
        raise AlreadyRunningError(
            f"another refresh of {codebooks_uri} is at work{_words_of(holder)}; nothing was done; "
            f"let it finish, or {error}"
        ) from error


def _words_of(holder: Path) -> str:
    try:
        held = json.loads(holder.read_bytes())
    except (FileNotFoundError, ValueError):
        # It has just begun, or ends just now; or it notes itself on another machine.
        return ""
    return f": process {held['process']} on {held['host']}, since {held['since']}"

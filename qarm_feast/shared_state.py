"""Locks, and the small documents that several processes change, on disk and in an object store.

On disk a document is one file that is replaced, and a lock is a file lock, which the system gives
back when its holder dies. In an object store both are *numbered objects* below their name,
``registry.json/00000012.json``: each is put once, by a put that is refused where an object is, and
never changes. Who has read number 11 puts number 12, so of two who change at once one is refused
(compare and set); readers take the highest number, old ones are deleted. A lock there is such a
document that says who holds it until when:

1. Who finds it free, or run out, puts the next number with their own name.
2. The holder puts another number, with a later end, every third of the lease.
3. At the end the holder puts a number that says free. A holder that was killed leaves a lease that
   runs out after ``LEASE_SECONDS``.

Ends of leases are compared with this machine's clock: machines that share a store have clocks that
agree within some seconds (NTP). Whoever a clock or a long pause misleads is still stopped where it
matters: what a document holds is replaced by number alone, and before a step that no number guards
a holder asks whether its lease has run out. May import: filelock, the object store.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from qarm_feast.artifact import replace_file
from qarm_feast.errors import QarmError, ServiceUnavailableError
from qarm_feast.object_store import Place, StorePath, check_conditional_put, scan

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30.0
"""How long a lock in an object store outlives a holder that was killed."""
WAIT_SECONDS = 3 * LEASE_SECONDS
"""How long a short change waits for another one: a killed holder's lease runs out meanwhile."""
_POLL_SECONDS = 0.25
_NUM_KEPT = 16
_READ_TRIES = 5

CheckHeld = Callable[[], None]
"""Raises a ServiceUnavailableError if the lock is not held any more; a file lock always is."""


class LockTakenError(Exception):
    """Another process holds the lock; says how to find it. Never leaves this package."""


@dataclass(frozen=True)
class Snapshot:
    """A document as it was read; ``payload`` is None where there is none yet."""

    payload: bytes | None
    number: int = 0


class SharedDocument:
    """A small document that is replaced as a whole.

    Args:
        path: Its file, or the prefix of its numbered objects.
    """

    def __init__(self, path: Place) -> None:
        self.path = path

    def read(self) -> Snapshot:
        """Return what it holds now; a ServiceUnavailableError says that the store is away."""
        if isinstance(self.path, StorePath):
            return _newest(self.path)
        try:
            return Snapshot(self.path.read_bytes())
        except FileNotFoundError:
            return Snapshot(None)

    def file(self, read: Snapshot) -> Place:
        """Return the file, or the object, that was read; where there is none, the first to be."""
        is_remote = isinstance(self.path, StorePath)
        return self.path / _name(read.number or 1) if is_remote else self.path

    def replace(self, read: Snapshot, payload: bytes) -> Snapshot | None:
        """Put ``payload`` in place of what was read; on disk the caller holds the document's lock.

        Args:
            read: What this change is based on.
            payload: The new content.

        Returns:
            The document as it is now; None: somebody has changed it since, so nothing was done.
        """
        if not isinstance(self.path, StorePath):
            replace_file(self.path, payload)
        elif not _append(self.path, read.number, payload):
            return None
        return Snapshot(payload, read.number + 1)


@contextmanager
def exclusive(path: Place, wait_seconds: float) -> Iterator[CheckHeld]:
    """Hold a lock that one process at a time can have.

    Args:
        path: A file, or the prefix of a lock's numbered objects.
        wait_seconds: How long to wait for another holder.

    Yields:
        What to ask before a step that another holder at the same time would spoil.

    Raises:
        LockTakenError: If another process holds it all that time.
        ConfigError: If the object store has no put that locks can rest upon.
        ServiceUnavailableError: If the store does not answer.
    """
    if isinstance(path, StorePath):
        check_conditional_put(path.parent)
        lease = _Lease(path)
        with lease.held(wait_seconds):
            yield lease.check
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path, timeout=wait_seconds)
        lock.acquire()
    except Timeout as error:
        raise LockTakenError(f"look for who holds the lock with `fuser {path}`") from error
    try:
        yield lambda: None
    finally:
        lock.release()


class _Lease:
    """A lock in an object store; see the module's docstring."""

    def __init__(self, path: StorePath) -> None:
        self._path = path
        self._owner = f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex}"
        self._number = 0
        self._expires = 0.0
        self._ended = threading.Event()

    @contextmanager
    def held(self, wait_seconds: float) -> Iterator[None]:
        self._acquire(wait_seconds)
        renewal = threading.Thread(target=self._renew, name="lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            self._ended.set()
            renewal.join()
            self._release()

    def check(self) -> None:
        """Refuse to go on if the lease has run out: another process may hold the lock by now."""
        if time.time() >= self._expires:
            raise ServiceUnavailableError(
                f"this process held {self._path} and could not renew that for "
                f"{LEASE_SECONDS:.0f} s: it slept, or the object store was away; it stops here, as "
                "another one may be at work by now; run the same command again"
            )

    def _acquire(self, wait_seconds: float) -> None:
        deadline = time.monotonic() + wait_seconds
        while True:
            found = _newest(self._path)
            owner, expires = _holder(found.payload)
            if expires <= time.time():
                if self._put(found.number, LEASE_SECONDS):
                    return
                # Somebody else was faster; the next look tells who.
                continue
            if time.monotonic() >= deadline:
                until = datetime.fromtimestamp(expires, UTC).strftime("%H:%M:%S")
                raise LockTakenError(
                    f"{owner or 'another process'} holds {self._path} until {until} UTC, and "
                    "longer while it runs; if it was killed, try again after that"
                )
            time.sleep(_POLL_SECONDS)

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 3):
            try:
                if not self._put(self._number, LEASE_SECONDS):
                    logger.error("lease_lost path=%s", self._path)
                    return
            except QarmError as error:
                # The next try comes before the lease has run out, or it is lost.
                logger.warning("lease_not_renewed path=%s error=%s", self._path, error)

    def _release(self) -> None:
        try:
            self._put(self._number, 0.0)
        except QarmError as error:
            # The work is done or has its own error; the lease runs out by itself.
            logger.warning("lease_not_released path=%s error=%s", self._path, error)

    def _put(self, number: int, seconds: float) -> bool:
        expires = time.time() + seconds if seconds else 0.0
        payload = json.dumps({"owner": self._owner, "expires": expires}).encode()
        if not _append(self._path, number, payload):
            found = _newest(self._path)
            if _holder(found.payload)[0] != self._owner:
                return False
            # The put before this one was done, though its answer never came.
            number = found.number
            if not _append(self._path, number, payload):
                return False
        self._number, self._expires = number + 1, expires
        return True


def _holder(payload: bytes | None) -> tuple[str, float]:
    if payload is None:
        return "", 0.0
    content = json.loads(payload)
    return str(content["owner"]), float(content["expires"])


def _newest(folder: StorePath) -> Snapshot:
    for _ in range(_READ_TRIES):
        numbers = _numbers(folder)
        if not numbers:
            return Snapshot(None)
        try:
            return Snapshot((folder / _name(numbers[-1])).read_bytes(), numbers[-1])
        except FileNotFoundError:
            # Deleted since it was listed: there are newer ones.
            continue
    raise ServiceUnavailableError(
        f"{folder} lists objects that are not there, {_READ_TRIES} times; see that the object "
        "store lists what was put before, then run the same command again"
    )


def _append(folder: StorePath, number: int, payload: bytes) -> bool:
    if not (folder / _name(number + 1)).create(payload):
        return False
    numbers = _numbers(folder)
    if numbers and numbers[-1] - (number + 1) >= _NUM_KEPT:
        # A process that slept while so many numbers came: the next one was deleted long ago, and
        # this is no change but a leftover.
        return False
    for old in numbers:
        if old <= number + 1 - _NUM_KEPT:
            (folder / _name(old)).unlink(missing_ok=True)
    return True


def _numbers(folder: StorePath) -> list[int]:
    stems = (Path(entry.name).stem for entry in scan(folder))
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _name(number: int) -> str:
    return f"{number:08d}.json"

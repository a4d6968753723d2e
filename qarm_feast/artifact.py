"""Files of immutable artifacts: complete or absent, and hashed; on disk or in an object store.

On disk a file is written under a temporary name, fsynced and renamed; an object is put whole, and
the store answers when it is safe. Verified bytes of an object are kept in a local folder under
their hash (``$QARM_CACHE_DIR``, else ``qarm-feast`` in the user's cache folder), so that a process
that starts again fetches no codebook anew. May import: the standard library, the object store.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from qarm_feast.errors import ConfigError, CorruptArtifactError
from qarm_feast.object_store import Place, StorePath

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_COPY_REMEDY = "put back a copy of it"
_CACHE_VARIABLE = "QARM_CACHE_DIR"
_CACHE_DAYS = 30.0
"""A cached file that nobody has read for so long is deleted when another one comes."""
_CACHED_NAME = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\..*")
"""A cached file, or one that is being written, or was when a kill ended it."""
_DAY_SECONDS = 86_400.0
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_file(path: Place, payload: bytes) -> None:
    """Put ``payload`` at ``path``, in place of what may be there; readers see old or new."""
    if isinstance(path, StorePath):
        path.put(payload)
        return
    temporary = _write_temporary(path, payload)
    os.replace(temporary, path)
    sync_folder(path.parent)


def replace_folder(filled: Path, final: Path) -> None:
    """Give a filled folder its final name, in place of another one; readers see old or new.

    1. Its files are fsynced, and its entries.
    2. It takes the name; where a folder has that, the two names are exchanged in one step.
    3. The old folder, which has the temporary name by now, is removed.

    Args:
        filled: A folder of files beside ``final``, complete.
        final: Its name to be.

    Raises:
        ConfigError: If a folder has the name and the file system cannot exchange (as NFS).
    """
    for path in filled.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(filled)
    if final.exists():
        _exchange(filled, final)
    else:
        filled.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(filled, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Exchange two names: Linux can, and the standard library has no call for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(
            f"the file system cannot exchange {first} and {second} ({reason}), so {second} stays "
            "as it was; remove it, then run the same command again"
        )


def remove_file(path: Place) -> None:
    """Remove the file at ``path`` if there is one, before anything that is written after it."""
    if isinstance(path, StorePath):
        path.unlink(missing_ok=True)
    elif path.is_file():
        path.unlink()
        sync_folder(path.parent)


def create_file(path: Place, payload: bytes) -> bool:
    """Put ``payload`` at ``path`` unless something is there.

    Args:
        path: Where the file shall be; its folder is made.
        payload: All of its bytes.

    Returns:
        Whether this call made the file. Of two callers at once one gets True; in an object store
        also the other one, if it came with the same bytes.
    """
    if isinstance(path, StorePath):
        return path.create(payload)
    temporary = _write_temporary(path, payload)
    try:
        # Unlike a rename, a link fails where a file exists.
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def read_verified(
    folder: Place, name: str, files: Mapping[str, str], remedy: str = _COPY_REMEDY
) -> bytes:
    """Return the bytes of one file of an artifact.

    Args:
        folder: The artifact's folder.
        name: File name, a key of ``files``.
        files: SHA-256 by file name, as the manifest has it.
        remedy: What the error shall say is to be done.

    Returns:
        The file's bytes.

    Raises:
        CorruptArtifactError: If the file is missing or its hash differs.
    """
    path = folder / name
    cached = _cached_file(files[name]) if isinstance(path, StorePath) else None
    if cached is not None and (payload := _read_cached(cached)) is not None:
        return payload
    try:
        payload = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        expected = files[name]
        raise CorruptArtifactError(
            path=str(path), expected=expected, found=None, remedy=remedy
        ) from error
    found = sha256(payload)
    if found != files[name]:
        raise CorruptArtifactError(path=str(path), expected=files[name], found=found, remedy=remedy)
    if cached is not None:
        _fill_cache(cached, payload)
    return payload


def _cached_file(digest: str) -> Path | None:
    """Return where a file is cached; None for a user without a home, as some containers have."""
    if folder := os.environ.get(_CACHE_VARIABLE):
        return Path(folder) / digest
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return caches / "qarm-feast" / digest


def _read_cached(path: Path) -> bytes | None:
    """Return a cached file; None if there is none, or a disk has damaged it."""
    try:
        payload = path.read_bytes()
    except OSError:
        # Not cached yet: the store has it.
        return None
    # In a cache that this user may only read, somebody else counts the days.
    with contextlib.suppress(OSError):
        os.utime(path)
    return payload if sha256(payload) == path.name else None


def _fill_cache(path: Path, payload: bytes) -> None:
    """Keep a copy, and let go of those that nobody asks for; a full disk keeps nothing."""
    try:
        replace_file(path, payload)
    except OSError as error:
        logger.warning("artifact_not_cached path=%s error=%s", path, error)
        return
    for other in path.parent.iterdir():
        # Whatever else lies in a folder that was named for the cache is not ours to delete.
        if _CACHED_NAME.fullmatch(other.name):
            # Another process may have deleted it, or this user may not.
            with contextlib.suppress(OSError):
                _remove_unread(other)


def _remove_unread(path: Path) -> None:
    if time.time() - path.stat().st_mtime > _CACHE_DAYS * _DAY_SECONDS:
        path.unlink()


def sha256(payload: bytes) -> str:
    """Return the SHA-256 of ``payload`` as hex text."""
    return hashlib.sha256(payload).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex text, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what is another as soon as a file is replaced or written to; None: there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def sync_folder(folder: Place) -> None:
    """Make the folder's entries survive a power cut: new names, and renames in it."""
    if isinstance(folder, StorePath):
        # What a store has answered for is safe.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_temporary(path: Path, payload: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        # Whoever tries again on a full disk must not litter it.
        Path(name).unlink(missing_ok=True)
        raise
    # mkstemp makes a file that only its owner may read; an artifact is for every process.
    Path(name).chmod(0o644)
    return Path(name)

"""Files of immutable artifacts: complete or absent, and hashed.

May import: the standard library.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qarm_feast.errors import CorruptArtifactError

MANIFEST_NAME = "manifest.json"
_COPY_REMEDY = "put back a copy of it"


def replace_file(path: Path, payload: bytes) -> None:
    """Put ``payload`` at ``path``, in place of what may be there; readers see old or new."""
    temporary = _write_temporary(path, payload)
    os.replace(temporary, path)
    sync_folder(path.parent)


def remove_file(path: Path) -> None:
    """Remove the file at ``path`` if there is one, before anything that is written after it."""
    if path.is_file():
        path.unlink()
        sync_folder(path.parent)


def create_file(path: Path, payload: bytes) -> bool:
    """Put ``payload`` at ``path`` unless something is there.

    Args:
        path: Where the file shall be; its folder is made.
        payload: All of its bytes.

    Returns:
        Whether this call made the file. Of two callers at once one gets True.
    """
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
    folder: Path, name: str, files: Mapping[str, str], remedy: str = _COPY_REMEDY
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
    if not path.is_file():
        raise CorruptArtifactError(path=str(path), expected=files[name], found=None, remedy=remedy)
    payload = path.read_bytes()
    found = sha256(payload)
    if found != files[name]:
        raise CorruptArtifactError(path=str(path), expected=files[name], found=found, remedy=remedy)
    return payload


def sha256(payload: bytes) -> str:
    """Return the SHA-256 of ``payload`` as hex text."""
    return hashlib.sha256(payload).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut: new names, and renames in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_temporary(path: Path, payload: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    # mkstemp makes a file that only its owner may read; an artifact is for every process.
    Path(name).chmod(0o644)
    return Path(name)

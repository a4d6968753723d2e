"""Places: a local path, or a key of an object store, under the same few names.

:class:`StorePath` offers the part of :class:`pathlib.Path` that codebooks and logs use, so that
most of the code asks a :data:`Place` and never what kind it is. An object is put whole or not at
all, a listing shows what was put before it began (true of S3 since December 2020 and of the usual
servers), and folders are prefixes: nobody makes or removes them.

Stores are reached through fsspec (``s3://`` through s3fs, with botocore's variables for endpoint,
region and credentials). What publish and rollout rest upon is a put that is refused where an
object is (``If-None-Match: *``); :func:`check_conditional_put` looks whether a store has it.
May import: fsspec.
"""

import functools
import importlib
import io
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qarm_feast.errors import ConfigError, MissingDependencyError, ServiceUnavailableError

_PACKAGE_OF = {"s3": "s3fs"}
_SETTINGS: dict[str, dict[str, Any]] = {
    # Tries and seconds are bounded: a worker has its own pauses between two tries.
    "s3": {
        # At more than one, s3fs asks for the size before each object: two requests in place of one.
        "max_concurrency": 1,
        "config_kwargs": {
            "connect_timeout": 5,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 3},
        },
    }
}
_REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_UNKNOWN_CONDITION = {"NotImplemented", "501"}
_NO_BUCKET = "NoSuchBucket"
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError"}
_ILLEGAL_NAME = "ParamValidationError"
_CLIENT_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec")
_CHANGED_KEYS = ("LastModified", "updated", "created")
_CREATE_TRIES = 3
_PATTERN_SIGNS = frozenset("*?[")


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes, and when an object was put, in seconds since the epoch, by the store's clock.

    Named as in :class:`os.stat_result`: an object never changes, so both times are one.
    """

    st_size: int
    st_ctime: float

    @property
    def st_mtime(self) -> float:
        """When it was put."""
        return self.st_ctime


class Entry(Protocol):
    """One entry of a folder; :class:`os.DirEntry` has this form."""

    @property
    def name(self) -> str:
        """Last part of the path."""
        ...

    @property
    def path(self) -> str:
        """Whole path or URI."""
        ...

    def stat(self) -> "os.stat_result | FileFacts":
        """Return size and times."""
        ...


@dataclass(frozen=True)
class StoreEntry:
    """One object or prefix of a listing; asking it costs no request."""

    path: str
    facts: FileFacts

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.path.rpartition("/")[2]

    def stat(self) -> FileFacts:
        """Return size and time as listed."""
        return self.facts


@dataclass(frozen=True)
class StorePath:
    """A key of an object store, or a prefix of keys; methods are named as those of a path."""

    scheme: str
    key: str
    """Bucket and key, without a slash at either end."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: "str | Path") -> "StorePath":
        return StorePath(self.scheme, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last dot of the name and what follows; empty if there is no dot."""
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> "StorePath":
        """The prefix that this key lies in."""
        return StorePath(self.scheme, self.key.rpartition("/")[0])

    @property
    def bucket(self) -> "StorePath":
        """The bucket alone."""
        return StorePath(self.scheme, self.key.partition("/")[0])

    def with_name(self, name: str) -> "StorePath":
        """Return the key beside this one that is called ``name``."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "StorePath":
        """Return the key beside this one whose name ends in ``suffix`` instead."""
        return self.with_name(os.path.splitext(self.name)[0] + suffix)

    def absolute(self) -> "StorePath":
        """Return itself: a URI depends on no working directory."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a prefix is there as soon as something has it."""

    def rmdir(self) -> None:
        """Do nothing: a prefix is gone with its last object."""

    def exists(self) -> bool:
        """Return whether there is such an object, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Return whether some object lies below this prefix."""
        return next(iter(scan(self)), None) is not None

    def stat(self) -> FileFacts:
        """Return size and time; a FileNotFoundError says that there is no such object."""
        with _asked(self):
            found = self._files.info(str(self))
        if found["type"] != "file":
            raise FileNotFoundError(f"no object at {self}")
        return _facts(found)

    def rglob(self, pattern: str) -> "Iterator[StorePath]":
        """Yield every object below this prefix; ``pattern`` is ``*``."""
        assert pattern == "*", pattern
        for entry in scan_below(self):
            yield StorePath(self.scheme, entry.path.partition("://")[2])

    def read_bytes(self) -> bytes:
        """Return an object; a FileNotFoundError says that there is none."""
        with _asked(self):
            content: bytes = self._files.cat_file(str(self))
        return content

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return an object as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, end: int) -> bytes:
        """Return some bytes of an object, ``end`` not among them."""
        with _asked(self):
            content: bytes = self._files.cat_file(str(self), start=start, end=end)
        return content

    def put(self, payload: bytes) -> None:
        """Put an object in place of what may be there; readers see old or new."""
        with _asked(self):
            self._files.pipe_file(str(self), payload)

    def create(self, payload: bytes) -> bool:
        """Put an object unless there is one.

        Args:
            payload: All of its bytes.

        Returns:
            Whether this call made it, or a try of it whose answer was lost: what lies there then
            has these bytes.

        Raises:
            ConfigError: If the store does not know such a put.
        """
        for _ in range(_CREATE_TRIES):
            if self._create_once(payload):
                return True
            try:
                return self.read_bytes() == payload
            except FileNotFoundError:
                # Refused because of another put at the same time, which then came to nothing.
                continue
        return False

    def _create_once(self, payload: bytes) -> bool:
        with _asked(self):
            try:
                self._files.pipe_file(str(self), payload, mode="create")
            except NotImplementedError as error:
                raise ConfigError(_no_conditional_put(self)) from error
            except OSError as error:
                if _code(error) in _UNKNOWN_CONDITION:
                    raise ConfigError(_no_conditional_put(self)) from error
                if isinstance(error, FileExistsError) or _code(error) in _REFUSED:
                    return False
                raise
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object.

        Args:
            missing_ok: Whether there may be none.

        Raises:
            FileNotFoundError: If there is none, and there has to be.
        """
        try:
            if not missing_ok:
                self.stat()
            with _asked(self):
                self._files.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def move(self, target: "StorePath") -> None:
        """Copy an object to ``target`` and delete it; killed in between, it is in both places."""
        with _asked(self):
            self._files.cp_file(str(self), str(target))
            self._files.rm_file(str(self))

    @property
    def _files(self) -> Any:
        return file_system(self.scheme)


class StoreFile(io.RawIOBase):
    """An object as a file that is read: each read asks the store for just those bytes.

    fsspec's own files raise what their client raises, which readers of the log would have to tell
    from a damaged part; this one raises our errors.
    """

    def __init__(self, path: StorePath) -> None:
        super().__init__()
        self._path = path
        self._size = path.stat().st_size
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to ``offset`` from the start, from here, or from the end; return where that is."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return how many bytes lie before what is read next."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Return the next ``size`` bytes, fewer at the end; -1: all that are left."""
        end = self._size if size < 0 else min(self._size, self._position + size)
        if end <= self._position:
            return b""
        content = self._path.read_range(self._position, end)
        self._position = end
        return content


Place = Path | StorePath
"""A path on a local or mounted disk, or a key of an object store."""


def place(uri: "str | Place") -> Place:
    """Return the place that a setting names.

    Args:
        uri: A path, or ``scheme://bucket/prefix``.

    Returns:
        The place; nothing need be there.

    Raises:
        ConfigError: If fsspec knows no such scheme, the bucket is not named, or the key would be
            taken for a pattern.
        MissingDependencyError: If the scheme's package is missing.
    """
    if not isinstance(uri, str):
        return uri
    scheme, separator, key = uri.partition("://")
    if not separator:
        return Path(uri)
    found = StorePath(scheme, key.strip("/"))
    file_system(scheme)
    if not found.key:
        raise ConfigError(f"{uri!r} names no bucket; write {scheme}://BUCKET/PREFIX")
    if not _PATTERN_SIGNS.isdisjoint(found.key):
        # fsspec would read and delete whatever the pattern fits.
        raise ConfigError(f"{uri!r} holds one of *?[ , which stand for patterns; rename the prefix")
    return found


@functools.cache
def _check_package(scheme: str) -> None:
    from fsspec.registry import known_implementations, registry

    if scheme in ("file", "local") or scheme not in {*known_implementations, *registry}:
        raise ConfigError(
            f"there is no object store of scheme {scheme!r}; write s3://BUCKET/PREFIX, or a path "
            "without a scheme"
        )
    package = _PACKAGE_OF.get(scheme)
    if package is None:
        return
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            package=package,
            needed_for=f"{scheme}://",
            command=f'pip install "qarm-feast[{scheme}]"',
        ) from error


def file_system(scheme: str) -> Any:
    """Return fsspec's client for a scheme, one per process.

    Args:
        scheme: For example ``s3``.

    Returns:
        The client, an ``fsspec.AbstractFileSystem``.

    Raises:
        ConfigError: If fsspec knows no such scheme.
        MissingDependencyError: If its package is missing.
    """
    import fsspec

    _check_package(scheme)
    # Listings are never kept: other processes put and delete.
    return fsspec.filesystem(scheme, use_listings_cache=False, **_SETTINGS.get(scheme, {}))


def scan(folder: Place) -> Iterator[Entry]:
    """Yield the entries of a folder, sizes and times at hand, in no particular order.

    Args:
        folder: A folder, or a prefix of keys.

    Yields:
        Entries; none for a prefix that nothing has.

    Raises:
        FileNotFoundError: If a local folder is not there.
        ConfigError: If the bucket is not there.
    """
    if isinstance(folder, Path):
        yield from os.scandir(folder)
        return
    try:
        with _asked(folder):
            found = file_system(folder.scheme).ls(str(folder), detail=True)
    except FileNotFoundError:
        return
    for each in found:
        name = each["name"].strip("/").removeprefix(f"{folder.key}/")
        # An object of the prefix's own name, as some tools put one for a folder, is none in it.
        if name and name != folder.key:
            yield StoreEntry(f"{folder}/{name}", _facts(each))


def scan_below(folder: StorePath) -> Iterator[StoreEntry]:
    """Yield every object below a prefix at any depth: a thousand per request, by ascending key."""
    with _asked(folder):
        found = file_system(folder.scheme).find(str(folder), detail=True)
    for name, facts in found.items():
        yield StoreEntry(f"{folder.scheme}://{name.strip('/')}", _facts(facts))


def names_in(folder: Place) -> list[str]:
    """Return the names of a folder's entries, in no particular order; none if it is not there."""
    try:
        return [entry.name for entry in scan(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_many(paths: Sequence[str]) -> list[bytes]:
    """Return objects of one store, asked for side by side.

    Args:
        paths: URIs.

    Returns:
        Their bytes in the same order.

    Raises:
        FileNotFoundError: If one is not there.
    """
    if not paths:
        return []
    first = place(paths[0])
    assert isinstance(first, StorePath)
    files = file_system(first.scheme)
    with _asked(first.parent):
        found = files.cat(list(paths), on_error="raise")
    # fsspec sorts what it was asked for.
    return [found[files._strip_protocol(path)] for path in paths]


def remove_many(paths: Sequence[StorePath]) -> None:
    """Delete objects of one prefix, of which some may not be there, in as few requests as it can.

    Args:
        paths: The objects.

    Raises:
        ServiceUnavailableError: If the store has kept one.
    """
    if not paths:
        return
    folder = paths[0].parent
    with _asked(folder):
        file_system(folder.scheme).rm([str(path) for path in paths])
    # A store answers for a bulk delete as a whole, and s3fs passes over objects that it has kept.
    kept = {path.name for path in paths}.intersection(names_in(folder))
    if kept:
        raise ServiceUnavailableError(
            f"the object store kept {len(kept)} of {len(paths)} objects that it was to delete, "
            f"such as {folder / min(kept)}; see that the credentials allow to delete objects there "
            "(s3:DeleteObject), then run the same command again"
        )


def is_remote(path: "str | Place") -> bool:
    """Return whether a path is the URI of an object."""
    return "://" in path if isinstance(path, str) else isinstance(path, StorePath)


def open_input(path: str) -> str | StoreFile:
    """Return what pyarrow opens: a local path as it is, an object as a file."""
    found = place(path)
    return StoreFile(found) if isinstance(found, StorePath) else path


def dataset_files(paths: Sequence[str]) -> tuple[list[str], Any]:
    """Return paths and the file system to hand to ``pyarrow.dataset``; None: the local one."""
    if not paths or not is_remote(paths[0]):
        return list(paths), None
    files = file_system(paths[0].partition("://")[0])
    return [files._strip_protocol(path) for path in paths], files


@functools.cache
def check_conditional_put(folder: StorePath) -> None:
    """Refuse a store that overwrites where it was asked to create; looked at once per process.

    Args:
        folder: Prefix to put an object at, and delete it again.

    Raises:
        ConfigError: If the second put of one key is not refused.
    """
    probe = folder / f".qarm-probe-{uuid.uuid4().hex}"
    try:
        holds = probe.create(b"first") and not probe.create(b"second")
    finally:
        probe.unlink(missing_ok=True)
    if not holds:
        raise ConfigError(_no_conditional_put(folder))


def _no_conditional_put(path: StorePath) -> str:
    return (
        f"the object store of {path.bucket} does not refuse a put with `If-None-Match: *` where "
        "an object is, and states, locks and rollouts rest upon that; use a store that does (S3, "
        "MinIO, Ceph and others do), or set codebook.uri and offline_store.uri to a mounted folder"
    )


@contextmanager
def _asked(where: StorePath) -> Iterator[None]:
    """Turn what a client raises into our errors; FileNotFoundError is for the caller."""
    try:
        yield
    except FileNotFoundError as error:
        if _code(error) == _NO_BUCKET:
            raise ConfigError(
                f"there is no bucket {where.bucket}; make it, for example with `aws s3 mb "
                f"{where.bucket}`, or correct the URI {where}"
            ) from error
        raise
    except FileExistsError:
        raise
    except PermissionError as error:
        raise ConfigError(
            f"the credentials do not allow to use {where}: {error}; look with `aws s3 ls "
            f"{where.bucket}` and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
        ) from error
    except Exception as error:
        if type(error).__name__ in _NO_CREDENTIALS:
            raise ConfigError(
                f"no credentials for {where}: {error}; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
            ) from error
        if type(error).__name__ == _ILLEGAL_NAME:
            raise ConfigError(f"{where} cannot be the name of an object: {error}") from error
        if not isinstance(error, OSError) and not _is_of_client(error):
            raise
        raise ServiceUnavailableError(
            f"the object store of {where} does not answer: {type(error).__name__}: {error}; see "
            f"that it runs and that AWS_ENDPOINT_URL, if set, is right, then look with `aws s3 ls "
            f"{where.bucket}`"
        ) from error


def _is_of_client(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _CLIENT_PACKAGES


def _code(error: BaseException) -> str:
    """Return the store's own code of an error; empty if it has none."""
    response = getattr(error.__cause__, "response", None) or {}
    code: str = str(response.get("Error", {}).get("Code", ""))
    return code


def _facts(found: dict[str, Any]) -> FileFacts:
    changed = next((found[key] for key in _CHANGED_KEYS if key in found), 0.0)
    seconds = changed if isinstance(changed, int | float) else changed.timestamp()
    return FileFacts(int(found["size"] or 0), float(seconds))

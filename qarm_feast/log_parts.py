"""The files in a log's day folders: names, containers, which of them count, which are damaged.

    part-<uuid>-<crc>.arrow         a small append: an Arrow stream; CRC-32 of the whole file
    part-<uuid>-<crc>.parquet       a large append; CRC-32 of the footer, each page has its own
    merged-<uuid>-<crc>.parquet     what a compaction made of others, sorted
    .<name of a merged part>.replaces     the parts that it stands for, until they are deleted
    .quarantined-<name>             a damaged part, kept for whoever wants to look into it
    .<name>-<uuid>.tmp              being written

A part is complete or absent, and never changes. A merged part and the parts that it stands for
change places in one step, the rename that gives it its name: from then on a listing leaves out
what its ``.replaces`` names. In an object store a part is put whole and has no hidden name before:
the put of a merged part is that one step, and its list is put before it. A small parquet file
costs a reader 0.4 ms whatever is in it, a stream 0.05 ms, hence two containers. Parts without a
checksum in their name, as older releases wrote, are read as they are. May import: pyarrow.
"""

import errno
import io
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from qarm_feast.artifact import replace_file, sync_folder
from qarm_feast.errors import ConfigError, DataError
from qarm_feast.object_store import (
    Entry,
    Place,
    StoreEntry,
    StoreFile,
    StorePath,
    is_remote,
    open_input,
    place,
    read_many,
    scan,
    scan_below,
)
from qarm_feast.observability import OFFLINE_DAMAGED_PARTS

logger = logging.getLogger(__name__)

DAY_PREFIX = "written_date="
PART_PREFIX = "part-"
MERGED_PREFIX = "merged-"
QUARANTINE_PREFIX = ".quarantined-"
TEMPORARY_SUFFIX = ".tmp"
_REPLACES_SUFFIX = ".replaces"
_STREAM, _PARQUET = ".arrow", ".parquet"

LARGE_TABLE_BYTES = 4 * 2**20
"""An append of more is parquet at once: a third of the bytes, and only asked columns are read."""
ROWS_PER_GROUP = 65_536
"""Of a parquet part: what statistics can leave out, and the most that is decoded at a time."""
_STREAMS_PER_BLOCK = 128
"""So many small parts are read at a time, so that columns not asked for are not held for long."""
_LONGEST_LISTING_SECONDS = 3600.0
_PARQUET_MAGIC = b"PAR1"
_FOOTER_TAIL = 8
_CRC_DIGITS = 8


Readable = StoreFile | IO[bytes]
"""An object, or bytes in memory, or a local file, that is open."""


class DamagedPartError(Exception):
    """A file that is not what was written; never leaves this package's readers."""


def write_part(folder: Place, table: pa.Table) -> Place:
    """Write an append; when this returns, its bytes survive a power cut, the folder's may not.

    Args:
        folder: Day folder; made if it is not there.
        table: The rows, in the log's schema.

    Returns:
        Path of the part.
    """
    is_large = table.nbytes > LARGE_TABLE_BYTES
    return _write(folder, PART_PREFIX, table, _PARQUET if is_large else _STREAM, ())


def write_merged(folder: Place, table: pa.Table, replaced: Sequence[str]) -> Place:
    """Write a part that takes the place of others; readers see either it or those.

    1. The part under a hidden name, fsynced, and read back.
    2. The names of what it replaces beside it, which mean nothing yet.
    3. The rename: from here on it counts, and they do not.

    In an object store the first step happens in memory, and the third is the put.

    Args:
        folder: Day folder of all of them.
        table: The rows.
        replaced: Names of the parts whose rows these are.

    Returns:
        Path of the part.

    Raises:
        DataError: If what was written cannot be read back.
    """
    return _write(folder, MERGED_PREFIX, table, _PARQUET, replaced)


def _write(
    folder: Place, prefix: str, table: pa.Table, suffix: str, replaced: Sequence[str]
) -> Place:
    stem = f"{prefix}{uuid.uuid4().hex}"
    if isinstance(folder, StorePath):
        return _put(folder, stem, table, suffix, replaced)
    folder.mkdir(parents=True, exist_ok=True)
    # Dataset readers, Feast's own too, skip names that begin with a dot.
    temporary = folder / f".{stem}{TEMPORARY_SUFFIX}"
    try:
        checksum = (_write_stream if suffix == _STREAM else _write_parquet)(temporary, table)
        part = folder / f"{stem}-{checksum:0{_CRC_DIGITS}x}{suffix}"
        if replaced:
            _read_back(str(temporary), checksum, str(temporary))
            replace_file(replaces_path(part), _with_checksum(replaced))
        os.replace(temporary, part)
    except BaseException:
        # A writer tries again for as long as a disk is full: it must not litter it.
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    return part


def _put(
    folder: StorePath, stem: str, table: pa.Table, suffix: str, replaced: Sequence[str]
) -> StorePath:
    if suffix == _STREAM:
        content = _stream_content(table).to_pybytes()
        checksum = zlib.crc32(content)
    else:
        sink = io.BytesIO()
        _encode_parquet(table, sink)
        content = sink.getvalue()
        checksum = _footer_checksum(sink)
    part = folder / f"{stem}-{checksum:0{_CRC_DIGITS}x}{suffix}"
    if replaced:
        _read_back(io.BytesIO(content), checksum, str(part))
        replace_file(replaces_path(part), _with_checksum(replaced))
    part.put(content)
    return part


def _read_back(source: str | Readable, checksum: int, path: str) -> None:
    """Look at a merged part before what it replaces is given up for it."""
    try:
        _check_parquet(source, checksum)
    except (DamagedPartError, pa.ArrowInvalid, OSError) as error:
        if not is_damage(error):
            raise
        raise DataError(
            f"what was just written to {path} reads back wrong ({error}); check the disk and the "
            "memory of this machine, then run `qarm offline compact` again"
        ) from error


def _stream_content(table: pa.Table) -> pa.Buffer:
    columns = [column.combine_chunks() for column in table.columns]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=table.schema))
    return sink.getvalue()


def _write_stream(path: Path, table: pa.Table) -> int:
    content = _stream_content(table)
    with open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(content))
        os.fsync(file.fileno())
    return zlib.crc32(content)


def _write_all(descriptor: int, content: memoryview) -> None:
    # A nearly full disk takes a part of it; the next call then says why.
    while content:
        content = content[os.write(descriptor, content) :]


def _write_parquet(path: Path, table: pa.Table) -> int:
    with open(path, "wb") as sink:
        _encode_parquet(table, sink)
        sink.flush()
        os.fsync(sink.fileno())
    return _footer_checksum(str(path))


def _encode_parquet(table: pa.Table, sink: IO[bytes]) -> None:
    pq.write_table(
        table,
        sink,
        compression="zstd",
        # Codes hardly repeat within a part: a dictionary makes it larger and slower.
        use_dictionary=False,
        row_group_size=ROWS_PER_GROUP,
        write_page_checksum=True,
    )


def list_parts(log_dir: Place) -> list[str]:
    """Return the paths of the parts that count, oldest day first, the seed among them.

    Entries that come or go while a folder is listed may be missing or stand in it, either of
    which is right as long as a replaced part outlives the time that one listing takes.
    """
    if isinstance(log_dir, StorePath):
        days = scan_days(log_dir)
        return sorted(path for day, entries in days.items() for path in _counting(day, entries))
    return sorted(path for day in list_days(log_dir) for path in list_day(day))


def scan_days(log_dir: StorePath) -> dict[StorePath, list[StoreEntry]]:
    """Return what each day's prefix holds, oldest day first: no request for each day."""
    days: dict[StorePath, list[StoreEntry]] = {}
    for entry in scan_below(log_dir):
        day, _, name = entry.path.removeprefix(f"{log_dir}/").rpartition("/")
        if day.startswith(DAY_PREFIX) and "/" not in day and name:
            days.setdefault(log_dir / day, []).append(entry)
    return days


def _counting(day: StorePath, entries: Sequence[StoreEntry]) -> list[str]:
    """Return the paths of a day's parts that no other one replaces.

    A list is put before its part, yet a listing of many pages may have missed it; of parts put
    long before, a listing shows the list, or there is none any more.
    """
    listed = {entry.name for entry in entries}
    found = {entry.name: entry for entry in entries if is_part(entry.name)}
    long_ago = time.time() - _LONGEST_LISTING_SECONDS
    may_replace = [
        name
        for name, entry in found.items()
        if replaces_path(day / name).name in listed or entry.stat().st_mtime > long_ago
    ]
    return [f"{day}/{name}" for name in found.keys() - _replaced_among(day, may_replace)]


def list_days(log_dir: Place) -> list[str]:
    """Return the paths of a log's day folders, oldest first; none if there is no log."""
    try:
        entries = [entry.path for entry in scan(log_dir)]
    except FileNotFoundError:
        return []
    return sorted(path for path in entries if os.path.basename(path).startswith(DAY_PREFIX))


def list_day(day: str | Place) -> list[str]:
    """Return the paths of the parts of one day that count, in no order; none if it is gone."""
    try:
        found = {entry.name for entry in scan(place(day)) if is_part(entry.name)}
    except FileNotFoundError:
        return []
    return [f"{day}/{name}" for name in found - _replaced_among(place(day), found)]


def list_sizes(day: Place) -> dict[str, int]:
    """Return the size in bytes of each part of one day that counts, by path."""
    found = {entry.name: entry for entry in scan(day) if is_part(entry.name)}
    kept = found.keys() - _replaced_among(day, found)
    return {f"{day}/{name}": size for name in kept if (size := size_in(found[name])) is not None}


def size_in(entry: Entry) -> int | None:
    """Return the size in bytes of what a listing names; None if it is gone by now."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return None


def _replaced_among(day: Place, names: Iterable[str]) -> set[str]:
    replaced: set[str] = set()
    for name in names:
        if name.startswith(MERGED_PREFIX):
            # Looked for by name: a listing may miss an entry that came while it went on.
            replaced |= read_replaced(day / name)
    return replaced


def is_part(name: str) -> bool:
    """Return whether a file name is that of a complete part."""
    return name.startswith((PART_PREFIX, MERGED_PREFIX)) and name.endswith((_STREAM, _PARQUET))


def is_stream(path: str) -> bool:
    """Return whether a part is an Arrow stream."""
    return path.endswith(_STREAM)


def is_part_leftover(name: str) -> bool:
    """Return whether a file is an append that is being written, or was when a kill ended it."""
    return name.startswith(f".{PART_PREFIX}") and name.endswith(TEMPORARY_SUFFIX)


def is_merged_leftover(name: str) -> bool:
    """Return whether a file is a merged part, or its list, that is being written, or was."""
    is_list = f"{_PARQUET}{_REPLACES_SUFFIX}." in name
    return (name.startswith(f".{MERGED_PREFIX}") and name.endswith(TEMPORARY_SUFFIX)) or is_list


def replaces_path(part: Place) -> Place:
    """Return where the names stand that a merged part replaces."""
    return part.with_name(f".{part.name}{_REPLACES_SUFFIX}")


def read_replaced(part: Place) -> frozenset[str]:
    """Return the names that a merged part stands for; empty if they are all deleted.

    If that list is damaged, a warning says so and nothing is replaced: rows may then be read
    twice, which readers and the next compaction put right, but none is lost.
    """
    path = replaces_path(part)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return frozenset()
    checksum, _, names = content.partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(names):
        logger.warning("offline_replaces_damaged path=%s", path)
        return frozenset()
    return frozenset(names.decode().split("\n"))


def _with_checksum(names: Sequence[str]) -> bytes:
    content = "\n".join(names).encode()
    return b"%08x\n" % zlib.crc32(content) + content


def merged_part_of(name: str) -> str | None:
    """Return the name of the merged part whose list a file is; None if it is no such list."""
    is_list = name.startswith(f".{MERGED_PREFIX}") and name.endswith(_REPLACES_SUFFIX)
    return name[1 : -len(_REPLACES_SUFFIX)] if is_list else None


def read_parts(
    paths: Sequence[str],
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    where: pads.Expression | None = None,
) -> pa.Table:
    """Return the rows of some parts, in the order of streams, then parquet files.

    Args:
        paths: Parts.
        schema: The log's.
        columns: Columns to read; None: all.
        where: Filter on the log's columns.

    Returns:
        The rows.

    Raises:
        DamagedPartError: If a checksum does not hold.
        FileNotFoundError: If a part is not there.
        OSError: If a file cannot be read, or its content makes no sense.
        pa.ArrowInvalid: If its content makes no sense.
    """
    streams = [path for path in paths if is_stream(path)]
    files = [path for path in paths if not is_stream(path)]
    chunks = _read_streams(streams, schema, columns, where)
    opened = [open_input(path) for path in files]
    for path, source in zip(files, opened, strict=True):
        _check_footer(path, source)
    tables = [*chunks, _dataset(opened, schema).to_table(columns=columns, filter=where)]
    return pa.concat_tables(tables)


def read_row_group(path: str, number: int, columns: Sequence[str]) -> pa.Table:
    """Return some columns of one row group of a parquet part.

    Args:
        path: The part.
        number: Which group, from 0.
        columns: Columns to read.

    Returns:
        Its rows.

    Raises:
        DamagedPartError: If a checksum does not hold.
        FileNotFoundError: If the part is not there.
        OSError: If it cannot be read, or its content makes no sense.
        pa.ArrowInvalid: If its content makes no sense.
    """
    source = open_input(path)
    _check_footer(path, source)
    with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False) as file:
        rows: pa.Table = file.read_row_group(number, columns=list(columns))
    return rows


def _dataset(sources: Sequence[str | StoreFile], schema: pa.Schema) -> pads.Dataset:
    options = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
    parquet = pads.ParquetFileFormat(default_fragment_scan_options=options)
    if not sources or isinstance(sources[0], str):
        return pads.dataset(list(sources), schema=schema, format=parquet)
    fragments = [parquet.make_fragment(pa.PythonFile(source, mode="r")) for source in sources]
    return pads.FileSystemDataset(fragments, schema, parquet)


def _read_streams(
    paths: Sequence[str],
    schema: pa.Schema,
    columns: Sequence[str] | None,
    where: pads.Expression | None,
) -> list[pa.Table]:
    wanted = schema.names if columns is None else list(columns)

    # A part holds the log's schema, then one batch: not parsing the former again is a third of
    # the time.
    head = schema.serialize().to_pybytes()

    def read_block(first: int) -> pa.Table:
        contents = _read_all_verified(paths[first : first + _STREAMS_PER_BLOCK])
        batches = [batch for content in contents for batch in _decode(content, head, schema)]
        # One chunk: whatever is done with thousands of small ones takes as long as reading them.
        table = pa.Table.from_batches(batches, schema)
        if where is None:
            return table.select(wanted).combine_chunks()
        return table.combine_chunks().filter(where).select(wanted)

    blocks = range(0, len(paths), _STREAMS_PER_BLOCK)
    with ThreadPoolExecutor(pa.cpu_count()) as pool:
        return list(pool.map(read_block, blocks))


def _read_all_verified(paths: Sequence[str]) -> list[bytes]:
    if not is_remote(paths[0]):
        return [_read_verified(path) for path in paths]
    contents = read_many(paths)
    for path, content in zip(paths, contents, strict=True):
        _expect(zlib.crc32(content), _named_checksum(path), path)
    return contents


def _read_verified(path: str) -> bytes:
    if is_remote(path):
        return _read_all_verified([path])[0]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        content = os.read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
    _expect(zlib.crc32(content), _named_checksum(path), path)
    return content


def _decode(content: bytes, head: bytes, schema: pa.Schema) -> list[pa.RecordBatch]:
    if content.startswith(head):
        message = pa.ipc.read_message(pa.py_buffer(content)[len(head) :])
        if message.type == "record batch":
            return [pa.ipc.read_record_batch(message, schema)]
    # Dictionaries come before the batch; another release of pyarrow may spell a schema otherwise.
    return list(pa.ipc.open_stream(content))


def find_damage(path: str | Place) -> str | None:
    """Return what is wrong with a part, every byte of it looked at; None if nothing is.

    Args:
        path: A part, or one in quarantine.

    Returns:
        The reason in words.

    Raises:
        FileNotFoundError: If it is not there.
        OSError: If the system cannot read it, which says nothing about its content.
    """
    name = str(path)
    try:
        if is_stream(name):
            pa.ipc.open_stream(_read_verified(name)).read_all().validate(full=True)
        else:
            _check_parquet(open_input(name), _named_checksum(name))
    except Exception as error:
        if not is_damage(error):
            raise
        return " ".join(str(error).split())
    return None


def is_damage(error: Exception) -> bool:
    """Return whether an error of a reader is about a file's content, not about the system."""
    # pyarrow tells what it cannot decode as an OSError as well, but one without a number.
    is_content = type(error) is OSError and error.errno is None
    return is_content or isinstance(error, DamagedPartError | pa.ArrowInvalid)


def is_gone(error: Exception) -> bool:
    """Return whether an error says that a part was deleted, on a network mount while open."""
    # pyarrow raises some of the first kind without a number.
    is_stale = isinstance(error, OSError) and error.errno == errno.ESTALE
    return is_stale or isinstance(error, FileNotFoundError)


def unpacked_bytes(path: str) -> int:
    """Return about how many bytes the rows of a part take in memory.

    Args:
        path: A part.

    Returns:
        Those of the Arrow stream, or of the parquet pages before compression.

    Raises:
        FileNotFoundError: If it is not there.
        OSError: If its footer cannot be read, or makes no sense.
        pa.ArrowInvalid: If its footer makes no sense.
    """
    if is_stream(path):
        return place(path).stat().st_size
    footer = pq.read_metadata(open_input(path))
    return sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))


def read_schema(path: str) -> pa.Schema:
    """Return the schema of a sound part."""
    if is_stream(path):
        return pa.ipc.open_stream(_read_verified(path)).schema
    return pq.read_schema(open_input(path)).remove_metadata()


def _check_parquet(source: str | Readable, checksum: int | None) -> None:
    if checksum is not None:
        _expect(_footer_checksum(source), checksum, str(source))
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        num_rows = sum(batch.num_rows for batch in file.iter_batches())
        if num_rows != file.metadata.num_rows:
            raise DamagedPartError(f"{num_rows} rows, its footer says {file.metadata.num_rows}")


def _check_footer(path: str, source: str | StoreFile) -> None:
    checksum = _named_checksum(path)
    if checksum is not None:
        _expect(_footer_checksum(source), checksum, path)


def _footer_checksum(source: str | Readable) -> int:
    if isinstance(source, str):
        with open(source, "rb") as file:
            return _footer_checksum(file)
    size = source.seek(0, os.SEEK_END)
    source.seek(max(0, size - _FOOTER_TAIL))
    tail = source.read()
    num_bytes = int.from_bytes(tail[:4], "little") + _FOOTER_TAIL
    if tail[4:] != _PARQUET_MAGIC or num_bytes > size:
        raise DamagedPartError(f"its {size} bytes do not end in a parquet footer")
    source.seek(size - num_bytes)
    return zlib.crc32(source.read())


def _named_checksum(path: str) -> int | None:
    """Return the checksum that a part's name ends in; None for a name without one."""
    digits = os.path.basename(path).rpartition(".")[0].rpartition("-")[2]
    if len(digits) != _CRC_DIGITS:
        return None
    return int(digits, 16)


def _expect(found: int, named: int | None, path: str) -> None:
    if found != named:
        said = "none" if named is None else f"{named:08x}"
        raise DamagedPartError(f"CRC-32 {found:08x} where the name says {said}")


def quarantine(path: str, reason: str) -> bool:
    """Move a damaged part out of every reader's sight, and say so.

    Args:
        path: The part.
        reason: What is wrong with it.

    Returns:
        Whether it was moved, by whichever process; False if this one may not write there.
    """
    target = f"{os.path.dirname(path)}/{QUARANTINE_PREFIX}{os.path.basename(path)}"
    OFFLINE_DAMAGED_PARTS.inc()
    try:
        _move(path, target)
    except FileNotFoundError:
        return True
    except (OSError, ConfigError) as error:
        logger.warning("offline_part_left_out path=%s reason=%r error=%r", path, reason, str(error))
        return False
    # An error: unless the parts that it was merged of are still there, its rows are lost.
    logger.error("offline_part_quarantined path=%s reason=%r", target, reason)
    return True


def _move(path: str, target: str) -> None:
    source, end = place(path), place(target)
    if isinstance(source, StorePath) and isinstance(end, StorePath):
        source.move(end)
    else:
        os.rename(path, target)


def set_aside_damaged(paths: Sequence[str]) -> set[str]:
    """Look through all parts, quarantine those that are damaged, and return them.

    Args:
        paths: Parts.

    Returns:
        The damaged ones, which are still in their place where this process may not write, and
        those that are gone by now, which another process may have set aside.
    """
    damaged = set()
    for path in paths:
        try:
            reason = find_damage(path)
        except OSError as error:
            if not is_gone(error):
                raise
            damaged.add(path)
            continue
        if reason is not None:
            quarantine(path, reason)
            damaged.add(path)
    return damaged


def list_quarantined(log_dir: Place) -> list[str]:
    """Return the paths of a log's damaged parts."""
    return [
        entry.path
        for day in list_days(log_dir)
        for entry in sorted(scan(place(day)), key=lambda entry: entry.name)
        if entry.name.startswith(QUARANTINE_PREFIX)
    ]

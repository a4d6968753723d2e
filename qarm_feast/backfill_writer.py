"""One piece of a backfill: read, encode as the stream does, write offline, then online.

A writer knows nothing of the other pieces, so one process may write them all, or many some each.
Shape letters in this file: N rows, D embedding width.
May import: feast, pyarrow, the codebook, the encoder.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import load_encoder, read_encoder_manifest
from qarm_feast.backfill_parts import (
    CataloguePiece,
    LogPiece,
    read_catalogue_piece,
    read_log_piece,
)
from qarm_feast.code_log import left_out_after
from qarm_feast.codebook import Codebook, QuantizerConfig
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.encode import (
    CONTENT_HASH,
    content_hashes,
    encode_items,
    newest_per_item,
    takedown_rows,
)
from qarm_feast.errors import DataError
from qarm_feast.feature_views import reads_aligned_vectors
from qarm_feast.input_data import (
    CONTENT_COLUMNS,
    EMBEDDING,
    UPLOAD_TIMESTAMP,
    DataConfig,
    embedding_matrix,
    plain_strings,
)
from qarm_feast.item_vectors import EncodedItems, Encoder, RefusedItems, vector_rows, vectors_of
from qarm_feast.log_parts import DamagedPartError
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    CODE_ROWS,
    CONTENT_BINARY_COLUMNS,
    CONTENT_LOG_ROWS,
    CONTENT_TEXT_COLUMNS,
    CREATED,
    EVENT_TIMESTAMP,
    ITEM_ID,
    TIMESTAMP,
    code_view_name,
    vector_view_name,
)

Piece = LogPiece | CataloguePiece

_ENCODER_VERSION = "encoder_version"
_IS_DELETED = "is_deleted"
_ROWS_AT_ONCE = 8192
"""Rows that are encoded at a time; codes do not depend on it, memory does."""


@dataclass(frozen=True)
class BackfillJob:
    """What every piece has in common."""

    config_path: str
    codebook_version: str


@dataclass
class BackfillCounts:
    """What a backfill did.

    Of ``num_log_rows`` (content events, each once) and ``num_catalogue_rows``, ``num_requantized``
    had a vector of the codebook's encoder, ``num_reencoded`` were encoded from content,
    ``num_deleted`` are takedowns, and ``num_refused`` (by reason) have no codes: neither a vector
    nor content that the encoder reads. ``num_online_changes`` are rows that were newer than what
    the online store held.
    """

    num_pieces: int = 0
    num_log_rows: int = 0
    num_catalogue_rows: int = 0
    num_requantized: int = 0
    num_reencoded: int = 0
    num_deleted: int = 0
    num_online_changes: int = 0
    num_damaged_parts: int = 0
    num_refused: Counter[str] = field(default_factory=Counter)

    @property
    def num_code_rows(self) -> int:
        """Rows written offline."""
        return self.num_requantized + self.num_reencoded + self.num_deleted

    def add(self, other: "BackfillCounts") -> None:
        """Add another piece's counts to these.

        Args:
            other: Counts of rows that are not among these.
        """
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))

    def __str__(self) -> str:
        """Return ``name=value`` pairs, as log lines have them."""
        numbers = {each.name: getattr(self, each.name) for each in fields(self)}
        refused = numbers.pop("num_refused")
        numbers |= {f"num_refused_{reason}": count for reason, count in sorted(refused.items())}
        return " ".join(f"{name}={value}" for name, value in numbers.items())


@dataclass(frozen=True)
class Refusal:
    """Rows of a piece that got no codes."""

    reason: str
    count: int
    first_item_id: int
    detail: str


@dataclass(frozen=True)
class PieceResult:
    """What came of a piece.

    ``num_rows`` is the piece's size. Where a part was gone or damaged nothing is written:
    ``is_cut``, and ``left_out`` are the damaged ones.
    """

    num_rows: int
    finished: tuple[str, ...] = ()
    counts: BackfillCounts = field(default_factory=BackfillCounts)
    refusals: tuple[Refusal, ...] = ()
    is_cut: bool = False
    left_out: frozenset[str] = frozenset()


class PieceWriter:
    """Writes the code rows of pieces into both stores.

    Args:
        job: What to write.
        clock: Aware time of a row's writing.

    Raises:
        CodebookError: If the codebook is not there or damaged.
        ConfigError: If ``feast apply`` has not run.
    """

    def __init__(
        self, job: BackfillJob, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        feature_store = open_feature_store(Path(job.config_path).resolve().parent)
        uri = load_section(job.config_path, "codebook", CodebookConfig).uri
        placement = load_section(job.config_path, "quantizer", QuantizerConfig).placement
        self._job = job
        self._clock = clock
        self._view = code_view_name(job.codebook_version)
        self._log = open_code_log(feature_store.config)
        self._online = FeastOnlineTables(feature_store)
        self._codebook = Codebook.load(uri, job.codebook_version, placement)
        self._encoder_uri = load_section(job.config_path, "alignment", AlignmentConfig).encoder_uri
        # Only a catalogue names files; what an event names comes as bytes, and is not opened.
        self._media_dir = Path(load_section(job.config_path, "data", DataConfig).input_dir)
        self._encoder: Encoder | None = None
        self._enable_vectors = reads_aligned_vectors(job.config_path)

    def write(self, piece: Piece) -> PieceResult:
        """Encode one piece and write it offline, then online.

        Args:
            piece: The piece.

        Returns:
            Counts, and the names that are done for good.

        Raises:
            DataError: If the encoder is needed and missing, or a vector has no code.
            ServiceUnavailableError: If the online store does not answer.
        """
        if isinstance(piece, CataloguePiece):
            return self._write_catalogue(piece)
        try:
            rows = read_log_piece(piece)
        except (DamagedPartError, pa.ArrowInvalid, OSError) as error:
            left_out = left_out_after(error, piece.paths)
            return PieceResult(piece.num_rows, is_cut=True, left_out=frozenset(left_out))
        counts = BackfillCounts(num_pieces=1, num_log_rows=rows.num_rows)
        refusals = self._write_rows(rows, self._log_vectors, counts)
        return PieceResult(piece.num_rows, piece.finished, counts, tuple(refusals))

    def _write_catalogue(self, piece: CataloguePiece) -> PieceResult:
        rows = _read_catalogue(piece)
        counts = BackfillCounts(num_pieces=1, num_catalogue_rows=rows.num_rows)
        refusals = self._write_rows(rows, self._catalogue_vectors, counts)
        return PieceResult(piece.num_rows, (), counts, tuple(refusals))

    def _write_rows(
        self,
        rows: pa.Table,
        vectors: Callable[[pa.Table], tuple[EncodedItems, list[RefusedItems]]],
        counts: BackfillCounts,
    ) -> list[Refusal]:
        tables: list[pa.Table] = []
        vector_tables: list[pa.Table] = []
        refusals: list[Refusal] = []
        for start in range(0, rows.num_rows, _ROWS_AT_ONCE):
            some = rows.slice(start, _ROWS_AT_ONCE)
            encoded, refused = vectors(some)
            tables += self._code_rows(some, encoded, counts)
            if self._enable_vectors:
                vector_tables.append(vector_rows(some, encoded, self._clock()))
            refusals += _refusals(some, refused)
        for refusal in refusals:
            counts.num_refused[refusal.reason] += refusal.count
        codes = pa.concat_tables([CODE_ROWS.empty_table(), *tables])
        if codes.num_rows:
            # Now, not at the start: encoding may have taken minutes, in which nobody was served
            # these rows, and `qarm audit` goes by it.
            codes = _created_at(codes, self._clock())
            self._log.append(self._view, codes)
            self._write_vectors(vector_tables)
            # Only then: what is online can be materialized again from the log, never back.
            counts.num_online_changes = self._online.write(self._view, newest_per_item(codes))
        return refusals

    def _write_vectors(self, tables: Sequence[pa.Table]) -> None:
        if not tables:
            return
        view = vector_view_name(self._codebook.manifest.encoder_version)
        rows = _created_at(pa.concat_tables(tables), self._clock())
        self._log.append(view, rows)
        self._online.write(view, newest_per_item(rows))

    def _code_rows(
        self, rows: pa.Table, encoded: EncodedItems, counts: BackfillCounts
    ) -> list[pa.Table]:
        """Return the rows of uploads and of takedowns, and count them."""
        version, created = self._job.codebook_version, self._clock()
        takedowns = rows.filter(rows[_IS_DELETED])
        uploads = rows.take(pa.array(encoded.positions_N))
        is_own = pc.equal(uploads[_ENCODER_VERSION], encoded.encoder_version)
        num_own = pc.sum(is_own, min_count=0).as_py()
        counts.num_requantized += num_own
        counts.num_reencoded += uploads.num_rows - num_own
        counts.num_deleted += takedowns.num_rows
        codes = encode_items(
            uploads,
            encoded.vectors_ND,
            {version: self._codebook},
            encoded.encoder_version,
            created,
        )
        return [codes[version], takedown_rows(takedowns, self._codebook, created)]

    def _log_vectors(self, rows: pa.Table) -> tuple[EncodedItems, list[RefusedItems]]:
        manifest = self._codebook.manifest
        rows = with_content(rows, manifest.encoder_version)
        return vectors_of(
            rows, manifest.encoder_version, manifest.embedding_dim, self._load_encoder
        )

    def _catalogue_vectors(self, rows: pa.Table) -> tuple[EncodedItems, list[RefusedItems]]:
        """Encode from content, or of an encoder that reads ready vectors from these as well."""
        version = self._codebook.manifest.encoder_version
        if EMBEDDING not in rows.column_names or not self._reads_vectors():
            rows = _without_vectors(rows)
            return vectors_of(
                rows, version, self._codebook.manifest.embedding_dim, self._load_encoder
            )
        encoder = self._load_encoder(version)
        columns = [name for name in encoder.content_columns if name in rows.column_names]
        vectors_ND = encoder.encode(rows.select(columns))
        return EncodedItems(version, np.arange(rows.num_rows), vectors_ND), []

    def _reads_vectors(self) -> bool:
        version = self._codebook.manifest.encoder_version
        with _naming_the_need(self._job):
            return EMBEDDING in read_encoder_manifest(self._encoder_uri, version).modalities

    def _load_encoder(self, version: str) -> Encoder:
        if self._encoder is None:
            with _naming_the_need(self._job):
                self._encoder = load_encoder(self._encoder_uri, version, self._media_dir)
        return self._encoder


def _created_at(codes: pa.Table, created: datetime) -> pa.Table:
    times = pa.repeat(pa.scalar(created, TIMESTAMP), codes.num_rows)
    return codes.set_column(codes.column_names.index(CREATED), codes.schema.field(CREATED), times)


@contextmanager
def _naming_the_need(job: BackfillJob) -> Iterator[None]:
    """Say in the error of a missing encoder why one is needed."""
    try:
        yield
    except DataError as error:
        raise DataError(
            f"rows without a vector of its encoder must be encoded for codebook "
            f"{job.codebook_version!r}, and {error}; or put back a copy of the artifact, then run "
            f"`qarm codebook backfill --codebook-version {job.codebook_version}` again"
        ) from error


def with_content(rows: pa.Table, encoder_version: str) -> pa.Table:
    """Return rows of the content log with the content columns as a worker sees them.

    Args:
        rows: Rows of ``schema.CONTENT_LOG_ROWS``, maybe without ``content``.
        encoder_version: Of a row with its vector nothing is taken out of the JSON.

    Returns:
        The rows, and behind them texts, and bytes of pictures and sounds.
    """
    contents: list[dict[str, Any]] = [{}] * rows.num_rows
    if "content" in rows.column_names:
        is_own = pc.fill_null(pc.equal(rows[_ENCODER_VERSION], encoder_version), False)
        is_read = pc.invert(pc.or_(is_own, rows[_IS_DELETED])).to_pylist()
        contents = [
            json.loads(content) if wanted and content else {}
            for wanted, content in zip(is_read, rows["content"].to_pylist(), strict=True)
        ]
    for name in CONTENT_TEXT_COLUMNS:
        texts = pa.array([content.get(name) for content in contents], pa.string())
        rows = rows.append_column(name, texts)
    for name in CONTENT_BINARY_COLUMNS:
        files = pa.array([_file_bytes(content.get(name)) for content in contents], pa.binary())
        rows = rows.append_column(name, files)
    return rows


def _file_bytes(value: str | dict[str, str] | None) -> bytes | None:
    """Return what the content log's JSON holds of a picture or sound: a file, or a URI."""
    if isinstance(value, dict):
        return base64.b64decode(value["base64"])
    return None if value is None else value.encode()


def _read_catalogue(piece: CataloguePiece) -> pa.Table:
    """Return a piece as content events: an item's event is its upload."""
    names = pq.read_schema(piece.path).names
    content = [name for name in CONTENT_COLUMNS if name in names]
    try:
        rows = plain_strings(
            read_catalogue_piece(piece, [ITEM_ID, UPLOAD_TIMESTAMP, *content])
        ).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"row group {piece.row_group} of {piece.path} cannot be read: {error}; put back a "
            "copy of the file, then run `qarm check-data`"
        ) from error
    if EMBEDDING in content:
        _check_vectors(rows, piece)
    columns = {name: rows[name] for name in content}
    for name in CONTENT_TEXT_COLUMNS:
        columns.setdefault(name, pa.nulls(rows.num_rows, pa.string()))
    columns |= {
        ITEM_ID: rows[ITEM_ID],
        EVENT_TIMESTAMP: rows[UPLOAD_TIMESTAMP],
        CONTENT_HASH: pa.array(content_hashes(rows.select(content)), pa.string()),
        _IS_DELETED: pa.repeat(pa.scalar(False), rows.num_rows),
        _ENCODER_VERSION: pa.nulls(rows.num_rows, pa.string()),
    }
    return pa.table(columns)


def _check_vectors(rows: pa.Table, piece: CataloguePiece) -> None:
    is_bad_N = ~np.isfinite(embedding_matrix(rows[EMBEDDING])).all(axis=1)
    if any(name in rows.column_names for name in CONTENT_COLUMNS if name != EMBEDDING):
        # An item that has other content may lack a vector.
        is_bad_N &= rows[EMBEDDING].is_valid().to_numpy()
    if is_bad_N.any():
        item_id = rows[ITEM_ID][int(is_bad_N.argmax())]
        raise DataError(
            f"{piece.path}, column {EMBEDDING!r}: {int(is_bad_N.sum())} vector(s) in row group "
            f"{piece.row_group} are null or hold NaN or infinity, the first is of item {item_id}; "
            "run `qarm check-data`"
        )


def _without_vectors(rows: pa.Table) -> pa.Table:
    """Leave out vectors that no aligned encoder has made."""
    if EMBEDDING in rows.column_names:
        rows = rows.drop_columns([EMBEDDING])
    kind = CONTENT_LOG_ROWS.field(EMBEDDING).type
    return rows.append_column(EMBEDDING, pa.nulls(rows.num_rows, kind))


def _refusals(rows: pa.Table, refused: Sequence[RefusedItems]) -> list[Refusal]:
    item_ids_N = rows[ITEM_ID].to_numpy()
    return [
        Refusal(reason, len(positions_N), int(item_ids_N[positions_N[0]]), detail)
        for positions_N, reason, detail in refused
        if len(positions_N)
    ]

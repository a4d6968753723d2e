"""A repository whose content log was written as a worker writes it, small enough to check.

Shape letters in this file: N rows, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from qarm_feast.alignment.backbones.ready import ReadyVectors
from qarm_feast.alignment.encoder import EncoderManifest, ItemEncoder, backbone_manifests
from qarm_feast.alignment.fusion import AlignmentHead, FusionSizes
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook
from qarm_feast.feature_views import item_code_view
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_tables import FeastOnlineTables
from qarm_feast.reader import CodeReader
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import CONTENT_LOG, CONTENT_TEXT_COLUMNS, TIMESTAMP, code_view_name
from qarm_feast.source_rows import FeatureRows, TimeRange
from streaming.columns import decode_items
from streaming.messages import ItemEvent, encode_item_event
from streaming.rows import LiveCodebooks, content_log_rows, encode_rows, hash_rows, quantize_rows
from tests.stream_repo import EMBEDDING_DIM, ENCODER_VERSION, START, StreamRepo

TOPIC = "item-events"
WRITTEN = datetime(2024, 6, 1, tzinfo=UTC)
CODE_COLUMNS = ("rq_code", "vq_code", "encoder_version", "content_hash", "is_deleted")


@dataclass(frozen=True)
class LoggedRecord:
    """A Kafka record as the worker sees it."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    partition: int
    offset: int
    topic: str = TOPIC
    timestamp: int = START // 1000 + 10**9


class TitleEncoder:
    """Encoder e2: a title gives the same vector every time."""

    content_columns = CONTENT_TEXT_COLUMNS

    def encode(self, items: pa.Table) -> np.ndarray:
        titles = items["title"].to_pylist()
        rows = [np.random.default_rng(len(t or "")).standard_normal(EMBEDDING_DIM) for t in titles]
        return np.array(rows, dtype=np.float32).reshape(-1, EMBEDDING_DIM)


def upload(
    item_id: int, minute: int = 0, title: str | None = None, seed: int | None = None
) -> ItemEvent:
    """An upload or edit with a ready vector of encoder e1, so many minutes after the start."""
    content = {} if title is None else {"title": title}
    x_D = np.random.default_rng(item_id + 1000 * minute).standard_normal(EMBEDDING_DIM)
    time = START + minute * 60_000_000
    return ItemEvent(item_id, time, content, x_D.astype(np.float32), ENCODER_VERSION)


def takedown(item_id: int, minute: int) -> ItemEvent:
    """The item goes, so many minutes after the start."""
    return ItemEvent(item_id, START + minute * 60_000_000, {}, is_deleted=True)


@dataclass
class LoggedStream:
    """Writes a content log as workers do, and remembers what they make of it.

    Args:
        repo: The repository.
        codebooks: By version; the first is the default.
    """

    repo: StreamRepo
    codebooks: Mapping[str, Codebook]
    codes: dict[str, list[pa.Table]] = field(default_factory=dict)
    next_offsets: dict[int, int] = field(default_factory=dict)

    def log(self, *events: ItemEvent, partition: int = 0) -> Path:
        """Append one batch to the content log; no code row is written anywhere."""
        first = self.next_offsets.get(partition, 0)
        self.next_offsets[partition] = first + len(events)
        messages = [encode_item_event(event) for event in events]
        records = [
            LoggedRecord(each.key, each.value, each.headers, partition, first + number)
            for number, each in enumerate(messages)
        ]
        rows = hash_rows(decode_items(records).rows)
        live = LiveCodebooks(self.codebooks, lambda version: TitleEncoder())
        encoded, _ = encode_rows(records, rows, live)
        for version, table in quantize_rows(rows, encoded, live, WRITTEN).items():
            self.codes.setdefault(version, []).append(table)
        content = content_log_rows(records, rows, encoded, WRITTEN)
        return code_log(self.repo).append(CONTENT_LOG, content, written_at=WRITTEN)

    def rows(self, version: str) -> dict[tuple[int, int, str], dict[str, Any]]:
        """The code rows that the stream would have written, by key."""
        return by_key(pa.concat_tables(self.codes[version]))


def code_log(repo: StreamRepo) -> CodeLog:
    """The repository's offline log."""
    return open_code_log(open_feature_store(repo.directory).config)


def offline_rows(repo: StreamRepo, version: str) -> dict[tuple[int, int, str], dict[str, Any]]:
    """The code rows that readers of the offline store see, by key."""
    path = code_log(repo).root / code_view_name(version)
    tags = item_code_view(version, None, "data/offline").tags
    columns = ["item_id", *CODE_COLUMNS]
    table = FeatureRows(path, "event_timestamp", "created", tags).all(columns, TimeRange())
    return by_key(table)


def by_key(codes: pa.Table) -> dict[tuple[int, int, str], dict[str, Any]]:
    """Code columns by (item, microseconds, content hash)."""
    times = codes["event_timestamp"].cast(pa.int64()).to_pylist()
    rows = zip(codes.to_pylist(), times, strict=True)
    return {
        (row["item_id"], time, row["content_hash"]): {name: row[name] for name in CODE_COLUMNS}
        for row, time in rows
    }


def newest(rows: Mapping[tuple[int, int, str], dict[str, Any]]) -> dict[int, list[int] | None]:
    """The RQ code of each item's greatest row; None for one that was taken down."""
    last = {key[0]: rows[key] for key in sorted(rows)}
    return {item: None if row["is_deleted"] else row["rq_code"] for item, row in last.items()}


def online_codes(repo: StreamRepo, version: str, *item_ids: int) -> dict[int, list[int] | None]:
    """The RQ codes that a ranker reads; None where there is none."""
    reader = CodeReader(open_feature_store(repo.directory), version)
    codes, is_present_N = reader.read_codes(np.array(item_ids, dtype=np.int64))
    rows = zip(item_ids, codes.rq_NL.tolist(), is_present_N, strict=True)
    return {item: code if present else None for item, code, present in rows}


def write_online(repo: StreamRepo, version: str, codes: pa.Table) -> None:
    """Do what a worker does with rows of a live version."""
    tables = FeastOnlineTables(open_feature_store(repo.directory))
    tables.write(code_view_name(version), codes)


def write_catalogue(repo: StreamRepo, **columns: Any) -> Path:
    """Write items.parquet; every upload is at the start unless columns say otherwise."""
    num_items = len(columns["item_id"])
    given = {"upload_timestamp": pa.array([START] * num_items, pa.int64()).cast(TIMESTAMP)}
    path = repo.directory / "data" / "input" / "items.parquet"
    pq.write_table(pa.table(given | columns), path)
    return path


def save_vector_encoder(uri: Path) -> ItemEncoder:
    """Encoder e2 of ready vectors of up to 16 numbers."""
    backbones = {"embedding": ReadyVectors(16)}
    manifest = EncoderManifest(
        version="e2",
        embedding_dim=EMBEDDING_DIM,
        backbones=backbone_manifests(backbones),
        fusion=FusionSizes(hidden_dim=16),
        behaviour_cutoff=WRITTEN,
        created=WRITTEN,
        training={},
        files={},
    )
    torch.manual_seed(0)
    encoder = ItemEncoder(
        manifest, AlignmentHead({"embedding": (1, 16)}, EMBEDDING_DIM, 16).eval(), backbones
    )
    encoder.save(str(uri))
    return encoder

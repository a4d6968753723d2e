"""Records, a codebook and an encoder small enough to check by hand."""

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from qarm_feast.codebook import ItemCodes
from qarm_feast.schema import CONTENT_TEXT_COLUMNS
from streaming.messages import SCHEMA_VERSION, SCHEMA_VERSION_HEADER, Message
from streaming.rows import LiveCodebooks

NOW_MS = 1_700_000_000_000
"""Append time of every fake record."""
NOW = NOW_MS * 1000
VERSIONED = [(SCHEMA_VERSION_HEADER, SCHEMA_VERSION)]


@dataclass(frozen=True)
class FakeRecord:
    key: bytes | None = None
    value: bytes | None = None
    headers: Sequence[tuple[str, bytes | None]] = field(default_factory=lambda: list(VERSIONED))
    topic: str = "items"
    partition: int = 0
    offset: int = 0
    timestamp: int = NOW_MS


def record_of(message: Message, topic: str = "items", offset: int = 0) -> FakeRecord:
    return FakeRecord(message.key, message.value, message.headers, topic, 0, offset)


@dataclass(frozen=True)
class FakeManifest:
    encoder_version: str
    num_levels: int = 2
    num_neighbors: int = 3


class SignCodebook:
    """RQ code: the signs of the first two numbers; VQ code: the item id three times."""

    embedding_dim = 2
    training = None

    def __init__(self, encoder_version: str = "e1") -> None:
        self.manifest = FakeManifest(encoder_version)

    def encode(
        self, item_ids_N: np.ndarray, content_hashes_N: Sequence[str], x_ND: np.ndarray
    ) -> ItemCodes:
        assert len(content_hashes_N) == len(item_ids_N) == len(x_ND)
        vq_NV = np.repeat(item_ids_N[:, None], 3, axis=1)
        return ItemCodes(item_ids_N, vq_NV, (x_ND[:, :2] > 0).astype(np.int64))


@dataclass
class FixedCodebooks:
    """The codebooks of a worker, changed by hand."""

    live: LiveCodebooks
    lagging_versions: list[list[str]] = field(default_factory=list)
    stopped_versions: set[str] = field(default_factory=set)

    def current(self) -> LiveCodebooks:
        return self.live

    def lagging(self, acknowledged: Iterable[str]) -> list[str]:
        return self.lagging_versions.pop(0) if self.lagging_versions else []

    def stopped(self, versions: Iterable[str]) -> set[str]:
        return self.stopped_versions & set(versions)


class TitleEncoder:
    """The vector of a title is (its length, -1)."""

    content_columns = CONTENT_TEXT_COLUMNS

    def encode(self, items: pa.Table) -> np.ndarray:
        lengths = [len(title or "") for title in items["title"].to_pylist()]
        return np.array([[length, -1.0] for length in lengths], dtype=np.float32)


def png_of(width: int, height: int, pixels: bytes | None = None) -> bytes:
    """A grey PNG; by default with as many pixel bytes as its header says."""
    rows = bytes((1 + width) * height) if pixels is None else pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    framed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def peak_bytes() -> int:
    """The most memory that this process has had; rusage would tell of its parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

"""What readers served, by sampling: (item, codebook version, hash of the codes), for `qarm audit`.

A reader offers each answer; a share of its items is put into a buffer, and a thread writes the
buffer as one part of ``served_code_log`` in the offline log at intervals. So the caller waits for
no disk. A buffer that is full, or a log that cannot be written, costs sampled rows and nothing
else: they are counted as dropped. May import: numpy, pyarrow, the log.

Shape letters in this file: N items, L levels, V pool neighbours.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import ItemCodes
from qarm_feast.config import Section, load_section
from qarm_feast.errors import DataError
from qarm_feast.observability import SERVING_LOG_ROWS
from qarm_feast.schema import ABSENT_CODE, SERVED_CODE_LOG, SERVED_CODE_ROWS, TIMESTAMP

if TYPE_CHECKING:
    from feast.repo_config import RepoConfig

logger = logging.getLogger(__name__)

_HASH_BYTES = 16
NO_CODES = ""
"""Hash of an item that has no codes."""


class ServingLogConfig(Section):
    """Section ``serving_log``: which share of what is served is kept for `qarm audit`."""

    sample_rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of served items that is logged; 0: none."
    )
    max_buffered_rows: int = Field(
        default=100_000, gt=0, description="Rows that wait for the disk at most; more are dropped."
    )
    flush_seconds: float = Field(default=60.0, gt=0, description="Time between two parts.")


@dataclass(frozen=True)
class _Sample:
    codebook_version: str
    codes: ItemCodes
    served_at: datetime


class ServingLog:
    """Samples answers and writes them in the background; threads may share one.

    Args:
        log: The offline logs.
        config: Rate and bounds.
        seed: Of the sampling; None: another one each time.
        clock: Aware time of an answer.
    """

    def __init__(
        self,
        log: CodeLog,
        config: ServingLogConfig,
        seed: int | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._log = log
        self._config = config
        self._rng = np.random.default_rng(seed)
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: list[_Sample] = []
        self._num_buffered = 0
        self._is_closing = threading.Event()
        self._writer = threading.Thread(target=self._run, name="serving-log", daemon=True)
        self._writer.start()

    def offer(self, codebook_version: str, codes: ItemCodes) -> None:
        """Sample an answer that was just read; returns without waiting for the disk.

        Args:
            codebook_version: Version of the codes.
            codes: The answer, ``ABSENT_CODE`` in every place of an item without codes.
        """
        served_at = self._clock()
        with self._lock:
            is_taken_N = self._rng.random(len(codes.item_ids_N)) < self._config.sample_rate
            num_taken = int(is_taken_N.sum())
            has_room = self._num_buffered + num_taken <= self._config.max_buffered_rows
            # Within the lock: what comes before the closing is in the last part.
            is_kept = has_room and not self._is_closing.is_set()
            if num_taken and is_kept:
                # Copies: the caller owns the arrays, and may write into them.
                taken = ItemCodes(
                    codes.item_ids_N[is_taken_N], codes.vq_NV[is_taken_N], codes.rq_NL[is_taken_N]
                )
                self._samples.append(_Sample(codebook_version, taken, served_at))
                self._num_buffered += num_taken
        if num_taken and not is_kept:
            SERVING_LOG_ROWS.labels("dropped").inc(num_taken)

    def close(self) -> None:
        """Write what is buffered and end the thread; answers offered later are dropped."""
        self._is_closing.set()
        self._writer.join()

    def _run(self) -> None:
        while not self._is_closing.wait(self._config.flush_seconds):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        """Write the buffer as one part; on failure its rows are dropped, and said to be."""
        with self._lock:
            samples, self._samples = self._samples, []
            num_rows, self._num_buffered = self._num_buffered, 0
        if not samples:
            return
        try:
            self._log.create(SERVED_CODE_LOG, SERVED_CODE_ROWS)
            self._log.append(SERVED_CODE_LOG, _table(samples, self._clock()))
        except (DataError, pa.ArrowException, OSError) as error:
            SERVING_LOG_ROWS.labels("dropped").inc(num_rows)
            logger.error("serving_log_not_written rows=%d error=%r", num_rows, str(error))
            return
        SERVING_LOG_ROWS.labels("written").inc(num_rows)


@contextmanager
def open_serving_log(config_path: str, repo_config: "RepoConfig") -> Iterator[ServingLog | None]:
    """Give the log of section ``serving_log``, and write the rest of it at the end of the block.

    Args:
        config_path: Path of ``qarm.yaml``.
        repo_config: Feast's configuration of the repository.

    Yields:
        The log; None where nothing is sampled.
    """
    config = load_section(config_path, "serving_log", ServingLogConfig)
    if not config.sample_rate:
        yield None
        return
    from qarm_feast.offline_store import open_code_log

    serving_log = ServingLog(open_code_log(repo_config), config)
    try:
        yield serving_log
    finally:
        serving_log.close()


def codes_hash(rq_L: Sequence[int], vq_V: Sequence[int]) -> str:
    """Return a hash of one item's codes.

    Args:
        rq_L: RQ codes.
        vq_V: VQ codes.

    Returns:
        BLAKE2b of 16 bytes in hex, over the number of levels, the RQ codes and the VQ codes as
        little-endian int64; ``NO_CODES`` where the first RQ code is ``ABSENT_CODE``, or there is
        none (the view does not tell how many an item has, and no item of the answer was known).
    """
    if not len(rq_L) or rq_L[0] == ABSENT_CODE:
        return NO_CODES
    row = np.array([len(rq_L), *rq_L, *vq_V], dtype="<i8")
    return hashlib.blake2b(row.tobytes(), digest_size=_HASH_BYTES).hexdigest()


def _table(samples: list[_Sample], created: datetime) -> pa.Table:
    lengths = [len(sample.codes.item_ids_N) for sample in samples]
    versions = np.repeat([sample.codebook_version for sample in samples], lengths)
    times = pa.array([sample.served_at for sample in samples], TIMESTAMP)
    hashes = [
        codes_hash(rq_L, vq_V)
        for sample in samples
        for rq_L, vq_V in zip(sample.codes.rq_NL.tolist(), sample.codes.vq_NV.tolist(), strict=True)
    ]
    columns = [
        pa.array(np.concatenate([sample.codes.item_ids_N for sample in samples])),
        pa.array(versions.tolist(), pa.string()),
        pa.array(hashes, pa.string()),
        times.take(pa.array(np.repeat(np.arange(len(samples)), lengths))),
        pa.repeat(pa.scalar(created, TIMESTAMP), sum(lengths)),
    ]
    return pa.table(columns, schema=SERVED_CODE_ROWS)

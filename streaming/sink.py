"""Rows into both of Feast's stores, and refused records into the dead-letter topic.

:class:`FeastSink` knows the order and the collapsing; the stores stand behind two small
Protocols. Shape letters in this file: N rows, M positives, U users.
May import: feast, kafka-python, numpy, pyarrow.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.encode import newest_per_item
from qarm_feast.erasure import outlives_erasure
from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.schema import (
    CONTENT_LOG,
    CREATED,
    ERASURE_MARK,
    EVENT_TIMESTAMP,
    INTERACTION_LOG,
    ITEM_ID,
    RECENT_ITEM_ROWS,
    RECENT_ITEMS_VIEW,
    TIMESTAMP,
    USER_ERASURE_LOG,
    USER_ID,
    code_view_name,
    vector_view_name,
)
from streaming.clients import connect_producer, send_all
from streaming.columns import DeadLetter
from streaming.config import StreamConfig
from streaming.letters import letter_message, stub_message

logger = logging.getLogger(__name__)

_NUM_APPENDS = 4
"""Logs that are written at once: content, two codebook versions, interactions."""


class OfflineLog(Protocol):
    """Append-only logs; ``qarm_feast.code_log.CodeLog`` has this form."""

    def append(self, name: str, table: pa.Table) -> object:
        """Store the rows for good under ``name``; called from one thread per log."""
        ...


class OnlineTables(Protocol):
    """Views of the online store, written by columns."""

    def write(self, view_name: str, table: pa.Table) -> int:
        """Store the rows that are newer than what is there, and return how many were."""
        ...

    def remove_if_gone(self, view_name: str) -> bool:
        """Remove all rows of a view that is not applied any more; return whether it is so."""
        ...


@dataclass(frozen=True)
class BatchRows:
    """Everything that one batch writes: code rows by codebook version, and four logs.

    ``interactions`` has the rows of ``schema.interaction_rows``, ``positives`` those of them
    that enter the users' recent items, ``erasures`` has ``schema.USER_ERASURE_ROWS``,
    and ``vectors``, filled where a ranker reads them, ``schema.VECTOR_ROWS`` by encoder version.
    """

    codes: Mapping[str, pa.Table]
    content: pa.Table
    interactions: pa.Table
    positives: pa.Table
    erasures: pa.Table
    vectors: Mapping[str, pa.Table] = field(default_factory=dict)


class FeastSink:
    """Writes one batch to the offline logs, then to the online store.

    Args:
        offline: The logs below the offline store.
        online: The online store's views.
        history_length: Latest positives that a user's row holds.
    """

    def __init__(self, offline: OfflineLog, online: OnlineTables, history_length: int) -> None:
        self._offline = offline
        self._online = online
        self._history_length = history_length
        self._pool = ThreadPoolExecutor(_NUM_APPENDS, thread_name_prefix="append")

    def write_offline(self, rows: BatchRows) -> None:
        """Append every row: replays and edits are told apart by the readers."""
        tables = {
            CONTENT_LOG: rows.content,
            **{code_view_name(version): codes for version, codes in rows.codes.items()},
            **{vector_view_name(encoder): vectors for encoder, vectors in rows.vectors.items()},
            INTERACTION_LOG: rows.interactions,
            USER_ERASURE_LOG: rows.erasures,
        }
        tables = {name: table for name, table in tables.items() if table.num_rows}
        # Side by side, because an append mostly waits for the disk.
        appends = [self._pool.submit(self._offline.append, *each) for each in tables.items()]
        # A failed one is told once all have ended: the next try must not meet them.
        wait(appends)
        for append in appends:
            append.result()

    def write_online(self, rows: BatchRows) -> None:
        """Write the newest row per item and the latest positives per user."""
        for version, codes in rows.codes.items():
            self._write(code_view_name(version), newest_per_item(codes))
        for encoder_version, vectors in rows.vectors.items():
            self._write(vector_view_name(encoder_version), newest_per_item(vectors))
        recent = recent_item_rows(rows.positives, rows.erasures, self._history_length)
        self._write(RECENT_ITEMS_VIEW, recent)

    def take_back(self, versions: Iterable[str], encoder_versions: Iterable[str] = ()) -> None:
        """Remove online what was written of retired versions after their views were dropped.

        Rows of a retired version whose view is still there stay: they are right, the retirement
        may be undone, and `feast apply` takes them away together with the view. So do vectors of
        an encoder of which there is another version.

        Args:
            versions: Codebook versions that a write just ended for, and that are retired by now.
            encoder_versions: Encoders whose vectors were written with them.
        """
        names = [*map(code_view_name, versions), *map(vector_view_name, encoder_versions)]
        for name in names:
            if self._online.remove_if_gone(name):
                logger.warning("rows_taken_back view=%s because=dropped during a write", name)

    def _write(self, view_name: str, table: pa.Table) -> None:
        if table.num_rows:
            self._online.write(view_name, table)


class DeadLetterTopic:
    """Sends refused records to the dead-letter topic; they are there when ``send`` returns.

    Args:
        config: Section ``stream``.

    Raises:
        ServiceUnavailableError: If no broker answers.
    """

    def __init__(self, config: StreamConfig) -> None:
        self._topic = config.dead_letter_topic
        self._producer = connect_producer(config)

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Send each letter with its key, value, headers, and the headers that tell why.

        Of a letter too large for the topic only the headers that tell why are sent.

        Args:
            letters: The letters.

        Raises:
            ServiceUnavailableError: If the broker does not take them.
        """
        is_whole = send_all(
            self._producer, [(self._topic, letter_message(letter)) for letter in letters]
        )
        stubs = [
            (self._topic, stub_message(letter))
            for letter, whole in zip(letters, is_whole, strict=True)
            if not whole
        ]
        if not all(send_all(self._producer, stubs)):
            raise ServiceUnavailableError(
                f"topic {self._topic} has no room for the headers of a dead letter; raise its "
                "max.message.bytes"
            )

    def close(self) -> None:
        """Close the connection; nothing is pending, as ``send`` waits."""
        self._producer.close(timeout=1.0)


def recent_item_rows(positives: pa.Table, erasures: pa.Table, history_length: int) -> pa.Table:
    """Return one row of ``schema.RECENT_ITEM_ROWS`` per user, newest item first.

    Args:
        positives: ``user_id``, ``item_id``, ``event_timestamp``, ``created``; any order, with
            duplicates.
        erasures: Rows of ``schema.USER_ERASURE_ROWS``; each becomes a mark at its time.
        history_length: Items kept per user.

    Returns:
        The rows, in ascending order of the users.
    """
    marks = erasures.append_column(ITEM_ID, pa.repeat(ERASURE_MARK, erasures.num_rows))
    names = [USER_ID, ITEM_ID, EVENT_TIMESTAMP, CREATED]
    pairs = pa.concat_tables([positives.select(names), marks.select(names)])
    users_M = pairs[USER_ID].to_numpy()
    items_M = pairs[ITEM_ID].to_numpy()
    times_M = pairs[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy()
    # The complement, not the negative: the lowest int64 has none.
    order = np.lexsort((~items_M, ~times_M, users_M))
    order = order[outlives_erasure(users_M, times_M, items_M)[order]]
    users_M, items_M, times_M = users_M[order], items_M[order], times_M[order]
    kept = _first_per_user(users_M, items_M, times_M, history_length)
    users_M, items_M, times_M = users_M[kept], items_M[kept], times_M[kept]
    users_U, starts_U = np.unique(users_M, return_index=True)
    offsets = pa.array(np.append(starts_U, len(users_M)).astype(np.int32))
    created = pc.max(pairs[CREATED])
    columns = [
        pa.array(users_U, pa.int64()),
        pa.ListArray.from_arrays(offsets, pa.array(items_M)),
        pa.ListArray.from_arrays(offsets, pa.array(times_M)),
        pa.array(times_M[starts_U]).cast(TIMESTAMP),
        pa.repeat(created, len(users_U)),
    ]
    return pa.table(columns, schema=RECENT_ITEM_ROWS)


def _first_per_user(
    users_M: np.ndarray, items_M: np.ndarray, times_M: np.ndarray, history_length: int
) -> np.ndarray:
    """Return positions of each user's first distinct (time, item) pairs; input is sorted."""
    is_same_M = np.zeros(len(users_M), dtype=bool)
    is_same_M[1:] = (
        (users_M[1:] == users_M[:-1])
        & (items_M[1:] == items_M[:-1])
        & (times_M[1:] == times_M[:-1])
    )
    distinct = np.flatnonzero(~is_same_M)
    starts = np.unique(users_M[distinct], return_index=True)[1]
    counts = np.diff(np.append(starts, len(distinct)))
    ranks = np.arange(len(distinct)) - np.repeat(starts, counts)
    first: np.ndarray = distinct[ranks < history_length]
    return first

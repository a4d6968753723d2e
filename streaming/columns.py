"""The records of one batch as Arrow columns, with the dead letters beside them.

One bad record, or one bad row of an Arrow record, never sinks the others.
May import: numpy, pyarrow.
"""

import logging
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.errors import EventError
from streaming.arrow_rows import (
    ArrowRecord,
    Check,
    CheckedRecords,
    check_interaction_rows,
    check_item_rows,
    check_records,
    same_schema_runs,
)
from streaming.event_columns import (
    RECORD_INDEX,
    ROW_INDEX,
    interaction_schema,
    interaction_table,
    item_table,
)
from streaming.limits import DEFAULT_LIMITS, EventLimits, Reason
from streaming.messages import (
    ARROW_TYPE,
    InteractionEvent,
    ItemEvent,
    Record,
    UnreadableRecord,
    UserErasure,
    check_record_size,
    check_unpacked_size,
    content_type,
    decode_arrow,
    decode_interaction_event,
    decode_item_event,
    encode_arrow,
    item_upload,
    json_fields,
)
from streaming.plain_uploads import PlainUploads

logger = logging.getLogger(__name__)


class DeadLetter(NamedTuple):
    """A record, or some rows of it (``value``), that break the contract."""

    record: Record
    reason: str
    detail: str
    value: bytes | None
    codebook_version: str = ""


class DecodedItems(NamedTuple):
    """Good rows of ``ITEM_EVENT_ROWS`` and the dead letters of the others."""

    rows: pa.Table
    dead_letters: list[DeadLetter]


class DecodedInteractions(NamedTuple):
    """Good rows (``user_id item_id <tasks> split event_timestamp``), dead letters, erasures."""

    rows: pa.Table
    dead_letters: list[DeadLetter]
    erasures: list[UserErasure]


def decode_items(records: Sequence[Record], limits: EventLimits = DEFAULT_LIMITS) -> DecodedItems:
    """Decode the item records of a batch.

    Args:
        records: Records of the item topic; ``record_index`` counts them.
        limits: Bounds that records must keep.

    Returns:
        Rows in the order of the records, and the dead letters.
    """
    plain = PlainUploads(limits)
    events: dict[int, ItemEvent] = {}
    arrow: list[ArrowRecord] = []

    def read(index: int) -> None:
        record = records[index]
        if _is_arrow(record, limits):
            arrow.append(ArrowRecord(index, record, decode_arrow(record)))
        elif record.value is None:
            events[index] = decode_item_event(record, limits)
        elif not plain.take(index, record, fields := json_fields(record.value)):
            events[index] = item_upload(record, fields, limits)

    def read_again(index: int) -> None:
        events[index] = decode_item_event(records[index], limits)

    dead_letters = _try_each(records, range(len(records)), read)
    plain_rows, doubtful = plain.rows()
    dead_letters += _try_each(records, doubtful, read_again)
    arrow_rows, refused = _checked_rows(arrow, check_item_rows(limits))
    rows = _in_order([plain_rows, item_table(events), *arrow_rows])
    return DecodedItems(rows, dead_letters + refused)


def decode_interactions(
    records: Sequence[Record],
    task_names: tuple[str, ...],
    limits: EventLimits = DEFAULT_LIMITS,
) -> DecodedInteractions:
    """Decode the interaction records of a batch.

    Args:
        records: Records of the interaction topic.
        task_names: The task flags that every event carries.
        limits: Bounds that records must keep.

    Returns:
        Rows, the dead letters, and the erasures of users.
    """
    events: list[InteractionEvent] = []
    erasures: list[UserErasure] = []
    arrow: list[ArrowRecord] = []

    def read(index: int) -> None:
        record = records[index]
        if _is_arrow(record, limits):
            table = _known_columns(decode_arrow(record), task_names)
            arrow.append(ArrowRecord(index, record, table))
            return
        event = decode_interaction_event(record, task_names, limits)
        if isinstance(event, UserErasure):
            erasures.append(event)
        else:
            events.append(event)

    dead_letters = _try_each(records, range(len(records)), read)
    arrow_rows, refused = _checked_rows(arrow, check_interaction_rows(task_names, limits))
    names = interaction_schema(task_names).names
    tables = [interaction_table(events, task_names), *(rows.select(names) for rows in arrow_rows)]
    return DecodedInteractions(pa.concat_tables(tables), dead_letters + refused, erasures)


def letters_of_rows(
    records: Sequence[Record], rows: pa.Table, letter: tuple[str, str, str]
) -> list[DeadLetter]:
    """Return dead letters for rows that a later stage refuses, one per record.

    Args:
        records: What was given to :func:`decode_items`.
        rows: The refused rows.
        letter: Reason, detail and codebook versions.

    Returns:
        The letters, each with the refused rows only.
    """
    reason, detail, versions = letter
    letters = []
    for index in pc.unique(rows[RECORD_INDEX]).to_pylist():
        record = records[index]
        value = record.value
        if content_type(record) == ARROW_TYPE:
            row_indexes = rows.filter(pc.equal(rows[RECORD_INDEX], index))[ROW_INDEX]
            value = encode_arrow(decode_arrow(record).take(row_indexes)).value
        letters.append(DeadLetter(record, reason, detail, value, versions))
    return letters


def _is_arrow(record: Record, limits: EventLimits) -> bool:
    """Tell the form of a record that is not too large, packed or unpacked."""
    if isinstance(record, UnreadableRecord):
        raise EventError(Reason.UNDECODABLE, f"the client cannot read the record: {record.fault}")
    check_record_size(record, limits.max_record_bytes)
    is_arrow = content_type(record) == ARROW_TYPE and record.value is not None
    if is_arrow:
        check_unpacked_size(record, limits.max_decoded_bytes)
    return is_arrow


def _try_each(
    records: Sequence[Record], indexes: Iterable[int], read: Callable[[int], None]
) -> list[DeadLetter]:
    """Read records, and return the dead letters of those that cannot be read."""
    dead_letters = []
    for index in indexes:
        try:
            read(index)
        except Exception as error:  # noqa: BLE001  # one record must not stop the others; logged
            dead_letters.append(_refused(records[index], error))
    return dead_letters


def _checked_rows(
    records: Sequence[ArrowRecord], check: Check
) -> tuple[list[pa.Table], list[DeadLetter]]:
    """Return the good rows of Arrow records, and the dead letters of the others."""
    tables: list[pa.Table] = []
    dead_letters: list[DeadLetter] = []
    runs = list(same_schema_runs(records))
    while runs:
        run = runs.pop(0)
        try:
            checked = check_records(run, check)
        except Exception as error:  # noqa: BLE001  # one record must not stop the others; logged
            if len(run) == 1:
                dead_letters.append(_refused(run[0].record, error))
            else:
                # One of them may be at fault for all.
                runs = [[record] for record in run] + runs
            continue
        tables.append(checked.rows)
        dead_letters += _row_letters(checked)
    return tables, dead_letters


def _row_letters(checked: CheckedRecords) -> list[DeadLetter]:
    letters = []
    for (_, record, table), part in zip(checked.records, checked.parts, strict=True):
        for reason, rows in checked.faults.rows_by_reason(part).items():
            detail = f"{reason}: {len(rows)} of the record's {table.num_rows} rows"
            value = encode_arrow(table.take(pa.array(rows))).value
            letters.append(DeadLetter(record, reason, detail, value))
    return letters


def _in_order(tables: Sequence[pa.Table]) -> pa.Table:
    """Return item rows in the order of their records."""
    rows = pa.concat_tables([table for table in tables if table.num_rows] or tables[:1])
    index_N = rows[RECORD_INDEX].to_numpy()
    if (index_N[1:] >= index_N[:-1]).all():
        return rows
    return rows.take(pa.array(np.argsort(index_N, kind="stable")))


def _known_columns(table: pa.Table, task_names: tuple[str, ...]) -> pa.Table:
    """Leave out what no reader asks for: rows of any other type may not even be filtered."""
    names = set(interaction_schema(task_names).names)
    return table.select([name for name in table.column_names if name in names])


def _refused(record: Record, error: Exception) -> DeadLetter:
    if isinstance(error, EventError):
        return DeadLetter(record, error.reason, str(error), record.value)
    # Where, but not the message: it may quote the payload.
    place = traceback.extract_tb(error.__traceback__)[-1]
    kind = type(error).__name__
    logger.error(
        "decoder_fault topic=%s partition=%d offset=%d error=%s file=%s line=%d",
        *(record.topic, record.partition, record.offset, kind, place.filename, place.lineno),
    )
    detail = f"{Reason.DECODER_FAULT}: {kind} in the decoder, the worker's log has the place"
    return DeadLetter(record, Reason.DECODER_FAULT, detail, record.value)

"""What became of each record of the mutation scenario: stored, or a dead letter that says why."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer

from streaming.config import StreamConfig
from streaming.messages import ARROW_TYPE, InteractionEvent, ItemEvent, Reason
from tests.fault.mutations import (
    SEQUENCE_HEADER,
    Mutant,
    is_sound,
    plain_interactions,
    plain_items,
    rows_of_arrow,
)
from tests.fault.truth import reference_hash

_READ_TIMEOUT_MS = 3000
_LETTER_HEADERS = {"reason", "detail", "topic", "partition", "offset", "codebook_version"}


@dataclass
class Judged:
    """The events that the stores must hold, and what is not right about the rest."""

    items: list[ItemEvent] = field(default_factory=list)
    interactions: list[InteractionEvent] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    num_refused: int = 0
    num_still_valid: int = 0

    @property
    def note(self) -> str:
        """What the table says about the records."""
        return (
            f"{self.num_refused} records to the dead letters for {len(self.reasons)} reasons, "
            f"{self.num_still_valid} still valid"
        )


def judge(config: StreamConfig, mutants: Sequence[Mutant]) -> Judged:
    """Read both topics and the dead letters again, and judge every record.

    Args:
        config: Section ``stream``.
        mutants: What was sent; the header ``sequence`` of a record points here.
    """
    letters: dict[tuple[str, int, int], list[Any]] = {}
    judged = Judged()
    for letter in _read(config, [config.dead_letter_topic]):
        headers = dict(letter.headers)
        missing = _LETTER_HEADERS - headers.keys()
        if missing or headers["reason"].decode() not in set(Reason):
            judged.problems.append(f"dead letter {letter.offset} has the headers {headers}")
            continue
        place = (headers["topic"].decode(), int(headers["partition"]), int(headers["offset"]))
        letters.setdefault(place, []).append(letter)
        judged.reasons[headers["reason"].decode()] += 1
    num_records = 0
    for record in _read(config, config.topics):
        num_records += 1
        mutant = mutants[int(dict(record.headers)[SEQUENCE_HEADER])]
        own = letters.pop((record.topic, record.partition, record.offset), [])
        _judge_record(record, own, mutant, judged)
    if num_records != len(mutants):
        judged.problems.append(f"{len(mutants)} records were sent, {num_records} are there")
    if letters:
        judged.problems.append(f"{len(letters)} dead letters of records that are not there")
    return judged


def _judge_record(record: Any, letters: list[Any], mutant: Mutant, judged: Judged) -> None:
    name = f"{mutant.mutation or 'valid'} record {record.topic}/{record.partition}@{record.offset}"
    judged.num_refused += bool(letters)
    if letters and not mutant.mutation:
        judged.problems.append(f"{name} was refused: {dict(letters[0].headers)}")
    judged.num_still_valid += bool(mutant.mutation and not letters)
    if dict(record.headers).get("content-type") == ARROW_TYPE:
        judged.items += _stored_rows(record, letters, name, judged)
        return
    if letters:
        if any(letter.value != (record.value or letter.value) for letter in letters):
            judged.problems.append(f"{name}: its dead letter has another value")
        return
    events = plain_interactions(record) if mutant.parcel.interactions else plain_items(record)
    if events is None:
        judged.problems.append(f"{name} was accepted: {record.value!r:.300}")
    elif mutant.parcel.interactions:
        judged.interactions += events
    else:
        judged.items += events


def _stored_rows(record: Any, letters: Iterable[Any], name: str, judged: Judged) -> list[ItemEvent]:
    """Return the rows of an Arrow record that no letter holds; all of them must be sound."""
    rows = plain_items(record)
    if rows is None:
        if not letters:
            judged.problems.append(f"{name} was accepted")
        return []
    refused: Counter[tuple[Any, ...]] = Counter()
    for letter in letters:
        held = rows_of_arrow(letter.value)
        if held is None:
            judged.problems.append(f"{name}: its dead letter cannot be read")
        refused.update(map(_row_key, held or ()))
    stored = []
    for row in rows:
        if refused[_row_key(row)] > 0:
            refused[_row_key(row)] -= 1
        elif is_sound(row):
            stored.append(row)
        else:
            judged.problems.append(f"{name}: the row {row} was accepted")
    if refused.total():
        judged.problems.append(f"{name}: its dead letters hold rows that it has not")
    return stored


def _row_key(row: ItemEvent) -> tuple[Any, ...]:
    return (row.item_id, row.event_timestamp, reference_hash(row))


def _read(config: StreamConfig, topics: Sequence[str]) -> Iterable[Any]:
    consumer = KafkaConsumer(
        *topics,
        bootstrap_servers=config.bootstrap_servers,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        consumer_timeout_ms=_READ_TIMEOUT_MS,
    )
    with closing(consumer):
        yield from consumer

"""``qarm-stream dlq``: look at dead letters, and send them to their topics once more.

Replaying goes in four steps per portion of letters:

1. Read the letters that were there when the command began.
2. Leave out what was not asked for, and refuse what must not go back.
3. Send the others to their own topics with their own keys and headers, and wait for every broker
   in sync.
4. Commit how far it came, in a group of its own per reason (``<consumer_group>-replay-<reason>``).

A crash between 3 and 4 sends letters twice. That is harmless: the stores' guards collapse equal
events, and the offline logs' readers do. An explicit range of offsets commits nothing and can be
replayed at will. May import: kafka-python.
"""

import heapq
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import NamedTuple, Protocol

from kafka import KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata, TopicPartition

from qarm_feast.errors import ConfigError, DataError, ServiceUnavailableError
from streaming.clients import connect_producer, connect_reader, send_all
from streaming.config import StreamConfig
from streaming.letters import StoredLetter, parse_letter, replay_message
from streaming.messages import Message, Record

_POLL_MS = 500
_TIMEOUT_MS = 10_000
_STALL_SECONDS = 30.0
_NO_ROOM = "its topic has no room for it, see max.message.bytes"

Offsets = Mapping[TopicPartition, int]


class OffsetRange(NamedTuple):
    """Letters of one partition of the dead-letter topic, both ends included."""

    partition: int
    first: int
    last: int


@dataclass(frozen=True)
class LetterFilter:
    """Which letters are meant.

    Attributes:
        reasons: Only these; all if empty.
        since_ms: Refused at this time or later, milliseconds since the epoch.
        ranges: Only these places; all if empty.
    """

    reasons: tuple[str, ...] = ()
    since_ms: int = 0
    ranges: tuple[OffsetRange, ...] = ()

    def matches(self, letter: StoredLetter) -> bool:
        """Tell whether a letter is meant."""
        partition, offset = letter.place
        is_inside = not self.ranges or any(
            part == partition and first <= offset <= last for part, first, last in self.ranges
        )
        is_asked_for = not self.reasons or letter.reason in self.reasons
        return is_inside and is_asked_for and letter.timestamp_ms >= self.since_ms


@dataclass(frozen=True)
class LetterList:
    """How many letters there are by reason, and the newest of them."""

    counts: Counter[str]
    rows: list[dict[str, str | int]]

    def json(self) -> str:
        """Return everything as one JSON object."""
        return json.dumps({"counts": dict(self.counts.most_common()), "letters": self.rows})

    def lines(self) -> list[str]:
        """Return the lines that ``qarm-stream dlq list`` prints: two tables."""
        counts = [f"{number:>8}  {reason}" for reason, number in self.counts.most_common()]
        if not self.rows:
            return counts or ["no dead letters"]
        table = [list(self.rows[0]), *[[str(v) for v in row.values()] for row in self.rows]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return [*counts, "", *rows]


@dataclass
class ReplayReport:
    """What a replay did, or with ``--dry-run`` would do: numbers by (reason, topic or fault)."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)

    def lines(self, is_dry_run: bool) -> list[str]:
        """Return what ``qarm-stream dlq replay`` prints."""
        verb = "would replay" if is_dry_run else "replayed"
        lines = [f"{verb} {n} {reason} to {to}" for (reason, to), n in sorted(self.sent.items())]
        lines += [
            f"refused {n} {reason}: {why}" for (reason, why), n in sorted(self.refused.items())
        ]
        return lines or [f"{verb} nothing: no letter matches that was not replayed before"]

    def check(self) -> None:
        """Raise if a letter could not go back.

        Raises:
            DataError: If letters were refused.
        """
        if self.refused:
            raise DataError(
                f"{self.refused.total()} dead letters were not replayed; once the reason given is "
                "mended, run `qarm-stream dlq replay --offsets LETTER` with the places that "
                "`qarm-stream dlq list` shows: --reason does not come back to them"
            )


def parse_since(text: str) -> int:
    """Return a time as milliseconds since the epoch.

    Args:
        text: ISO-8601 with an offset.

    Returns:
        The milliseconds.

    Raises:
        ConfigError: If it is something else.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--since {text!r} is not ISO-8601, as 2026-01-31T12:00:00Z") from error
    if moment.tzinfo is None:
        raise ConfigError(f"--since {text!r} has no offset; write {text}Z for UTC")
    return round(moment.timestamp() * 1000)


def parse_range(text: str) -> OffsetRange:
    """Return a range of offsets.

    Args:
        text: ``partition:first-last`` or ``partition:offset``.

    Returns:
        The range.

    Raises:
        ConfigError: If it is something else.
    """
    found = re.fullmatch(r"(\d+):(\d+)(?:-(\d+))?", text)
    if found is None:
        raise ConfigError(
            f"--offsets {text!r} is neither PARTITION:FIRST-LAST nor PARTITION:OFFSET"
        )
    partition, first, last = found.groups(default=found[2])
    return OffsetRange(int(partition), int(first), int(last))


class LetterSource(Protocol):
    """The dead-letter topic, read in portions; :class:`LetterReader` is one."""

    def portions(self) -> Iterator[tuple[Sequence[Record], Offsets]]:
        """Return records, and the offset behind the last one of each partition."""
        ...

    def commit(self, offsets: Offsets) -> None:
        """Note how far a replay came."""
        ...


class LetterReader:
    """Reads the dead-letter topic up to the end that it had when the reader was made.

    Args:
        config: Section ``stream``.
        group: Start from this group's committed offsets; without one from the beginning.

    Raises:
        ConfigError: If there is no such topic.
        ServiceUnavailableError: If no broker answers.
    """

    def __init__(self, config: StreamConfig, group: str | None = None) -> None:
        self._topic = config.dead_letter_topic
        self._group = group
        self._consumer: KafkaConsumer = connect_reader(config, group)
        try:
            self._ends = self._seek()
        # The client (kafka-python 3.0.12) asks for no partition that is without a leader, and then
        # misses it in the answers.
        except (KafkaError, KeyError) as error:
            self.close()
            raise self._away(error) from error
        except ConfigError:
            self.close()
            raise

    def portions(self) -> Iterator[tuple[Sequence[Record], Offsets]]:
        """Return records, and the offset behind the last one of each partition.

        Yields:
            Some records of one or more partitions.

        Raises:
            ServiceUnavailableError: If nothing comes any more before the end.
        """
        deadline = time.monotonic() + _STALL_SECONDS
        while any(self._position(tp) < end for tp, end in self._ends.items()):
            polled = self._poll()
            if polled:
                deadline = time.monotonic() + _STALL_SECONDS
                records = [record for tp in polled for record in polled[tp]]
                inside = [r for r in records if r.offset < self._ends[_partition_of(r)]]
                yield inside, {_partition_of(record): record.offset + 1 for record in inside}
            elif time.monotonic() > deadline:
                raise self._away(f"nothing came for {_STALL_SECONDS:.0f} s")

    def commit(self, offsets: Offsets) -> None:
        """Note how far a replay came; without a group nobody keeps that.

        Args:
            offsets: Next offset by partition.

        Raises:
            ServiceUnavailableError: If the broker does not take it.
        """
        if self._group is None or not offsets:
            return
        entries = {tp: OffsetAndMetadata(offset) for tp, offset in offsets.items()}
        try:
            self._consumer.commit(entries, timeout_ms=_TIMEOUT_MS)
        except KafkaError as error:
            raise self._away(error) from error

    def close(self) -> None:
        """Close the connection; nothing is committed by that."""
        self._consumer.close(autocommit=False)

    def _seek(self) -> dict[TopicPartition, int]:
        numbers = self._consumer.partitions_for_topic(self._topic)
        if not numbers:
            raise ConfigError(f"no topic {self._topic}; `qarm-stream check` tells what is missing")
        partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
        self._consumer.assign(partitions)
        starts = self._consumer.beginning_offsets(partitions)
        for tp, start in starts.items():
            # Without a limit the client asks a broker that is gone for ever.
            committed = (
                self._consumer.committed(tp, timeout_ms=_TIMEOUT_MS) if self._group else None
            )
            self._consumer.seek(tp, max(start, committed or 0))
        ends: dict[TopicPartition, int] = self._consumer.end_offsets(partitions)
        return ends

    def _position(self, partition: TopicPartition) -> int:
        return int(self._consumer.position(partition))

    def _poll(self) -> dict[TopicPartition, list[Record]]:
        try:
            polled: dict[TopicPartition, list[Record]] = self._consumer.poll(_POLL_MS)
        except KafkaError as error:
            raise self._away(error) from error
        return polled

    def _away(self, fault: object) -> ServiceUnavailableError:
        return ServiceUnavailableError(
            f"topic {self._topic} cannot be read ({fault!r}); run `qarm-stream check`"
        )


def list_letters(config: StreamConfig, wanted: LetterFilter, limit: int) -> LetterList:
    """Return the letters that are meant: counted by reason, and the newest of them.

    Args:
        config: Section ``stream``.
        wanted: Which letters.
        limit: So many rows at most.

    Returns:
        Counts of all, rows of the newest first.

    Raises:
        ConfigError: If there is no dead-letter topic.
        ServiceUnavailableError: If the broker does not answer.
    """
    with closing(LetterReader(config)) as reader:
        return summarize(reader, wanted, limit)


def summarize(source: LetterSource, wanted: LetterFilter, limit: int) -> LetterList:
    """Return counts and the newest rows of a source's letters; keeps no payload."""
    counts: Counter[str] = Counter()

    def rows() -> Iterator[tuple[int, int, int, dict[str, str | int]]]:
        for records, _ in source.portions():
            for letter in _meant(records, wanted):
                counts[letter.reason] += 1
                yield letter.timestamp_ms, *letter.place, letter.row()

    # Time and place differ between any two letters, so rows are never compared.
    newest = heapq.nlargest(limit, rows())
    return LetterList(counts, [row for *_, row in newest])


def replay_reasons(config: StreamConfig, reasons: Sequence[str], is_dry_run: bool) -> ReplayReport:
    """Send back the letters of some reasons that no earlier call has handled.

    Args:
        config: Section ``stream``.
        reasons: Values of the letters' header ``reason``.
        is_dry_run: Only count.

    Returns:
        What was sent and what was refused.

    Raises:
        ConfigError: If there is no dead-letter topic.
        ServiceUnavailableError: If the broker does not answer.
    """
    report = ReplayReport()
    for reason in sorted(set(reasons)):
        group = f"{config.consumer_group}-replay-{reason}"
        part = _replay(config, group, LetterFilter(reasons=(reason,)), is_dry_run)
        report.sent += part.sent
        report.refused += part.refused
    return report


def replay_ranges(
    config: StreamConfig, ranges: Sequence[OffsetRange], is_dry_run: bool
) -> ReplayReport:
    """Send back the letters at these places, whether or not they were sent before.

    Args:
        config: Section ``stream``.
        ranges: Places in the dead-letter topic.
        is_dry_run: Only count.

    Returns:
        What was sent and what was refused.

    Raises:
        ConfigError: If there is no dead-letter topic.
        ServiceUnavailableError: If the broker does not answer.
    """
    return _replay(config, None, LetterFilter(ranges=tuple(ranges)), is_dry_run)


def send_back(
    source: LetterSource,
    wanted: LetterFilter,
    refusal: Callable[[StoredLetter], str | None],
    send: Callable[[Sequence[tuple[str, Message]]], Sequence[bool]] | None,
) -> ReplayReport:
    """Take every portion of a source through steps 2 to 4.

    Args:
        source: The letters.
        wanted: Which of them.
        refusal: Says why a letter must not go back, or None.
        send: Stores messages in their topics for good, and tells which had room; None only counts.

    Returns:
        What was sent and what was refused.
    """
    report = ReplayReport()
    for records, offsets in source.portions():
        going = []
        for letter in _meant(records, wanted):
            fault = refusal(letter)
            if fault:
                report.refused[letter.reason, fault] += 1
            else:
                going.append(letter)
        messages = [(letter.source[0], replay_message(letter)) for letter in going]
        has_room = [True] * len(going) if send is None else send(messages)
        for letter, fits in zip(going, has_room, strict=True):
            if fits:
                report.sent[letter.reason, letter.source[0]] += 1
            else:
                report.refused[letter.reason, _NO_ROOM] += 1
        if send is not None:
            # Commit last: a crash before this line sends twice, the other order would lose.
            source.commit(offsets)
    return report


def refusal_of(letter: StoredLetter, topics: Sequence[str], max_replays: int) -> str | None:
    """Return why a letter must not go back, or None.

    Args:
        letter: The letter.
        topics: Topics that take replays: whoever may write letters must not reach others.
        max_replays: What was sent so often is not sent again, so that poison ends its circle.

    Returns:
        The reason, or None.
    """
    if letter.source[0] not in topics:
        return "its topic is none of the input topics"
    if letter.num_replays >= max_replays:
        return f"replayed {letter.num_replays} times, stream.max_replays is {max_replays}"
    if not letter.is_whole:
        return "its value is not in the letter, it lies at the topic, partition and offset listed"
    return None


def _replay(
    config: StreamConfig, group: str | None, wanted: LetterFilter, is_dry_run: bool
) -> ReplayReport:
    def refusal(letter: StoredLetter) -> str | None:
        return refusal_of(letter, config.topics, config.max_replays)

    with closing(LetterReader(config, group)) as reader:
        if is_dry_run:
            return send_back(reader, wanted, refusal, None)
        with closing(connect_producer(config)) as producer:
            return send_back(reader, wanted, refusal, partial(send_all, producer))


def _meant(records: Sequence[Record], wanted: LetterFilter) -> Iterator[StoredLetter]:
    for record in records:
        letter = parse_letter(record)
        if letter is not None and wanted.matches(letter):
            yield letter


def _partition_of(record: Record) -> TopicPartition:
    return TopicPartition(record.topic, record.partition)

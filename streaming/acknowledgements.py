"""Which codebook versions the owner of a partition writes: told to the group with its offsets.

An acknowledgement is the metadata of a committed offset. It says for each version the first
offset from which on the owner has written that version's rows, and the owner's epoch (the group's
generation). So the broker keeps it, refuses it from a member that lost the partition, and
replaces it with the next owner's first commit; a backfill has to go up to that first offset.

What an owner may count on:

1. A version is acknowledged before or with the first commit that follows its first row.
2. A partition without events is acknowledged as well, by a commit of its position.
3. A new owner looks at what was acknowledged before its first batch
   (:meth:`AcknowledgedVersions.earlier`) and writes that, too, or waits: past an acknowledged
   offset no event is stored without that version, unless the version was retired.

A rollout reads all of them with :func:`read_acknowledgements`. May import: kafka-python.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from kafka import KafkaAdminClient, KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata, TopicPartition

from qarm_feast.errors import ConfigError, ServiceUnavailableError
from streaming.clients import connect_admin
from streaming.config import StreamConfig

logger = logging.getLogger(__name__)

_TIMEOUT_MS = 10_000


@dataclass(frozen=True)
class Acknowledgement:
    """The first offset that was written per codebook version, and the group's generation."""

    first_offsets: Mapping[str, int]
    owner_epoch: int

    def encode(self) -> str:
        """Return the metadata that goes with a committed offset."""
        content = {"codebooks": dict(self.first_offsets), "owner_epoch": self.owner_epoch}
        return json.dumps(content, separators=(",", ":"))


def decode_acknowledgement(metadata: str | None) -> Acknowledgement | None:
    """Return what a committed offset's metadata acknowledges; None if it is not ours.

    Args:
        metadata: Empty where a tool has set the offset, or another consumer has.

    Returns:
        The acknowledgement.
    """
    try:
        content = json.loads(metadata or "")
        offsets = {str(name): int(offset) for name, offset in content["codebooks"].items()}
        return Acknowledgement(offsets, int(content["owner_epoch"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def read_acknowledgements(config: StreamConfig) -> dict[TopicPartition, Acknowledgement | None]:
    """Return what the owners of the item topic's partitions have acknowledged; joins no group.

    Args:
        config: Section ``stream``.

    Returns:
        One entry per partition; None where no worker has committed anything yet.

    Raises:
        ConfigError: If there is no such topic.
        ServiceUnavailableError: If the broker does not answer.
    """
    topic, group = config.item_topic, config.consumer_group
    with closing(connect_admin(config)) as admin:
        try:
            described = {found["name"]: found for found in admin.describe_topics()}
            if topic not in described:
                raise ConfigError(f"no topic {topic}; create it, then run `qarm-stream check`")
            stored = _committed_offsets(admin, group)
        except KafkaError as error:
            raise ServiceUnavailableError(
                f"the broker does not tell the committed offsets of group {group}: {error!r}; "
                "run `qarm-stream check`"
            ) from error
    numbers = sorted(found["partition_index"] for found in described[topic]["partitions"])
    partitions = [TopicPartition(topic, number) for number in numbers]
    return {
        partition: decode_acknowledgement(stored[partition].metadata)
        if partition in stored
        else None
        for partition in partitions
    }


def _committed_offsets(
    admin: KafkaAdminClient, group: str
) -> Mapping[TopicPartition, OffsetAndMetadata]:
    try:
        found: Mapping[TopicPartition, OffsetAndMetadata] = admin.list_group_offsets({group: None})[
            group
        ]
    except KafkaError as error:
        if not error.retriable:
            raise
        # The broker makes the topic of offsets when the first group joins.
        return {}
    return found


class ReadMarks(Protocol):
    """How far the assigned partitions are stored; ``streaming.source.WaitingRecords``."""

    @property
    def is_assigned(self) -> bool:
        """Whether there is an assignment."""
        ...

    @property
    def assignment_number(self) -> int:
        """Changes with every revocation."""
        ...

    @property
    def first_unstored(self) -> Mapping[TopicPartition, int]:
        """The offset to go on from, where it is known."""
        ...


class AcknowledgedVersions:
    """What this member has acknowledged on its partitions of one topic; use from one thread.

    Args:
        consumer: A subscribed member of the group.
        topic: The topic whose events get codes.
        marks: How far the partitions are stored.
    """

    def __init__(self, consumer: KafkaConsumer, topic: str, marks: ReadMarks) -> None:
        self._consumer = consumer
        self._topic = topic
        self._marks = marks
        self._assignment_number = -1
        self._earlier: frozenset[str] | None = None
        self._first_offsets: dict[TopicPartition, dict[str, int]] = {}
        self._owner_epoch = -1

    def earlier(self) -> frozenset[str]:
        """Return the versions that the owners before have acknowledged; asked once per assignment.

        Returns:
            Versions, retired ones among them; none without an assignment.

        Raises:
            ServiceUnavailableError: If the broker does not tell.
        """
        if not self._marks.is_assigned:
            return frozenset()
        self._follow_assignment()
        if self._earlier is None:
            self._earlier = self._ask_earlier()
        return self._earlier

    def announce(self, in_hand: Iterable[TopicPartition], versions: Iterable[str]) -> None:
        """Note that ``versions`` are written from here on; cheap if nothing has changed.

        Partitions of the batch in hand tell it with their next commit, the others at once.

        Args:
            in_hand: Partitions of the batch in hand; nothing else is read and not stored.
            versions: All versions that are written, no others.
        """
        if not self._marks.is_assigned:
            return
        self._follow_assignment()
        wanted, busy = set(versions), set(in_hand)
        idle: dict[TopicPartition, int] = {}
        for partition in self._own_partitions():
            known = self._first_offsets.get(partition)
            if known is not None and known.keys() == wanted:
                continue
            offset = self._next_offset(partition, is_busy=partition in busy)
            if offset is None:
                continue
            self._first_offsets[partition] = dict.fromkeys(wanted, offset) | {
                version: first for version, first in (known or {}).items() if version in wanted
            }
            if partition not in busy:
                idle[partition] = offset
        self._commit_idle(idle)

    def with_metadata(
        self, offsets: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """Return what to commit: the offsets, and what is acknowledged on their partitions."""
        return {
            partition: OffsetAndMetadata(offset, self._metadata_of(partition), -1)
            for partition, offset in offsets.items()
        }

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """Note that a commit of these partitions failed, so that the next call tells them again.

        Args:
            partitions: Partitions of either topic.
        """
        for partition in partitions:
            self._first_offsets.pop(partition, None)

    def _follow_assignment(self) -> None:
        if self._assignment_number != self._marks.assignment_number:
            self._assignment_number = self._marks.assignment_number
            self._owner_epoch = self._consumer.group_metadata().generation_id
            self._earlier = None
            self._first_offsets = {}

    def _own_partitions(self) -> list[TopicPartition]:
        return sorted(tp for tp in self._consumer.assignment() if tp.topic == self._topic)

    def _ask_earlier(self) -> frozenset[str]:
        versions: set[str] = set()
        try:
            for partition in self._own_partitions():
                stored = self._consumer.committed(partition, metadata=True, timeout_ms=_TIMEOUT_MS)
                found = decode_acknowledgement(stored.metadata) if stored else None
                versions |= set(found.first_offsets) if found else set()
        except KafkaError as error:
            raise ServiceUnavailableError(
                f"the broker does not tell the committed offsets of {self._topic}: {error!r}; "
                "run `qarm-stream check`"
            ) from error
        return frozenset(versions)

    def _next_offset(self, partition: TopicPartition, *, is_busy: bool) -> int | None:
        stored = self._marks.first_unstored.get(partition)
        if is_busy:
            return stored
        try:
            position: int | None = self._consumer.position(partition, timeout_ms=_TIMEOUT_MS)
        except KafkaError as error:
            logger.warning("position_unknown partition=%d error=%r", partition.partition, error)
            return None
        return position

    def _metadata_of(self, partition: TopicPartition) -> str:
        first_offsets = self._first_offsets.get(partition)
        if first_offsets is None:
            return ""
        return Acknowledgement(first_offsets, self._owner_epoch).encode()

    def _commit_idle(self, offsets: Mapping[TopicPartition, int]) -> None:
        if not offsets:
            return
        try:
            self._consumer.commit(self.with_metadata(offsets), timeout_ms=_TIMEOUT_MS)
        except KafkaError as error:
            self.forget(offsets)
            logger.warning("acknowledge_failed partitions=%d error=%r", len(offsets), error)

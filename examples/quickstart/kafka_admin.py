"""Topics, test traffic and progress of the quickstart's Kafka.

Used by the quickstart and by the integration tests. May import: kafka-python, pyarrow.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, TopicAlreadyExistsError

from qarm_feast.errors import QarmError, ServiceUnavailableError
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID, USER_ID
from streaming.clients import connect_admin, connect_consumer, connect_producer
from streaming.config import StreamConfig
from streaming.messages import (
    EMBEDDING,
    ENCODER_VERSION,
    SCHEMA_VERSION,
    SCHEMA_VERSION_HEADER,
    SPLIT,
    ItemEvent,
    Message,
    encode_item_event,
)

NUM_PARTITIONS = 4
_TOPIC_SETTINGS = {
    "message.timestamp.type": "LogAppendTime",
    "cleanup.policy": "delete",
    # max.message.bytes then bounds batches as workers unpack them, not as producers pack them.
    "compression.type": "uncompressed",
    # A dead letter is its record and some headers: it needs more room than the record had.
    "max.message.bytes": "1048588",
}
_DEAD_LETTER_BYTES = "2097152"
_WATCH_SECONDS = 0.25
_CONNECT_TIMEOUT_MS = 10_000

Progress = Callable[[int, int], None]
"""Called with (records stored, records in all)."""


class NotDrainedError(QarmError):
    """The consumer group did not reach the end of its topics in time."""


def create_topics(config: StreamConfig, num_partitions: int = NUM_PARTITIONS) -> None:
    """Create both input topics and the dead-letter topic; topics that exist are left alone.

    Args:
        config: Section ``stream``.
        num_partitions: Partitions of each topic.

    Raises:
        ServiceUnavailableError: If the broker refuses.
    """
    sizes: dict[str, dict[str, str]] = {topic: {} for topic in config.topics}
    sizes[config.dead_letter_topic] = {"max.message.bytes": _DEAD_LETTER_BYTES}
    with closing(connect_admin(config)) as admin:
        existing = set(admin.list_topics())
        missing = {
            topic: {
                "num_partitions": num_partitions,
                "replication_factor": -1,
                "configs": _TOPIC_SETTINGS | extra,
            }
            for topic, extra in sizes.items()
            if topic not in existing
        }
        if not missing:
            return
        try:
            admin.create_topics(missing, wait_for_metadata=True)
        except TopicAlreadyExistsError:
            # Someone else made them between the two requests.
            admin.wait_for_topics(list(missing))
        except KafkaError as error:
            raise ServiceUnavailableError(
                f"{config.bootstrap_servers} made no topics {', '.join(missing)}: {error}"
            ) from error


def produce_items(
    config: StreamConfig, items: pa.Table, on_progress: Progress | None = None
) -> int:
    """Send one event per row, oldest first, and return how many the broker has acknowledged.

    Args:
        config: Section ``stream``.
        items: ``item_id``, ``upload_timestamp`` or ``event_timestamp``, content columns, and
            ``embedding`` with ``encoder_version`` if the vectors are ready.
        on_progress: Told now and then how far it is.

    Raises:
        ServiceUnavailableError: If the broker does not take them all.
    """
    name = EVENT_TIMESTAMP if EVENT_TIMESTAMP in items.column_names else "upload_timestamp"
    items = items.rename_columns(
        [EVENT_TIMESTAMP if column == name else column for column in items.column_names]
    )
    if ENCODER_VERSION not in items.column_names and EMBEDDING in items.column_names:
        # Without its encoder's name a vector means nothing; the content is encoded instead.
        items = items.drop_columns([EMBEDDING])
    messages = item_messages(
        items.sort_by([(EVENT_TIMESTAMP, "ascending"), (ITEM_ID, "ascending")])
    )
    return _produce(config, config.item_topic, messages, items.num_rows, on_progress)


def produce_interactions(
    config: StreamConfig, interactions: pa.Table, on_progress: Progress | None = None
) -> int:
    """Send one event per row, oldest first, and return how many the broker has acknowledged.

    Args:
        config: Section ``stream``.
        interactions: ``user_id``, ``item_id``, ``event_timestamp``, bool tasks, maybe ``split``.
        on_progress: Told now and then how far it is.

    Raises:
        ServiceUnavailableError: If the broker does not take them all.
    """
    in_order = interactions.sort_by([(EVENT_TIMESTAMP, "ascending")])
    messages = interaction_messages(in_order)
    num_rows = interactions.num_rows
    return _produce(config, config.interaction_topic, messages, num_rows, on_progress)


def item_messages(items: pa.Table) -> Iterator[Message]:
    """Return the item events of a table, as ``streaming.messages`` encodes them."""
    fixed = (ITEM_ID, EVENT_TIMESTAMP, EMBEDDING, ENCODER_VERSION)
    names = [name for name in items.column_names if name not in fixed]
    for batch in items.to_batches(max_chunksize=4096):
        times = batch[EVENT_TIMESTAMP].cast(pa.int64()).to_pylist()
        vectors, versions = _ready_vectors(batch)
        rows = batch.select(names).to_pylist()
        ids = batch[ITEM_ID].to_pylist()
        for item_id, time_us, row, vector, version in zip(
            ids, times, rows, vectors, versions, strict=True
        ):
            content = {name: value for name, value in row.items() if not _is_missing(value)}
            yield encode_item_event(ItemEvent(item_id, time_us, content, vector, version))


def interaction_messages(interactions: pa.Table) -> Iterator[Message]:
    """Return the interaction events of a table.

    Written as text column by column, which is five times as fast as
    ``encode_interaction_event`` row by row; a test keeps the two equal.
    """
    names = interactions.column_names
    tasks = [n for n in names if pa.types.is_boolean(interactions.schema.field(n).type)]
    columns = [interactions[USER_ID], interactions[ITEM_ID]]
    columns.append(interactions[EVENT_TIMESTAMP].cast(pa.int64()))
    columns += [pc.if_else(interactions[name], "true", "false") for name in tasks]
    fields = [f'"{USER_ID}":%d', f'"{ITEM_ID}":%d', f'"{EVENT_TIMESTAMP}":%d']
    fields += [json.dumps(name).replace("%", "%%") + ":%s" for name in tasks]
    if SPLIT in names:
        columns.append(interactions[SPLIT])
        fields.append(f'"{SPLIT}":"%s"')
    template = "{" + ",".join(fields) + "}"
    headers = [(SCHEMA_VERSION_HEADER, SCHEMA_VERSION)]
    for row in zip(*[column.to_pylist() for column in columns], strict=True):
        yield Message(b"%d" % row[0], (template % row).encode(), headers)


def wait_until_drained(
    config: StreamConfig,
    timeout_seconds: float,
    on_progress: Progress | None = None,
) -> int:
    """Wait until the group has committed the end of both input topics; return that many records.

    Args:
        config: Section ``stream``.
        timeout_seconds: Give up after this.
        on_progress: Told four times a second how far it is; what it raises ends the waiting.

    Raises:
        NotDrainedError: If it takes longer.
    """
    deadline = time.monotonic() + timeout_seconds
    with closing(connect_admin(config)) as admin, _reader(config) as reader:
        while True:
            stored, total = _progress(config, admin, reader)
            if on_progress is not None:
                on_progress(stored, total)
            if stored == total:
                return total
            if time.monotonic() > deadline:
                raise NotDrainedError(
                    f"group {config.consumer_group} stored {stored} of {total} records of "
                    f"{' and '.join(config.topics)} in {timeout_seconds:.0f} s; "
                    "read the workers' logs"
                )
            time.sleep(_WATCH_SECONDS)


def count_records(config: StreamConfig, topic: str) -> int:
    """Return how many records a topic holds.

    Args:
        config: Section ``stream``.
        topic: A topic that exists.

    Raises:
        ServiceUnavailableError: If no broker answers.
    """
    with _reader(config) as reader:
        partitions = _partitions(reader, [topic])
        starts, ends = reader.beginning_offsets(partitions), reader.end_offsets(partitions)
        return sum(ends[tp] - starts[tp] for tp in partitions)


def _partitions(reader: KafkaConsumer, topics: Iterable[str]) -> list[TopicPartition]:
    return [
        TopicPartition(topic, partition)
        for topic in topics
        for partition in reader.partitions_for_topic(topic) or ()
    ]


def _progress(
    config: StreamConfig, admin: KafkaAdminClient, reader: KafkaConsumer
) -> tuple[int, int]:
    partitions = _partitions(reader, config.topics)
    ends = reader.end_offsets(partitions)
    starts = reader.beginning_offsets(partitions)
    committed = _committed(config.consumer_group, admin)
    total = sum(ends[tp] - starts[tp] for tp in partitions)
    stored = sum(max(0, committed.get(tp, 0) - starts[tp]) for tp in partitions)
    return stored, total


def _committed(group: str, admin: KafkaAdminClient) -> dict[TopicPartition, int]:
    try:
        offsets = admin.list_group_offsets([group])[group]
    except KafkaError as error:
        # The first member of the first group makes Kafka create its offsets topic.
        if error.retriable:
            return {}
        raise
    return {partition: entry.offset for partition, entry in offsets.items()}


def _produce(
    config: StreamConfig,
    topic: str,
    messages: Iterable[Message],
    total: int,
    on_progress: Progress | None,
) -> int:
    failures: list[BaseException] = []
    sent = 0
    with closing(connect_producer(config)) as producer:
        for sent, message in enumerate(messages, start=1):
            future = producer.send(
                topic, key=message.key, value=message.value, headers=message.headers
            )
            future.add_errback(failures.append)
            if on_progress is not None and sent % 5000 == 0:
                on_progress(sent, total)
        producer.flush()
    if failures:
        raise ServiceUnavailableError(
            f"{config.bootstrap_servers} refused {len(failures)} of {sent} records for {topic}: "
            f"{failures[0]!r}"
        ) from failures[0]
    return sent


def _is_missing(value: object) -> bool:
    # Data frames spell a missing number as NaN.
    return value is None or (isinstance(value, float) and math.isnan(value))


def _ready_vectors(batch: pa.RecordBatch) -> tuple[Sequence[Any], Sequence[str | None]]:
    names = batch.schema.names
    if EMBEDDING not in names:
        nothing = [None] * batch.num_rows
        return nothing, nothing
    vectors = [
        None if not value.is_valid else value.values.to_numpy() for value in batch[EMBEDDING]
    ]
    return vectors, batch[ENCODER_VERSION].to_pylist()


@contextmanager
def _reader(config: StreamConfig) -> Iterator[KafkaConsumer]:
    # It reads offsets only, so it never joins the group.
    with closing(connect_consumer(config, _CONNECT_TIMEOUT_MS)) as reader:
        reader.topics()
        yield reader

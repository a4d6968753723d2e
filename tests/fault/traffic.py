"""The seeded stream of events, and the thread that sends it at a steady rate."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
from kafka.errors import KafkaError

from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.schema import TIMESTAMP
from streaming.clients import connect_producer
from streaming.config import StreamConfig
from streaming.messages import (
    InteractionEvent,
    ItemEvent,
    Message,
    UserErasure,
    encode_arrow,
    encode_interaction_event,
    encode_item_event,
    encode_user_erasure,
)
from tests.stream_repo import EMBEDDING_DIM, ENCODER_VERSION, START

TASK_NAMES = ("is_click", "is_like")
NUM_ITEMS = 600
NUM_USERS = 80
_STEP_MICROS = 1000
_JITTER_STEPS = 1500
_STEPS_PER_TICK = 250
"""Times are this coarse, so that many edits of one item share one."""
_TICK_SECONDS = 0.05
_ACKNOWLEDGE_SECONDS = 60.0
_MAX_ROUNDS = 5


UserEvent = InteractionEvent | UserErasure
"""What the interaction topic carries."""


class Parcel(NamedTuple):
    """One Kafka message and the events in it."""

    message: Message
    items: tuple[ItemEvent, ...] = ()
    interactions: tuple[UserEvent, ...] = ()

    @property
    def num_events(self) -> int:
        """Events in the message."""
        return len(self.items) + len(self.interactions)


class SeededEvents:
    """An endless stream of parcels that depends on the seed alone."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._step = 0
        self._sent: list[Parcel] = []

    def __iter__(self) -> Iterator[Parcel]:
        return self

    def __next__(self) -> Parcel:
        """Return the next parcel."""
        kind = self._rng.random()
        if kind < 0.05 and self._sent:
            # An exact duplicate, possibly of something long ago.
            return self._sent[int(self._rng.integers(len(self._sent)))]
        if kind < 0.10:
            items = tuple(self._upload() for _ in range(int(self._rng.integers(2, 12))))
            parcel = Parcel(encode_arrow(arrow_items(items)), items)
        elif kind < 0.15:
            item = ItemEvent(self._item_id(), self._timestamp(), content={}, is_deleted=True)
            parcel = Parcel(encode_item_event(item), (item,))
        elif kind < 0.65:
            item = self._upload()
            parcel = Parcel(encode_item_event(item), (item,))
        elif kind < 0.98:
            event = self._interaction()
            parcel = Parcel(encode_interaction_event(event, TASK_NAMES), (), (event,))
        else:
            erasure = UserErasure(int(self._rng.integers(NUM_USERS)), self._timestamp())
            parcel = Parcel(encode_user_erasure(erasure), (), (erasure,))
        self._sent.append(parcel)
        return parcel

    def _upload(self) -> ItemEvent:
        vector_D = self._rng.standard_normal(EMBEDDING_DIM).astype(np.float32)
        content = {"title": f"edit {self._step}"} if self._rng.random() < 0.5 else {}
        return ItemEvent(self._item_id(), self._timestamp(), content, vector_D, ENCODER_VERSION)

    def _interaction(self) -> InteractionEvent:
        user_id = int(self._rng.integers(NUM_USERS))
        labels = (bool(self._rng.random() < 0.7), bool(self._rng.random() < 0.3))
        return InteractionEvent(user_id, self._item_id(), self._timestamp(), labels)

    def _item_id(self) -> int:
        return int(self._rng.integers(NUM_ITEMS))

    def _timestamp(self) -> int:
        """Return a time that goes up on the whole and back and forth in detail."""
        self._step += 1
        step = self._step + int(self._rng.integers(-_JITTER_STEPS, _JITTER_STEPS))
        return START + step // _STEPS_PER_TICK * _STEPS_PER_TICK * _STEP_MICROS


def arrow_items(items: Iterable[ItemEvent]) -> pa.Table:
    """Return uploads as the columns of an Arrow record."""
    rows = list(items)
    vectors = [None if item.embedding is None else item.embedding.tolist() for item in rows]
    return pa.table(
        {
            "item_id": pa.array([item.item_id for item in rows], pa.int64()),
            "event_timestamp": pa.array([item.event_timestamp for item in rows]).cast(TIMESTAMP),
            "title": pa.array([item.content.get("title") for item in rows], pa.string()),
            "embedding": pa.array(vectors, pa.list_(pa.float32())),
            "encoder_version": pa.array([item.encoder_version for item in rows], pa.string()),
        }
    )


class Sender:
    """Sends parcels at a steady rate on its own thread, for as long as its ``with`` block.

    Args:
        config: Section ``stream``.
        parcels: Where the parcels come from.
        per_second: Messages per second.
    """

    def __init__(self, config: StreamConfig, parcels: Iterator[Parcel], per_second: float) -> None:
        self._config = config
        self._parcels = parcels
        self._per_second = per_second
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._sent: list[Parcel] = []
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        # After a failure the broker may be gone; nobody asks for the parcels then.
        self._thread.join(_ACKNOWLEDGE_SECONDS)

    def stop(self) -> list[Parcel]:
        """Stop, and return every parcel that was sent, all of them acknowledged.

        Raises:
            ServiceUnavailableError: If the broker does not take them.
        """
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            raise ServiceUnavailableError(f"traffic failed: {self._failure!r}") from self._failure
        return self._sent

    def _run(self) -> None:
        try:
            send_all(self._config, self._paced())
        except BaseException as error:  # noqa: BLE001  -- handed to the thread that asks
            self._failure = error

    def _paced(self) -> Iterator[Parcel]:
        start = time.monotonic()
        while not self._ended.wait(_TICK_SECONDS):
            due = int((time.monotonic() - start) * self._per_second)
            while len(self._sent) < due:
                parcel = next(self._parcels)
                self._sent.append(parcel)
                yield parcel


def send_all(config: StreamConfig, parcels: Iterable[Parcel]) -> int:
    """Send parcels until the broker has acknowledged each; return how many there were.

    Args:
        config: Section ``stream``.
        parcels: Any number of them.

    Raises:
        ServiceUnavailableError: If the broker takes some of them by no means.
    """
    count = 0
    for _ in range(_MAX_ROUNDS):
        refused: list[Parcel] = []
        with closing(connect_producer(config)) as producer:
            pending = []
            for parcel in parcels:
                topic = config.interaction_topic if parcel.interactions else config.item_topic
                message = parcel.message
                future = producer.send(topic, message.value, message.key, message.headers)
                pending.append((parcel, future))
            for parcel, future in pending:
                try:
                    future.get(_ACKNOWLEDGE_SECONDS)
                    count += 1
                except KafkaError:
                    # It may be there or not; sent again it is there once or twice.
                    refused.append(parcel)
        if not refused:
            return count
        parcels = refused
    raise ServiceUnavailableError(
        f"{config.bootstrap_servers} did not acknowledge {len(refused)} records"
    )

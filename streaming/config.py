"""Section ``stream`` of ``qarm.yaml``. May import: pydantic."""

import os
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from qarm_feast.config import Section
from streaming.limits import EventLimits

_LIMITS = fields(EventLimits)
_UriPrefix = Annotated[
    str, Field(pattern=r"^(file://)?/[^/]+/([^/]+/)*$|^[a-z][a-z0-9+.-]*://[^/]+/([^/]+/)*$")
]


def _half_of_the_cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) // 2)


class StreamConfig(Section):
    """Where events come from, how they are batched, and how a worker behaves."""

    bootstrap_servers: str = Field(
        default="localhost:9092", description="Kafka brokers, host:port, separated by commas."
    )
    item_topic: str = Field(default="item-events", description="Topic of item events.")
    interaction_topic: str = Field(
        default="interaction-events", description="Topic of interaction events."
    )
    dead_letter_topic: str = Field(
        default="qarm-dead-letters", description="Topic that takes records that break the contract."
    )
    consumer_group: str = Field(
        default="qarm-quantizer", description="Group whose members share the partitions."
    )
    auto_offset_reset: Literal["earliest", "latest"] = Field(
        default="earliest", description="Where a group without committed offsets starts."
    )
    max_batch_size: int = Field(default=2048, gt=0, description="Records that close a batch.")
    max_batch_bytes: int = Field(
        default=16_777_216, gt=0, description="Bytes of keys and values that close a batch."
    )
    max_batch_wait_seconds: float = Field(
        default=0.1, ge=0, description="Age of the oldest record that closes a batch."
    )
    task_names: Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default="auto",
        description="Task flags of interaction events; auto = those of the interaction log, or of "
        "data.input_dir before the first event.",
    )
    max_future_seconds: float = Field(
        default=300.0,
        ge=0,
        description="An event may lie this much later than its record's append time.",
    )
    max_record_bytes: int = Field(
        default=8_388_608,
        gt=0,
        description="Key, value and headers of one record. The broker's own bound is the topic's "
        "max.message.bytes, of a producer's batch; a record above the fetch sizes comes alone.",
    )
    max_decoded_bytes: int = Field(
        default=67_108_864,
        gt=0,
        description="An Arrow record unpacked, a cell counting as 16 bytes at least; and what is "
        "unpacked at once of a batch.",
    )
    max_image_pixels: int = Field(
        default=50_000_000, gt=0, description="Width times height of an image in an event."
    )
    allowed_uri_prefixes: tuple[_UriPrefix, ...] = Field(
        default=(),
        description="An image or audio given as text must start with one of these: folders, "
        "ending in a slash, as /srv/images/ or s3://bucket/; by default no URI is taken.",
    )
    max_replays: int = Field(
        default=3, gt=0, description="`qarm-stream dlq replay` sends a record again so often."
    )
    max_retry_wait_seconds: float = Field(
        default=5.0, gt=0, description="Longest pause between two tries at a store that is down."
    )
    codebook_poll_seconds: float = Field(
        default=5.0,
        gt=0,
        description="Time between two looks at the codebook registry while a worker runs.",
    )
    drift_window_items: int = Field(
        default=10_000,
        gt=0,
        description="Latest uploads that are held against each codebook's training set.",
    )
    shutdown_timeout_seconds: float = Field(
        default=30.0, gt=0, description="After SIGTERM a worker has this long to drain."
    )
    num_threads: int = Field(
        default_factory=_half_of_the_cores,
        gt=0,
        description="Compute threads of one worker; by default half of the cores.",
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        description="Address of /metrics; 0.0.0.0 lets Prometheus read from another machine.",
    )
    kafka_options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description="Passed as they are to every Kafka client (security_protocol, ssl_cafile ...); "
        "file names absolute, the password as QARM_STREAM__KAFKA_OPTIONS__SASL_PLAIN_PASSWORD.",
    )

    @property
    def limits(self) -> EventLimits:
        """Bounds that records must keep."""
        return EventLimits(**{field.name: getattr(self, field.name) for field in _LIMITS})

    @property
    def topics(self) -> tuple[str, str]:
        """Both input topics."""
        return (self.item_topic, self.interaction_topic)

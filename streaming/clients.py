"""Kafka clients made from section ``stream``; the faults of connecting, translated.

May import: kafka-python.
"""

import logging
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.consumer.group import RangePartitionAssignor
from kafka.errors import (
    KafkaConfigurationError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)

from qarm_feast.errors import ConfigError, ServiceUnavailableError
from streaming.config import StreamConfig
from streaming.messages import Message

_BOOTSTRAP_TIMEOUT_MS = 10_000
_PROBE_SECONDS = 0.25
_SEND_SECONDS = 30.0
_BOOTSTRAP_FAULT = re.compile(r"^Bootstrap connection to \S+ failed: (.*?)( \(backoff .*)?$")
_LOST_CONNECTION = re.compile(
    "socket disconnected|Connection reset by peer|Broken pipe|Request timed out"
)
_MAX_REASONS = 3
_RECONNECT_BACKOFF_MAX_MS = 1_000
"""kafka-python's own 30 s would keep a worker away long after a broker has come back."""
_OWN_OPTIONS = {
    "bootstrap_servers": "set stream.bootstrap_servers",
    "group_id": "set stream.consumer_group",
    "auto_offset_reset": "set stream.auto_offset_reset",
    "enable_auto_commit": "offsets are committed once both stores hold the rows",
    "partition_assignment_strategy": "the worker counts on eager rebalances",
    "acks": "dead letters wait for every replica in sync",
    "enable_idempotence": "a dead letter too large must not end the producer",
}
"""What ``kafka_options`` must not touch, and why."""
_TEXT_OPTIONS = ("sasl_plain_username", "sasl_plain_password", "ssl_password")
_LETTER_HEADER_BYTES = 65_536
"""Room for what a dead letter adds to its record."""


def connect_consumer(config: StreamConfig, connect_timeout_ms: int) -> KafkaConsumer:
    """Return a consumer of the group that commits nothing by itself.

    Args:
        config: Section ``stream``.
        connect_timeout_ms: How long a broker may take to answer first.

    Returns:
        The consumer, not subscribed yet.

    Raises:
        ServiceUnavailableError: If no broker answers.
        ConfigError: If a Kafka option is wrong.
    """
    fixed = {
        "group_id": config.consumer_group,
        "auto_offset_reset": config.auto_offset_reset,
        "enable_auto_commit": False,
        "allow_auto_create_topics": False,
        "max_poll_records": config.max_batch_size,
        "bootstrap_timeout_ms": connect_timeout_ms,
        # Eager: each revocation covers every partition. KafkaSource's bookkeeping relies on it.
        "partition_assignment_strategy": [RangePartitionAssignor],
    }
    return _connect(KafkaConsumer, config, fixed)


def connect_reader(config: StreamConfig, group: str | None) -> KafkaConsumer:
    """Return a consumer that joins no group; it is told by hand what to read.

    Args:
        config: Section ``stream``.
        group: Whose offsets it looks up and commits, if any.

    Returns:
        The consumer, nothing assigned yet.

    Raises:
        ServiceUnavailableError: If no broker answers.
        ConfigError: If a Kafka option is wrong.
    """
    fixed = {
        "group_id": group,
        "auto_offset_reset": "earliest",
        "enable_auto_commit": False,
        "allow_auto_create_topics": False,
        "bootstrap_timeout_ms": _BOOTSTRAP_TIMEOUT_MS,
    }
    return _connect(KafkaConsumer, config, fixed)


def connect_producer(config: StreamConfig) -> KafkaProducer:
    """Return a producer that waits for every replica in sync; it sends in small batches.

    Args:
        config: Section ``stream``.

    Returns:
        The producer; the caller closes it.

    Raises:
        ServiceUnavailableError: If no broker answers.
        ConfigError: If a Kafka option is wrong.
    """
    fixed = {
        "acks": "all",
        # kafka-python's idempotent producer fails for good once a broker finds one record too
        # large; what is sent here may come twice.
        "enable_idempotence": False,
        "linger_ms": 5,
        "max_request_size": config.max_record_bytes + _LETTER_HEADER_BYTES,
        "bootstrap_timeout_ms": _BOOTSTRAP_TIMEOUT_MS,
    }
    return _connect(KafkaProducer, config, fixed)


def send_all(producer: KafkaProducer, messages: Sequence[tuple[str, Message]]) -> list[bool]:
    """Send messages and wait until every replica in sync has them.

    Args:
        producer: Made by :func:`connect_producer`.
        messages: Each with its topic.

    Returns:
        Of each message whether its topic, or the client, has room for one so large.

    Raises:
        ServiceUnavailableError: If the broker does not take them.
    """
    try:
        pending = [_begin(producer, topic, message) for topic, message in messages]
        return [_is_taken(future) for future in pending]
    except KafkaError as error:
        topics = ", ".join(sorted({topic for topic, _ in messages}))
        raise ServiceUnavailableError(
            f"topic {topics} takes no records ({error!r}); run `qarm-stream check`"
        ) from error


def connect_admin(config: StreamConfig) -> KafkaAdminClient:
    """Return an admin client.

    Args:
        config: Section ``stream``.

    Returns:
        The client; the caller closes it.

    Raises:
        ServiceUnavailableError: If no broker answers.
        ConfigError: If a Kafka option is wrong.
    """
    return _connect(KafkaAdminClient, config, {"bootstrap_timeout_ms": _BOOTSTRAP_TIMEOUT_MS})


def _connect(client_type: Any, config: StreamConfig, fixed: dict[str, Any]) -> Any:
    fixed = {"reconnect_backoff_max_ms": _RECONNECT_BACKOFF_MAX_MS, **fixed}
    options = fixed | _options_of(client_type, config.kafka_options)
    servers = config.bootstrap_servers.split(",")
    # kafka-python leaks sockets and a thread when its constructor finds nobody.
    if "proxy_url" not in options:
        _wait_for_listener(servers, options["bootstrap_timeout_ms"] / 1000)
    with _client_warnings() as warnings:
        try:
            return client_type(bootstrap_servers=servers, **options)
        except (KafkaConfigurationError, AssertionError, ValueError, TypeError) as error:
            raise ConfigError(f"stream.kafka_options do not work: {error}") from error
        except (KafkaError, OSError) as error:
            protocol = options.get("security_protocol", "PLAINTEXT")
            reasons = warnings.reasons(with_login=protocol.startswith("SASL")) or error
            raise ServiceUnavailableError(
                f"{config.bootstrap_servers} answers, but gives no Kafka session with "
                f"security_protocol={protocol} ({reasons}); look at "
                "stream.kafka_options (security_protocol, ssl_*, sasl_*) and the broker's log"
            ) from error


class _BootstrapFaults(logging.Handler):
    """Keeps why connections failed: the client says it in its log and nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        # A refused password shows as such or as a lost connection, from try to try: a broker
        # answers and closes at once, and kafka-python drops an answer that it reads with the end.
        self._reasons: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        found = _BOOTSTRAP_FAULT.search(record.getMessage())
        if found and len(self._reasons) < _MAX_REASONS:
            self._reasons[found[1]] = None

    def reasons(self, with_login: bool) -> str:
        """Return the different reasons in the order in which they came first.

        Args:
            with_login: Whether a user logs in, so that a lost connection may mean a refused one.

        Returns:
            The reasons, empty if the client gave none.
        """
        reasons = list(self._reasons)
        if with_login and reasons and all(map(_LOST_CONNECTION.search, reasons)):
            reasons.append("a broker that refuses a user name or a password closes so, too")
        return "; ".join(reasons)


@contextmanager
def _client_warnings() -> Iterator[_BootstrapFaults]:
    handler = _BootstrapFaults()
    client_logger = logging.getLogger("kafka")
    client_logger.addHandler(handler)
    try:
        yield handler
    finally:
        client_logger.removeHandler(handler)


def _begin(producer: KafkaProducer, topic: str, message: Message) -> Any:
    """Return the broker's coming answer, or None if the client finds the message too large."""
    key, value, headers = message
    try:
        return producer.send(topic, key=key, value=value, headers=headers)
    except MessageSizeTooLargeError:
        return None


def _is_taken(future: Any) -> bool:
    try:
        if future is not None:
            future.get(_SEND_SECONDS)
    except (MessageSizeTooLargeError, RecordListTooLargeError):
        return False
    return future is not None


def _wait_for_listener(servers: list[str], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        for server in servers:
            host, _, port = server.strip().rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout_seconds).close()
                return
            except ValueError as error:
                raise ConfigError(
                    f"stream.bootstrap_servers has {server!r}, which is not host:port"
                ) from error
            except OSError as error:
                fault = error
        if time.monotonic() > deadline:
            raise ServiceUnavailableError(
                f"no Kafka broker answers at {', '.join(servers)} ({fault}); "
                "start it, or set stream.bootstrap_servers"
            )
        time.sleep(_PROBE_SECONDS)


def _options_of(client_type: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that this client knows; one that no client knows is an error."""
    taken = [f"{name} ({why})" for name, why in _OWN_OPTIONS.items() if name in options]
    if taken:
        raise ConfigError(f"stream.kafka_options must not hold {', '.join(taken)}")
    # A password of digits comes as a number, and a number is not the text that it was.
    numbers = [name for name in _TEXT_OPTIONS if isinstance(options.get(name), int | float)]
    if numbers:
        raise ConfigError(
            f"stream.kafka_options has {', '.join(numbers)} as a number or a bool; put the text "
            'in double quotes, which are part of the value in the environment, too: "12345"'
        )
    known = set().union(
        *(client.DEFAULT_CONFIG for client in (KafkaConsumer, KafkaProducer, KafkaAdminClient))
    )
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(
            f"stream.kafka_options has {', '.join(unknown)}, which kafka-python does not know"
        )
    return {name: value for name, value in options.items() if name in client_type.DEFAULT_CONFIG}

"""Redis's wire protocol for columns: commands as one buffer, many answers in one call.

redis-py packs and reads command by command, which costs more than all else. Its connections are
used as they are: pool, TLS, password, time limit and retries are its own.

Shape letters in this file: N rows. May import: redis, hiredis (Feast's redis extra brings it).
"""

from collections.abc import Callable
from typing import Any

import hiredis
import redis

from qarm_feast.online_stores.blobs import (
    Blobs,
    common_width,
    contents,
    join_blobs,
    look_up_blobs,
    sizes_of,
)

_KEYS_PER_ROUND_TRIP = 10_000
_READ_BYTES = 1 << 17


def hmget_all(
    client: redis.Redis, entity_keys: Blobs, project: bytes, fields: list[bytes]
) -> list[list[bytes | None]]:
    """Return the fields of every entity, fetched in one round trip for ten thousand entities.

    Args:
        client: Of a redis server.
        entity_keys: Keys without the project.
        project: What every key ends with.
        fields: Fields of each key's hash.

    Returns:
        For each key one entry per field, ``None`` where it is not there.

    Raises:
        redis.RedisError: If the server does not answer, or answers with an error.
    """
    head = b"*%d\r\n" % (2 + len(fields)) + command_bytes(b"HMGET")
    tail = command_bytes(*fields)
    replies: list[list[bytes | None]] = []
    for start in range(0, len(entity_keys), _KEYS_PER_ROUND_TRIP):
        part = entity_keys[start : start + _KEYS_PER_ROUND_TRIP]
        packed, _ = contents(wire_keys(part, project, head, tail))

        def fetch(connection: Any, packed: bytes = packed, count: int = len(part)) -> list[Any]:
            connection.send_packed_command([packed])
            return Replies(connection).all(count)

        replies += raise_first_error(on_connection(client, fetch))
    return replies


def on_connection(client: Any, work: Callable[[Any], list[Any]]) -> list[Any]:
    """Run ``work`` on a connection of the pool, again after a lost one as redis-py does.

    Everything that is sent here may be sent twice: reads, and writes under a guard.
    """
    connection = client.connection_pool.get_connection()
    try:
        answers: list[Any] = connection.retry.call_with_retry(
            lambda: work(connection), lambda _: connection.disconnect()
        )
    except BaseException:
        # Replies may be under way that nobody will read.
        connection.disconnect()
        raise
    finally:
        client.connection_pool.release(connection)
    return answers


def command_bytes(*arguments: bytes) -> bytes:
    """Return arguments in the protocol's form, without the count that a command starts with."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


def wire_keys(entity_keys: Blobs, project: bytes, head: bytes = b"", tail: bytes = b"") -> Blobs:
    """Return each entity's key as one argument in the protocol's form.

    Args:
        entity_keys: Keys without the project.
        project: What every key ends with.
        head: What stands before each argument.
        tail: What stands behind it.

    Returns:
        One blob per key.
    """
    width = common_width(entity_keys)
    behind = project + b"\r\n" + tail
    if width is not None:
        return join_blobs(head + b"$%d\r\n" % (width + len(project)), entity_keys, behind)
    sizes = look_up_blobs(sizes_of(entity_keys) + len(project), b"$%d\r\n".__mod__)
    return join_blobs(head, sizes, entity_keys, behind)


class Replies:
    """The answers that one connection still owes; reads all that come until it is given back.

    Args:
        connection: One of redis-py's, with no answer read in part.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        # redis-py has no public way to this, nor to the socket.
        self._reader = hiredis.Reader(replyError=connection._parser.parse_error)
        self._buffer = bytearray(_READ_BYTES)

    def next(self) -> Any:
        """Return the next answer; where the server answers with an error, the error.

        Returns:
            The answer.

        Raises:
            redis.ConnectionError: If the connection ends.
            redis.TimeoutError: If the server does not answer in time.
        """
        while (reply := self._reader.gets()) is False:
            # Not kept from the start: a lost connection has a socket again once it has sent.
            num_bytes = _receive(self._connection._sock, self._buffer)
            self._reader.feed(self._buffer, 0, num_bytes)  # type: ignore[arg-type]  # any buffer
        return reply

    def all(self, count: int) -> list[Any]:
        """Return the next ``count`` answers, before any other was read."""
        # As one list of answers: the compiled parser makes all of them in one call.
        self._reader.feed(b"*%d\r\n" % count)
        answers: list[Any] = self.next()
        return answers


def _receive(sock: Any, buffer: bytearray) -> int:
    """Fill the buffer with what has arrived; a broken socket becomes redis-py's error."""
    try:
        num_bytes: int = sock.recv_into(buffer)
    except TimeoutError as error:
        raise redis.TimeoutError(f"no answer in time: {error}") from error
    except OSError as error:
        raise redis.ConnectionError(f"the connection broke: {error}") from error
    if not num_bytes:
        raise redis.ConnectionError("the server closed the connection")
    return num_bytes


def raise_first_error(replies: list[Any]) -> list[Any]:
    """Return the answers if none is an error."""
    # Thousands of answers are of one or two types.
    if any(issubclass(kind, Exception) for kind in set(map(type, replies))):
        raise next(reply for reply in replies if isinstance(reply, Exception))
    return replies

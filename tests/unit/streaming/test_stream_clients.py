"""What a user is told when a broker closes the connection instead of answering."""

import socket
import threading
from collections.abc import Iterator

import pytest

from qarm_feast.errors import ServiceUnavailableError
from streaming.clients import connect_consumer
from streaming.config import StreamConfig

_CONNECT_TIMEOUT_MS = 800
_REFUSAL = "a broker that refuses a user name or a password closes so, too"


@pytest.fixture
def closing_server() -> Iterator[str]:
    """The address of a server that closes every connection once something comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_a_login_that_ends_in_a_closed_connection_names_the_password(closing_server: str) -> None:
    login = {"sasl_mechanism": "PLAIN", "sasl_plain_username": "me", "sasl_plain_password": "x1"}

    assert _REFUSAL in _refusal_of(closing_server, {"security_protocol": "SASL_PLAINTEXT", **login})


def test_without_a_login_a_closed_connection_is_not_a_password(closing_server: str) -> None:
    message = _refusal_of(closing_server, {})

    assert "gives no Kafka session with security_protocol=PLAINTEXT" in message
    assert _REFUSAL not in message


def _refusal_of(server: str, options: dict[str, str]) -> str:
    config = StreamConfig(bootstrap_servers=server, kafka_options=options)
    with pytest.raises(ServiceUnavailableError) as caught:
        connect_consumer(config, _CONNECT_TIMEOUT_MS)
    return str(caught.value)

"""What a worker tells the world: ``/healthz``, ``/readyz`` and Prometheus' ``/metrics``.

May import: prometheus_client, the standard library.
"""

import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from qarm_feast.errors import ConfigError
from qarm_feast.observability import STREAM_READY

logger = logging.getLogger(__name__)

STALL_SECONDS = 300.0
"""A worker that finishes no step for so long is stuck; its group has given it up as well."""


class WorkerHealth:
    """Set by the worker's thread, read by the HTTP threads."""

    def __init__(self) -> None:
        self._last_step = time.monotonic()
        self._not_ready = "starting"

    def step(self) -> None:
        """Note that the worker goes on."""
        self._last_step = time.monotonic()

    def set_ready(self) -> None:
        """The worker can store events."""
        self._not_ready = ""
        STREAM_READY.set(1)

    def set_not_ready(self, reason: str) -> None:
        """The worker waits for something."""
        self._not_ready = reason
        STREAM_READY.set(0)

    def is_alive(self) -> bool:
        """Whether a step was finished lately."""
        return time.monotonic() - self._last_step < STALL_SECONDS

    def not_ready_reason(self) -> str:
        """Return why events cannot be stored now; empty if they can."""
        return self._not_ready


class HealthServer:
    """Serves the three paths from a daemon thread for as long as its ``with`` block.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        health: What to tell.

    Raises:
        ConfigError: If the address cannot be bound.
    """

    def __init__(self, host: str, port: int, health: WorkerHealth) -> None:
        try:
            self._server = ThreadingHTTPServer((host, port), _handler_of(health))
        except OSError as error:
            raise ConfigError(
                f"/metrics cannot listen on {host}:{port} ({error.strerror}); give each worker "
                "its own --metrics-port, or 0 for a free one"
            ) from error
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler_of(health: WorkerHealth) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body, kind = _answer(self.path, health)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            logger.debug("http_request " + format, *args)

    return Handler


def _answer(path: str, health: WorkerHealth) -> tuple[int, bytes, str]:
    plain = "text/plain; charset=utf-8"
    if path == "/metrics":
        return 200, generate_latest(), CONTENT_TYPE_LATEST
    if path == "/healthz":
        return (200, b"ok\n", plain) if health.is_alive() else (503, b"stalled\n", plain)
    if path == "/readyz":
        reason = health.not_ready_reason()
        return (503, f"{reason}\n".encode(), plain) if reason else (200, b"ok\n", plain)
    return 404, b"try /healthz, /readyz or /metrics\n", plain

"""``qarm-stream run``: one worker as a process that starts, answers for itself, and drains.

May import: everything in this package; torch comes in through qarm_feast.
"""

import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qarm_feast.config import load_section
from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.observability import ObservabilityConfig
from streaming.assembly import limit_threads, open_pipeline
from streaming.background import background_compaction
from streaming.config import StreamConfig
from streaming.health import HealthServer, WorkerHealth
from streaming.worker import Drain, StreamWorker

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_BATCH_GRACE_SECONDS = 5.0
"""After the time to drain the batch in hand gets so long before the process is ended."""


def run_worker(config_path: str, metrics_port: int | None = None) -> None:
    """Run one worker until SIGTERM or SIGINT; returns when it has drained.

    Args:
        config_path: Path of ``qarm.yaml``.
        metrics_port: Port of /metrics instead of the configured one; 0 takes a free one.

    Raises:
        ConfigError: If the configuration is wrong or ``feast apply`` has not run.
        CodebookError: If no codebook is published or one is damaged.
        ServiceUnavailableError: If the broker does not answer.
    """
    config = load_section(config_path, "stream", StreamConfig)
    limit_threads(config.num_threads)
    drain = Drain(config.shutdown_timeout_seconds)
    health = WorkerHealth()
    port = metrics_port
    if port is None:
        port = load_section(config_path, "observability", ObservabilityConfig).metrics_port
    with (
        _drain_on_signals(drain),
        HealthServer(config.metrics_host, port, health) as server,
        open_pipeline(config_path, config) as (pipeline, settings),
        background_compaction(config_path, drain.requested.is_set),
    ):
        logger.info("worker_started pid=%d metrics_port=%d", os.getpid(), server.port)
        # What is loaded now stays: a full collection would only walk over it again and again.
        gc.freeze()
        try:
            StreamWorker(pipeline, settings, health, drain).run()
        finally:
            # duckdb's binding reports whatever is still frozen at exit as a leak.
            gc.unfreeze()
    logger.info("worker_stopped pid=%d", os.getpid())


@contextmanager
def _drain_on_signals(drain: Drain) -> Iterator[None]:
    """Let SIGTERM and SIGINT set the flag, and nothing else."""

    def request(number: int, frame: FrameType | None) -> None:
        drain.requested.set()

    before = {number: signal.signal(number, request) for number in _STOP_SIGNALS}
    is_over = threading.Event()
    watchdog = threading.Thread(target=_end_late_drain, args=(drain, is_over), daemon=True)
    watchdog.start()
    try:
        yield
    finally:
        is_over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_late_drain(drain: Drain, is_over: threading.Event) -> None:
    """End the process when a batch takes longer than the time to drain; it will be replayed."""
    drain.requested.wait()
    # A process that runs a worker among other things lives on after it has drained.
    if is_over.wait(drain.timeout_seconds + LAST_BATCH_GRACE_SECONDS):
        return
    logger.error("drain_timed_out seconds=%.0f", drain.timeout_seconds)
    os._exit(ServiceUnavailableError.exit_code)

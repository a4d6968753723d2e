"""Logging set-up for entry points, and every Prometheus metric of the system.

Library code only calls ``logging.getLogger(__name__)``; entry points call
:func:`configure_logging` once. May import: prometheus_client.
"""

import json
import logging
import sys
from typing import Literal

from pydantic import Field

from qarm_feast.config import Section


class ObservabilityConfig(Section):
    """Section ``observability``."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe level that is written."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="One line of text or one JSON object per record."
    )
    metrics_port: int = Field(
        default=9108, ge=0, le=65535, description="HTTP port of /metrics; 0 takes a free one."
    )


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(config: ObservabilityConfig) -> None:
    """Send our packages' records to stderr; leave the root logger and other libraries alone."""
    handler = logging.StreamHandler(sys.stderr)
    if config.log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s", "%H:%M:%S")
        )
    for package in ("qarm_feast", "streaming", "torchrec_models"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(config.log_level.upper())
        logger.propagate = False

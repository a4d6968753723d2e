"""Logging set-up for entry points, and every Prometheus metric of the system.

Library code only calls ``logging.getLogger(__name__)``; entry points call
:func:`configure_logging` once. May import: prometheus_client.
"""

import json
import logging
import re
import sys
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram
from pydantic import Field

from qarm_feast.config import Section

_TEMPLATE_VALUE = re.compile(r"(?:(\w+)=)?%[-+# 0-9.]*[diouxXeEfFgGcrsa]")

STREAM_EVENTS = Counter(
    "qarm_stream_events",
    "Events by outcome: item, takedown, interaction, erasure (stored), dead_letter (refused).",
    ["outcome"],
)
STREAM_DEAD_LETTERS = Counter(
    "qarm_stream_dead_letters", "Refused records, or rows of them, by reason.", ["reason"]
)
STREAM_RETRIES = Counter("qarm_stream_write_retries", "Tries at a store that failed.", ["store"])
STREAM_BATCH_ITEMS = Histogram(
    "qarm_stream_batch_items",
    "Records of one batch.",
    buckets=(1, 4, 16, 64, 256, 1024, 2048, 4096, 16384),
)
STREAM_DECODE_SECONDS = Histogram("qarm_stream_decode_seconds", "Decoding one batch.")
STREAM_ENCODE_SECONDS = Histogram("qarm_stream_encode_seconds", "Content to vectors, one batch.")
STREAM_QUANTIZE_SECONDS = Histogram(
    "qarm_stream_quantize_seconds", "Vectors to the codes of every version, one batch."
)
STREAM_DRIFT_SECONDS = Histogram(
    "qarm_stream_drift_seconds", "Holding one batch's codes against the training set."
)
STREAM_WRITE_SECONDS = Histogram(
    "qarm_stream_write_seconds", "Writing one batch to one store.", ["store"]
)
STREAM_CONSUMER_LAG = Gauge(
    "qarm_stream_consumer_lag_messages",
    "Records in an assigned partition that are not stored yet.",
    ["topic", "partition"],
)
STREAM_READY = Gauge("qarm_stream_ready", "1 while the worker is able to store events.")
ITEM_FRESHNESS_SECONDS = Histogram(
    "qarm_item_freshness_seconds",
    "From a record's append time until its batch is readable online; the oldest of each batch.",
    buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
)
CODEBOOK_INFO = Gauge(
    "qarm_codebook_info",
    "1 for each codebook version that this process writes, 0 for one that it has stopped writing.",
    ["version"],
)
CODEBOOK_REFRESH_FAILED = Gauge(
    "qarm_codebook_refresh_failed",
    "1 while a version that should be written cannot be loaded, or the registry cannot be read; "
    "the worker goes on with the versions that it has.",
)
GPU_LOST = Gauge(
    "qarm_gpu_lost",
    "1 once the GPU has failed in a search of codes; the processor has taken over, or the process "
    "ends (quantizer.enable_cpu_fallback).",
)
CODEBOOK_ERROR_RATIO = Gauge(
    "qarm_codebook_quantization_error_ratio",
    "Quantization error of the latest uploads after this level, by that of the training set.",
    ["version", "level"],
)
CODEBOOK_CODE_DIVERGENCE = Gauge(
    "qarm_codebook_code_divergence_bits",
    "Jensen-Shannon divergence of the codes of the latest uploads and of the training set, 0 to 1.",
    ["version", "level"],
)
CODEBOOK_DRIFT_ITEMS = Gauge(
    "qarm_codebook_drift_items",
    "Uploads in the window that the two drift figures are taken over; few make them noisy.",
    ["version"],
)

OFFLINE_DAMAGED_PARTS = Counter(
    "qarm_offline_damaged_parts",
    "Damaged parts of the offline logs that this process or its compactions met; `qarm offline "
    "status` lists those in quarantine.",
)
OFFLINE_MERGED_PARTS = Counter(
    "qarm_offline_merged_parts", "Parts that this process's compactions took together."
)
OFFLINE_COMPACTION_FAILED = Gauge(
    "qarm_offline_compaction_failed",
    "1 while this process's latest compaction of the offline logs failed; the log says why.",
)
SERVING_LOG_ROWS = Counter(
    "qarm_serving_log_rows",
    "Sampled answers of a reader by outcome: written to the log, or dropped (a full buffer, a log "
    "that could not be written).",
    ["outcome"],
)

RANK_SECONDS = Histogram(
    "qarm_rank_request_seconds",
    "From a request's last byte to its scores, by outcome: ok, or the kind of the error.",
    ["outcome"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)
RANK_CANDIDATES = Histogram(
    "qarm_rank_candidates",
    "Candidates of one scored request.",
    buckets=(1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10000),
)
RANK_MISSING_ITEMS = Counter(
    "qarm_rank_missing_items", "Candidates that were scored without codes: unknown or taken down."
)
RANK_EMPTY_HISTORIES = Counter(
    "qarm_rank_empty_histories", "Requests of users without any recent item."
)
RANK_ERRORS = Counter("qarm_rank_errors", "Requests that were not scored, by kind.", ["kind"])
RANK_READY = Gauge(
    "qarm_rank_ready", "1 while model, store and codebook agreed when /health was last asked."
)


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
            **_fields_of(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return the event's name, and the values that its template names: ``items=%d``."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    names = _TEMPLATE_VALUE.findall(str(record.msg))
    if not arguments or len(names) != len(arguments):
        return {}
    fields = {name: value for name, value in zip(names, arguments, strict=True) if name}
    return {"event": str(record.msg).partition(" ")[0], "fields": fields}


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

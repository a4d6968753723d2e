"""Stage "stream": a real Kafka, all events in time order, two workers that drain the topics."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from examples.quickstart.broker import KafkaBroker
from examples.quickstart.kafka_admin import (
    create_topics,
    produce_interactions,
    produce_items,
    wait_until_drained,
)
from examples.quickstart.layout import RunLayout
from examples.quickstart.processes import ChildFailedError, Processes
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.config import load_section
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.schema import CONTENT_TEXT_COLUMNS, ITEM_ID
from streaming.config import StreamConfig

_WORKERS = ("worker-1", "worker-2")
_DRAIN_SECONDS = 600.0
_SHOW_EVERY_SECONDS = 5.0


def run_stream(
    layout: RunLayout, processes: Processes, bin_dir: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Produce everything, let two workers of one group drain it, and return the counts.

    Raises:
        ChildFailedError: If a worker ends before all is stored, or does not end in order.
    """
    input_data = load_input_data(load_section(layout.config_path, "data", DataConfig))
    with _broker_address(layout) as servers:
        show(f"Apache Kafka at {servers}")
        overrides = {"bootstrap_servers": servers}
        config = load_section(layout.config_path, "stream", StreamConfig, overrides)
        create_topics(config)
        _start_workers(layout, processes, bin_dir, servers)
        num_events = _produce_all(layout, config, input_data, show)
        show(f"produced {num_events:,} events; two workers drain them")
        num_stored = wait_until_drained(config, _DRAIN_SECONDS, _progress(processes, show))
        for name in _WORKERS:
            status = processes.stop(name)
            if status != 0:
                raise ChildFailedError([name], status, layout.log_dir / f"{name}.log")
    show(f"{num_stored:,} events stored in both stores and committed; both workers ended with 0")
    return {"events": num_stored}


@contextmanager
def _broker_address(layout: RunLayout) -> Iterator[str]:
    """Yield the brokers of ``KAFKA_BOOTSTRAP_SERVERS``, or those of a local one."""
    given = os.environ.get("KAFKA_BOOTSTRAP_SERVERS")
    if given:
        yield given
        return
    with KafkaBroker(layout.data_dir / "kafka") as broker:
        yield broker.bootstrap_servers


def _start_workers(layout: RunLayout, processes: Processes, bin_dir: Path, servers: str) -> None:
    command = [str(bin_dir / "qarm-stream"), "run", "--config", str(layout.config_path)]
    environment = {
        "QARM_STREAM__BOOTSTRAP_SERVERS": servers,
        "QARM_OBSERVABILITY__METRICS_PORT": "0",
    }
    for name in _WORKERS:
        processes.start(name, command, environment)


def _produce_all(
    layout: RunLayout, config: StreamConfig, input_data: InputData, show: Callable[[str], None]
) -> int:
    """Send the catalogue, then the later uploads, then all interactions."""
    items = _items_with_content(layout, input_data)
    is_catalogue = pc.is_in(items[ITEM_ID], pa.array(input_data.train_item_ids()))
    total = 0
    for name, part in (
        ("catalogue items", items.filter(is_catalogue)),
        ("later uploads", items.filter(pc.invert(is_catalogue))),
    ):
        total += produce_items(config.bootstrap_servers, config.item_topic, part)
        show(f"produced {part.num_rows:,} {name}")
    interactions = input_data.interactions
    total += produce_interactions(config.bootstrap_servers, config.interaction_topic, interactions)
    show(f"produced {interactions.num_rows:,} interactions")
    return total


def _items_with_content(layout: RunLayout, input_data: InputData) -> pa.Table:
    """Return the items as they are sent: without text, with the aligned vectors of the export."""
    items = input_data.items
    if any(name in items.column_names for name in CONTENT_TEXT_COLUMNS):
        return items
    alignment = load_section(layout.config_path, "alignment", AlignmentConfig)
    version = alignment.encoder_version
    vectors = pads.dataset(Path(alignment.vectors_uri) / version, format="parquet").to_table(
        columns=[ITEM_ID, "embedding"]
    )
    encoder_version = pa.repeat(pa.scalar(version), vectors.num_rows)
    vectors = vectors.append_column("encoder_version", encoder_version)
    return items.select([ITEM_ID, "upload_timestamp"]).join(vectors, ITEM_ID, join_type="inner")


def _progress(processes: Processes, show: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return a callback that shows progress now and then, and fails when a worker has died."""
    shown_at = time.monotonic()

    def on_progress(stored: int, total: int) -> None:
        nonlocal shown_at
        for name in _WORKERS:
            processes.check_running(name)
        if time.monotonic() - shown_at >= _SHOW_EVERY_SECONDS:
            shown_at = time.monotonic()
            show(f"stored {stored:,} of {total:,} events")

    return on_progress

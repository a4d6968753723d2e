"""Stage "stream": a real Kafka, all events in time order, two workers that drain the topics."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.types as pt

from examples.quickstart.broker import KafkaBroker
from examples.quickstart.kafka_admin import (
    Progress,
    count_records,
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
from qarm_feast.schema import CONTENT_BINARY_COLUMNS, CONTENT_TEXT_COLUMNS, ITEM_ID
from streaming.checks import check_topics
from streaming.config import StreamConfig

_GIVEN_KAFKA = "KAFKA_BOOTSTRAP_SERVERS"
_EVENT_TYPES = (pt.is_string, pt.is_integer, pt.is_floating, pt.is_boolean)
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
        settings = _stream_settings(layout, servers)
        config = load_section(layout.config_path, "stream", StreamConfig, settings)
        create_topics(config)
        if _GIVEN_KAFKA in os.environ:
            check_topics(config)
        num_refused_before = count_records(config, config.dead_letter_topic)
        try:
            _start_workers(layout, processes, bin_dir, settings)
            num_events = _produce_all(layout, config, input_data, processes, show)
            show(f"produced {num_events:,} events; two workers drain them")
            on_progress = _progress(processes, show, "drained")
            num_drained = wait_until_drained(config, _DRAIN_SECONDS, on_progress)
            _stop_workers(layout, processes)
        finally:
            # Before the broker goes: workers leave their group through it.
            processes.stop_all()
        num_refused = count_records(config, config.dead_letter_topic) - num_refused_before
    show(f"{num_drained:,} events committed; both workers ended with 0")
    if num_refused:
        show(f"{num_refused:,} of them refused; topic {config.dead_letter_topic} says why")
    return {"events": num_drained, "dead_letters": num_refused}


@contextmanager
def _broker_address(layout: RunLayout) -> Iterator[str]:
    """Yield the brokers of ``KAFKA_BOOTSTRAP_SERVERS``, or those of a local one."""
    given = os.environ.get(_GIVEN_KAFKA)
    if given:
        yield given
        return
    with KafkaBroker(layout.data_dir / "kafka") as broker:
        yield broker.bootstrap_servers


def _stream_settings(layout: RunLayout, servers: str) -> dict[str, str]:
    """Return the keys of section ``stream`` that this run sets.

    Brokers may serve several runs, so a run on a directory has topics and a group of its own.
    """
    settings = {"bootstrap_servers": servers}
    if layout.source_dir is not None:
        run_name = re.sub(r"[^A-Za-z0-9_-]", "_", layout.source_dir.name)
        declared = load_section(layout.config_path, "stream", StreamConfig)
        for key in ("item_topic", "interaction_topic", "dead_letter_topic", "consumer_group"):
            settings[key] = f"{run_name}.{getattr(declared, key)}"
    return settings


def _start_workers(
    layout: RunLayout, processes: Processes, bin_dir: Path, settings: dict[str, str]
) -> None:
    command = [str(bin_dir / "qarm-stream"), "run", "--config", str(layout.config_path)]
    environment = {f"QARM_STREAM__{key.upper()}": value for key, value in settings.items()}
    environment["QARM_OBSERVABILITY__METRICS_PORT"] = "0"
    for name in _WORKERS:
        processes.start(name, command, environment)


def _stop_workers(layout: RunLayout, processes: Processes) -> None:
    for name in _WORKERS:
        status = processes.stop(name)
        if status != 0:
            raise ChildFailedError([name], status, layout.log_dir / f"{name}.log")


def _produce_all(
    layout: RunLayout,
    config: StreamConfig,
    input_data: InputData,
    processes: Processes,
    show: Callable[[str], None],
) -> int:
    """Send the catalogue, then the later uploads, then all interactions."""
    items = _sendable(_items_with_content(layout, input_data), show)
    is_catalogue = pc.is_in(items[ITEM_ID], pa.array(input_data.train_item_ids()))
    on_progress = _progress(processes, show, "produced")
    total = 0
    for name, part in (
        ("catalogue items", items.filter(is_catalogue)),
        ("later uploads", items.filter(pc.invert(is_catalogue))),
    ):
        total += produce_items(config, part, on_progress)
        show(f"produced {part.num_rows:,} {name}")
    interactions = input_data.interactions
    total += produce_interactions(config, interactions, on_progress)
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


def _sendable(items: pa.Table, show: Callable[[str], None]) -> pa.Table:
    """Leave out the columns that an item event cannot carry, and say so."""
    known = (ITEM_ID, "upload_timestamp", "embedding", *CONTENT_BINARY_COLUMNS)
    left_out = [
        field.name
        for field in items.schema
        if field.name not in known and not any(is_kind(field.type) for is_kind in _EVENT_TYPES)
    ]
    if left_out:
        show(f"not in the events, which hold text, numbers and bools: {', '.join(left_out)}")
    return items.drop_columns(left_out)


def _progress(processes: Processes, show: Callable[[str], None], verb: str) -> Progress:
    """Return a callback that shows progress now and then, and fails when a worker has died."""
    shown_at = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal shown_at
        for name in _WORKERS:
            processes.check_running(name)
        if time.monotonic() - shown_at >= _SHOW_EVERY_SECONDS:
            shown_at = time.monotonic()
            show(f"{verb} {done:,} of {total:,} events")

    return on_progress

"""Stage "materialize": fill an empty Redis from the offline store and compare every row.

``feast materialize`` reads what the workers wrote offline; what it writes into the second store
must be, row by row, what the workers wrote online into the first.
"""

import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import yaml
from feast import FeatureStore, FeatureView
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from examples.quickstart.layout import RunLayout
from examples.quickstart.processes import Processes
from qarm_feast.config import load_section
from qarm_feast.errors import DataError, ServiceUnavailableError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID, USER_ID

_START_SECONDS = 15.0


def run_second_store(
    layout: RunLayout, processes: Processes, bin_dir: Path, show: Callable[[str], None]
) -> dict[str, Any]:
    """Materialize the data's own range into an empty Redis; return the rows compared per view.

    Raises:
        DataError: If a view came out empty or a row differs.
    """
    port = _start_redis(layout, processes)
    yaml_path = _write_store_yaml(layout, port)
    input_data = load_input_data(load_section(layout.config_path, "data", DataConfig))
    start, end = _time_range(input_data)
    feast = (str(bin_dir / "feast"), "-c", str(layout.repo_dir), "-f", str(yaml_path))
    show(f"feast materialize {start} {end} into Redis at 127.0.0.1:{port}")
    processes.run("feast-materialize", [*feast, "materialize", start, end])
    rows = compare_stores(
        open_feature_store(layout.repo_dir),
        open_feature_store(layout.repo_dir, yaml_path),
        input_data,
    )
    for view_name, num_rows in rows.items():
        show(f"{view_name}: {num_rows:,} rows, times and features equal to what the workers wrote")
    processes.run(
        "feast-materialize-incremental",
        [*feast, "materialize-incremental", datetime.now(UTC).isoformat(timespec="seconds")],
    )
    show("feast materialize-incremental: done")
    processes.stop("redis")
    return {"rows": rows}


def compare_stores(
    first: FeatureStore, second: FeatureStore, input_data: InputData
) -> dict[str, int]:
    """Return the number of present rows per online view, all equal in both stores.

    Raises:
        DataError: If a view has no rows or the stores differ.
    """
    ids = {
        ITEM_ID: input_data.items[ITEM_ID].to_pylist(),
        USER_ID: input_data.interactions[USER_ID].unique().to_pylist(),
    }
    counts = {}
    for view in first.list_feature_views():
        if view.online:
            counts[view.name] = _compare_view(first, second, view, ids[view.join_keys[0]])
    return counts


def _compare_view(
    first: FeatureStore, second: FeatureStore, view: FeatureView, ids: list[int]
) -> int:
    """Compare times and features of every row, as Feast itself reads them."""
    (join_key,) = view.join_keys
    keys = [
        EntityKey(join_keys=[join_key], entity_values=[Value(int64_val=entity_id)])
        for entity_id in ids
    ]
    written, materialized = (
        [_row(*read) for read in store.provider.online_store.online_read(store.config, view, keys)]
        for store in (first, second)
    )
    differing = [
        entity_id
        for entity_id, one, other in zip(ids, written, materialized, strict=True)
        if one != other
    ]
    num_present = sum(row is not None for row in written)
    if num_present == 0 or differing:
        raise DataError(
            f"view {view.name}: the first store holds {num_present} rows of {len(ids)} entities, "
            f"and {len(differing)} rows of the second differ (first ids: {differing[:5]}); look "
            f"into both with `feast -c {first.repo_path} get-online-features`"
        )
    return num_present


def _row(
    event_timestamp: datetime | None, features: dict[str, Value] | None
) -> tuple[datetime | None, dict[str, Value]] | None:
    """Return None for an absent row, which Redis reads as unset values at the epoch."""
    if not features or all(value.WhichOneof("val") is None for value in features.values()):
        return None
    return event_timestamp, features


def _time_range(input_data: InputData) -> tuple[str, str]:
    times = input_data.interactions[EVENT_TIMESTAMP]
    uploads = input_data.items["upload_timestamp"]
    start = min(pc.min(times).as_py(), pc.min(uploads).as_py()) - timedelta(days=1)
    end = max(pc.max(times).as_py(), pc.max(uploads).as_py()) + timedelta(days=1)
    return start.isoformat(timespec="seconds"), end.isoformat(timespec="seconds")


def _start_redis(layout: RunLayout, processes: Processes) -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    options = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
    processes.start("redis", ["redis-server", "--port", str(port), *options])
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        processes.check_running("redis", ["redis-server"])
        ping = ["redis-cli", "-p", str(port), "ping"]
        if subprocess.run(ping, capture_output=True, check=False).stdout.strip() == b"PONG":
            return port
        time.sleep(0.1)
    raise ServiceUnavailableError(
        f"redis-server at 127.0.0.1:{port} did not answer in {_START_SECONDS:.0f} s; "
        f"read {layout.log_dir / 'redis.log'}"
    )


def _write_store_yaml(layout: RunLayout, port: int) -> Path:
    declared = yaml.safe_load((layout.repo_dir / "feature_store.yaml").read_text(encoding="utf-8"))
    declared["online_store"] = {
        "type": "qarm_feast.online_stores.redis.CodeRedisOnlineStore",
        "connection_string": f"127.0.0.1:{port}",
    }
    path = layout.data_dir / "second_store.yaml"
    path.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")
    return path

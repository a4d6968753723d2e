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

import numpy as np
import pyarrow.compute as pc
import yaml
from feast import FeatureStore, FeatureView

from examples.quickstart.layout import RunLayout
from examples.quickstart.processes import Processes
from qarm_feast.config import load_section
from qarm_feast.errors import DataError, ServiceUnavailableError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.online_stores import code_online_store
from qarm_feast.online_stores.codec import Column
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
        show(f"{view_name}: {num_rows:,} rows, every one equal to what the workers wrote")
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
        ITEM_ID: input_data.items[ITEM_ID].to_numpy(),
        USER_ID: np.unique(input_data.interactions[USER_ID].to_numpy()),
    }
    counts = {}
    for view in first.list_feature_views():
        if view.online:
            counts[view.name] = _compare_view(first, second, view, ids[view.join_keys[0]])
    return counts


def _compare_view(
    first: FeatureStore, second: FeatureStore, view: FeatureView, ids_N: np.ndarray
) -> int:
    names = [field.name for field in view.features]
    batches = []
    for store in (first, second):
        online_store = code_online_store(store)
        batches.append(online_store.read_columns(store.config, view, ids_N, names))
    written, materialized = batches
    is_same_N = written.present_N == materialized.present_N
    for name in names:
        is_same_N &= _is_same(written.columns[name], materialized.columns[name])
    num_present = int(written.present_N.sum())
    if num_present == 0 or not is_same_N.all():
        wrong = ids_N[~is_same_N][:5].tolist()
        raise DataError(
            f"view {view.name}: {num_present} rows in the first store, "
            f"{int(materialized.present_N.sum())} in the second, {int((~is_same_N).sum())} differ "
            f"(first ids: {wrong}); look into both with `feast get-online-features`"
        )
    return num_present


def _is_same(one: Column, other: Column) -> np.ndarray:
    is_same_N: np.ndarray = one.lengths_N == other.lengths_N
    one_rows = np.split(one.values, np.cumsum(one.lengths_N)[:-1])
    other_rows = np.split(other.values, np.cumsum(other.lengths_N)[:-1])
    return is_same_N & np.array(
        [np.array_equal(a, b) for a, b in zip(one_rows, other_rows, strict=True)]
    )


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

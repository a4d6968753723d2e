"""Repositories of the contract tests that stock stores and ours both have to pass."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, RepoConfig
from feast import ValueType as Kind
from feast.types import FeastType, Float32, Int64

OURS = "qarm_feast.offline_store.CodeLogOfflineStore"
OFFLINE_TYPES = {"stock-dask": "dask", "stock-duckdb": "duckdb", "ours": OURS}
NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
DRIVER = Entity(name="driver", join_keys=["driver_id"], value_type=Kind.INT64)


def hours_ago(hours: float) -> datetime:
    return NOW - timedelta(hours=hours)


def make_store(directory: Path, offline: str, online: dict[str, Any] | None = None) -> FeatureStore:
    settings = {
        "project": "universal",
        "provider": "local",
        "registry": str(directory / "registry.db"),
        "offline_store": {"type": offline},
        "online_store": online or {"type": "sqlite", "path": str(directory / "online.db")},
        "entity_key_serialization_version": 3,
    }
    return FeatureStore(config=RepoConfig(**settings, repo_path=directory))


def stats_frame() -> pd.DataFrame:
    """Two rows of driver 1, one of driver 2; written an hour after they became true."""
    hours = [10, 4, 6]
    return pd.DataFrame(
        {
            "driver_id": [1, 1, 2],
            "rate": pd.Series([0.25, 0.5, 0.75], dtype="float32"),
            "trips": [10, 20, 30],
            "event_timestamp": [hours_ago(hour) for hour in hours],
            "created": [hours_ago(hour - 1) for hour in hours],
        }
    )


def file_source(path: Path, frame: pd.DataFrame, **options: Any) -> FileSource:
    # Stock duckdb cannot filter by nanoseconds.
    frame.to_parquet(path, coerce_timestamps="us")
    times = {"timestamp_field": "event_timestamp", "created_timestamp_column": "created"}
    return FileSource(name=f"{path.stem}_source", path=str(path), **(times | options))


def stats_view(
    directory: Path, frame: pd.DataFrame | None = None, ttl: timedelta = timedelta(days=1)
) -> FeatureView:
    source = file_source(directory / "stats.parquet", stats_frame() if frame is None else frame)
    return view("stats", [DRIVER], {"rate": Float32, "trips": Int64}, source, ttl)


def view(
    name: str,
    entities: list[Entity],
    features: dict[str, FeastType],
    source: FileSource,
    ttl: timedelta = timedelta(days=1),
) -> FeatureView:
    return FeatureView(
        name=name,
        entities=entities,
        ttl=ttl,
        schema=[Field(name=feature, dtype=dtype) for feature, dtype in features.items()],
        source=PushSource(name=f"{name}_push", batch_source=source),
    )


def labels(drivers: list[Any], hours: list[float], **columns: list[Any]) -> pd.DataFrame:
    times = [hours_ago(hour) for hour in hours]
    return pd.DataFrame({"driver_id": drivers, "event_timestamp": times, **columns})

"""The offline part of ``feature_store.py``: our code log against Feast's duckdb and dask stores.

All hold the same code rows; items have several edits. A join asks for the codes of items as of
random times, as one Arrow table; a materialization brings the newest row of each item into the
repository's sqlite online store (each its own kind). Feast's dask store takes far fewer labels: it
is far slower, and it leaves out rows whose feature is later than the label.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore

from benchmarks.feature_store_online import (
    CODEBOOK_SIZE,
    FEATURES,
    NUM_LEVELS,
    POOL_SIZE,
    VIEW,
    make_again,
)
from benchmarks.stream_bench import CODEBOOK_VERSION, START
from benchmarks.stream_write import (
    SOURCE_FILE,
    SQLITE_TYPE,
    applied_store,
    frozen,
    given_codes,
    is_duckdb,
)
from qarm_feast.feature_views import item_code_view, item_entity
from qarm_feast.offline_store import open_code_log
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Scale:
    """How much is joined and materialized.

    Attributes:
        num_code_rows: Rows of the offline stores.
        num_edits: Rows of each item.
        num_labels: Rows of a join.
        num_dask_labels: Rows of a join that the dask store does as well.
        num_offline_rounds: How often each arm does each; medians count.
    """

    num_code_rows: int = 400_000
    num_edits: int = 4
    num_labels: int = 200_000
    num_dask_labels: int = 5_000
    num_offline_rounds: int = 3


QUICK = Scale(num_code_rows=20_000, num_labels=10_000, num_dask_labels=1_000, num_offline_rounds=1)


def offline_figures(directory: Path, scale: Scale) -> dict[str, float]:
    """Return how many times as fast as Feast's stores ours joins and materializes.

    Args:
        directory: Takes the repositories.
        scale: How much is run.

    Returns:
        ``join_vs_feast_<store>`` and ``materialize_vs_feast_<store>``, medians' ratios.
    """
    codes = _edited_codes(scale)
    ours = _our_store(directory / "ours", codes)
    figures: dict[str, float] = {}
    arms = {"dask": scale.num_dask_labels, "duckdb": scale.num_labels}
    if not is_duckdb():
        print("  no duckdb figures: Feast's duckdb store needs ibis", file=sys.stderr, flush=True)
        del arms["duckdb"]
    for kind, num_labels in arms.items():
        online = {"type": "sqlite", "path": str(directory / f"{kind}.db")}
        stock = applied_store(directory / kind, online, VIEW, kind)
        pq.write_table(codes, directory / kind / SOURCE_FILE)
        labels = _labels(scale, num_labels)
        with frozen():
            figures |= _ratios(kind, (ours, stock), labels, scale)
        print(f"  {figures}", file=sys.stderr, flush=True)
    return figures


def _ratios(
    kind: str, stores: Sequence[FeatureStore], labels: pd.DataFrame, scale: Scale
) -> dict[str, float]:
    """Return the times of the second store over those of the first."""
    seconds: dict[str, list[list[float]]] = {"join": [[], []], "materialize": [[], []]}
    for number in range(1 + scale.num_offline_rounds):
        for place, store in enumerate(stores):
            # Rows that are there already would cost ours nothing.
            make_again(store)
            start = time.perf_counter()
            _join(store, labels)
            joined = time.perf_counter()
            _materialize(store, scale)
            materialized = time.perf_counter()
            # The first round imports what each store needs.
            if number:
                seconds["join"][place].append(joined - start)
                seconds["materialize"][place].append(materialized - joined)
    return {
        f"{work}_vs_feast_{kind}": float(np.median(theirs) / np.median(ours))
        for work, (ours, theirs) in seconds.items()
    }


def _join(store: FeatureStore, labels: pd.DataFrame) -> pa.Table:
    features = [f"{VIEW}:{name}" for name in FEATURES]
    joined: pa.Table = store.get_historical_features(labels, features).to_arrow()
    assert joined.num_rows == len(labels)
    return joined


def _materialize(store: FeatureStore, scale: Scale) -> None:
    end = _EPOCH + timedelta(microseconds=START + scale.num_code_rows)
    # Feast prints its progress, and the last line of stdout is the result.
    with contextlib.redirect_stdout(sys.stderr):
        store.materialize(end - timedelta(days=1), end, [VIEW])


def _edited_codes(scale: Scale) -> pa.Table:
    """Return rows in order of time; each item comes once per round of edits."""
    codes = given_codes(scale.num_code_rows, CODEBOOK_SIZE, POOL_SIZE, NUM_LEVELS)
    item_ids_N = np.arange(scale.num_code_rows) % (scale.num_code_rows // scale.num_edits)
    return codes.set_column(0, codes.schema.field(ITEM_ID), pa.array(item_ids_N))


def _labels(scale: Scale, num_labels: int) -> pd.DataFrame:
    """Return random items at random times after each item's first row."""
    rng = np.random.default_rng(1)
    num_items = scale.num_code_rows // scale.num_edits
    micros_N = START + rng.integers(num_items, scale.num_code_rows, num_labels)
    return pd.DataFrame(
        {
            ITEM_ID: rng.integers(num_items, size=num_labels),
            EVENT_TIMESTAMP: pd.to_datetime(micros_N, unit="us", utc=True),
        }
    )


def _our_store(directory: Path, codes: pa.Table) -> FeatureStore:
    directory.mkdir()
    (directory / "feature_store.yaml").write_text(
        "project: ours\n"
        "provider: local\n"
        "registry: {registry_type: sql, path: 'sqlite:///data/registry.db'}\n"
        f"online_store: {{type: {SQLITE_TYPE}, path: data/online.db}}\n"
        "offline_store: {type: qarm_feast.offline_store.CodeLogOfflineStore}\n",
        "utf-8",
    )
    store = open_feature_store(directory)
    store.apply([item_entity(), item_code_view(CODEBOOK_VERSION)])
    open_code_log(store.config).append(VIEW, codes)
    return store

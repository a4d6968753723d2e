"""Item pairs from behaviour: which items users treat as neighbours.

All sources read positive train rows only. I2I pairs are an item's neighbours by Swing, and by
item-CF if asked for. U2I pairs join each positive of a user (target) with the most similar of the
user's latest earlier positives (trigger) in a behaviour space that this job trains.

Shape letters in this file: P positives, M items, B behaviour width, R pairs.
May import: numpy, pyarrow.
"""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qarm_feast.alignment.behaviour_space import (
    behaviour_vectors,
    corrected,
    find_triggers,
    group_starts,
)
from qarm_feast.alignment.config import AlignmentConfig, PairConfig, PairSource
from qarm_feast.alignment.item_cf import item_cf_neighbors
from qarm_feast.alignment.judge import Judge, judge_pairs, load_judge
from qarm_feast.alignment.neighbors import Neighbors, NeighborSearch, popularity_factors
from qarm_feast.alignment.pair_report import EventCounts, PairReport, SourceCounts
from qarm_feast.alignment.positives import Positives, count_train_positives, read_positives
from qarm_feast.alignment.swing import swing_neighbors
from qarm_feast.artifact import replace_file
from qarm_feast.errors import DataError
from qarm_feast.input_data import InputData

logger = logging.getLogger(__name__)

NO_USER = -1
PAIR_ROWS = pa.schema(
    [
        ("trigger_item_id", pa.int64()),
        ("target_item_id", pa.int64()),
        ("source", pa.string()),
        ("user_row", pa.int64()),
        ("score", pa.float32()),
        ("weight", pa.float32()),
    ]
)
"""``source`` is swing, item_cf or u2i; ``user_row`` numbers users (NO_USER for I2I); ``weight`` in
(0, 1] is the score over the best score of the same target and source."""
_REPORT = b"report"
_SMALL_JOB = 1_000_000
"""Positives below which one process is done before others have started."""


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one source as dense rows, and how many each step left."""

    triggers_R: np.ndarray
    targets_R: np.ndarray
    users_R: np.ndarray
    scores_R: np.ndarray
    steps: dict[str, int]


def build_pairs(checked: InputData, config: PairConfig, seed: int) -> pa.Table:
    """Return the pairs of the configured sources, one source after the other.

    Args:
        checked: Input data; only train rows whose positive label is true are read.
        config: Sources, thresholds, caps and judge.
        seed: Seed of the eigensolver's start vector.

    Returns:
        Rows of ``PAIR_ROWS``, at least one; :func:`report_of` tells how they came about.

    Raises:
        DataError: If there are no positives, no two items share a user, or the judge's answer is
            none or it keeps nothing.
        ConfigError: If the judge cannot be imported.
    """
    judge = load_judge(config.judge) if config.judge else None
    positives = read_positives(checked, config.memory_limit_mib)
    tables: list[pa.Table] = []
    sources: dict[str, SourceCounts] = {}
    for source in dict.fromkeys(config.sources):
        table, counts = _source_table(checked, positives, source, judge, config, seed)
        logger.info("pairs_built source=%s pairs=%d seconds=%.1f", source, table.num_rows,
                    counts.seconds)  # fmt: skip
        tables.append(table)
        sources[source] = counts
    pairs = pa.concat_tables(tables)
    if pairs.num_rows == 0:
        raise _nothing_left(checked, sources)
    num_covered = len(np.union1d(pairs["trigger_item_id"], pairs["target_item_id"]))
    report = PairReport(_count_events(checked, positives, config), sources, num_covered)
    return pairs.replace_schema_metadata({_REPORT: report.to_json()})


def _source_table(
    checked: InputData,
    positives: Positives,
    source: PairSource,
    judge: Judge | None,
    config: PairConfig,
    seed: int,
) -> tuple[pa.Table, SourceCounts]:
    started = time.monotonic()
    if source == "u2i":
        found = _u2i_pairs(positives, config, seed)
    else:
        found = _i2i_pairs(positives, source, config)
    table = _pair_table(positives.item_ids_M, found, source)
    steps = found.steps
    if judge is not None:
        table = table.filter(pa.array(judge_pairs(judge, table, checked.items)))
        steps = {**steps, "judge": table.num_rows}
    return table, SourceCounts(
        steps=steps,
        target_items=len(table["target_item_id"].unique()),
        trigger_items=len(table["trigger_item_id"].unique()),
        seconds=round(time.monotonic() - started, 2),
    )


def _nothing_left(checked: InputData, sources: dict[str, SourceCounts]) -> DataError:
    if not any(next(iter(counts.steps.values())) for counts in sources.values()):
        return DataError(f"no two items of {checked.directory} share a user among its train rows")
    steps = "; ".join(f"{name}: {dict(counts.steps)}" for name, counts in sources.items())
    return DataError(
        f"no pair of {checked.directory} is left ({steps}); lower the thresholds of "
        "alignment.pairs, or let its judge keep more"
    )


def _count_events(checked: InputData, positives: Positives, config: PairConfig) -> EventCounts:
    num_events = count_train_positives(checked)
    items_per_user_U = np.bincount(positives.users_P)
    return EventCounts(
        events=num_events,
        repeated_events=num_events - len(positives.users_P),
        unknown_item_events=checked.num_unknown_interactions,
        users=positives.num_users,
        users_capped=int((items_per_user_U > config.max_items_per_user).sum()),
        items_capped=int((positives.users_per_item() > config.max_users_per_item).sum()),
        catalogue_items=checked.items.num_rows,
        items=positives.num_items,
    )


def report_of(pairs: pa.Table) -> PairReport:
    """Return how the pairs of :func:`build_pairs` or :func:`read_pairs` came about."""
    return PairReport.from_json(pairs.schema.metadata[_REPORT].decode())


def write_pairs(checked: InputData, config: AlignmentConfig) -> tuple[Path, pa.Table]:
    """Build the pairs and put them in place of earlier ones of this encoder version.

    The report lies beside them as ``<encoder version>.json``, and in their metadata.

    Args:
        checked: Input data.
        config: Section ``alignment``.

    Returns:
        The parquet file ``<pairs_uri>/<encoder version>.parquet`` and its rows.

    Raises:
        DataError: If no pair can be built.
    """
    table = build_pairs(checked, config.pairs, config.seed)
    table = table.replace_schema_metadata({**table.schema.metadata, **_fingerprint(checked)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    path = _pairs_path(config)
    replace_file(path, sink.getvalue().to_pybytes())
    replace_file(path.with_suffix(".json"), table.schema.metadata[_REPORT])
    return path, table


def read_pairs(checked: InputData, config: AlignmentConfig) -> pa.Table:
    """Return the stored pairs of this encoder version.

    Args:
        checked: Input data that the pairs must have been built from.
        config: Section ``alignment``.

    Returns:
        Rows of ``PAIR_ROWS``.

    Raises:
        DataError: If there are none, or they were built from other train rows.
    """
    path = _pairs_path(config)
    if not path.is_file():
        raise DataError(f"there are no item pairs at {path}; run `qarm align pairs` first")
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    wanted = _fingerprint(checked)
    found = {key: metadata[key.encode()].decode() for key in wanted if key.encode() in metadata}
    if found != wanted:
        raise DataError(
            f"{path} was built from {found or 'unknown data'}, "
            f"but {checked.directory} is {wanted}; run `qarm align pairs` again"
        )
    return table


def _pairs_path(config: AlignmentConfig) -> Path:
    return Path(config.pairs_uri) / f"{config.encoder_version}.parquet"


def _fingerprint(checked: InputData) -> dict[str, str]:
    return {
        "positive_label": checked.positive_label,
        "num_train_positives": str(count_train_positives(checked)),
        "behaviour_cutoff": checked.behaviour_cutoff().isoformat(),
    }


def _num_processes(positives: Positives, config: PairConfig) -> int:
    if config.num_processes is not None:
        return config.num_processes
    return 1 if len(positives.users_P) < _SMALL_JOB else len(os.sched_getaffinity(0))


def _i2i_pairs(positives: Positives, source: PairSource, config: PairConfig) -> _Pairs:
    search = NeighborSearch(
        config.num_neighbors, config.popularity_power, _num_processes(positives, config)
    )
    latest = positives.latest(config.max_items_per_user)
    if source == "swing":
        found = swing_neighbors(latest, search, config.swing_alpha, config.max_users_per_item)
        return _above(found, config.min_swing_score)
    found = item_cf_neighbors(latest, search, config.min_shared_users)
    return _above(found, config.min_item_cf_score)


def _above(found: Neighbors, min_score: float) -> _Pairs:
    kept_R = found.scores_R >= min_score
    items_R = found.items_R[kept_R]
    steps = {
        "scored": found.num_scored,
        "num_neighbors": len(found.items_R),
        "min_score": len(items_R),
    }
    users_R = np.full(len(items_R), NO_USER)
    return _Pairs(found.neighbors_R[kept_R], items_R, users_R, found.scores_R[kept_R], steps)


def _u2i_pairs(positives: Positives, config: PairConfig, seed: int) -> _Pairs:
    num_processes = _num_processes(positives, config)
    vectors_MB = behaviour_vectors(
        positives.latest(config.max_items_per_user),
        config.behaviour_dim,
        seed,
        config.max_cooccurrences,
        num_processes,
    )
    power = config.u2i_popularity_power
    triggers_P, scores_P = find_triggers(
        positives,
        vectors_MB,
        config.history_length,
        num_processes,
        power,
        config.min_similarity,
    )
    steps = {"scored": int(np.isfinite(scores_P).sum())}
    kept_R = np.flatnonzero(scores_P >= config.min_similarity)
    if power:
        factors_M = popularity_factors(positives.users_per_item(), power)
        scores_P = corrected(scores_P, factors_M[triggers_P])
    steps["min_similarity"] = len(kept_R)
    kept_R = best_per_group(kept_R, positives.users_P, scores_P, config.max_pairs_per_user)
    steps["max_pairs_per_user"] = len(kept_R)
    kept_R = best_per_group(kept_R, positives.items_P, scores_P, config.max_pairs_per_item)
    steps["max_pairs_per_item"] = len(kept_R)
    return _Pairs(
        triggers_P[kept_R],
        positives.items_P[kept_R],
        positives.users_P[kept_R],
        scores_P[kept_R],
        steps,
    )


def best_per_group(
    rows_R: np.ndarray, groups_P: np.ndarray, scores_P: np.ndarray, limit: int
) -> np.ndarray:
    """Return the rows of highest score of each group, ascending; ties go to the earlier row.

    Args:
        rows_R: Rows to choose from, ascending.
        groups_P: Group of every row, 0 or above.
        scores_P: Score of every row.
        limit: Most rows of a group.

    Returns:
        Some of ``rows_R``.
    """
    groups_R = groups_P[rows_R]
    is_crowded_R = np.bincount(groups_R)[groups_R] > limit
    crowded_R, groups_R = rows_R[is_crowded_R], groups_R[is_crowded_R]
    order_R = np.lexsort((-scores_P[crowded_R], groups_R))
    rank_R = np.arange(len(order_R)) - group_starts(groups_R[order_R])
    best_R = crowded_R[order_R[rank_R < limit]]
    return np.sort(np.concatenate([rows_R[~is_crowded_R], best_R]))


def _pair_table(item_ids_M: np.ndarray, found: _Pairs, source: PairSource) -> pa.Table:
    best_M = np.full(len(item_ids_M), 1e-12)
    np.maximum.at(best_M, found.targets_R, found.scores_R)
    columns = [
        item_ids_M[found.triggers_R],
        item_ids_M[found.targets_R],
        pa.repeat(pa.scalar(source), len(found.targets_R)),
        found.users_R.astype(np.int64),
        found.scores_R.astype(np.float32),
        np.clip(found.scores_R / best_M[found.targets_R], 1e-6, 1.0).astype(np.float32),
    ]
    return pa.table(columns, schema=PAIR_ROWS)

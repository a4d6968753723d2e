"""``qarm audit``: what was served against what the offline join gives for the same moment.

Every sampled answer (:mod:`qarm_feast.serving_log`) is joined to the code view by Feast's own
point-in-time join, as training rows are, and the hashes of the codes are compared. What differs is
explained by the log's rows, where it can be: a join made today also sees what was written after
the answer, which nobody could have served then.

    equal          The join gives the codes that were served.
    taken_down     The item was down, and nothing was served.
    unknown        The item was not known, and nothing was served.
    written_after  The join gives a row that was written after the answer, or too shortly before
                   it to be online; what was served is what the log held until then.
    differing      Everything else: a difference between training and serving.
    unchecked      Answers of a version whose view is gone.

Shape letters in this file: N served rows. May import: click, feast, pandas, pyarrow, the log.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from qarm_feast.code_log import CodeLog
from qarm_feast.command import config_option, log_level_option, start_logging
from qarm_feast.errors import DataError
from qarm_feast.offline_store import open_code_log
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    CREATED,
    EVENT_TIMESTAMP,
    ITEM_ID,
    SERVED_CODE_LOG,
    code_view_name,
)
from qarm_feast.serving_log import NO_CODES, codes_hash

OUTCOMES = ("equal", "taken_down", "unknown", "written_after", "differing", "unchecked")
_ROW = "row_number"
_ROWS_PER_JOIN = 500_000
_MAX_HOURS = 10 * 366 * 24
_MAX_LAG_SECONDS = 86_400.0
_FEATURES = ("rq_code", "vq_code", "is_deleted")


@dataclass(frozen=True)
class Difference:
    """An answer that the offline join does not give; hashes are empty where there are no codes."""

    item_id: int
    codebook_version: str
    served_at: str
    served_hash: str
    offline_hash: str
    reason: str


@dataclass(frozen=True)
class AuditReport:
    """How many answers had which outcome, and every difference, in the order of serving."""

    counts: dict[str, int]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Answer:
    """A sampled row of the serving log."""

    item_id: int
    codebook_version: str
    served_at: datetime
    codes_hash: str


@dataclass(frozen=True)
class _Write:
    """A row of the code log: what it holds, and when it came."""

    event_time: datetime
    content_hash: str
    created: datetime
    codes_hash: str


def audit(
    store: FeatureStore, log: CodeLog, since: datetime, until: datetime, lag: timedelta
) -> AuditReport:
    """Compare the answers of a time with the offline join.

    Args:
        store: The repository.
        log: Its offline logs.
        since: First moment of serving, aware.
        until: Last moment, aware.
        lag: How long a row may take from its ``created`` until it is online.

    Returns:
        Counts and differences.

    Raises:
        DataError: If nothing was ever logged.
    """
    if not log.exists(SERVED_CODE_LOG):
        raise DataError(
            f"no log at {log.root / SERVED_CODE_LOG}: nothing that was served was sampled; set "
            "serving_log.sample_rate in qarm.yaml, serve, then audit"
        )
    served_at = pc.field(EVENT_TIMESTAMP)
    times = (served_at >= pa.scalar(since)) & (served_at <= pa.scalar(until))
    served = log.read(SERVED_CODE_LOG, where=times)
    served = served.sort_by([(EVENT_TIMESTAMP, "ascending"), (ITEM_ID, "ascending")])
    counts = dict.fromkeys(OUTCOMES, 0)
    differences: list[Difference] = []
    for version in pc.unique(served["codebook_version"]).to_pylist():
        answers = served.filter(pc.equal(served["codebook_version"], version))
        try:
            store.get_feature_view(code_view_name(version))
        except FeatureViewNotFoundException:
            counts["unchecked"] += len(answers)
            continue
        for start in range(0, len(answers), _ROWS_PER_JOIN):
            part = answers.slice(start, _ROWS_PER_JOIN)
            differences += _compare(store, log, part, lag, counts)
    differences.sort(key=lambda each: (each.served_at, each.codebook_version, each.item_id))
    return AuditReport(counts, tuple(differences))


def _compare(
    store: FeatureStore, log: CodeLog, served: pa.Table, lag: timedelta, counts: dict[str, int]
) -> list[Difference]:
    """Count the outcomes of one version's answers; return those that differ."""
    view = code_view_name(served["codebook_version"][0].as_py())
    joined = _joined(store, view, served)
    offline_hashes = _hashes_of(joined)
    is_down_N = pc.fill_null(joined["is_deleted"], False).to_numpy()
    is_same_N = np.array(offline_hashes) == served["codes_hash"].to_numpy()
    is_absent_N = np.array(offline_hashes) == NO_CODES
    counts["equal"] += int((is_same_N & ~is_absent_N).sum())
    counts["taken_down"] += int((is_same_N & is_down_N).sum())
    counts["unknown"] += int((is_same_N & is_absent_N & ~is_down_N).sum())
    others_N = np.flatnonzero(~is_same_N)
    if not len(others_N):
        return []
    rest = served.take(pa.array(others_N))
    writes = _writes(log, view, pc.unique(rest[ITEM_ID]))
    differences = []
    for place, answer in zip(others_N.tolist(), _answers(rest), strict=True):
        offline_hash = offline_hashes[place]
        reason = explain(answer, offline_hash, writes.get(answer.item_id, []), lag)
        if reason == "written_after":
            counts["written_after"] += 1
            continue
        differences.append(_difference(answer, offline_hash, reason))
    counts["differing"] += len(differences)
    return differences


def explain(answer: Answer, offline_hash: str, writes: Sequence[_Write], lag: timedelta) -> str:
    """Return why an answer is not what the join gives.

    The store's content is followed through the time in which it may have been read: as it was
    ``lag`` before the answer, and after each row written since. A row that the answer itself
    shows to have been there counts as written, whenever its ``created`` is: of a row that was
    replayed, a compaction keeps the last copy.

    Args:
        answer: What was served.
        offline_hash: Hash of the codes that the join gives.
        writes: The item's rows, in any order.
        lag: How long a row may take from its ``created`` until it is online.

    Returns:
        ``written_after`` if the store held the answer in that time, and the join's row came
        later; ``event_time_ahead`` if it held it by a row of a later event time than the answer,
        which no join may see; ``not_joined`` if it held it, and no later row is why the join
        gives something else; else ``not_served`` (nothing was served), ``not_offline`` (no row
        of the item has these codes) or ``other_row`` (another row of the item has them).
    """
    seen = [write for write in writes if write.event_time <= answer.served_at]
    shown = [write for write in seen if write.codes_hash == answer.codes_hash]
    joined = [write.created for write in seen if write.codes_hash == offline_hash]
    first_end = answer.served_at - lag
    ends = {write.created for write in writes if first_end < write.created <= answer.served_at}
    was_held = False
    for end in sorted({first_end, *ends}):
        held = _newest([*shown, *(write for write in writes if write.created <= end)])
        if (NO_CODES if held is None else held.codes_hash) != answer.codes_hash:
            continue
        if held is not None and held.event_time > answer.served_at:
            return "event_time_ahead"
        if any(created > end for created in joined):
            return "written_after"
        was_held = True
    if was_held:
        return "not_joined"
    if answer.codes_hash == NO_CODES:
        return "not_served"
    return "other_row" if any(w.codes_hash == answer.codes_hash for w in writes) else "not_offline"


def _newest(writes: Sequence[_Write]) -> _Write | None:
    """Return the row that an online store keeps of these."""
    return max(writes, key=lambda write: (write.event_time, write.content_hash), default=None)


def _joined(store: FeatureStore, view: str, served: pa.Table) -> pa.Table:
    frame = pd.DataFrame(
        {
            ITEM_ID: served[ITEM_ID].to_numpy(),
            EVENT_TIMESTAMP: served[EVENT_TIMESTAMP].to_pandas(),
            _ROW: np.arange(len(served)),
        }
    )
    joined = store.get_historical_features(
        entity_df=frame, features=[f"{view}:{name}" for name in _FEATURES]
    ).to_arrow()
    return joined.sort_by(_ROW)


def _hashes_of(rows: pa.Table) -> list[str]:
    """Return the hash of each row's codes; ``NO_CODES`` where it has none, or is taken down."""
    has_codes = pc.and_kleene(
        pc.is_valid(rows["rq_code"]), pc.invert(pc.fill_null(rows["is_deleted"], True))
    )
    columns = [has_codes.to_pylist(), rows["rq_code"].to_pylist(), rows["vq_code"].to_pylist()]
    return [
        codes_hash(rq_L, vq_V) if here else NO_CODES
        for here, rq_L, vq_V in zip(*columns, strict=True)
    ]


def _writes(log: CodeLog, view: str, item_ids: pa.Array) -> dict[int, list[_Write]]:
    """Return every row of some items in a code log, repeated ones too."""
    if not log.exists(view):
        return {}
    columns = [ITEM_ID, "content_hash", EVENT_TIMESTAMP, CREATED, *_FEATURES]
    rows = log.read(view, columns=columns, where=pc.field(ITEM_ID).isin(item_ids))
    writes: dict[int, list[_Write]] = {}
    narrow = rows.select([ITEM_ID, EVENT_TIMESTAMP, "content_hash", CREATED]).to_pylist()
    for row, row_hash in zip(narrow, _hashes_of(rows), strict=True):
        write = _Write(row[EVENT_TIMESTAMP], row["content_hash"], row[CREATED], row_hash)
        writes.setdefault(row[ITEM_ID], []).append(write)
    return writes


def _answers(served: pa.Table) -> list[Answer]:
    names = (ITEM_ID, "codebook_version", EVENT_TIMESTAMP, "codes_hash")
    columns = [served[name].to_pylist() for name in names]
    return [Answer(*row) for row in zip(*columns, strict=True)]


def _difference(answer: Answer, offline_hash: str, reason: str) -> Difference:
    return Difference(
        item_id=answer.item_id,
        codebook_version=answer.codebook_version,
        served_at=answer.served_at.isoformat(),
        served_hash=answer.codes_hash,
        offline_hash=offline_hash,
        reason=reason,
    )


@click.command("audit", epilog="Example: qarm audit --config feature_repo/qarm.yaml --hours 24")
@config_option
@log_level_option
@click.option(
    "--hours",
    type=click.FloatRange(min=0, min_open=True, max=_MAX_HOURS),
    default=24.0,
    show_default=True,
    help="How far back answers are compared. Let regular audits overlap by more than "
    "serving_log.flush_seconds: later answers may not be written yet.",
)
@click.option(
    "--lag-seconds",
    type=click.FloatRange(min=0, max=_MAX_LAG_SECONDS),
    default=60.0,
    show_default=True,
    help="How long a row may take from its writing offline until it is served.",
)
def audit_command(
    config_path: str, log_level: str | None, hours: float, lag_seconds: float
) -> None:
    """Compare what was served with the offline join: a line per difference, then the counts.

    Every line is a JSON object. The exit status is 4 if anything differs.
    """
    start_logging(config_path, log_level)
    store = open_feature_store(Path(config_path).resolve().parent)
    until = datetime.now(UTC)
    report = audit(
        store,
        open_code_log(store.config),
        until - timedelta(hours=hours),
        until,
        timedelta(seconds=lag_seconds),
    )
    for difference in report.differences:
        click.echo(json.dumps(asdict(difference)))
    click.echo(json.dumps(report.counts))
    if report.differences:
        raise DataError(
            f"{len(report.differences)} of {sum(report.counts.values())} served answers differ "
            "from the offline join; see the lines above, and `qarm offline status` for damage"
        )

"""The online rows of a purged codebook version, removed at a bounded pace.

A store is never searched for them: the ids stand in the version's offline log. In order:

1. The log's distinct ids are taken in ascending order, those behind the mark of an earlier try.
2. A batch is deleted: on redis one view's fields, on sqlite in a transaction of its own.
3. The mark, a file beside the codebooks, moves to the batch's last id; then comes the pause.
4. After the last batch, ids whose rows were written since the first try began are deleted once
   more: a worker learns of a retirement late, and its ids may lie behind the mark.
5. The mark is removed.

Killed between 2 and 3, one batch is deleted again, which changes nothing and counts no row twice;
rows of that batch that were deleted before are not in the count. May import: feast (on use).
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from qarm_feast.artifact import remove_file, replace_file
from qarm_feast.errors import CodebookError
from qarm_feast.object_store import Place, place
from qarm_feast.schema import CREATED, ITEM_ID, TIMESTAMP, code_view_name

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

    from qarm_feast.code_log import CodeLog
    from qarm_feast.online_stores.blobs import Ints

logger = logging.getLogger(__name__)

_MARKS_NAME = ".purges"
_ROWS_PER_BATCH = 500
_BATCHES_PER_LOG_LINE = 20
_CLOCK_SKEW_US = 300_000_000
"""Most that a worker's clock is taken to be behind the one here."""


@dataclass(frozen=True)
class PurgeMark:
    """How far a purge has come.

    Attributes:
        started_us: When the first try began, in microseconds UTC.
        last_item_id: Greatest id whose row was deleted; None: none yet.
        num_items: Distinct ids looked at, but for those that came late and lie behind the last.
        num_rows: Rows deleted.
    """

    started_us: int
    last_item_id: int | None = None
    num_items: int = 0
    num_rows: int = 0


def mark_path(codebooks_uri: str, version: str) -> Place:
    """Return the file that tells how far the purge of ``version`` has come."""
    return place(codebooks_uri) / _MARKS_NAME / f"{version}.json"


def purge_online_rows(
    feature_store: "FeatureStore",
    codebooks_uri: str,
    version: str,
    rows_per_second: float,
    sleep: Callable[[float], None] = time.sleep,
) -> PurgeMark:
    """Delete the online rows of a version, as slowly as asked; goes on where a killed one ended.

    Args:
        feature_store: The repository whose stores hold the version's rows.
        codebooks_uri: ``codebook.uri``, beside whose versions the mark lies.
        version: A version that nothing writes any more.
        rows_per_second: Most rows to delete per second, on average.
        sleep: Waits that many seconds.

    Returns:
        What was looked at and deleted, earlier tries included.

    Raises:
        ConfigError: If the online store is not one of ours.
        CodebookError: If the mark of an earlier try cannot be read.
        ServiceUnavailableError: If the store does not answer; what was done stays done.
    """
    from qarm_feast.offline_store import open_code_log
    from qarm_feast.online_stores import code_online_store

    store, config = code_online_store(feature_store), feature_store.config
    view, path = _view_of(feature_store, version), mark_path(codebooks_uri, version)
    mark = _read_mark(path) or PurgeMark(time.time_ns() // 1000)
    batch_size = max(1, min(_ROWS_PER_BATCH, int(rows_per_second)))
    batches = _id_batches(open_code_log(config), view.name, mark, batch_size)
    for number, batch_N in enumerate(batches):
        if number:
            sleep(batch_size / rows_per_second)
        mark = _moved(mark, batch_N, store.delete_rows(config, view, batch_N))
        replace_file(path, json.dumps(asdict(mark)).encode())
        if number % _BATCHES_PER_LOG_LINE == 0:
            logger.info(
                "rows_purged view=%s items=%d rows=%d", view.name, mark.num_items, mark.num_rows
            )
    remove_file(path)
    return mark


def _view_of(feature_store: "FeatureStore", version: str) -> "FeatureView":
    """Return the view that is applied, or was: `feast apply` may have dropped it already."""
    from feast.errors import FeatureViewNotFoundException

    from qarm_feast.feature_views import item_code_view

    try:
        return feature_store.get_feature_view(code_view_name(version))
    except FeatureViewNotFoundException:
        return item_code_view(version)


def _id_batches(log: "CodeLog", name: str, mark: PurgeMark, size: int) -> Iterator["Ints"]:
    """Yield the ids behind the mark, then those whose rows were written since the first try."""
    if not log.exists(name):
        return
    yield from _cut(_ids(log, name, _after(mark.last_item_id)), size)
    since = pa.scalar(mark.started_us - _CLOCK_SKEW_US, TIMESTAMP)
    yield from _cut(_ids(log, name, pads.field(CREATED) >= since), size)


def _after(item_id: int | None) -> pads.Expression | None:
    return None if item_id is None else pads.field(ITEM_ID) > item_id


def _ids(log: "CodeLog", name: str, where: pads.Expression | None) -> "Ints":
    item_ids_N: Ints = np.unique(log.read(name, [ITEM_ID], where)[ITEM_ID].to_numpy())
    logger.info("purge_ids_read view=%s items=%d", name, len(item_ids_N))
    return item_ids_N


def _cut(item_ids_N: "Ints", size: int) -> Iterator["Ints"]:
    for start in range(0, len(item_ids_N), size):
        yield item_ids_N[start : start + size]


def _moved(mark: PurgeMark, batch_N: "Ints", num_rows: int) -> PurgeMark:
    """Return the mark after a batch of ascending ids; late ones do not move it back."""
    last = int(batch_N[-1])
    num_new = len(batch_N)
    if mark.last_item_id is not None:
        num_new = int(np.count_nonzero(batch_N > mark.last_item_id))
        last = max(last, mark.last_item_id)
    return PurgeMark(mark.started_us, last, mark.num_items + num_new, mark.num_rows + num_rows)


def _read_mark(path: Place) -> PurgeMark | None:
    if not path.is_file():
        return None
    try:
        return PurgeMark(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise CodebookError(
            f"{path} cannot be read: {error}; delete it and run the same command again, which then "
            "starts from the first row"
        ) from error

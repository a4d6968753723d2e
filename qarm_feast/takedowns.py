"""Items that were taken down, as the content log of the feature repository tells.

May import: feast, the offline log.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qarm_feast.encode import newest_per_item
from qarm_feast.offline_store import CodeLogOfflineStoreConfig, open_code_log
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import CONTENT_LOG, CONTENT_LOG_ROWS, EVENT_TIMESTAMP, ITEM_ID

_COLUMNS = [ITEM_ID, EVENT_TIMESTAMP, "content_hash", "is_deleted"]


def taken_down_items(config_path: str | Path) -> npt.NDArray[np.int64]:
    """Return the items whose newest content event is a takedown.

    Args:
        config_path: Path of ``qarm.yaml``, in the folder of a feature repository.

    Returns:
        Item ids, int64, ascending; none if the folder is no feature repository with our offline
        store, or no worker has written to it.

    Raises:
        OSError: If the system cannot read a part of the log.
    """
    folder = Path(config_path).resolve().parent
    if not (folder / "feature_store.yaml").is_file():
        return np.empty(0, dtype=np.int64)
    config = open_feature_store(folder).config
    if not isinstance(config.offline_store, CodeLogOfflineStoreConfig):
        return np.empty(0, dtype=np.int64)
    log = open_code_log(config)
    if CONTENT_LOG not in log.names():
        return np.empty(0, dtype=np.int64)
    # One row per item is held, however many events the log has.
    newest = _schema().empty_table()
    for table in log.tables(CONTENT_LOG, _COLUMNS):
        newest = newest_per_item(pa.concat_tables([newest, table.select(_COLUMNS)]))
    item_ids: npt.NDArray[np.int64] = newest.filter(newest["is_deleted"])[ITEM_ID].to_numpy()
    return item_ids


def _schema() -> pa.Schema:
    return pa.schema([CONTENT_LOG_ROWS.field(name) for name in _COLUMNS])

"""``qarm load-users``: the rows of ``users.parquet`` into both stores as ``user_profile``.

The file does not say when a profile became true. The first one of a user holds from the oldest
event of the data on; one that a later load finds changed holds from that load on, so that no
training row sees what was not known. May import: click, pyarrow, feast, duckdb.
"""

from datetime import UTC, datetime
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from qarm_feast.code_log import conform
from qarm_feast.command import config_option, log_level_option, start_logging
from qarm_feast.config import load_section
from qarm_feast.errors import ConfigError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.point_in_time import latest_rows
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import CREATED, EVENT_TIMESTAMP, TIMESTAMP, USER_ID, USER_PROFILE_VIEW


def profile_rows(users: pa.Table, known_since: datetime, created: datetime) -> pa.Table:
    """Return rows of the view ``user_profile``.

    Args:
        users: ``users.parquet``.
        known_since: ``event_timestamp`` of every row.
        created: When the rows are written.

    Returns:
        The users with both time columns.
    """
    for name, time in ((EVENT_TIMESTAMP, known_since), (CREATED, created)):
        users = users.append_column(name, pa.repeat(pa.scalar(time, TIMESTAMP), len(users)))
    return users


def write_profiles(store: FeatureStore, input_data: InputData, created: datetime) -> int:
    """Write the users to the offline log, then to the online store; return how many changed.

    Args:
        store: Store of a repository on which ``feast apply`` ran.
        input_data: Checked input data.
        created: When the rows are written.

    Returns:
        Number of users that were new or had changed; 0 if the data has no users.

    Raises:
        ConfigError: If the repository has no ``user_profile`` view.
        DataError: If the log holds profiles of other columns or types.
    """
    if input_data.users is None:
        return 0
    try:
        view = store.get_feature_view(USER_PROFILE_VIEW)
    except FeatureViewNotFoundException as error:
        raise ConfigError(
            f"the repository {store.repo_path} has no view {USER_PROFILE_VIEW!r}; "
            f"run `feast -c {store.repo_path} apply` first"
        ) from error
    known_since = pc.min(input_data.interactions[EVENT_TIMESTAMP]).as_py()
    rows = profile_rows(input_data.users, known_since, created)
    log = open_code_log(store.config)
    if log.exists(USER_PROFILE_VIEW):
        rows = date_by_stored(rows, log.read(USER_PROFILE_VIEW))
    changed = rows.filter(pc.equal(rows[CREATED], pa.scalar(created, TIMESTAMP)))
    # Offline first: what is lost online can be materialized again.
    if len(changed):
        log.append(USER_PROFILE_VIEW, changed)
    # All rows: a load that died before this line left some offline only; the guard drops the rest.
    code_online_store(store).write_table(store.config, view, rows)
    return len(changed)


def date_by_stored(rows: pa.Table, stored: pa.Table) -> pa.Table:
    """Return the rows with the times that follow from what is stored.

    Args:
        rows: From :func:`profile_rows`.
        stored: All rows of the log, several of one user among them.

    Returns:
        The same users in the same order. A row that equals its user's newest stored one has that
        row's times; one that differs from it holds from its own ``created`` on.

    Raises:
        DataError: If the stored rows have other columns or types.
    """
    times = [EVENT_TIMESTAMP, CREATED]
    rows = conform(rows, stored.schema, f"the log {USER_PROFILE_VIEW!r}")
    stored = stored.take(latest_rows(stored.select([USER_ID, *times]), [USER_ID], times))
    places = pc.index_in(rows[USER_ID], stored[USER_ID].combine_chunks())
    before = stored.take(places)
    is_same = pc.is_valid(places)
    for name in set(rows.column_names) - set(times):
        is_same = pc.and_(is_same, _are_equal(rows[name], before[name]))
    held_since = pc.if_else(pc.is_valid(places), rows[CREATED], rows[EVENT_TIMESTAMP])
    for name, fresh in ((EVENT_TIMESTAMP, held_since), (CREATED, rows[CREATED])):
        dated = pc.if_else(is_same, before[name], fresh)
        rows = rows.set_column(rows.column_names.index(name), name, dated)
    return rows


def _are_equal(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    return pc.or_(pc.fill_null(pc.equal(left, right), False), both_null)


@click.command("load-users", epilog="Example: qarm load-users --config feature_repo/qarm.yaml")
@config_option
@log_level_option
def load_users(config_path: str, log_level: str | None) -> None:
    """Write users.parquet to Feast as the view user_profile, offline and online."""
    start_logging(config_path, log_level)
    input_data = load_input_data(load_section(config_path, "data", DataConfig))
    store = open_feature_store(Path(config_path).resolve().parent)
    num_written = write_profiles(store, input_data, datetime.now(UTC))
    num_users = 0 if input_data.users is None else len(input_data.users)
    click.echo(f"users written: {num_written} (unchanged: {num_users - num_written})")

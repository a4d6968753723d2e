"""``qarm load-users``: the rows of ``users.parquet`` into both stores as ``user_profile``.

A profile holds from the oldest event of the data on, since the file does not say when it became
true. May import: click, pyarrow, feast.
"""

from datetime import UTC, datetime
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureStore
from feast.errors import FeatureViewNotFoundException

from qarm_feast.command import config_option, log_level_option, start_logging
from qarm_feast.config import load_section
from qarm_feast.errors import ConfigError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import CREATED, EVENT_TIMESTAMP, TIMESTAMP, USER_PROFILE_VIEW


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
    """Write the users to the offline log, then to the online store; return how many.

    Args:
        store: Store of a repository on which ``feast apply`` ran.
        input_data: Checked input data.
        created: When the rows are written.

    Returns:
        Number of rows written; 0 if the data has no users.

    Raises:
        ConfigError: If the repository has no ``user_profile`` view.
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
    # Offline first: what is lost online can be materialized again.
    open_code_log(store.config).append(USER_PROFILE_VIEW, rows)
    code_online_store(store).write_table(store.config, view, rows)
    return len(rows)


@click.command("load-users", epilog="Example: qarm load-users --config feature_repo/qarm.yaml")
@config_option
@log_level_option
def load_users(config_path: str, log_level: str | None) -> None:
    """Write users.parquet to Feast as the view user_profile, offline and online."""
    start_logging(config_path, log_level)
    input_data = load_input_data(load_section(config_path, "data", DataConfig))
    store = open_feature_store(Path(config_path).resolve().parent)
    num_users = write_profiles(store, input_data, datetime.now(UTC))
    click.echo(f"users written: {num_users}")

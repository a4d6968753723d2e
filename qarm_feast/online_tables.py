"""The online store's views, written by columns: what stream and backfill write codes through.

May import: feast, numpy, pyarrow.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from feast import FeatureStore, FeatureView
from feast.errors import FeatureViewNotFoundException
from sqlalchemy.exc import SQLAlchemyError

from qarm_feast.errors import ConfigError, ServiceUnavailableError
from qarm_feast.online_stores import code_online_store
from qarm_feast.schema import RECENT_ITEMS_VIEW


class FeastOnlineTables:
    """The online store of a Feast repository; reads the registry, never writes it.

    Args:
        feature_store: An opened repository.

    Raises:
        ConfigError: If its online store cannot be written by columns.
    """

    def __init__(self, feature_store: FeatureStore) -> None:
        self._feature_store = feature_store
        self._store = code_online_store(feature_store)
        self._views: dict[str, FeatureView] = {}

    def check_views(self, view_names: Iterable[str]) -> None:
        """Look the views up once, so that a missing one is told before anything is read.

        Args:
            view_names: Names of applied feature views.

        Raises:
            ConfigError: If a view is not applied.
        """
        for name in view_names:
            self._view(name)

    def has_view(self, view_name: str) -> bool:
        """Return whether a view is applied; one that was not is looked for afresh.

        ``feast apply`` writes its registry before it makes tables, so the store is asked as well.

        Args:
            view_name: Name of a feature view with one int64 key.

        Returns:
            Whether it is there, and can be read.

        Raises:
            ServiceUnavailableError: If the registry or the store does not answer.
        """
        view = self._find(view_name)
        if view is None:
            return False
        nobody_N = np.zeros(1, dtype=np.int64)
        try:
            names = [view.features[0].name]
            self._store.read_columns(self._feature_store.config, view, nobody_N, names)
        except ConfigError:
            return False
        return True

    def check_reachable(self) -> None:
        """Read one user, there or not.

        Raises:
            ServiceUnavailableError: If the store does not answer.
        """
        nobody_N = np.zeros(1, dtype=np.int64)
        view = self._view(RECENT_ITEMS_VIEW)
        self._store.read_columns(self._feature_store.config, view, nobody_N, ["item_ids"])

    def write(self, view_name: str, table: pa.Table) -> int:
        """Store the rows that are newer than what is there, and return how many were.

        Args:
            view_name: Name of an applied feature view.
            table: The view's join key, features and times.

        Returns:
            Number of entities that changed.

        Raises:
            ConfigError: If the view is not applied.
            ServiceUnavailableError: If the store does not answer.
        """
        return self._store.write_table(self._feature_store.config, self._view(view_name), table)

    def remove_if_gone(self, view_name: str) -> bool:
        """Remove all rows of a view that is not applied any more, by a fresh look at the registry.

        Args:
            view_name: Name of a view that was written.

        Returns:
            Whether it is gone.

        Raises:
            ServiceUnavailableError: If the registry or the store does not answer.
        """
        view = self._views.get(view_name)
        # Not looked up: not written either.
        if view is None or self._look_up(view_name) is not None:
            return False
        # What `feast apply` has done before, when it dropped the view.
        self._store.update(self._feature_store.config, [view], [], [], [], partial=True)
        # Forgotten last: a try that failed above must come here again.
        del self._views[view_name]
        return True

    def _view(self, name: str) -> FeatureView:
        view = self._find(name)
        if view is None:
            raise ConfigError(
                f"the feature repository has no view {name!r}; "
                f"run `feast -c {self._feature_store.repo_path} apply`"
            )
        return view

    def _find(self, name: str) -> FeatureView | None:
        if name not in self._views:
            view = self._look_up(name)
            if view is None:
                return None
            self._views[name] = view
        return self._views[name]

    def _look_up(self, name: str) -> FeatureView | None:
        try:
            return self._feature_store.get_feature_view(name)
        except FeatureViewNotFoundException:
            return None
        except SQLAlchemyError as error:
            raise ServiceUnavailableError(f"Feast's registry does not answer: {error}") from error

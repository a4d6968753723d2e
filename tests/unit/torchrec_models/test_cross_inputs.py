"""Cross features through both doors: Feast's on-demand view and the ranker's batch builder."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from feast import FeatureStore

from qarm_feast.code_log import CodeLog
from qarm_feast.feature_views import (
    CodebookFacts,
    HistorySettings,
    cross_feature_view,
    item_code_view,
    item_entity,
    recent_items_view,
    user_entity,
)
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.reader import CodeReader
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import CODE_ROWS, RECENT_ITEM_ROWS
from torchrec_models.batch import BatchBuilder
from torchrec_models.config import RankerConfig
from torchrec_models.row_columns import RowColumns
from torchrec_models.score import ReadHistory
from torchrec_models.vocabulary import IdVocabulary, Vocabularies

START = datetime(2026, 1, 1, tzinfo=UTC)
CODES = {1: [3, 4], 2: [3, 9], 3: [7, 4], 4: [3, 4]}
TAKEN_DOWN, UNKNOWN = 5, 6
HISTORIES = {10: [2, TAKEN_DOWN, 1, UNKNOWN, 4, 1], 11: [3], 12: []}
CANDIDATES = [1, 2, 3, TAKEN_DOWN, UNKNOWN]
OUTPUTS = [
    f"{prefix}_{name}" for name in ("count", "position", "share") for prefix in ("c1", "c1_c2")
]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """A repository whose stores hold the codes and histories above."""
    (tmp_path / "feature_store.yaml").write_text(
        "project: test\n"
        "provider: local\n"
        "registry: {registry_type: sql, path: 'sqlite:///data/registry.db'}\n"
        "online_store:\n"
        "  {type: qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore, path: data/online.db}\n"
        "offline_store: {type: qarm_feast.offline_store.CodeLogOfflineStore}\n"
        "entity_key_serialization_version: 3\n"
    )
    opened = open_feature_store(tmp_path)
    views = [item_code_view("v1", CodebookFacts("e1", 2, 1)), recent_items_view(HistorySettings())]
    with pytest.warns(RuntimeWarning, match="experimental"):
        opened.apply([item_entity(), user_entity(), *views, cross_feature_view("v1", views[0])])
    online = code_online_store(opened)
    online.write_table(opened.config, views[0], _code_rows())
    online.write_table(opened.config, views[1], _recent_rows())
    log: CodeLog = open_code_log(opened.config)
    log.append("item_codes_v1", _code_rows())
    return opened


def _code_rows() -> pa.Table:
    rows = [*CODES.items(), (TAKEN_DOWN, [-1, -1])]
    return pa.table(
        {
            "item_id": [item for item, _ in rows],
            "rq_code": [codes for _, codes in rows],
            "vq_code": [[codes[0]] for _, codes in rows],
            "encoder_version": ["e1"] * len(rows),
            "content_hash": ["a"] * len(rows),
            "is_deleted": [item == TAKEN_DOWN for item, _ in rows],
            "event_timestamp": [START] * len(rows),
            "created": [START] * len(rows),
        },
        schema=CODE_ROWS,
    )


def _recent_rows() -> pa.Table:
    """Times fall along each list, so that the merge keeps its order."""
    lists = {user: items for user, items in HISTORIES.items() if items}
    return pa.table(
        {
            "user_id": list(lists),
            "item_ids": list(lists.values()),
            "item_timestamps": [[100 - place for place in range(len(x))] for x in lists.values()],
            "event_timestamp": [START] * len(lists),
            "created": [START] * len(lists),
        },
        schema=RECENT_ITEM_ROWS,
    )


def _by_builder(reader: CodeReader, user: int) -> np.ndarray:
    """One row per candidate, as scoring makes them."""
    inputs = reader.read_scoring_inputs(user, np.array(CANDIDATES), 10)
    history, num_rows = inputs.history.item_ids_N, len(CANDIDATES)
    ids = IdVocabulary(np.array([1]))
    builder = BatchBuilder(
        RankerConfig(features=("item_id", "cross")),
        Vocabularies(ids, ids),
        ("item_id",),
        ReadHistory(inputs),
    )
    rows = RowColumns(
        user_ids_B=np.full(num_rows, user),
        item_ids_B=np.array(CANDIDATES),
        label_times_B=np.zeros(num_rows, dtype=np.int64),
        rq_BL=inputs.candidates.rq_NL,
        vq_BK=inputs.candidates.vq_NV,
        history_item_ids_H=np.tile(history, num_rows),
        history_lengths_B=np.full(num_rows, len(history)),
        labels_BT=np.zeros((num_rows, 1), dtype=np.float32),
        is_train_B=np.zeros(num_rows, dtype=np.bool_),
    )
    return builder.build(rows).dense_features.numpy()


def _as_dense(outputs: dict[str, list[float]]) -> np.ndarray:
    """Make the net's inputs from what Feast returned, by the formula."""
    columns = {name: np.array(outputs[name], dtype=np.float64) for name in OUTPUTS}
    dense = []
    for name, values in columns.items():
        if name.endswith("count"):
            dense.append(np.log1p(values))
        elif name.endswith("position"):
            dense.append([1 / (1 + value) if value >= 0 else 0.0 for value in values])
        else:
            dense.append(values)
    return np.stack(dense, axis=1).astype(np.float32)


def _history_codes(reader: CodeReader, user: int) -> list[int] | None:
    """As a request brings them; None for no history, since Feast cannot type empty lists."""
    inputs = reader.read_scoring_inputs(user, np.array(CANDIDATES), 10)
    flat: list[int] = inputs.history.rq_NL.ravel().tolist()
    return flat or None


def test_feasts_on_demand_view_and_the_batch_builder_agree_on_the_same_rows(
    store: FeatureStore,
) -> None:
    reader = CodeReader(store, "v1")
    for user in HISTORIES:
        request = {"history_rq_codes": _history_codes(reader, user)}

        by_feast = store.get_online_features(
            features=[f"cross_features_v1:{name}" for name in OUTPUTS],
            entity_rows=[{"item_id": item} | request for item in CANDIDATES],
        ).to_dict()

        np.testing.assert_array_equal(_as_dense(by_feast), _by_builder(reader, user))
        if user == 10:
            assert by_feast["c1_count"] == [4, 4, 0, 0, 0]
            assert by_feast["c1_position"] == [0, 0, -1, -1, -1]
            assert by_feast["c1_c2_count"] == [3, 1, 0, 0, 0]
            assert by_feast["c1_c2_position"] == [2, 0, -1, -1, -1]
            assert by_feast["c1_c2_share"] == pytest.approx([0.75, 0.25, 0, 0, 0])


def test_feasts_historical_join_gives_what_its_online_view_gives(store: FeatureStore) -> None:
    reader = CodeReader(store, "v1")
    history = _history_codes(reader, 10)
    features = [f"cross_features_v1:{name}" for name in OUTPUTS]
    frame = pd.DataFrame(
        {
            "item_id": CANDIDATES,
            "history_rq_codes": [history] * len(CANDIDATES),
            "event_timestamp": pd.to_datetime([START + timedelta(days=1)] * 5, utc=True),
        }
    )

    online = store.get_online_features(
        features=features,
        entity_rows=[{"item_id": item, "history_rq_codes": history} for item in CANDIDATES],
    ).to_dict()
    joined = store.get_historical_features(entity_df=frame, features=features).to_arrow()

    assert {name: joined[name].to_pylist() for name in OUTPUTS} == {
        name: online[name] for name in OUTPUTS
    }


def test_the_registry_holds_a_function_that_only_calls_the_installed_one(
    store: FeatureStore,
) -> None:
    view = store.get_on_demand_feature_view("cross_features_v1")

    kept = view.to_proto().spec.feature_transformation.user_defined_function

    assert "from qarm_feast.cross_features import on_demand_features" in kept.body_text
    assert view.feature_transformation.udf.__module__ != "qarm_feast.feature_views"

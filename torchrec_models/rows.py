"""Training rows by Feast's point-in-time joins.

    codes and profile   joined at the label's time
    history             joined at the label's time - 1 microsecond: events of one user at one
                        timestamp do not see each other. A train row's history holds train
                        positives only, that of a valid or test row all positives so far, as the
                        online list of its time did

Labels and history events that an erasure of their user covers are left out.
The joined rows pass every check of :mod:`torchrec_models.leaks` before they are published.
Shape letters: N rows, I items, L levels, D aligned embedding width.
May import: feast, duckdb, pyarrow; neither torch nor torchrec.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from feast import FeatureStore
from feast.errors import FeatureServiceNotFoundException
from feast.infra.offline_stores.offline_utils import get_offline_store_from_config

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.export import raw_vectors_folder
from qarm_feast.codebook import Codebook
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.erasure import without_erased
from qarm_feast.errors import DataError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.offline_store import open_code_log
from qarm_feast.registry import Manifest
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import (
    ABSENT_CODE,
    CODES,
    RECENT_ITEMS_VIEW,
    SPLITS,
    TIMESTAMP,
    TRAIN_ITEMS_VIEW,
    USER_PROFILE_VIEW,
    code_view_name,
)
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import resolve_codebook_version
from torchrec_models.item_columns import (
    ItemColumns,
    build_item_columns,
    select_item_columns,
)
from torchrec_models.leaks import (
    check_code_times,
    check_history_split,
    check_history_times,
    check_learnt_rows,
    check_pool,
)
from torchrec_models.pair_counts import count_train_pairs
from torchrec_models.popularity import count_items
from torchrec_models.row_store import RowsManifest, SnapshotArrays, publish_rows, row_schema
from torchrec_models.side_tables import SideTables
from torchrec_models.sorted_ids import find_ids
from torchrec_models.vocabulary import ColumnVocabulary, build_vocabularies

logger = logging.getLogger(__name__)

_ROW = "row_number"


def build_training_rows(
    config_path: str, config: RankerConfig, codebook_version: str | None = None
) -> RowsManifest:
    """Join, check and publish the training rows of one feature service.

    Args:
        config_path: Path of ``qarm.yaml``, beside ``feature_store.yaml``.
        config: The ranker section.
        codebook_version: Version whose codes are joined; None: ``config.codebook_version``.

    Returns:
        The manifest of the published rows: counts by split and by finding.

    Raises:
        DataError: If the feature service is not applied.
        LeakError: If a row has seen its future.
    """
    version = resolve_codebook_version(config_path, codebook_version or config.codebook_version)
    sources = _Sources.open(config_path, config.service_name(version), version)
    rows = sources.join_rows()
    codes = sources.read_codes()
    num_history_events = sources.check(rows, codes)
    train_rows = rows.filter(pc.equal(rows["split"], "train"))
    vocabularies = build_vocabularies(train_rows, sources.user_columns, config.num_numeric_buckets)
    columns, column_vocabularies = sources.item_columns(config, vocabularies.item_ids.ids_V)
    vocabularies = replace(vocabularies, item_columns=column_vocabularies)
    side_tables = SideTables(
        columns,
        count_items(train_rows, sources.labels.task_names),
        count_train_pairs(
            train_rows,
            sources.labels.positive_label,
            config.history_length,
            items=config.has("item_cf"),
            codes=config.has("code_cf"),
        ),
    )
    vectors = sources.read_vectors(codes.item_ids_I)
    snapshot = SnapshotArrays(codes.item_ids_I, codes.last_times_I, codes.rq_IL, *vectors)
    manifest = sources.manifest(rows, num_history_events, vectors.raw_IE)
    publish_rows(config.rows_uri, manifest, rows, vocabularies, snapshot, side_tables)
    logger.info(
        "built_rows service=%s %s %s",
        manifest.service,
        " ".join(f"{split}={count}" for split, count in manifest.num_rows.items()),
        " ".join(f"{name}={count}" for name, count in manifest.counts.items()),
    )
    return manifest


@dataclass(frozen=True)
class _CodeRows:
    """Oldest and newest code row of each item, by ascending item id."""

    item_ids_I: npt.NDArray[np.int64]
    first_times_I: npt.NDArray[np.int64]
    last_times_I: npt.NDArray[np.int64]
    rq_IL: npt.NDArray[np.int64]


class _Vectors(NamedTuple):
    """Exported vectors of items, zero rows where there is none; None: no export."""

    aligned_ID: npt.NDArray[np.float32] | None
    raw_IE: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class _Sources:
    store: FeatureStore
    service: str
    labels: InputData
    label_rows: pa.Table
    """The interactions of ``labels`` that no erasure covers; checks go by all of them."""
    codebook: Codebook
    user_columns: tuple[str, ...]
    vectors_uri: str

    @staticmethod
    def open(config_path: str, service: str, version: str) -> "_Sources":
        store = open_feature_store(Path(config_path).resolve().parent)
        try:
            projections = store.get_feature_service(service).feature_view_projections
        except FeatureServiceNotFoundException as error:
            raise DataError(
                f"the Feast registry has no service {service!r}; run "
                f"`feast -c {store.repo_path} apply` after `qarm codebook publish`"
            ) from error
        profile = [view for view in projections if view.name == USER_PROFILE_VIEW]
        codebooks = load_section(config_path, "codebook", CodebookConfig)
        codebook = Codebook.load(codebooks.uri, version)
        alignment = load_section(config_path, "alignment", AlignmentConfig)
        labels = load_input_data(load_section(config_path, "data", DataConfig))
        return _Sources(
            store=store,
            service=service,
            labels=labels,
            label_rows=without_erased(labels.interactions, open_code_log(store.config)),
            codebook=codebook,
            user_columns=tuple(feature.name for view in profile for feature in view.features),
            vectors_uri=alignment.vectors_uri,
        )

    @property
    def facts(self) -> Manifest:
        """Manifest of the codebook."""
        return self.codebook.manifest

    def join_rows(self) -> pa.Table:
        """Return the labels with codes, profile and history, in the order of the labels."""
        labels = self.label_rows
        code_view = code_view_name(self.facts.version)
        references = [f"{code_view}:rq_code", f"{code_view}:vq_code", f"{code_view}:is_deleted"]
        references += [f"{USER_PROFILE_VIEW}:{name}" for name in self.user_columns]
        entities = labels.select(["user_id", "item_id", "event_timestamp"])
        entities = entities.append_column(_ROW, pa.array(np.arange(len(labels))))
        return self._assemble(self._join(entities, references), self._histories(entities))

    def _histories(self, entities: pa.Table) -> pa.Table:
        """Join each row with the history that it may see, just before its time."""
        times = pc.subtract(entities["event_timestamp"].cast(pa.int64()), 1).cast(TIMESTAMP)
        entities = entities.drop_columns(["item_id", "event_timestamp"])
        entities = entities.append_column("event_timestamp", times)
        is_train = pc.equal(self.label_rows["split"], "train")
        parts = []
        for view, is_chosen in (
            (TRAIN_ITEMS_VIEW, is_train),
            (RECENT_ITEMS_VIEW, pc.invert(is_train)),
        ):
            chosen = entities.filter(is_chosen)
            if len(chosen):
                references = [f"{view}:item_ids", f"{view}:item_timestamps"]
                parts.append(self._join(chosen, references))
        return pa.concat_tables(parts, promote_options="default").sort_by(_ROW)

    def _join(self, entities: pa.Table, references: list[str]) -> pa.Table:
        joined = self.store.get_historical_features(
            entity_df=entities.to_pandas(), features=references
        ).to_arrow()
        if len(joined) != len(entities):
            raise DataError(
                f"the offline store returned {len(joined)} rows for {len(entities)} labels; use "
                "offline_store.type qarm_feast.offline_store.CodeLogOfflineStore"
            )
        return joined.sort_by(_ROW)

    def _assemble(self, now: pa.Table, history: pa.Table) -> pa.Table:
        labels = self.label_rows
        has_codes = pc.and_kleene(
            pc.is_valid(now["rq_code"]), pc.invert(pc.fill_null(now["is_deleted"], True))
        )
        columns = {
            "rq_code": _dense_lists(now["rq_code"], has_codes, len(self.facts.level_sizes)),
            "vq_code": _dense_lists(now["vq_code"], has_codes, self.facts.num_neighbors),
            "history_item_ids": _no_null_lists(history["item_ids"]),
            "history_timestamps": _no_null_lists(history["item_timestamps"]),
        }
        fields = [now.schema.field(name) for name in self.user_columns]
        schema = row_schema(self.labels.task_names, fields)
        arrays = [
            columns[name]
            if name in columns
            else (now if name in self.user_columns else labels)[name]
            for name in schema.names
        ]
        return pa.table(
            [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)],
            schema=schema,
        )

    def read_codes(self) -> _CodeRows:
        """Read the oldest and the newest code row of every item from the offline store."""
        view = self.store.get_feature_view(code_view_name(self.facts.version))
        job = get_offline_store_from_config(
            self.store.config.offline_store
        ).pull_all_from_table_or_query(
            config=self.store.config,
            data_source=view.batch_source,
            join_key_columns=["item_id"],
            feature_name_columns=["rq_code", "is_deleted"],
            timestamp_field="event_timestamp",
        )
        return _code_rows(job.to_arrow(), len(self.facts.level_sizes))

    def check(self, rows: pa.Table, codes: _CodeRows) -> int:
        """Run every leak check; return the number of history events."""
        num_events = check_history_times(rows)
        check_history_split(rows, self.labels.positives())
        check_code_times(
            rows, dict(zip(codes.item_ids_I.tolist(), codes.first_times_I.tolist(), strict=True))
        )
        check_learnt_rows(
            rows,
            has_given_split=self.labels.has_given_split,
            cutoff=self.facts.behaviour_cutoff,
        )
        check_pool(self.codebook.vq.pool_item_ids_P, self.labels.train_item_ids())
        return num_events

    def read_vectors(self, item_ids_I: npt.NDArray[np.int64]) -> "_Vectors":
        """Return the exported vectors of items, aligned and raw."""
        encoder, uri = self.facts.encoder_version, self.vectors_uri
        aligned_ID = _read_vectors(Path(uri) / encoder, item_ids_I)
        return _Vectors(aligned_ID, _read_vectors(raw_vectors_folder(uri, encoder), item_ids_I))

    def item_columns(
        self, config: RankerConfig, train_item_ids: npt.NDArray[np.int64]
    ) -> tuple[ItemColumns, Mapping[str, ColumnVocabulary]]:
        """Return the typed columns of the items and their vocabularies."""
        wanted = None if config.item_columns == "auto" else config.item_columns
        items = self.labels.items
        names = select_item_columns(items.schema, wanted)
        return build_item_columns(items, names, train_item_ids, config.num_numeric_buckets)

    def manifest(
        self, rows: pa.Table, num_history_events: int, raw_IE: npt.NDArray[np.float32] | None
    ) -> RowsManifest:
        """Describe the rows."""
        created = datetime.now(UTC)
        is_absent_N = pc.equal(pc.list_element(rows["rq_code"], 0), ABSENT_CODE)
        history_lengths = pc.list_value_length(rows["history_item_ids"])
        return RowsManifest(
            service=self.service,
            codebook_version=self.facts.version,
            encoder_version=self.facts.encoder_version,
            build=f"build-{created:%Y%m%dT%H%M%S%f}",
            created=created.isoformat(),
            label_names=self.labels.task_names,
            user_columns=self.user_columns,
            level_sizes=self.facts.level_sizes,
            num_neighbors=self.facts.num_neighbors,
            pool_size=self.facts.pool_size,
            vector_dim=self.facts.embedding_dim,
            raw_vector_dim=0 if raw_IE is None else raw_IE.shape[1],
            num_rows={
                split: pc.sum(pc.equal(rows["split"], split)).as_py() or 0 for split in SPLITS
            },
            counts={
                "history_events": num_history_events,
                "rows_without_history": pc.sum(pc.equal(history_lengths, 0)).as_py() or 0,
                "rows_without_codes": pc.sum(is_absent_N).as_py() or 0,
                "labels_erased": self.labels.interactions.num_rows - self.label_rows.num_rows,
            },
        )


def _read_vectors(
    folder: Path, item_ids_I: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32] | None:
    if not folder.is_dir():
        return None
    table = pads.dataset(folder, format="parquet").to_table(columns=["item_id", "embedding"])
    width = table.schema.field("embedding").type.list_size
    vectors_ID = np.zeros((len(item_ids_I), width), dtype=np.float32)
    places_N, is_known_N = find_ids(item_ids_I, table["item_id"].to_numpy())
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    vectors_ID[places_N[is_known_N]] = flat.reshape(-1, width)[is_known_N]
    return vectors_ID


def _code_rows(table: pa.Table, num_levels: int) -> _CodeRows:
    table = table.sort_by([("item_id", "ascending"), ("event_timestamp", "ascending")])
    table = table.combine_chunks()
    item_ids = table["item_id"].to_numpy()
    times = table["event_timestamp"].cast(pa.int64()).to_numpy()
    firsts = np.flatnonzero(np.append(True, item_ids[1:] != item_ids[:-1])[: len(item_ids)])
    lasts = np.append(firsts[1:], len(item_ids))[: len(firsts)] - 1
    newest = table.take(pa.array(lasts))
    has_codes = pc.invert(newest["is_deleted"])
    rq = _dense_lists(newest["rq_code"], has_codes, num_levels)
    return _CodeRows(
        item_ids_I=item_ids[firsts],
        first_times_I=times[firsts],
        last_times_I=times[lasts],
        rq_IL=rq.flatten().to_numpy().reshape(len(firsts), num_levels),
    )


def _dense_lists(column: pa.ChunkedArray, is_present: pa.ChunkedArray, width: int) -> pa.ListArray:
    """Return lists of ``width`` codes each, filled with ABSENT_CODE where there is none to use."""
    is_present_N = is_present.to_numpy()
    present = column.filter(is_present).combine_chunks()
    lengths_N = pc.list_value_length(present).to_numpy()
    if len(wrong := lengths_N[lengths_N != width]):
        raise DataError(
            f"{len(wrong)} code rows do not hold {width} codes, the first holds {wrong[0]}; "
            "another codebook's codes were written into this view: write this version's again"
        )
    values = present.flatten().to_numpy()
    codes = np.full((len(is_present_N), width), ABSENT_CODE, dtype=np.int64)
    codes[is_present_N] = values.reshape(-1, width)
    offsets = np.arange(len(codes) + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes.ravel()), type=CODES)


def _no_null_lists(column: pa.ChunkedArray) -> pa.ListArray:
    lists = column.combine_chunks()
    lengths_N = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), lists.flatten(), type=CODES)

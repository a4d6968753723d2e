"""Rows for ranker benchmarks: one directory of the input contract, coded in several ways.

Everything learns from train rows alone: pairs, encoder, codebooks, vocabularies. Histories are
point in time: the user's positives strictly before the label, for train rows those of train rows
alone. The rows pass the checks of :mod:`torchrec_models.leaks` and are published as the trainer
reads them, once per way of coding the items.

Shape letters in this file: N items, E width of raw vectors (and positive events), D width of
aligned ones, L levels, V neighbours, P pool rows, R rows.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures, content_features
from qarm_feast.alignment.fusion import ContentFusion
from qarm_feast.alignment.pairs import build_pairs
from qarm_feast.alignment.train import pair_rows, train_head
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.encode import content_hashes
from qarm_feast.input_data import SPLIT, UPLOAD_TIMESTAMP, InputData
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.recent_items import PositiveEvents, histories_as_of, newest_first
from qarm_feast.schema import CODES, EVENT_TIMESTAMP, ITEM_ID, SPLITS, USER_ID
from torchrec_models.inputs import CodebookVectors, TrainInputs
from torchrec_models.item_columns import build_item_columns, select_item_columns
from torchrec_models.leaks import (
    check_history_split,
    check_history_times,
    check_learnt_rows,
    check_pool,
)
from torchrec_models.pair_counts import count_train_pairs
from torchrec_models.popularity import count_items
from torchrec_models.row_store import (
    RowsManifest,
    RowStore,
    SnapshotArrays,
    publish_rows,
    row_schema,
)
from torchrec_models.side_tables import SideTables
from torchrec_models.vocabulary import build_vocabularies

LEFT_OUT = "none"
"""Split of rows that nothing learns from and nobody ranks."""
VALID_SHARE = 0.2
"""Of the train rows, that are valid rows where the protocol is moved back."""
THIRD_PARTY = "third_party_codes.parquet"
SERVICE = "ranker"
HISTORY_LENGTH = 50
NUM_NUMERIC_BUCKETS = 10
RQ_SIZES = (16, 64, 256)
"""Centroids per level: few on the first, whose rows then see many clicks."""
NUM_NEIGHBORS = 10
MOST_ALIGNMENT_EPOCHS = 3
"""More passes tell more of items with train rows and less of cold ones."""
CREATED = datetime(2024, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class CodedItems:
    """Codes of every item and what the tables of their codes start from.

    ``vq_NV`` has no columns where codes came without neighbours.
    """

    rq_NL: Codes
    vq_NV: Codes
    pool_item_ids_P: npt.NDArray[np.int64]
    starts: CodebookVectors


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of every item: of the content model, and of the head aligned on train rows."""

    raw_NE: Embeddings
    aligned_ND: Embeddings


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


def with_fewer_users(checked: InputData, share: float) -> InputData:
    """Return the data in which a random share of the train users teaches, the rest as it is.

    Train rows of the others get the split ``none``: nothing learns from them, but the histories of
    valid and test rows hold what an online list would, so that only the learning is smaller.
    """
    interactions = checked.interactions
    users = np.unique(checked.train_interactions()[USER_ID].to_numpy())
    kept = np.random.default_rng(0).permutation(users)[: math.ceil(share * len(users))]
    is_left_out_R = pc.equal(interactions[SPLIT], "train").to_numpy()
    is_left_out_R &= ~np.isin(interactions[USER_ID].to_numpy(), kept)
    splits = pc.if_else(pa.array(is_left_out_R), LEFT_OUT, interactions[SPLIT])
    place = interactions.schema.get_field_index(SPLIT)
    return replace(checked, interactions=interactions.set_column(place, SPLIT, splits))


def moved_back(checked: InputData, share: float) -> InputData:
    """Return the data with the whole protocol moved to an earlier time, its test rows left out.

    The oldest ``share`` of the train rows teaches, the next fifth of them are the valid rows, and
    the rest of them with the old valid rows are ranked: no test row plays a part, and many more
    of the ranked rows are of items without a train row.

    Args:
        checked: The data.
        share: Share of train rows that are older than the new cut-off, above 0 and at most .8.
    """
    interactions = checked.interactions
    times_R = interactions[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy()
    splits_R = interactions[SPLIT].to_numpy()
    train_times = times_R[splits_R == "train"]
    ends = np.quantile(train_times, [share, share + VALID_SHARE], method="lower")
    moved_R = np.array(["train", "valid", "test"])[np.searchsorted(ends, times_R)]
    moved_R[splits_R == "test"] = LEFT_OUT
    place = interactions.schema.get_field_index(SPLIT)
    splits = pa.array(moved_R, type=interactions.schema.field(place).type)
    return replace(checked, interactions=interactions.set_column(place, SPLIT, splits))


def item_vectors(checked: InputData, backbone_folder: str, features_uri: str) -> Vectors:
    """Return the content model's vectors, and those of a head aligned on train rows.

    Args:
        checked: The data; items without text give their ready vectors.
        backbone_folder: Folder of the text model.
        features_uri: Folder where its outputs are kept.
    """
    config = AlignmentConfig(
        backbone=backbone_folder,
        features_uri=features_uri,
        num_epochs=MOST_ALIGNMENT_EPOCHS,
    )
    features = content_features(checked.items, config, checked.directory)
    say(f"vectors of {len(features)} items")
    return align(checked, features, config)[1]


def align(
    checked: InputData,
    features: ItemFeatures,
    config: AlignmentConfig,
    parent: ContentFusion | None = None,
) -> tuple[ContentFusion, Vectors]:
    """Return a head aligned on train rows, and the vectors of all items.

    Args:
        checked: The data.
        features: Content features of its items, in their order.
        config: How to align.
        parent: A head to go on from.
    """
    item_ids_N = checked.items[ITEM_ID].to_numpy()
    is_train_N = np.isin(item_ids_N, checked.train_item_ids())
    pairs = build_pairs(checked, config.pairs, config.seed)
    rows = pair_rows(pairs, item_ids_N[is_train_N])
    head, run = train_head(features.take(is_train_N), rows, config, parent=parent)
    say(f"head aligned on {run.num_train_pairs} pairs, best epoch {run.best_epoch}")
    with torch.no_grad():
        aligned_ND: Embeddings = head(*features.tensors()).numpy()
    return head, Vectors(features.raw_vectors(), aligned_ND)


def train_codebook(
    checked: InputData, x_ND: Embeddings, version: str, sizes: tuple[int, ...] = RQ_SIZES
) -> Codebook:
    """Return a codebook of the items that have a train row."""
    item_ids_N = checked.items[ITEM_ID].to_numpy()
    is_train_N = np.isin(item_ids_N, checked.train_item_ids())
    num_neighbors = min(NUM_NEIGHBORS, int(is_train_N.sum()) - 1)
    return Codebook.train(
        version,
        item_ids_N[is_train_N],
        x_ND[is_train_N],
        config=QuantizerConfig(
            rq=RqConfig(codebook_size=fitting_sizes(x_ND[is_train_N], sizes)),
            vq=VqConfig(num_neighbors=num_neighbors),
        ),
        encoder=EncoderFacts("e1", "0" * 64, checked.behaviour_cutoff()),
        created=CREATED,
    )


def fitting_sizes(x_ND: Embeddings, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes, cut so that a level leaves two points per centroid."""
    most = max(2, len(np.unique(x_ND, axis=0)) // 2)
    return tuple(min(size, most) for size in sizes)


def coded_items(checked: InputData, codebook: Codebook, x_ND: Embeddings) -> CodedItems:
    """Return the codes that a codebook serves for all items of the data."""
    hashes = content_hashes(checked.items)
    codes = codebook.encode(checked.items[ITEM_ID].to_numpy(), hashes, x_ND)
    return CodedItems(
        rq_NL=codes.rq_NL,
        vq_NV=codes.vq_NV,
        pool_item_ids_P=codebook.vq.pool_item_ids_P,
        starts=CodebookVectors(codebook.rq.codebooks, codebook.vq.pool_vectors_PD),
    )


def third_party_items(checked: InputData, x_ND: Embeddings) -> CodedItems | None:
    """Return the codes that lie beside the data, or None; tables start from their cells' means.

    Args:
        checked: The data; its folder may hold ``third_party_codes.parquet``.
        x_ND: Vectors whose means over each code's train items stand for the unknown centroids.

    Raises:
        SystemExit: If an item has no code there.
    """
    path = checked.directory / THIRD_PARTY
    if not path.is_file():
        return None
    table = pq.read_table(path)
    item_ids_N = checked.items[ITEM_ID].to_numpy()
    rows = pc.index_in(pa.array(item_ids_N), table[ITEM_ID].combine_chunks())
    if rows.null_count:
        raise SystemExit(
            f"{path} holds codes of {table.num_rows} items, {rows.null_count} of the catalogue's "
            f"{len(item_ids_N)} are not among them; give each a code, or take the file away"
        )
    rq_NL: Codes = np.array(table["rq_code"].take(rows).to_pylist(), dtype=np.int64)
    is_train_N = np.isin(item_ids_N, checked.train_item_ids())
    residual_ND = x_ND[is_train_N].copy()
    codebooks = []
    for codes_N, size in zip(rq_NL[is_train_N].T, rq_NL.max(axis=0) + 1, strict=True):
        sums_KD = np.zeros((size, x_ND.shape[1]), dtype=np.float32)
        np.add.at(sums_KD, codes_N, residual_ND)
        codebooks.append(sums_KD / np.maximum(np.bincount(codes_N, minlength=size), 1)[:, None])
        codebooks[-1] = codebooks[-1].astype(np.float32)
        residual_ND -= codebooks[-1][codes_N]
    return CodedItems(
        rq_NL=rq_NL,
        vq_NV=np.empty((len(rq_NL), 0), dtype=np.int64),
        pool_item_ids_P=item_ids_N[is_train_N],
        starts=CodebookVectors(codebooks, x_ND[is_train_N]),
    )


def publish_coded_rows(
    checked: InputData,
    coded: CodedItems,
    vectors: Vectors,
    name: str,
    folder: Path,
    *,
    fit_splits: Sequence[str] | None = None,
) -> TrainInputs:
    """Publish the rows of one way of coding the items and return what training takes.

    Args:
        checked: The data.
        coded: Codes of its items, in their order.
        vectors: What the ranker may read beside the codes.
        name: What the codebook version is called here.
        folder: Where rows are kept.
        fit_splits: Which split the ranker takes each interaction for, ``none`` leaves it out;
            histories, vocabularies and counts learn from the data's own train rows all the same.
            By default the data's own.

    Raises:
        LeakError: If a row has seen its future.
    """
    rows = _joined_rows(checked, coded)
    rows = rows.filter(pc.not_equal(rows["split"], LEFT_OUT))
    _check(checked, coded, rows)
    user_columns = _user_columns(checked)
    train = rows.filter(pc.equal(rows["split"], "train"))
    vocabularies = build_vocabularies(train, user_columns, NUM_NUMERIC_BUCKETS)
    item_columns, column_vocabularies = build_item_columns(
        checked.items,
        select_item_columns(checked.items.schema, None),
        checked.train_item_ids(),
        NUM_NUMERIC_BUCKETS,
    )
    side_tables = SideTables(
        item_columns,
        count_items(train, checked.task_names),
        count_train_pairs(train, checked.positive_label, HISTORY_LENGTH, items=True, codes=True),
    )
    if fit_splits is not None:
        place = rows.schema.get_field_index("split")
        rows = rows.set_column(place, "split", pa.array(fit_splits))
    uploads = checked.items[UPLOAD_TIMESTAMP].cast(pa.int64()).to_numpy()
    snapshot = SnapshotArrays(
        item_ids_I=checked.items[ITEM_ID].to_numpy(),
        event_times_I=uploads,
        rq_IL=coded.rq_NL,
        vectors_ID=vectors.aligned_ND,
        raw_vectors_IE=vectors.raw_NE,
    )
    store: RowStore = publish_rows(
        str(folder),
        _manifest(checked, coded, vectors, name, rows),
        rows,
        replace(vocabularies, item_columns=column_vocabularies),
        snapshot,
        side_tables,
    )
    return TrainInputs(store=store, codebook=coded.starts)


def _manifest(
    checked: InputData, coded: CodedItems, vectors: Vectors, name: str, rows: pa.Table
) -> RowsManifest:
    return RowsManifest(
        service=f"{SERVICE}_{name}",
        codebook_version=name,
        encoder_version="e1",
        build="build-1",
        created=CREATED.isoformat(),
        label_names=checked.task_names,
        user_columns=_user_columns(checked),
        level_sizes=tuple(len(codebook_KD) for codebook_KD in coded.starts.codebooks),
        num_neighbors=coded.vq_NV.shape[1],
        pool_size=len(coded.pool_item_ids_P),
        vector_dim=vectors.aligned_ND.shape[1],
        raw_vector_dim=vectors.raw_NE.shape[1],
        num_rows={split: pc.sum(pc.equal(rows["split"], split)).as_py() or 0 for split in SPLITS},
        counts={},
    )


def _joined_rows(checked: InputData, coded: CodedItems) -> pa.Table:
    labels = checked.interactions
    item_rows_R = pc.index_in(labels[ITEM_ID], checked.items[ITEM_ID].combine_chunks()).to_numpy()
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "rq_code": _lists(coded.rq_NL[item_rows_R]),
        "vq_code": _lists(coded.vq_NV[item_rows_R]),
        **_histories(checked),
        **_profiles(checked),
    }
    fields = [checked.users.schema.field(name) for name in _user_columns(checked)]
    schema = row_schema(checked.task_names, fields)
    arrays = [
        columns.get(name, labels[name] if name in labels.column_names else None)
        for name in schema.names
    ]
    return pa.table(
        [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)],
        schema=schema,
    )


def _histories(checked: InputData) -> Mapping[str, pa.Array]:
    """Return the lists that rows may see: train rows train positives, others all so far."""
    labels = checked.interactions
    is_train_R = pc.equal(labels[SPLIT], "train").to_numpy()
    order_R = np.argsort(np.concatenate([np.flatnonzero(is_train_R), np.flatnonzero(~is_train_R)]))
    parts = [
        _lists_as_of(checked.train_positives(), labels.filter(pa.array(is_train_R))),
        _lists_as_of(checked.positives(), labels.filter(pa.array(~is_train_R))),
    ]
    return {
        name: pa.concat_arrays([part[name] for part in parts]).take(pa.array(order_R))
        for name in parts[0]
    }


def _lists_as_of(positives: pa.Table, labels: pa.Table) -> Mapping[str, pa.Array]:
    events = PositiveEvents.sort(
        positives[USER_ID].to_numpy(),
        positives[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy(),
        positives[ITEM_ID].to_numpy(),
    )
    # A microsecond before: events of one time do not see each other.
    times_R = labels[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy() - 1
    slices = histories_as_of(events, labels[USER_ID].to_numpy(), times_R, HISTORY_LENGTH)
    return {
        name: pc.fill_null(newest_first(values_E, slices), [])
        for name, values_E in (
            ("history_item_ids", events.item_ids_E),
            ("history_timestamps", events.times_E),
        )
    }


def _user_columns(checked: InputData) -> tuple[str, ...]:
    if checked.users is None:
        return ()
    return tuple(name for name in checked.users.column_names if name != USER_ID)


def _profiles(checked: InputData) -> Mapping[str, pa.ChunkedArray]:
    if checked.users is None:
        return {}
    known = checked.users[USER_ID].combine_chunks()
    rows = pc.index_in(checked.interactions[USER_ID], known)
    return {name: checked.users[name].take(rows) for name in _user_columns(checked)}


def _check(checked: InputData, coded: CodedItems, rows: pa.Table) -> None:
    check_history_times(rows)
    check_history_split(rows, checked.positives())
    check_learnt_rows(
        rows, has_given_split=checked.has_given_split, cutoff=checked.behaviour_cutoff()
    )
    check_pool(coded.pool_item_ids_P, checked.train_item_ids())


def _lists(codes_RK: Codes) -> pa.ListArray:
    offsets = np.arange(len(codes_RK) + 1, dtype=np.int32) * codes_RK.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes_RK.ravel()), type=CODES)

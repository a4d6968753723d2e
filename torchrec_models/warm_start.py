"""Warm start: a new ranker takes over what an older one learned, through the codebook's label map.

    RQ tables       by label; a code that goes on from none keeps its own start (its centroid)
    VQ table        by pool row; a recycled row keeps its own start
    prefix table    by the codes of the prefix; hashed rows go on in the same codebook only
    ID tables       by id through both vocabularies; a new id starts as the default row
    column tables   by value; a bucket by its lower edge; a new value starts as the default row
    dense parts     as they are, where names and shapes agree; else the start is refused

The optimizer's state goes on with each row, so that a learned row does not jump at its first step.
A table that another module adds gets its map in :func:`row_maps`.
Shape letters: R rows of a new table, K codes of a level, P pool rows, S rows of a shard, E width,
N prefixes of one length, L levels.
May import: numpy, torch, torchrec.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard

from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.errors import DataError
from qarm_feast.registry import Manifest, read_manifest
from torchrec_models.checkpoint import Checkpoint, flat_state
from torchrec_models.config import CodeSizes
from torchrec_models.label_maps import NO_ROW, LabelMap, RowMap, Rows, label_map
from torchrec_models.prefixes import PrefixVocabulary
from torchrec_models.sharding import ShardedRanker
from torchrec_models.tables import (
    ITEM_ID_FEATURE,
    PREFIX_FEATURE,
    SEQUENCE_TABLE,
    USER_ID_FEATURE,
    VQ_FEATURE,
    item_column_feature,
    rq_feature,
    user_column_feature,
)
from torchrec_models.vocabulary import (
    DEFAULT_ROW,
    CategoryVocabulary,
    ColumnVocabulary,
    IdVocabulary,
    Vocabularies,
)

_NUM_SHOWN = 3


@dataclass(frozen=True)
class WarmStart:
    """An older ranker, and what its codes have become."""

    checkpoint: Checkpoint
    labels: LabelMap


def load_warm_start(config_path: str, folder: str, codebook_version: str) -> WarmStart:
    """Return the warm start from a checkpoint, its label map read from the codebook registry.

    Args:
        config_path: Path of ``qarm.yaml``.
        folder: Folder of the older checkpoint.
        codebook_version: Version of the rows to train on.

    Returns:
        The warm start.

    Raises:
        DataError: If there is no such checkpoint, or the version does not descend from its one.
    """
    checkpoint = Checkpoint.at(folder)
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    old = checkpoint.manifest.codebook_version
    manifests: dict[str, Manifest] = {}
    version: str | None = codebook_version
    while version is not None:
        manifests[version] = read_manifest(uri, version)
        version = manifests[version].parent if version != old else None
    return WarmStart(checkpoint, label_map(manifests, old=old, new=codebook_version))


def take_over(sharded: ShardedRanker, start: WarmStart, vocabularies: Vocabularies) -> None:
    """Fill a new ranker's weights and optimizer state from an older one; on all ranks at once.

    One whole table of the older ranker is held at a time.

    Args:
        sharded: The new ranker, each row with its own start.
        start: The older ranker.
        vocabularies: Of the rows to train on.

    Raises:
        DataError: If the older ranker has other parts, or parts of another shape.
    """
    checkpoint = start.checkpoint
    state = {
        "model": sharded.model.state_dict(),
        "optimizer": sharded.optimizer.state_dict()["state"],
    }
    tensors = flat_state(state)
    shapes = checkpoint.shapes()
    _check_shapes(tensors, shapes, checkpoint)
    maps = row_maps(checkpoint, vocabularies, start.labels)
    dense = {key: value for key, value in tensors.items() if not isinstance(value, ShardedTensor)}
    checkpoint.read(dense)
    for key, value in tensors.items():
        if isinstance(value, ShardedTensor):
            older = torch.zeros(shapes[key])
            checkpoint.read({key: older})
            is_state = key.startswith("optimizer.")
            for shard in value.local_shards():
                _fill(shard, older, maps[_table_name(key)], is_state=is_state)


def row_maps(
    checkpoint: Checkpoint, vocabularies: Vocabularies, labels: LabelMap
) -> dict[str, RowMap]:
    """Return the row map of each table that a ranker can have, by the table's name.

    Args:
        checkpoint: The older ranker.
        vocabularies: Of the rows to train on.
        labels: From the new codebook to the older one.

    Returns:
        Maps over the rows of the new tables.
    """
    older = checkpoint.vocabularies()
    maps = {rq_feature(level): RowMap.of_sources(rows) for level, rows in enumerate(labels.levels)}
    maps[SEQUENCE_TABLE] = RowMap.of_sources(_sequence_rows(labels, checkpoint.manifest.sizes))
    maps[VQ_FEATURE] = RowMap.of_sources(labels.pool_P)
    maps[USER_ID_FEATURE] = _id_map(vocabularies.user_ids, older.user_ids)
    maps[ITEM_ID_FEATURE] = _id_map(vocabularies.item_ids, older.item_ids)
    if vocabularies.prefixes is not None and older.prefixes is not None:
        maps[PREFIX_FEATURE] = RowMap.of_sources(
            _prefix_rows(vocabularies.prefixes, older.prefixes, labels)
        )
    for name, vocabulary in vocabularies.user_columns.items():
        maps[user_column_feature(name)] = _column_map(vocabulary, older.user_columns.get(name))
    for name, vocabulary in vocabularies.item_columns.items():
        maps[item_column_feature(name)] = _column_map(vocabulary, older.item_columns.get(name))
    return maps


def _sequence_rows(labels: LabelMap, sizes: CodeSizes) -> Rows:
    """Return the older rows of the table in which the levels stand one behind the other."""
    offsets = np.concatenate([[0], np.cumsum(sizes.level_sizes)])
    return np.concatenate(
        [
            # A level that the older codebook lacks has no source.
            np.where(rows != NO_ROW, rows + offsets[min(level, len(offsets) - 1)], NO_ROW)
            for level, rows in enumerate(labels.levels)
        ]
    )


def _prefix_rows(vocabulary: PrefixVocabulary, older: PrefixVocabulary, labels: LabelMap) -> Rows:
    if vocabulary.keys is None:
        # Which prefixes share a row is not kept, so that only rows of equal meaning can go on.
        numbers = np.arange(vocabulary.num_embeddings)
        return (
            numbers if vocabulary == older and labels.is_identity else np.full_like(numbers, NO_ROW)
        )
    sources = [np.zeros(0, dtype=np.int64)]
    for codes_NL in vocabulary.codes():
        older_NL = np.stack(
            [labels.levels[level][codes_N] for level, codes_N in enumerate(codes_NL.T)], axis=1
        )
        goes_on_N = (older_NL != NO_ROW).all(axis=1)
        source_N = np.full(len(codes_NL), NO_ROW, dtype=np.int64)
        # The last column is the whole prefix; an older vocabulary of shorter ones has none.
        found_NL = older.rows(older_NL[goes_on_N])
        if found_NL.shape[1] == codes_NL.shape[1]:
            source_N[goes_on_N] = found_NL[:, -1]
        sources.append(source_N)
    source_R = np.concatenate(sources)
    # A vocabulary of no prefix at all has one row, which nobody reads.
    return source_R if len(source_R) else np.array([NO_ROW])


def _id_map(vocabulary: IdVocabulary, older: IdVocabulary) -> RowMap:
    source_R = np.concatenate([[DEFAULT_ROW], older.rows(vocabulary.ids_V)])
    return _with_defaults(source_R)


def _column_map(vocabulary: ColumnVocabulary, older: ColumnVocabulary | None) -> RowMap:
    if older is None or type(older) is not type(vocabulary):
        return RowMap.of_sources(np.full(vocabulary.num_embeddings, NO_ROW, dtype=np.int64))
    if isinstance(vocabulary, CategoryVocabulary):
        values = pa.array(vocabulary.values, pa.string())
    else:
        # A value of each bucket: below the first edge, then the edges, which are lower bounds.
        values = pa.array([-np.inf, *vocabulary.edges], pa.float64())
    return _with_defaults(np.concatenate([[DEFAULT_ROW], older.rows(values)]))


def _with_defaults(source_R: Rows) -> RowMap:
    goes_on_R = source_R != DEFAULT_ROW
    goes_on_R[DEFAULT_ROW] = True
    return RowMap(source_R, goes_on_R)


def _fill(shard: Shard, older: torch.Tensor, rows: RowMap, *, is_state: bool) -> None:
    first, num_rows = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
    part = slice(first, first + num_rows)
    source_S = torch.from_numpy(rows.source_R[part])
    columns = slice(None)
    if older.dim() > 1:
        first_column = shard.metadata.shard_offsets[1]
        columns = slice(first_column, first_column + shard.metadata.shard_sizes[1])
    taken = older[source_S.clamp(min=0)]
    taken = taken[:, columns] if older.dim() > 1 else taken
    is_taken_S = torch.from_numpy(rows.goes_on_R[part]) if is_state else source_S != NO_ROW
    shard.tensor[is_taken_S] = taken[is_taken_S].to(shard.tensor.device)


def _check_shapes(
    tensors: Mapping[str, torch.Tensor | ShardedTensor],
    shapes: Mapping[str, torch.Size],
    checkpoint: Checkpoint,
) -> None:
    wrong = []
    for key, value in tensors.items():
        # Tables may have grown; their width may not have changed.
        first = 1 if isinstance(value, ShardedTensor) else 0
        wanted = value.metadata().size if isinstance(value, ShardedTensor) else value.size()
        found = shapes.get(key)
        if found is None or found[first:] != wanted[first:]:
            has = "is missing" if found is None else f"has shape {tuple(found)}"
            wrong.append(f"{key} {has} there and {tuple(wanted)} here")
    if wrong:
        more = f", and {len(wrong) - _NUM_SHOWN} more" if len(wrong) > _NUM_SHOWN else ""
        raise DataError(
            f"{checkpoint.folder} cannot start this ranker: {'; '.join(wrong[:_NUM_SHOWN])}{more}; "
            "take its features, widths, heads and tasks in section ranker, and a codebook of as "
            "many levels, or train without --init-from"
        )


def _table_name(key: str) -> str:
    """Return the table of ``model.….<table>.weight`` or ``optimizer.….<table>.momentum1``."""
    return key.rpartition(".")[0].rpartition(".")[2]

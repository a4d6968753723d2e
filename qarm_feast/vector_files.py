"""Aligned embeddings in parquet files, read a batch at a time: more of them than memory holds.

Shape letters in this file: N items, D embedding width, B items of a batch.
May import: pyarrow, the codebook.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qarm_feast.codebook import ItemIds, ItemVectors, check_distinct
from qarm_feast.errors import DataError
from qarm_feast.quantizers.base import Embeddings
from qarm_feast.schema import ITEM_ID

EXPORT_MANIFEST = "_manifest.json"
"""What an export puts beside its parts; programs that read a folder of parquet files pass over
names with an underscore in front."""
_EMBEDDING = "embedding"
_CONTENT_HASH = "content_hash"
_COLUMNS = (ITEM_ID, _EMBEDDING, _CONTENT_HASH)
_ROWS_PER_BATCH = 65_536
_READ_BUFFER_BYTES = 1 << 20


class VectorFiles:
    """The vectors that `qarm align export` wrote, or those of some of their items.

    A source of training vectors; the ids alone are held in memory.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        embedding_dim: int,
        all_item_ids_N: ItemIds,
        is_listed_N: npt.NDArray[np.bool_],
    ) -> None:
        self.embedding_dim = embedding_dim
        self._paths = paths
        self._all_item_ids_N = all_item_ids_N
        self._is_listed_N = is_listed_N

    @classmethod
    def open(cls, folder: Path) -> "VectorFiles":
        """Return the files of ``folder`` after a look at their columns and ids.

        Args:
            folder: Folder of parquet files with ``item_id`` (int64), ``embedding`` (fixed-size
                list of float32) and ``content_hash`` (string).

        Returns:
            All rows, files in name order.

        Raises:
            DataError: If there are no rows, a file that the export names or a column is missing,
                a column is of another type, an id is null, or files hold vectors of unequal width.
        """
        paths = sorted(folder.glob("*.parquet"))
        if not paths:
            raise DataError(f"{folder} holds no parquet file; run `qarm align export` first")
        _check_parts(folder, paths)
        embedding_dim = _common_width(paths)
        ids = [_column_batches(path, (ITEM_ID,)) for path in paths]
        parts = [batch[ITEM_ID].to_numpy() for batches in ids for batch in batches]
        if not sum(map(len, parts)):
            raise DataError(f"{folder} holds no vectors; run `qarm align export` again")
        item_ids_N = np.concatenate(parts)
        return cls(paths, embedding_dim, item_ids_N, np.ones(len(item_ids_N), dtype=np.bool_))

    def item_ids(self) -> ItemIds:
        """Return the ids of the items, int64 ``[N]``, in the order of the batches."""
        return self._all_item_ids_N[self._is_listed_N]

    def only(self, item_ids: ItemIds) -> "VectorFiles":
        """Return the same files, of which only ``item_ids`` are read."""
        is_listed_N = self._is_listed_N & np.isin(self._all_item_ids_N, item_ids)
        return VectorFiles(self._paths, self.embedding_dim, self._all_item_ids_N, is_listed_N)

    def batches(self) -> Iterator[Embeddings]:
        """Yield the vectors in order, float32 ``[B, D]``.

        Yields:
            At most 65,536 rows at a time.

        Raises:
            DataError: If a vector, or a value in one, is null.
        """
        start = 0
        for path in self._paths:
            for batch in _column_batches(path, (_EMBEDDING,)):
                is_listed_B = self._is_listed_N[start : start + batch.num_rows]
                start += batch.num_rows
                if is_listed_B.any():
                    yield _matrix(batch[_EMBEDDING], path)[is_listed_B]

    def read(self) -> ItemVectors:
        """Return all vectors at once, with their content hashes.

        Returns:
            Rows in the order of the batches.

        Raises:
            DataError: If a value is null, or an item comes twice.
        """
        check_distinct(np.sort(self.item_ids()))
        hashes = [
            text
            for path in self._paths
            for batch in _column_batches(path, (_CONTENT_HASH,))
            for text in batch[_CONTENT_HASH].to_pylist()
        ]
        listed = np.flatnonzero(self._is_listed_N).tolist()
        return ItemVectors(
            item_ids_N=self.item_ids(),
            content_hashes_N=[hashes[row] for row in listed],
            x_ND=np.concatenate(list(self.batches())),
        )


def _check_parts(folder: Path, paths: Sequence[Path]) -> None:
    """Refuse a folder that is not as its export left it."""
    try:
        named = set(json.loads((folder / EXPORT_MANIFEST).read_bytes())["parts"])
    except FileNotFoundError:
        # Vectors of a user's own making have no manifest.
        return
    if odd := sorted(named ^ {path.name for path in paths}):
        raise DataError(
            f"{folder} holds {len(paths)} parquet files, its {EXPORT_MANIFEST} names {len(named)}; "
            f"the first that only one of them has is {odd[0]}; run `qarm align export` again"
        )


def _common_width(paths: Sequence[Path]) -> int:
    widths = [_width(path) for path in paths]
    for path, width in zip(paths, widths, strict=True):
        if width != widths[0]:
            raise DataError(
                f"{path} holds vectors of width {width}, {paths[0]} of {widths[0]}; remove the "
                "file that is no longer valid, or run `qarm align export` into an empty folder"
            )
    return widths[0]


def _width(path: Path) -> int:
    """Return the width of a file's vectors after a look at its columns."""
    schema = pq.read_schema(path)
    missing = [name for name in _COLUMNS if name not in schema.names]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}; it has {schema.names}")
    kind = schema.field(_EMBEDDING).type
    if not (pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()):
        raise DataError(f"{path}: embedding is {kind}, it must be fixed_size_list<float>[D]")
    if schema.field(ITEM_ID).type != pa.int64():
        raise DataError(f"{path}: item_id is {schema.field(ITEM_ID).type}, it must be int64")
    if not pa.types.is_string(schema.field(_CONTENT_HASH).type):
        raise DataError(
            f"{path}: content_hash is {schema.field(_CONTENT_HASH).type}, it must be string"
        )
    return int(kind.list_size)


def _column_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        # Not read ahead: a row group may be larger than what a job may hold.
        opened = pq.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is gone: another export took its place while it was read; run the same "
            "command again"
        ) from error
    with opened as file:
        for batch in file.iter_batches(_ROWS_PER_BATCH, columns=list(columns), use_threads=False):
            for name in columns:
                if batch[name].null_count:
                    raise DataError(f"{path}: {batch[name].null_count} values of {name} are null")
            yield batch


def _matrix(embeddings: pa.FixedSizeListArray, path: Path) -> Embeddings:
    values = embeddings.flatten()
    if values.null_count:
        raise DataError(
            f"{path}: {pc.sum(pc.is_null(values)).as_py()} numbers inside embedding are null"
        )
    matrix_BD: Embeddings = values.to_numpy().reshape(len(embeddings), embeddings.type.list_size)
    return matrix_BD

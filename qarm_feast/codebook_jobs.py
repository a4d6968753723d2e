"""The jobs behind `qarm codebook train` and `evaluate`: from exported vectors to a codebook.

Shape letters in this file: N items, D embedding width.
May import: pyarrow, the codebook, the input data and section ``alignment``.
"""

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AwareDatetime, BaseModel, ValidationError

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.artifact import MANIFEST_NAME, sha256
from qarm_feast.codebook import Codebook, EncoderFacts, ItemVectors, QuantizerConfig
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.continuity import ParentCodes, refresh_codebook
from qarm_feast.errors import CodebookMismatchError, CodebookNotFoundError, DataError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.quality import codebook_quality
from qarm_feast.registry import (
    CodebookRegistry,
    Manifest,
    drafts_uri,
    trained_uri,
    write_report,
)
from qarm_feast.schema import ITEM_ID

logger = logging.getLogger(__name__)

_COLUMNS = (ITEM_ID, "embedding", "content_hash")


class _EncoderManifest(BaseModel):
    """The part of an encoder's manifest that a codebook records."""

    version: str
    behaviour_cutoff: AwareDatetime | None


def train_codebook(
    config_path: str, version: str, created: datetime, parent: str | None = None
) -> Manifest:
    """Train a codebook on the exported vectors of items with a train row; store it as a draft.

    Args:
        config_path: Path of ``qarm.yaml``.
        version: Name of the codebook version.
        created: Wall clock, aware UTC.
        parent: A published version whose codes the new one keeps as far as it can; the vectors of
            its encoder must be there still. None trains from nothing.

    Returns:
        The draft's manifest.

    Raises:
        DataError: If the data, the encoder or its vectors are missing or broken.
        CodebookNotFoundError: If the parent is not published.
        CodebookError: If the vectors are too few for the sizes asked for, or the parent is the
            version itself.
    """
    alignment = load_section(config_path, "alignment", AlignmentConfig)
    quantizer = load_section(config_path, "quantizer", QuantizerConfig)
    config = load_section(config_path, "codebook", CodebookConfig)
    parent_codes = None if parent is None else _parent_codes(alignment, config.uri, parent)
    dataset = load_input_data(load_section(config_path, "data", DataConfig))
    encoder = _encoder_facts(alignment, dataset)
    vectors = read_vectors(Path(alignment.vectors_uri) / alignment.encoder_version)
    has_train_row_N = np.isin(vectors.item_ids_N, dataset.train_item_ids())
    logger.info(
        "codebook_training version=%s num_items=%d num_train_items=%d",
        version, len(vectors.item_ids_N), int(has_train_row_N.sum()),
    )  # fmt: skip
    codebook = Codebook.train(
        version,
        vectors.item_ids_N[has_train_row_N],
        vectors.x_ND[has_train_row_N],
        config=quantizer,
        encoder=encoder,
        created=created,
    )
    if parent_codes is not None:
        codebook = refresh_codebook(
            codebook,
            vectors,
            vectors.item_ids_N[has_train_row_N],
            parent_codes,
            config.continuity,
            quantizer.rq,
        )
    codebook.save(drafts_uri(config.uri), replace=True)
    return codebook.manifest


def evaluate_codebook(config_path: str, version: str) -> tuple[dict[str, Any], Path]:
    """Measure a trained version on all exported vectors and store the figures beside it.

    Args:
        config_path: Path of ``qarm.yaml``.
        version: A draft or a published version.

    Returns:
        The figures, and the file that holds them.

    Raises:
        CodebookNotFoundError: If no such version was trained.
        CodebookMismatchError: If it belongs to another encoder than section ``alignment``.
        DataError: If the vectors are missing or broken.
    """
    alignment = load_section(config_path, "alignment", AlignmentConfig)
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    codebook = Codebook.load(trained_uri(uri, version), version)
    if codebook.manifest.encoder_version != alignment.encoder_version:
        raise CodebookMismatchError(
            expected=alignment.encoder_version,
            found=codebook.manifest.encoder_version,
            where=f"codebook {version!r} (encoder)",
            command=f"qarm codebook train --codebook-version {version}",
        )
    vectors = read_vectors(Path(alignment.vectors_uri) / alignment.encoder_version)
    codes = codebook.encode(vectors.item_ids_N, vectors.content_hashes_N, vectors.x_ND)
    quality = codebook_quality(codebook, codes, vectors.x_ND)
    return quality, write_report(uri, codebook.manifest, quality)


def read_vectors(folder: Path) -> ItemVectors:
    """Return the vectors that `qarm align export` wrote.

    Args:
        folder: Folder of parquet files with ``item_id``, ``embedding`` (fixed-size list of
            float32) and ``content_hash``.

    Returns:
        All rows, files in name order.

    Raises:
        DataError: If there are no rows, a column is missing, a value is null or of another type,
            or files hold vectors of unequal width.
    """
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise DataError(f"{folder} holds no parquet file; run `qarm align export` first")
    parts = [_read_part(path) for path in paths]
    _check_widths(paths, parts)
    table = pa.concat_tables(parts).combine_chunks()
    if table.num_rows == 0:
        raise DataError(f"{folder} holds no vectors; run `qarm align export` again")
    # A table's combined column is still chunked; it has one chunk.
    embeddings = table["embedding"].chunk(0)
    return ItemVectors(
        item_ids_N=table[ITEM_ID].to_numpy(),
        content_hashes_N=table["content_hash"].to_pylist(),
        x_ND=embeddings.flatten().to_numpy().reshape(table.num_rows, embeddings.type.list_size),
    )


def _parent_codes(alignment: AlignmentConfig, uri: str, parent: str) -> ParentCodes:
    # A draft may still be replaced, so it cannot be what a label map points at.
    if parent not in CodebookRegistry(uri).states():
        raise CodebookNotFoundError(version=parent, uri=uri, known=CodebookRegistry(uri).versions())
    codebook = Codebook.load(uri, parent)
    folder = Path(alignment.vectors_uri) / codebook.manifest.encoder_version
    return ParentCodes.served_by(codebook, read_vectors(folder))


def _read_part(path: Path) -> pa.Table:
    schema = pq.read_schema(path)
    missing = [name for name in _COLUMNS if name not in schema.names]
    if missing:
        raise DataError(f"{path} lacks the columns {missing}; it has {schema.names}")
    kind = schema.field("embedding").type
    if not (pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()):
        raise DataError(f"{path}: embedding is {kind}, it must be fixed_size_list<float>[D]")
    if schema.field(ITEM_ID).type != pa.int64():
        raise DataError(f"{path}: item_id is {schema.field(ITEM_ID).type}, it must be int64")
    table = pq.read_table(path, columns=list(_COLUMNS))
    for name in _COLUMNS:
        if table[name].null_count:
            raise DataError(f"{path}: {table[name].null_count} values of {name} are null")
    return table.select(_COLUMNS)


def _check_widths(paths: list[Path], parts: list[pa.Table]) -> None:
    widths = [part.schema.field("embedding").type.list_size for part in parts]
    for path, width in zip(paths, widths, strict=True):
        if width != widths[0]:
            raise DataError(
                f"{path} holds vectors of width {width}, {paths[0]} of {widths[0]}; remove the "
                "file that is no longer valid, or run `qarm align export` into an empty folder"
            )


def _encoder_facts(alignment: AlignmentConfig, dataset: InputData) -> EncoderFacts:
    path = Path(alignment.encoder_uri) / alignment.encoder_version / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"there is no encoder at {path.parent}; run `qarm align train` first")
    content = path.read_bytes()
    try:
        encoder = _EncoderManifest.model_validate_json(content)
    except ValidationError as error:
        raise DataError(
            f"{path} is no encoder manifest: {error}; run `qarm align train` again"
        ) from error
    # The choice of items with a train row has seen the newest train interaction.
    seen = [dataset.behaviour_cutoff()]
    if encoder.behaviour_cutoff is not None:
        seen.append(encoder.behaviour_cutoff)
    return EncoderFacts(version=encoder.version, hash=sha256(content), behaviour_cutoff=max(seen))

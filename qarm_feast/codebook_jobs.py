"""The job behind `qarm codebook train`: from exported vectors to a codebook.

May import: the codebook, the vector files, the input data, section ``alignment``, the offline log.
"""

import logging
from datetime import datetime
from pathlib import Path

import numpy as np
from pydantic import AwareDatetime, BaseModel, ValidationError

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.artifact import MANIFEST_NAME, sha256
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.continuity import ParentCodes, refresh_codebook
from qarm_feast.errors import DataError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.registry import (
    CodebookRegistry,
    Manifest,
    check_version_name,
    drafts_uri,
)
from qarm_feast.takedowns import taken_down_items
from qarm_feast.vector_files import VectorFiles

logger = logging.getLogger(__name__)


class _EncoderManifest(BaseModel):
    """The part of an encoder's manifest that a codebook records."""

    version: str
    behaviour_cutoff: AwareDatetime | None


def train_codebook(
    config_path: str,
    version: str,
    created: datetime,
    parent: str | None = None,
    encoder_version: str | None = None,
) -> Manifest:
    """Train a codebook on the exported vectors of items with a train row; store it as a draft.

    Items whose newest content event is a takedown are left out, of the VQ pool as well.

    Args:
        config_path: Path of ``qarm.yaml``.
        version: Name of the codebook version.
        created: Wall clock, aware UTC.
        parent: A published version whose codes the new one keeps as far as it can; the vectors of
            its encoder must be there still. None trains from nothing.
        encoder_version: Whose vectors are read; None: ``alignment.encoder_version``.

    Returns:
        The draft's manifest.

    Raises:
        DataError: If the data, the encoder or its vectors are missing or broken.
        CodebookNotFoundError: If the parent is not published.
        CodebookError: If the version is published already, the vectors are too few for the sizes
            asked for, or the parent was purged or is the version itself.
    """
    own_encoder = None if encoder_version is None else {"encoder_version": encoder_version}
    alignment = load_section(config_path, "alignment", AlignmentConfig, own_encoder)
    quantizer = load_section(config_path, "quantizer", QuantizerConfig)
    config = load_section(config_path, "codebook", CodebookConfig)
    CodebookRegistry(config.uri).check_unpublished(check_version_name(version))
    parent_codes = None if parent is None else read_parent_codes(alignment, config.uri, parent)
    dataset = load_input_data(load_section(config_path, "data", DataConfig))
    encoder = _encoder_facts(alignment, dataset)
    files = VectorFiles.open(Path(alignment.vectors_uri) / alignment.encoder_version)
    taken_down = np.intersect1d(dataset.train_item_ids(), taken_down_items(config_path))
    train_files = files.only(np.setdiff1d(dataset.train_item_ids(), taken_down))
    logger.info(
        "codebook_training version=%s num_items=%d num_train_items=%d num_taken_down=%d",
        version, len(files.item_ids()), len(train_files.item_ids()), len(taken_down),
    )  # fmt: skip
    codebook = Codebook.train_from(
        version, train_files, config=quantizer, encoder=encoder, created=created
    )
    if parent_codes is not None:
        codebook = refresh_codebook(
            codebook,
            files.read(),
            train_files.item_ids(),
            parent_codes,
            config.continuity,
            quantizer.rq,
        )
    codebook.save(drafts_uri(config.uri), replace=True)
    return codebook.manifest


def read_parent_codes(alignment: AlignmentConfig, uri: str, parent: str) -> ParentCodes:
    """Return the codes that a published version serves for the vectors of its own encoder.

    Args:
        alignment: Where vectors lie.
        uri: Folder of codebook versions.
        parent: A published version.

    Returns:
        Its codes and its pool.

    Raises:
        CodebookNotFoundError: If the version is not published.
        CodebookError: If it was purged.
        DataError: If the vectors of its encoder are missing or broken.
    """
    # A draft may still be replaced, so it cannot be what a label map points at.
    CodebookRegistry(uri).check_published(parent)
    codebook = Codebook.load(uri, parent)
    folder = Path(alignment.vectors_uri) / codebook.manifest.encoder_version
    return ParentCodes.served_by(codebook, VectorFiles.open(folder).read())


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

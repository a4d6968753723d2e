"""Vectors of items in memory, raw and aligned, and as the rows that an export writes.

Shape letters in this file: N items, D embedding width.
May import: numpy, pyarrow.
"""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import ItemEncoder
from qarm_feast.alignment.features import FeatureCache, ItemFeatures
from qarm_feast.encode import content_hashes
from qarm_feast.input_data import UPLOAD_TIMESTAMP
from qarm_feast.schema import ITEM_ID, TIMESTAMP

logger = logging.getLogger(__name__)


def raw_vectors_folder(vectors_uri: str, encoder_version: str) -> Path:
    """Return where an encoder's content features lie: no version's name holds a dot."""
    return Path(vectors_uri) / f"{encoder_version}.raw"


def vector_table(items: pa.Table, vectors_ND: np.ndarray) -> pa.Table:
    """Return the rows that are exported.

    Args:
        items: Items with their content.
        vectors_ND: Aligned embeddings of the same rows, float32.

    Returns:
        Columns ``item_id``, ``embedding`` (fixed-size list of float32), ``content_hash``,
        ``upload_timestamp``; rows in the order of ``items``.
    """
    width = vectors_ND.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors_ND, dtype=np.float32).reshape(-1))
    return pa.table(
        {
            ITEM_ID: items[ITEM_ID],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
            "content_hash": pa.array(content_hashes(items), pa.string()),
            UPLOAD_TIMESTAMP: items[UPLOAD_TIMESTAMP].cast(TIMESTAMP),
        }
    )


def catalogue_features(
    items: pa.Table, encoder: ItemEncoder, config: AlignmentConfig
) -> ItemFeatures:
    """Return the content features of all items, from the cache where it holds them.

    Args:
        items: Items with their content.
        encoder: A loaded encoder.
        config: Section ``alignment``; says where the cache lies.

    Returns:
        One row per item.
    """
    features = encoder.read_features(items, FeatureCache(config.features_uri))
    for modality, counts in features.counts.items():
        logger.info("content_read modality=%s %s", modality,
                    " ".join(f"{name}={count}" for name, count in counts.items()))  # fmt: skip
    return features


def raw_and_aligned_vectors(
    items: pa.Table, encoder: ItemEncoder, config: AlignmentConfig
) -> dict[str, np.ndarray]:
    """Return both kinds of vectors by name, ``raw`` and ``aligned``, L2-normalised.

    Args:
        items: Items with their content.
        encoder: A loaded encoder.
        config: Section ``alignment``.

    Returns:
        Matrices with one row per item; raw ones are the content features as they are.
    """
    features = catalogue_features(items, encoder, config)
    return {"raw": features.raw_vectors(), "aligned": encoder.project(features)}

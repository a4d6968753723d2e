"""Embedding tables of the ranker, sized from the codebook manifest and the vocabularies.

A table is shared by every feature that means the same thing: the target's code of a level and
the codes of the user's history on that level read the same rows.
Shape letters: K codebook size, P pool size, D aligned embedding width, E table width.
May import: numpy, torch, torchrec; does no I/O.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)

from qarm_feast.cross_features import NUM_DENSE_INPUTS, PREFIX_NAMES
from torchrec_models.config import DENSE_FEATURES, CodeSizes, RankerConfig
from torchrec_models.pair_counts import FEATURES_PER_THING
from torchrec_models.popularity import popularity_width
from torchrec_models.vector_inputs import NUM_COSINES
from torchrec_models.vocabulary import Vocabularies

Weights = npt.NDArray[np.float32]

USER_ID_FEATURE = "user_id"
ITEM_ID_FEATURE = "item_id"
HISTORY_ITEM_FEATURE = "history_item_id"
VQ_FEATURE = "vq_code"
PREFIX_FEATURE = "prefix"
HISTORY_PREFIX_FEATURE = "history_prefix"
SEQUENCE_TABLE = "sequence_rq"
TARGET_SEQUENCE = "target_sequence"
HISTORY_SEQUENCE = "history_sequence"
SHARED_SEQUENCES = ("shared_c1_sequence", "shared_c1_c2_sequence")
"""History items that share the prefixes of :data:`~qarm_feast.cross_features.PREFIX_NAMES`."""
SEARCHED_SEQUENCE = "searched_sequence"
BAG_OF_SEQUENCE = {
    "shared_c1_sequence": "shared_c1_item_id",
    "shared_c1_c2_sequence": "shared_c1_c2_item_id",
    SEARCHED_SEQUENCE: "searched_item_id",
}
"""Sequences that are subsets of the history, and the feature that holds their item ids."""


def rq_feature(level: int) -> str:
    """Return the feature, and the table, of the target item's RQ code on a level."""
    return f"rq_{level}"


def history_rq_feature(level: int) -> str:
    """Return the feature that holds the history items' RQ codes on a level."""
    return f"history_rq_{level}"


def user_column_feature(name: str) -> str:
    """Return the feature, and the table, of a typed user column."""
    return f"user_{name}" if name != "id" else "user_column_id"


def item_column_feature(name: str) -> str:
    """Return the feature, and the table, of a typed item column."""
    return f"item_{name}" if name != "id" else "item_column_id"


def prefix_tables(vocabularies: Vocabularies, config: RankerConfig) -> list[EmbeddingBagConfig]:
    """Return the one table of prefix tokens, if there is any, read by target and history."""
    features = [PREFIX_FEATURE] * config.has("prefix")
    features += [HISTORY_PREFIX_FEATURE] * config.has("history_prefix")
    if not features:
        return []
    assert vocabularies.prefixes is not None, "prefixes are numbered when a run starts"
    table = _table(PREFIX_FEATURE, vocabularies.prefixes.num_embeddings, features, config)
    table.init_fn = _random_start(config)
    return [table]


def code_tables(sizes: CodeSizes, config: RankerConfig) -> list[EmbeddingBagConfig]:
    """Return one table per RQ level and the VQ bag, as far as their features are switched on.

    Args:
        sizes: Level sizes and pool size of the codebook.
        config: The ranker section.

    Returns:
        Tables ``rq_<level>`` with ``level_sizes[level]`` rows, read by the target and the
        history, and ``vq_code`` with one row per pool row, mean-pooled over the neighbours.
    """
    tables = []
    for level, codebook_size in enumerate(sizes.level_sizes):
        features = [rq_feature(level)] * config.has("rq_code")
        features += [history_rq_feature(level)] * config.has("history_rq_code")
        tables.append(_table(rq_feature(level), codebook_size, features, config))
    tables.append(_table(VQ_FEATURE, sizes.pool_size, [VQ_FEATURE] * config.has("vq_code"), config))
    for table in tables:
        table.init_fn = _random_start(config)
    return [table for table in tables if table.feature_names]


def _random_start(config: RankerConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    # As wide as a centroid start: a table's own default shrinks with its number of rows.
    return functools.partial(torch.nn.init.normal_, std=config.centroid_scale)


def id_tables(vocabularies: Vocabularies, config: RankerConfig) -> list[EmbeddingBagConfig]:
    """Return the tables of user ids, item ids (shared with the history), and typed columns."""
    item_features = [ITEM_ID_FEATURE] * config.has("item_id")
    item_features += [HISTORY_ITEM_FEATURE] * config.has("history_item_id")
    item_features += [
        BAG_OF_SEQUENCE[name] for name in sequence_names(config) if name in BAG_OF_SEQUENCE
    ]
    user_features = [USER_ID_FEATURE] * config.has("user_id")
    tables = [
        _table(USER_ID_FEATURE, vocabularies.user_ids.num_embeddings, user_features, config),
        _table(ITEM_ID_FEATURE, vocabularies.item_ids.num_embeddings, item_features, config),
    ]
    if config.has("user_columns"):
        for name, vocabulary in vocabularies.user_columns.items():
            feature = user_column_feature(name)
            tables.append(_table(feature, vocabulary.num_embeddings, [feature], config))
    if config.has("item_columns"):
        for name, vocabulary in vocabularies.item_columns.items():
            feature = item_column_feature(name)
            tables.append(_table(feature, vocabulary.num_embeddings, [feature], config))
    return [table for table in tables if table.feature_names]


def frozen_tables(sizes: CodeSizes, config: RankerConfig) -> list[str]:
    """Return the tables that keep their first weights: those of codes, or none."""
    if config.code_table_training == "trained":
        return []
    names = [table.name for table in (*code_tables(sizes, config), *sequence_tables(sizes, config))]
    has_prefixes = config.has("prefix") or config.has("history_prefix")
    return names + [PREFIX_FEATURE] * has_prefixes


def sequence_names(config: RankerConfig) -> list[str]:
    """Return the sequences of history items that the target attends over."""
    names = [HISTORY_SEQUENCE] * config.has("attention")
    names += [*SHARED_SEQUENCES] * config.has("shared_history")
    names += [SEARCHED_SEQUENCE] * config.has("long_history")
    return names


def sequence_tables(sizes: CodeSizes, config: RankerConfig) -> list[EmbeddingConfig]:
    """Return the one table of all sequences, if there is any.

    Args:
        sizes: Level sizes of the codebook.
        config: The ranker section.

    Returns:
        Table ``sequence_rq``, the RQ levels one behind the other: one lookup finds an item.
    """
    names = sequence_names(config)
    if not names:
        return []
    table = EmbeddingConfig(
        name=SEQUENCE_TABLE,
        embedding_dim=config.embedding_dim,
        num_embeddings=sum(sizes.level_sizes),
        feature_names=[TARGET_SEQUENCE, *names],
        init_fn=_random_start(config),
    )
    return [table]


def pooled_tables(
    sizes: CodeSizes, vocabularies: Vocabularies, config: RankerConfig
) -> list[EmbeddingBagConfig]:
    """Return the tables of which each feature gives one vector per row."""
    tables = [*id_tables(vocabularies, config), *code_tables(sizes, config)]
    return [*tables, *prefix_tables(vocabularies, config)]


def ranker_tables(
    sizes: CodeSizes, vocabularies: Vocabularies, config: RankerConfig
) -> list[BaseEmbeddingConfig]:
    """Return every table of the ranker; the order fixes the order of the sparse features."""
    return [*pooled_tables(sizes, vocabularies, config), *sequence_tables(sizes, config)]


def sparse_feature_names(tables: Sequence[BaseEmbeddingConfig]) -> tuple[str, ...]:
    """Return the features of all tables in table order: the keys of a batch."""
    return tuple(feature for table in tables for feature in table.feature_names)


def vector_width(sizes: CodeSizes, config: RankerConfig) -> int:
    """Return the width of an item's vector from ``ranker.vector_source``."""
    return sizes.raw_vector_dim if config.vector_source == "raw" else sizes.vector_dim


def dense_width(sizes: CodeSizes, config: RankerConfig, num_tasks: int) -> int:
    """Return the number of dense inputs: vectors, cosines, cross features, counts."""
    widths = {
        "vector": 2 * vector_width(sizes, config) + NUM_COSINES,
        "aligned_cosine": NUM_COSINES,
        "cross": NUM_DENSE_INPUTS,
        "popularity": popularity_width(num_tasks),
        "item_cf": FEATURES_PER_THING,
        "code_cf": FEATURES_PER_THING * min(len(PREFIX_NAMES), len(sizes.level_sizes)),
    }
    return sum(widths[name] for name in DENSE_FEATURES if config.has(name))


def _table(
    name: str, num_embeddings: int, feature_names: list[str], config: RankerConfig
) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name,
        embedding_dim=config.embedding_dim,
        num_embeddings=num_embeddings,
        feature_names=feature_names,
        pooling=PoolingType.MEAN,
    )


def centroid_start(
    codebooks: Sequence[Weights], pool_vectors_PD: Weights, config: RankerConfig
) -> Mapping[str, Weights]:
    """Return first weights of the code tables: centroids, projected by one SVD, scaled.

    All levels and the pool go through one projection and one factor, so that dot products
    between tables mean what they mean between centroids. The pool's mean is taken out of the
    pool and of the first level, the only one that carries it.

    Args:
        codebooks: Centroids of each RQ level, ``[K_l, D]``.
        pool_vectors_PD: Aligned vectors of the VQ pool, row by row.
        config: The ranker section; ``centroid_scale`` is the first level's standard deviation.

    Returns:
        Table name to weights of shape ``[rows, E]``, float32; columns beyond D are zero.
    """
    mean_D = pool_vectors_PD.mean(axis=0)
    centred_PD = pool_vectors_PD - mean_D
    projection_DE = _principal_directions(centred_PD, config.embedding_dim)
    centred = [codebooks[0] - mean_D, *codebooks[1:]]
    first_std = float((centred[0] @ projection_DE).std())
    projection_DE *= config.centroid_scale / max(first_std, float(np.finfo(np.float32).tiny))
    weights = {rq_feature(level): x_KD @ projection_DE for level, x_KD in enumerate(centred)}
    weights[SEQUENCE_TABLE] = np.concatenate(list(weights.values()))
    weights[VQ_FEATURE] = centred_PD @ projection_DE
    return weights


def _principal_directions(centred_PD: Weights, width: int) -> Weights:
    # Singular vectors through the D x D product: the pool may have far more rows than columns.
    _, directions_DD = np.linalg.eigh(centred_PD.T @ centred_PD)
    kept_DE = directions_DD[:, ::-1][:, :width]
    projection_DE = np.zeros((centred_PD.shape[1], width), dtype=np.float32)
    projection_DE[:, : kept_DE.shape[1]] = kept_DE
    return projection_DE

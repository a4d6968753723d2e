"""AlignRec's mask-modality protocol: how far figures fall when items lose one modality.

Shape letters in this file: N items, T feature tokens of a modality, E their width.
May import: numpy, pyarrow, the encoder, the protocols.
"""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from qarm_feast.alignment.encoder import ItemEncoder
from qarm_feast.alignment.evaluate import RAW, Measured, measure_vectors
from qarm_feast.alignment.features import ItemFeatures
from qarm_feast.alignment.later_behaviour import LaterBehaviour
from qarm_feast.quantizers.base import Embeddings
from qarm_feast.schema import CONTENT_TEXT_COLUMNS

MASKED_SHARES = (0.25, 0.5, 1.0)
MaskFigures = dict[str, dict[str, dict[str, dict[str, float]]]]
"""By modality, masked share of items (as text) and kind of vectors: means by
``<measure>_<slice>``."""

Decode = Callable[[Embeddings, np.ndarray], Mapping[str, Embeddings]]
"""Aligned vectors of all items, and which have changed, to what their codes stand for, by name."""


def mask_figures(
    encoder: ItemEncoder,
    features: ItemFeatures,
    behaviour: LaterBehaviour,
    decode: Decode | None = None,
    seed: int = 0,
) -> MaskFigures:
    """Return the means of every measure and slice with a share of one modality masked.

    Args:
        encoder: The encoder; one that reads ready vectors alone has nothing to mask, as it refuses
            an item without.
        features: Its features of all items.
        behaviour: What users did later; without any there are no figures.
        decode: Gives the vectors of codes; None: there is no codebook.
        seed: Seed of the choice of items. The items of a share are among those of a larger one.

    Returns:
        For vectors ``raw``, ``aligned`` and those that ``decode`` gives; a slice that holds no
        query or user is left out.
    """
    has_behaviour = len(behaviour.query_items_Q) and len(behaviour.next_items_U)
    if encoder.modalities == ("embedding",) or not has_behaviour:
        return {}
    nothing = encoder.read_features(
        pa.table({name: pa.nulls(1, pa.string()) for name in CONTENT_TEXT_COLUMNS})
    )
    chance_N = np.random.default_rng(seed).random(len(features))
    figures: MaskFigures = {}
    for modality in encoder.modalities:
        figures[modality] = {}
        for share in MASKED_SHARES:
            is_masked_N = chance_N < share
            masked = masked_features(features, modality, is_masked_N, nothing)
            vectors = {RAW: masked.raw_vectors(), "aligned": encoder.project(masked)}
            if decode is not None:
                is_changed_N = is_masked_N & features.present[modality]
                vectors |= decode(vectors["aligned"], is_changed_N)
            figures[modality][f"{share:g}"] = _means(measure_vectors(behaviour, vectors), vectors)
    return figures


def _means(
    measured: Mapping[str, Measured], names: Mapping[str, Embeddings]
) -> dict[str, dict[str, float]]:
    return {
        name: {
            f"{measure}_{key}": float(each.values_by_name[name][mask_S].mean())
            for measure, each in measured.items()
            for key, mask_S in each.slices().items()
        }
        for name in names
    }


def masked_features(
    features: ItemFeatures, modality: str, is_masked_N: np.ndarray, nothing: ItemFeatures
) -> ItemFeatures:
    """Return features of items as if some had been given without one modality.

    Args:
        features: Features as they are.
        modality: The modality to take away.
        is_masked_N: From which items.
        nothing: Features of one item without any content: what an item gets that loses its last.

    Returns:
        New features; those given are not changed.
    """
    tokens = dict(features.by_modality)
    present = {name: is_present_N.copy() for name, is_present_N in features.present.items()}
    tokens[modality] = np.where(is_masked_N[:, None, None], 0, tokens[modality])
    present[modality] &= ~is_masked_N
    is_bare_N = ~np.any(list(present.values()), axis=0)
    for name in tokens:
        tokens[name] = np.where(is_bare_N[:, None, None], nothing.by_modality[name], tokens[name])
        present[name] = np.where(is_bare_N, nothing.present[name], present[name])
    return ItemFeatures(tokens, present)

"""Made-up vectors for the benchmarks: three shapes that are hard in different ways.

    uv run --frozen --extra cpu python benchmarks/generators.py --data DIR [--backbone DIR]

prints how fast the singular values of a text model's item vectors fall, and next to them those of
:func:`low_rank`. Its constants were fitted to all-MiniLM-L6-v2 on the 3,686 titles of
amazon_industrial; on those items' full texts the command's ratios lie within 6 %.

Every function returns float32 rows of length 1 and gives the same rows for the same seed.

Shape letters in this file: N rows, D embedding width, C clusters.
"""

import argparse
from pathlib import Path

import numpy as np

from qarm_feast.quantizers.base import Embeddings

SPECTRUM_SHIFT = 4.0
SPECTRUM_EXPONENT = -0.476
"""Singular value number r (from 1) is proportional to ``(r + shift) ** exponent``."""
MEAN_LENGTH = 0.435
"""Length of the mean of the text model's vectors, which themselves have length 1."""
NUM_CLUSTERS = 1000
CLUSTER_NOISE = 0.5
"""Expected length of a row's distance from its cluster's centre, which has length 1."""


def iid(num_rows: int, embedding_dim: int, seed: int) -> Embeddings:
    """Return directions drawn evenly: no structure, every centroid is about equally far."""
    return _unit(_normal(num_rows, embedding_dim, np.random.default_rng(seed)))


def low_rank(num_rows: int, embedding_dim: int, seed: int) -> Embeddings:
    """Return rows with the mean and the falling singular values of MiniLM's sentence vectors."""
    spectrum_D = (np.arange(1, embedding_dim + 1) + SPECTRUM_SHIFT) ** SPECTRUM_EXPONENT
    spectrum_D *= np.sqrt((1 - MEAN_LENGTH**2) / np.square(spectrum_D).sum())
    x_ND = _normal(num_rows, embedding_dim, np.random.default_rng(seed))
    x_ND *= spectrum_D.astype(np.float32)
    x_ND += np.float32(MEAN_LENGTH / np.sqrt(embedding_dim))
    return _unit(x_ND)


def clustered(num_rows: int, embedding_dim: int, seed: int) -> Embeddings:
    """Return rows around 1000 centres, whose shares fall like Zipf's law."""
    rng = np.random.default_rng(seed)
    centres_CD = _unit(_normal(NUM_CLUSTERS, embedding_dim, rng))
    shares_C = 1 / np.arange(1, NUM_CLUSTERS + 1)
    cluster_N = rng.choice(NUM_CLUSTERS, size=num_rows, p=shares_C / shares_C.sum())
    x_ND = _normal(num_rows, embedding_dim, rng)
    x_ND *= np.float32(CLUSTER_NOISE / np.sqrt(embedding_dim))
    x_ND += centres_CD[cluster_N]
    return _unit(x_ND)


GENERATORS = {"iid": iid, "low_rank": low_rank, "clustered": clustered}


def main() -> None:
    """Print the spectrum of real vectors beside the one used here."""
    # Imported here: a benchmark that only wants vectors needs no text model.
    from examples.quickstart.layout import BACKBONE
    from qarm_feast.alignment.config import AlignmentConfig
    from qarm_feast.alignment.features import content_features
    from qarm_feast.input_data import DataConfig, load_input_data

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Folder in the input contract.")
    parser.add_argument("--backbone", default=str(BACKBONE), help="Folder of the text model.")
    arguments = parser.parse_args()
    config = AlignmentConfig(backbone=arguments.backbone)
    items = load_input_data(DataConfig(input_dir=str(Path(arguments.data)))).items
    real_ND = content_features(items, config).raw_vectors()
    made_ND = low_rank(len(real_ND), real_ND.shape[1], seed=0)
    print(f"mean length: real {_mean_length(real_ND):.3f}, made {_mean_length(made_ND):.3f}")
    ranks = [1, 2, 4, 8, 16, 32, 64, 128]
    real_D, made_D = _relative_spectrum(real_ND), _relative_spectrum(made_ND)
    for rank in ranks:
        print(f"singular value {rank:4d}: real {real_D[rank - 1]:.3f}, made {made_D[rank - 1]:.3f}")


def _normal(num_rows: int, embedding_dim: int, rng: np.random.Generator) -> Embeddings:
    return rng.standard_normal((num_rows, embedding_dim), dtype=np.float32)


def _unit(x_ND: Embeddings) -> Embeddings:
    # In place: a million rows are not copied, and a benchmark needs no canonical rounding.
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND


def _mean_length(x_ND: Embeddings) -> float:
    return float(np.linalg.norm(x_ND.mean(axis=0)))


def _relative_spectrum(x_ND: Embeddings) -> np.ndarray:
    values_D = np.linalg.svd(x_ND - x_ND.mean(axis=0), compute_uv=False)
    return values_D / values_D[0]


if __name__ == "__main__":
    main()

"""Residual quantizers to stand beside ours: libraries' own, and k-means as other projects run it.

What was taken from the public code of the peers (read, not copied):

- TorchEasyRec and OpenOneRec: one ``faiss.Kmeans`` per level on the raw residuals; the former with
  faiss's defaults (random start, 25 iterations, at most 256 points per centroid), which is what
  runs here; the latter says 20 iterations.
- MiniOneRec: ``faiss.ResidualQuantizer``, default training, beam 1.
- GRID: residuals scaled to length 1 before each level, plain k-means++ on 3072 points, then
  mini-batches of 2048 with count-weighted means, 30 steps over three levels; the decoded vector is
  the sum of the centroids. It runs in bfloat16, which is not repeated here.

Every method decodes by its own centroids.

Shape letters in this file: N items to code, T training items, D width, L levels, K centroids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from sklearn.cluster import KMeans, kmeans_plusplus

from qarm_feast.quantizers import RqConfig
from qarm_feast.quantizers.base import Codes, Embeddings
from qarm_feast.quantizers.rq import ResidualQuantizer
from qarm_feast.quantizers.search import nearest

NUM_LEVELS = 3
GRID_START_POINTS, GRID_BATCH, GRID_STEPS = 3072, 2048, 10


@dataclass(frozen=True)
class Coded:
    """What a method made of the items; ``codebooks`` only where codes add up in the raw space."""

    rq_NL: Codes
    decoded_ND: Embeddings
    codebooks: Sequence[Embeddings] = ()


Method = Callable[[Embeddings, Embeddings, int, int], Coded]
"""Training vectors, vectors to code, codes per level, seed."""


def ours(**options: object) -> Method:
    """Return our quantizer with these settings."""

    def run(train_TD: Embeddings, x_ND: Embeddings, size: int, seed: int) -> Coded:
        config = RqConfig(codebook_size=(size,) * NUM_LEVELS, seed=seed, **options)
        quantizer = ResidualQuantizer(config)
        quantizer.train(train_TD)
        return _coded(quantizer, x_ND)

    return run


def plain_kmeans(train_TD: Embeddings, x_ND: Embeddings, size: int, seed: int) -> Coded:
    """Code by scikit-learn's k-means, level after level, its defaults."""

    def fit(residual_TD: Embeddings) -> Embeddings:
        return KMeans(size, random_state=seed).fit(residual_TD).cluster_centers_

    return _residual_kmeans(fit, train_TD, x_ND)


def faiss_kmeans(train_TD: Embeddings, x_ND: Embeddings, size: int, seed: int) -> Coded:
    """Code by ``faiss.Kmeans``, level after level, its defaults."""

    def fit(residual_TD: Embeddings) -> Embeddings:
        # The least number of points only silences a warning.
        kmeans = faiss.Kmeans(
            residual_TD.shape[1], size, seed=1234 + seed, min_points_per_centroid=1
        )
        kmeans.train(residual_TD)
        return kmeans.centroids

    return _residual_kmeans(fit, train_TD, x_ND)


def faiss_residual(beam_size: int) -> Method:
    """Return ``faiss.ResidualQuantizer`` with that beam, trained by its default."""

    def run(train_TD: Embeddings, x_ND: Embeddings, size: int, seed: int) -> Coded:
        num_bits = size.bit_length() - 1
        quantizer = faiss.ResidualQuantizer(x_ND.shape[1], NUM_LEVELS, num_bits)
        quantizer.train_type = faiss.ResidualQuantizer.Train_default
        quantizer.max_beam_size = beam_size
        quantizer.cp.seed = 1234 + seed
        quantizer.cp.min_points_per_centroid = 1
        quantizer.train(train_TD)
        packed = quantizer.compute_codes(x_ND)
        codebooks = faiss.vector_to_array(quantizer.codebooks).reshape(NUM_LEVELS, size, -1)
        return Coded(_unpacked(packed, num_bits), quantizer.decode(packed), list(codebooks))

    return run


def grid(train_TD: Embeddings, x_ND: Embeddings, size: int, seed: int) -> Coded:
    """Code by mini-batch k-means on residuals of length 1."""
    generator = np.random.default_rng(seed)
    decoded_ND, codes = np.zeros_like(x_ND), []
    for _ in range(NUM_LEVELS):
        train_TD, x_ND = _unit(train_TD), _unit(x_ND)
        centroids_KD = _mini_batch_kmeans(train_TD, size, generator)
        train_TD = train_TD - centroids_KD[nearest(train_TD, centroids_KD)[:, 0]]
        codes.append(nearest(x_ND, centroids_KD)[:, 0])
        x_ND = x_ND - centroids_KD[codes[-1]]
        decoded_ND += centroids_KD[codes[-1]]
    return Coded(np.stack(codes, axis=1), decoded_ND)


PEERS: dict[str, Method] = {
    "kmeans": plain_kmeans,
    "faiss_rq_beam1": faiss_residual(1),
    "faiss_rq_beam5": faiss_residual(5),
    "torcheasyrec": faiss_kmeans,
    "grid": grid,
}
OURS: dict[str, Method] = {
    "ours": ours(),
    "ours_balanced": ours(enable_balance=True),
    "ours_fsq": ours(last_level="fsq"),
}


def _residual_kmeans(
    fit: Callable[[Embeddings], Embeddings], train_TD: Embeddings, x_ND: Embeddings
) -> Coded:
    codebooks: list[Embeddings] = []
    residual_TD = train_TD.copy()
    for _ in range(NUM_LEVELS):
        codebooks.append(np.ascontiguousarray(fit(residual_TD), dtype=np.float32))
        residual_TD -= codebooks[-1][nearest(residual_TD, codebooks[-1])[:, 0]]
    return _coded(ResidualQuantizer(codebooks=codebooks), x_ND)


def _coded(quantizer: ResidualQuantizer, x_ND: Embeddings) -> Coded:
    rq_NL = quantizer.encode(x_ND)
    return Coded(rq_NL, quantizer.decode(rq_NL), quantizer.codebooks)


def _unpacked(packed: np.ndarray, num_bits: int) -> Codes:
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : NUM_LEVELS * num_bits]
    bits = bits.reshape(len(packed), NUM_LEVELS, num_bits).astype(np.int64)
    return (bits << np.arange(num_bits)).sum(axis=2)


def _unit(x_ND: Embeddings) -> Embeddings:
    # A residual of length zero stays what it is, as torch's normalize leaves it.
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


def _mini_batch_kmeans(
    unit_TD: Embeddings, size: int, generator: np.random.Generator
) -> Embeddings:
    start = generator.permutation(len(unit_TD))[:GRID_START_POINTS]
    seed = int(generator.integers(2**31))
    centroids_KD = kmeans_plusplus(unit_TD[start], size, random_state=seed, n_local_trials=1)[0]
    seen_K = np.zeros(size)
    order = np.concatenate([generator.permutation(len(unit_TD)) for _ in range(GRID_STEPS)])
    for batch in _batches(order, len(unit_TD)):
        codes_B = nearest(unit_TD[batch], centroids_KD)[:, 0]
        counts_K = np.bincount(codes_B, minlength=size)
        sums_KD = np.zeros_like(centroids_KD)
        np.add.at(sums_KD, codes_B, unit_TD[batch])
        seen_K += counts_K
        used = np.flatnonzero(counts_K)
        towards = sums_KD[used] / counts_K[used, None] - centroids_KD[used]
        centroids_KD[used] += towards * (counts_K[used] / seen_K[used])[:, None].astype(np.float32)
    return centroids_KD


def _batches(order: np.ndarray, epoch_size: int) -> list[np.ndarray]:
    """Return the first steps' batches: each epoch in its own order, its last batch shorter."""
    epochs = order.reshape(-1, epoch_size)
    batches = [e[b : b + GRID_BATCH] for e in epochs for b in range(0, epoch_size, GRID_BATCH)]
    return batches[:GRID_STEPS]

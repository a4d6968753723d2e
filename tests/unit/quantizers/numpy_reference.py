"""Slow plain-NumPy references: one vector at a time, by the written rule.

Shape letters in this file: N items, K centroids, D embedding width, L levels, k nearest wanted.
"""

import numpy as np


def distances(x_D: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """Squared differences in float64, folded at the largest power of two below the width."""
    columns = list(((x_D.astype(np.float64) - centroids_KD.astype(np.float64)) ** 2).T)
    while len(columns) > 1:
        cut = 1
        while cut * 2 < len(columns):
            cut *= 2
        upper = columns[cut:]
        columns = [c + upper[i] if i < len(upper) else c for i, c in enumerate(columns[:cut])]
    return columns[0].astype(np.float32)


def nearest(x_ND: np.ndarray, centroids_KD: np.ndarray, k: int = 1) -> np.ndarray:
    rows = []
    for x_D in x_ND:
        keys = zip(distances(x_D, centroids_KD).tolist(), range(len(centroids_KD)), strict=True)
        rows.append([index for _, index in sorted(keys)[:k]])
    return np.array(rows, dtype=np.int64).reshape(len(x_ND), k)


def encode_residual(x_ND: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
    residual_ND = x_ND.copy()
    codes = []
    for codebook_KD in codebooks:
        codes_N = nearest(residual_ND, codebook_KD)[:, 0]
        residual_ND = residual_ND - codebook_KD[codes_N]
        codes.append(codes_N)
    return np.stack(codes, axis=1)


def encode_neighbors(
    x_ND: np.ndarray, item_ids_N: np.ndarray, pool_PD: np.ndarray, pool_ids_P: np.ndarray, k: int
) -> np.ndarray:
    rows = []
    for x_D, item_id in zip(x_ND, item_ids_N, strict=True):
        keys = zip(distances(x_D, pool_PD).tolist(), range(len(pool_PD)), strict=True)
        rows.append([row for _, row in sorted(keys) if pool_ids_P[row] != item_id][:k])
    return np.array(rows, dtype=np.int64)


def encode_listed_neighbors(
    x_ND: np.ndarray, pool_PD: np.ndarray, coarse_ID: np.ndarray, num_probes: int, k: int
) -> np.ndarray:
    """The nearest of the pool rows whose nearest centroid is among the vector's nearest."""
    list_of_row_P = nearest(pool_PD, coarse_ID)[:, 0]
    rows = []
    for x_D, probed in zip(x_ND, nearest(x_ND, coarse_ID, num_probes), strict=True):
        keys = zip(distances(x_D, pool_PD).tolist(), range(len(pool_PD)), strict=True)
        rows.append([row for _, row in sorted(keys) if list_of_row_P[row] in probed][:k])
    return np.array(rows, dtype=np.int64)

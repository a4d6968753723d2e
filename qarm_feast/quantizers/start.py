"""Where k-means starts on residuals: by direction first, by length afterwards.

What a level leaves over varies in length. Items near a centroid leave next to nothing, and k-means
on such points ends badly: outliers draw centroids to themselves, and one centroid near the origin,
which is nearer to most points than any long one, takes the bulk: codes are wasted, and on text
vectors the error is higher, too.

So directions are clustered first: residuals scaled to length 1, on which k-means spreads well. The
means of the residuals themselves, cell by cell, are the start; the iterations that follow are
those of plain k-means, for the plain error.

Shape letters in this file: N points, S sampled points, K centroids, D embedding width.
May import: NumPy, torch through ``kmeans``.
"""

import numpy as np

from qarm_feast.quantizers.base import Embeddings, unit_rows, usable_rows
from qarm_feast.quantizers.kmeans import cell_means, lloyd, plus_plus_start, sample_rows
from qarm_feast.quantizers.search import nearest

_MIN_SAMPLE = 16_384
_POINTS_PER_CENTROID = 64
"""Directions of more points change the start no more, and would cost a second copy of them."""


def direction_start(
    x_ND: Embeddings, num_centroids: int, num_iterations: int, generator: np.random.Generator
) -> Embeddings:
    """Return centroids whose cells hold points of like direction.

    Args:
        x_ND: Points, float32; at least ``num_centroids`` of them.
        num_centroids: How many centroids to return.
        num_iterations: Most k-means iterations on the directions of a sample.
        generator: Source of every draw.

    Returns:
        Means of shape ``[K, D]``, float32. With fewer points off the origin than centroids, plain
        chosen points.
    """
    sample_size = max(_MIN_SAMPLE, _POINTS_PER_CENTROID * num_centroids)
    sample_SD = x_ND[sample_rows(len(x_ND), sample_size, generator)]
    sample_SD = sample_SD[usable_rows(sample_SD)]
    if len(sample_SD) < num_centroids:
        return plus_plus_start(x_ND, num_centroids, generator)
    unit_SD = unit_rows(sample_SD)
    start_KD = plus_plus_start(unit_SD, num_centroids, generator)
    directions_KD = lloyd(unit_SD, start_KD, num_iterations)
    return cell_means(sample_SD, nearest(unit_SD, directions_KD)[:, 0], directions_KD)

"""Binary finite scalar quantization (FSQ): a lattice of 2^b centroids from b directions.

Method: QARM V2's last level. After two k-means levels the residuals are nearly isotropic: few of
the k-means centroids get most of them, and many bits of sign split them evenly.

A lattice is ``mean + sum_i s_i a_i w_i`` over all signs ``s_i = +-1``, with orthonormal directions
``w_i`` and one scale ``a_i`` each. Bit i of a code is 1 where ``s_i = +1``. Because the directions
are orthonormal, the nearest lattice point of x has the signs of ``(x - mean) . w_i``; it is stored
as plain centroids all the same, so that everything that reads a codebook needs one rule only.

Training takes the principal directions of the residuals and the mean length of the projection on
each. Rotating them further by Procrustes steps (as iterative quantization does) was measured and
left out: it lowers the error of the training vectors by some 0.3 %, that of held-out vectors by
nothing, and makes items collide more. The same step fits directions to codes that items already
have, which is how a refresh keeps what each bit means.

Shape letters in this file: N points, D embedding width, K = 2^b lattice points, B bits,
M points of a block.
May import: NumPy, scipy.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers.base import Codes, Embeddings

MAX_NUM_BITS = 16
NUM_FIT_STEPS = 3
"""Steps of directions, then scales, in which a lattice is fitted to given codes."""
_RANK_TOLERANCE = 1e-6
"""A direction counts if its spread is more than this share of the widest."""

_ROWS_PER_BLOCK = 65_536

_Matrix = npt.NDArray[np.float64]


def num_bits_of(codebook_size: int) -> int:
    """Return b of a lattice of ``2^b`` points.

    Args:
        codebook_size: Lattice points.

    Returns:
        The number of bits, 1 to 16.

    Raises:
        CodebookError: If the size is no power of two, or out of range.
    """
    num_bits = codebook_size.bit_length() - 1
    if codebook_size != 1 << num_bits or not 1 <= num_bits <= MAX_NUM_BITS:
        raise CodebookError(
            f"an FSQ level of {codebook_size} codes was asked for; its size must be a power of two "
            f"from 2 to {1 << MAX_NUM_BITS}: set the last quantizer.rq.codebook_size to one"
        )
    return num_bits


def train_lattice(x_ND: Embeddings, codebook_size: int) -> Embeddings:
    """Return the lattice of the principal directions of ``x_ND``.

    Args:
        x_ND: Points, float32: what the levels before left over.
        codebook_size: Lattice points, a power of two.

    Returns:
        Centroids of shape ``[K, D]``, float32; the first bit belongs to the widest direction.

    Raises:
        CodebookError: If the points spread over fewer directions than the lattice has bits.
    """
    num_bits = num_bits_of(codebook_size)
    mean_D = x_ND.mean(axis=0, dtype=np.float64)
    scatter_DD = sum(block_MD.T @ block_MD for _, block_MD in _centred_blocks(x_ND, mean_D))
    spread_D, directions_DD = np.linalg.eigh(scatter_DD)
    num_directions = int((spread_D > _RANK_TOLERANCE * max(spread_D[-1], 1e-30)).sum())
    if num_directions < num_bits:
        raise CodebookError(
            f"an FSQ level of {codebook_size} codes needs {num_bits} directions, but its residuals "
            f"spread over {num_directions}; lower the last quantizer.rq.codebook_size or set "
            "quantizer.rq.last_level to kmeans"
        )
    directions_DB = _with_fixed_signs(directions_DD[:, ::-1][:, :num_bits])
    lengths_B = sum(
        np.abs(block_MD @ directions_DB).sum(axis=0)
        for _, block_MD in _centred_blocks(x_ND, mean_D)
    )
    return _lattice(mean_D, directions_DB, lengths_B / len(x_ND))


def fit_lattice(x_ND: Embeddings, codes_N: Codes, codebook_size: int) -> Embeddings:
    """Return the lattice whose codes ``codes_N`` stand for the points with the least error.

    Directions by orthogonal Procrustes, then the mean and the scales, a few times in turn.

    Args:
        x_ND: Points, float32.
        codes_N: The code that each point has.
        codebook_size: Lattice points, a power of two.

    Returns:
        Centroids of shape ``[K, D]``, float32; bit i of a code means what it means in ``codes_N``.
    """
    num_bits = num_bits_of(codebook_size)
    mean_D = points_mean_D = x_ND.mean(axis=0, dtype=np.float64)
    moments_DB, mean_signs_B = _sign_moments(x_ND, codes_N, num_bits)
    moments_DB -= np.outer(points_mean_D, mean_signs_B)
    scales_B = np.linalg.norm(moments_DB, axis=0)
    for _ in range(NUM_FIT_STEPS):
        # Around the lattice's mean: points where a bit is more often 1 lie off it.
        shifted_DB = moments_DB + np.outer(points_mean_D - mean_D, mean_signs_B)
        directions_DB = _nearest_orthonormal(shifted_DB * scales_B)
        scales_B = np.maximum((shifted_DB * directions_DB).sum(axis=0), 0)
        mean_D = points_mean_D - directions_DB @ (mean_signs_B * scales_B)
    return _lattice(mean_D, directions_DB, scales_B)


def paired_codes(old_N: Codes, new_N: Codes, codebook_size: int) -> Codes:
    """Return how to renumber a lattice so that its bits agree with old codes as far as they can.

    Each old bit is paired with one new bit, turned over where they mostly disagree, so that the
    number of agreeing bits over all points is largest. A lattice so renumbered is a lattice still.

    Args:
        old_N: The code that each point had.
        new_N: Its code of the lattice as it is.
        codebook_size: Lattice points.

    Returns:
        For each code after renumbering the code before, ``[K]``.
    """
    num_bits = num_bits_of(codebook_size)
    old_NB, new_NB = (2 * code_bits(codes_N, num_bits) - 1 for codes_N in (old_N, new_N))
    agreement_BB = old_NB.T @ new_NB
    old_bits, new_bits = linear_sum_assignment(np.abs(agreement_BB), maximize=True)
    is_turned_B = agreement_BB[old_bits, new_bits] < 0
    bits_KB = code_bits(np.arange(codebook_size), num_bits) ^ is_turned_B
    source_K: Codes = (bits_KB << new_bits).sum(axis=1)
    return source_K


def code_bits(codes_N: Codes, num_bits: int) -> npt.NDArray[np.int64]:
    """Return the bits of codes, ``[N, B]`` of 0 and 1, the lowest first."""
    return (codes_N[:, None] >> np.arange(num_bits)) & 1


def _sign_moments(x_ND: Embeddings, codes_N: Codes, num_bits: int) -> tuple[_Matrix, _Matrix]:
    """Return the means over points of ``x s_i``, ``[D, B]``, and of ``s_i``, ``[B]``."""
    moments_DB = np.zeros((x_ND.shape[1], num_bits))
    sums_B = np.zeros(num_bits)
    for rows, block_MD in _centred_blocks(x_ND, np.zeros(x_ND.shape[1])):
        signs_MB = 2.0 * code_bits(codes_N[rows], num_bits) - 1
        moments_DB += block_MD.T @ signs_MB
        sums_B += signs_MB.sum(axis=0)
    return moments_DB / len(x_ND), sums_B / len(x_ND)


def _centred_blocks(x_ND: Embeddings, mean_D: _Matrix) -> Iterator[tuple[slice, _Matrix]]:
    """Yield rows and their float64 distance from the mean; all at once would be twice as large."""
    for start in range(0, len(x_ND), _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        yield rows, x_ND[rows] - mean_D


def _lattice(mean_D: _Matrix, directions_DB: _Matrix, scales_B: _Matrix) -> Embeddings:
    num_bits = len(scales_B)
    signs_KB = 2.0 * code_bits(np.arange(1 << num_bits), num_bits) - 1
    centroids_KD: Embeddings = (mean_D + (signs_KB * scales_B) @ directions_DB.T).astype(np.float32)
    return centroids_KD


def _with_fixed_signs(directions_DB: _Matrix) -> _Matrix:
    """Turn each direction so that its largest coordinate is positive: a solver may give either."""
    largest_B = np.abs(directions_DB).argmax(axis=0)
    signs_B = np.sign(directions_DB[largest_B, np.arange(directions_DB.shape[1])])
    fixed_DB: _Matrix = directions_DB * signs_B
    return fixed_DB


def _nearest_orthonormal(matrix_DB: _Matrix) -> _Matrix:
    left_DB, _, right_BB = np.linalg.svd(matrix_DB, full_matrices=False)
    nearest_DB: _Matrix = left_DB @ right_BB
    return nearest_DB

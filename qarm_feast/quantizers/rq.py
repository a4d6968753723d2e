"""Residual quantization (RQ): one codebook per level, k-means or, on the last level, a lattice.

Shape letters in this file: N items, B items of a block, D embedding width, L levels,
K codebook size of a level.
May import: NumPy, torch through ``search``.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from qarm_feast.codebook_config import LevelKind
from qarm_feast.config import Section
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers.balance import balanced_lloyd
from qarm_feast.quantizers.base import Arrays, Codes, Embeddings, check_embeddings
from qarm_feast.quantizers.devices import ON_CPU, Placement
from qarm_feast.quantizers.fsq import num_bits_of, train_lattice
from qarm_feast.quantizers.kmeans import lloyd, num_distinct_rows, plus_plus_start, sample_rows
from qarm_feast.quantizers.search import NearestSearch
from qarm_feast.quantizers.start import direction_start

logger = logging.getLogger(__name__)

POINTS_PER_CENTROID = 39
"""Below this many points per centroid, k-means follows noise (the limit that faiss warns at)."""
MAX_AUTO_CODEBOOK_SIZE = 4096
AUTO_NUM_LEVELS = 3
POINTS_PER_LATTICE_POINT = 4
"""Fewer are needed than for k-means: 2^b lattice points are learnt as b directions. With 4, even
random signs leave only 2 % of the codes unused."""
MAX_AUTO_LATTICE_SIZE = 1 << 13

_ROWS_PER_BLOCK = 16_384
"""Rows that go through all levels together: their residuals stay in the processor's cache."""

LevelSize = Annotated[int, Field(gt=1)]


class RqConfig(Section):
    """Residual quantizer."""

    num_levels: Literal["auto"] | Annotated[int, Field(gt=0, le=64)] = Field(
        default="auto", description="Codebooks in the residual chain; auto is 3."
    )
    codebook_size: Literal["auto"] | LevelSize | tuple[LevelSize, ...] = Field(
        default="auto",
        description="Centroids per level, or one number per level; auto is the largest power of "
        "two that leaves 39 distinct training points per centroid, at most 4096; on an fsq level 4 "
        "points, at most 8192.",
    )
    last_level: LevelKind = Field(
        default="kmeans",
        description="Codebook of the last level: kmeans centroids, or fsq, a lattice of 2^b signs "
        "that spreads near-isotropic residuals over more codes.",
    )
    enable_balance: bool = Field(
        default=False,
        description="Train k-means levels towards equally full cells; encoding stays the nearest "
        "rule.",
    )
    num_iterations: int = Field(default=25, gt=0, description="Most k-means iterations per level.")
    train_sample_size: int = Field(
        default=2_000_000, gt=0, description="Most points that k-means is trained on."
    )
    seed: int = Field(default=0, ge=0, description="Seed of every draw.")


class ResidualQuantizer:
    """One code per level: the nearest centroid to what the levels before left over."""

    def __init__(
        self,
        config: RqConfig | None = None,
        codebooks: Sequence[Embeddings] = (),
        placement: Placement = ON_CPU,
    ) -> None:
        self._config = config or RqConfig()
        self._placement = placement
        self._set_codebooks(codebooks)

    @property
    def codebooks(self) -> list[Embeddings]:
        """Centroids per level, ``[K, D]`` float32 each; read-only."""
        return list(self._codebooks)

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Centroids per level."""
        return tuple(len(codebook_KD) for codebook_KD in self._codebooks)

    def train(self, x_ND: Embeddings) -> None:
        """Train level after level, each on the residuals of the levels before.

        Args:
            x_ND: Training vectors, float32.

        Raises:
            CodebookError: If a level has fewer distinct residuals than centroids, or the sizes in
                the configuration contradict each other.
            DataError: If there are no vectors, or a value is NaN or infinite.
        """
        check_embeddings(x_ND)
        if len(x_ND) == 0:
            raise DataError("no vectors to train a residual quantizer on")
        generator = np.random.default_rng(self._config.seed)
        residual_ND = np.ascontiguousarray(x_ND[self.training_rows(len(x_ND))])
        sizes = level_sizes(self._config, num_distinct_rows(residual_ND))
        codebooks: list[Embeddings] = []
        for level, (size, kind) in enumerate(
            zip(sizes, level_kinds(self._config, sizes), strict=True)
        ):
            if kind == "fsq":
                codebook_KD = train_lattice(residual_ND, size)
            else:
                codebook_KD = self._train_level(residual_ND, level, size, generator)
            logger.info("rq_level_trained level=%d kind=%s codebook_size=%d", level + 1, kind, size)
            NearestSearch(codebook_KD).subtract_nearest(residual_ND)
            codebooks.append(codebook_KD)
        self._set_codebooks(codebooks)

    def training_rows(self, num_rows: int) -> npt.NDArray[np.int64]:
        """Return which of ``num_rows`` vectors training looks at: ascending, a seeded sample."""
        generator = np.random.default_rng(self._config.seed)
        return sample_rows(num_rows, self._config.train_sample_size, generator)

    def encode(self, x_ND: Embeddings) -> Codes:
        """Assign one code per level, each on what the levels before left over.

        Args:
            x_ND: Vectors, float32.

        Returns:
            Codes of shape ``[N, L]``, int64, level ``l`` in ``[0, K_l)``.

        Raises:
            CodebookError: If the quantizer is untrained or the widths differ.
            DataError: If a value is NaN or infinite.
        """
        check_embeddings(x_ND, self._trained()[0].shape[1])
        codes_NL = np.empty((len(x_ND), len(self._codebooks)), dtype=np.int64)
        for start in range(0, len(x_ND), _ROWS_PER_BLOCK):
            block = slice(start, start + _ROWS_PER_BLOCK)
            residual_BD = np.array(x_ND[block], order="C")
            for level, search in enumerate(self._searches):
                codes_NL[block, level] = search.subtract_nearest(residual_BD)
        return codes_NL

    def decode(self, codes_NC: Codes) -> Embeddings:
        """Return the sum of the centroids that each row of codes names, added in level order.

        Args:
            codes_NC: Codes of the first levels, ``[N, 1]`` to ``[N, L]``: a prefix gives the
                vector of that prefix.

        Returns:
            Vectors of shape ``[N, D]``, float32.

        Raises:
            CodebookError: If there are more codes than levels, or a code outside its level.
        """
        embedding_dim = self._trained()[0].shape[1]
        num_levels = codes_NC.shape[1]
        sizes_L = np.array(self.level_sizes[:num_levels])
        if len(sizes_L) != num_levels or not ((codes_NC >= 0) & (codes_NC < sizes_L)).all():
            raise CodebookError(
                f"rq_code has {num_levels} levels with codes in "
                f"{codes_NC.min(initial=0)} ... {codes_NC.max(initial=0)}; "
                f"this codebook's levels have {list(self.level_sizes)} codes"
            )
        x_ND = np.zeros((len(codes_NC), embedding_dim), dtype=np.float32)
        for level in range(num_levels):
            x_ND += self._codebooks[level][codes_NC[:, level]]
        return x_ND

    def arrays(self) -> Arrays:
        """Return ``level_00``, ``level_01``, ...: the centroids of each level."""
        return {f"level_{level:02d}": array for level, array in enumerate(self._trained())}

    def _train_level(
        self, residual_ND: Embeddings, level: int, size: int, generator: np.random.Generator
    ) -> Embeddings:
        num_distinct = num_distinct_rows(residual_ND)
        if num_distinct < size:
            raise CodebookError(
                f"level {level + 1} has {num_distinct} distinct residuals among "
                f"{len(residual_ND)} items, fewer than its {size} centroids; lower "
                "quantizer.rq.codebook_size or quantizer.rq.num_levels"
            )
        if num_distinct < size * POINTS_PER_CENTROID:
            logger.warning(
                "rq_level_thin level=%d num_distinct=%d codebook_size=%d wanted_per_centroid=%d",
                level + 1, num_distinct, size, POINTS_PER_CENTROID,
            )  # fmt: skip
        num_iterations = self._config.num_iterations
        if level == 0:
            start_KD = plus_plus_start(residual_ND, size, generator)
        else:
            start_KD = direction_start(residual_ND, size, num_iterations, generator)
        iterate = balanced_lloyd if self._config.enable_balance else lloyd
        return iterate(residual_ND, start_KD, num_iterations)

    def _set_codebooks(self, codebooks: Sequence[Embeddings]) -> None:
        self._codebooks = tuple(codebooks)
        self._searches = tuple(self._placement.open(codebook_KD) for codebook_KD in codebooks)

    def _trained(self) -> tuple[Embeddings, ...]:
        if not self._codebooks:
            raise CodebookError("this residual quantizer is untrained; call train first")
        return self._codebooks


def level_sizes(config: RqConfig, num_points: int) -> tuple[int, ...]:
    """Return the codebook size of each level.

    Args:
        config: Sizes as they were asked for.
        num_points: Distinct training vectors.

    Returns:
        One size per level.

    Raises:
        CodebookError: If an automatic size finds too few points, ``num_levels`` and a list of
            sizes contradict each other, or an FSQ level's size is no power of two.
    """
    size = config.codebook_size
    if isinstance(size, tuple):
        if not size or config.num_levels not in ("auto", len(size)):
            raise CodebookError(
                f"quantizer.rq.codebook_size lists {len(size)} levels, "
                f"quantizer.rq.num_levels is {config.num_levels}"
            )
        sizes = size
    else:
        num_levels = AUTO_NUM_LEVELS if config.num_levels == "auto" else config.num_levels
        sizes = (_auto_size(num_points) if size == "auto" else size,) * num_levels
    if config.last_level == "fsq":
        sizes = (*sizes[:-1], _auto_lattice_size(num_points) if size == "auto" else sizes[-1])
        num_bits_of(sizes[-1])
    return sizes


def level_kinds(config: RqConfig, sizes: Sequence[int]) -> tuple[LevelKind, ...]:
    """Return the kind of each level: k-means, and the last as the configuration says."""
    kmeans: LevelKind = "kmeans"
    return (*[kmeans] * (len(sizes) - 1), config.last_level)


def _auto_size(num_points: int) -> int:
    most = num_points // POINTS_PER_CENTROID
    if most < 2:
        raise CodebookError(
            f"{num_points} distinct vectors are too few for an automatic codebook size (at least "
            f"{2 * POINTS_PER_CENTROID} are needed); set quantizer.rq.codebook_size to a number"
        )
    return min(1 << most.bit_length() - 1, MAX_AUTO_CODEBOOK_SIZE)


def _auto_lattice_size(num_points: int) -> int:
    most = max(2, num_points // POINTS_PER_LATTICE_POINT)
    return min(1 << most.bit_length() - 1, MAX_AUTO_LATTICE_SIZE)

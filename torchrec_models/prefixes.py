"""Prefix tokens: (c1), (c1, c2), (c1, c2, c3) ... of an item's RQ code as rows of one table.

A table per level knows no context: the second code means something else below each first one. A
prefix has the context in it. An item's bag holds the rows of its prefixes.

While the distinct prefixes of the train items fit ``ranker.prefix_table_rows``, each has a row of
its own: all of length 1, then those of length 2 and so on, each length in ascending order of its
codes. A prefix that no train item has is in no bag; the shorter ones of the item are. With more of
them than rows, every prefix goes by a hash, ``h_p mod rows``, in unsigned 64-bit numbers:

    h_0 = 0,  h_p = mix(h_(p-1) + c_p + 1),  mix = the finalizer of splitmix64

How many prefixes then share a row is logged when a training starts.
Shape letters: N items, L levels, P prefix lengths, K prefixes of one length, R rows of the table.
May import: numpy.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.schema import ABSENT_CODE
from torchrec_models.sorted_ids import Ids, find_ids

logger = logging.getLogger(__name__)

ABSENT_ROW = -1
_RADIX = 2**31
"""Above every code, so that place of the parent and code make one int64."""


@dataclass(frozen=True)
class PrefixVocabulary:
    """Numbers the prefixes up to some length.

    Attributes:
        max_length: Longest prefix.
        keys: Per length the keys of the known prefixes, ascending: place of the prefix that is one
            shorter * 2^31 + last code. None: prefixes are hashed.
        num_embeddings: Rows of the table.
    """

    max_length: int
    keys: tuple[Ids, ...] | None
    num_embeddings: int

    def rows(self, rq_NL: Ids) -> Ids:
        """Return the table rows of items' prefixes, shortest first.

        Args:
            rq_NL: RQ codes, ``ABSENT_CODE`` for an item without codes.

        Returns:
            Int64 ``[N, P]``, ``ABSENT_ROW`` for a prefix without a row.
        """
        length = min(self.max_length, rq_NL.shape[1])
        if self.keys is None:
            is_absent_N1 = rq_NL[:, :1] == ABSENT_CODE
            return np.where(is_absent_N1, ABSENT_ROW, _hashed(rq_NL[:, :length], self))
        rows_NP = np.full((len(rq_NL), length), ABSENT_ROW, dtype=np.int64)
        known = np.arange(len(rq_NL))
        places, first_row = np.zeros(len(rq_NL), dtype=np.int64), 0
        for level, keys_K in enumerate(self.keys[:length]):
            # What has no shorter prefix here has no longer one either.
            places, is_known = find_ids(keys_K, places * _RADIX + rq_NL[known, level])
            known, places = known[is_known], places[is_known]
            rows_NP[known, level] = first_row + places
            first_row += len(keys_K)
        return rows_NP

    def codes(self) -> list[Ids]:
        """Return the codes of the known prefixes, ``[K, p]`` for each length p, in row order."""
        codes: list[Ids] = []
        for keys_K in self.keys or ():
            last_K1 = (keys_K % _RADIX)[:, None]
            parents = [codes[-1][keys_K // _RADIX]] if codes else []
            codes.append(np.concatenate([*parents, last_K1], axis=1))
        return codes

    def to_json(self) -> dict[str, Any]:
        """Return the vocabulary as JSON values."""
        keys = None if self.keys is None else [keys_K.tolist() for keys_K in self.keys]
        return {"max_length": self.max_length, "keys": keys, "num_rows": self.num_embeddings}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "PrefixVocabulary":
        """Return what :meth:`to_json` wrote."""
        keys = content["keys"]
        return PrefixVocabulary(
            max_length=content["max_length"],
            keys=None if keys is None else tuple(np.array(k, dtype=np.int64) for k in keys),
            num_embeddings=content["num_rows"],
        )


def build_prefixes(rq_NL: Ids, max_length: int, max_rows: int) -> PrefixVocabulary:
    """Return the vocabulary of the prefixes of train items.

    Args:
        rq_NL: RQ codes of the items with a train row, ``ABSENT_CODE`` where there are none.
        max_length: Longest prefix; longer than the code means the whole code.
        max_rows: Rows of the table at most.

    Returns:
        Numbers of the distinct prefixes if they fit, else hashing into ``max_rows`` rows.
    """
    rq_NL = rq_NL[rq_NL[:, 0] != ABSENT_CODE]
    length = min(max_length, rq_NL.shape[1])
    keys: list[Ids] = []
    places_N = np.zeros(len(rq_NL), dtype=np.int64)
    for level in range(length):
        keys_K, places_N = np.unique(places_N * _RADIX + rq_NL[:, level], return_inverse=True)
        keys.append(keys_K)
    num_prefixes = sum(map(len, keys))
    if num_prefixes <= max_rows:
        # TorchRec makes no table without rows.
        return PrefixVocabulary(length, tuple(keys), max(num_prefixes, 1))
    hashed = PrefixVocabulary(length, None, max_rows)
    _log_collisions(hashed, PrefixVocabulary(length, tuple(keys), num_prefixes))
    return hashed


def _log_collisions(hashed: PrefixVocabulary, exact: PrefixVocabulary) -> None:
    rows = [hashed.rows(codes_KP)[:, -1] for codes_KP in exact.codes()]
    counts_R = np.bincount(np.concatenate(rows), minlength=hashed.num_embeddings)
    logger.info(
        "prefixes_hashed prefixes=%d rows=%d prefixes_that_share_a_row=%d",
        exact.num_embeddings,
        hashed.num_embeddings,
        counts_R[counts_R > 1].sum(),
    )


def _hashed(rq_NP: Ids, vocabulary: PrefixVocabulary) -> Ids:
    hashes_N = np.zeros(len(rq_NP), dtype=np.uint64)
    rows_NP = np.empty(rq_NP.shape, dtype=np.int64)
    for level, codes_N in enumerate(rq_NP.T):
        hashes_N = _mix(hashes_N + (codes_N + 1).astype(np.uint64))
        rows_NP[:, level] = hashes_N % np.uint64(vocabulary.num_embeddings)
    return rows_NP


def _mix(x_N: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's finalizer (Steele, Lea, Flood 2014) of unsigned 64-bit numbers."""
    x_N = x_N + np.uint64(0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def prefix_start(
    vocabulary: PrefixVocabulary, level_weights: Sequence[npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32] | None:
    """Return first weights of the prefix table: each prefix's decoded vector.

    Args:
        vocabulary: Numbers of the prefixes.
        level_weights: First weights of each level's table: projected centroids, ``[K_l, E]``.

    Returns:
        Their sums over the prefix, float32 ``[R, E]``; None where rows are shared by hashing.
    """
    if vocabulary.keys is None:
        return None
    weights_RE = np.zeros((vocabulary.num_embeddings, level_weights[0].shape[1]), dtype=np.float32)
    first_row = 0
    for codes_KP in vocabulary.codes():
        rows = weights_RE[first_row : first_row + len(codes_KP)]
        for level, codes_K in enumerate(codes_KP.T):
            rows += level_weights[level][codes_K]
        first_row += len(codes_KP)
    return weights_RE

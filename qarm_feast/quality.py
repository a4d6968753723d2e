"""How good a codebook is: the figures that `qarm codebook evaluate` writes and gates look at.

Each measure is a function of codes and vectors, so that any quantizer can be held against it.

Shape letters in this file: N items, D embedding width, L levels, K codes of a level, Q queries,
U distinct full codes, G groups of items that share a prefix, P pool rows, V VQ neighbours.
May import: NumPy, the codebook.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.behaviour import BehaviourPairs, behaviour_figures
from qarm_feast.codebook import Codebook, ItemCodes
from qarm_feast.errors import DataError
from qarm_feast.quantizers.base import Codes, Embeddings, unit_rows
from qarm_feast.quantizers.search import nearest

Counts = npt.NDArray[np.int64]

NUM_HIT_QUERIES = 2000
"""Most items whose exact nearest neighbour is looked for among the decoded vectors."""
NUM_WORST_BUCKETS = 10
NUM_BUCKET_TITLES = 5
MAX_TITLE_LENGTH = 100
_DISTANCES_PER_BLOCK = 1 << 22


@dataclass(frozen=True)
class ItemFacts:
    """What is known of the items beside their vectors: the pairs of neighbours, and titles."""

    pairs: BehaviourPairs
    titles_N: Sequence[str]


def codebook_quality(
    codebook: Codebook,
    codes: ItemCodes,
    x_ND: Embeddings,
    facts: ItemFacts | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the quality figures of ``codebook`` on some items, ready for JSON.

    Keys: ``num_items``; ``levels`` (per level the use of its codes, see :func:`code_use`, and
    ``quantization_mse``, ``relative_residual_norm`` of what is left after it); ``collision_rate``,
    ``singleton_share``, ``max_bucket``, ``mean_items_per_shared_code`` of full codes;
    ``quantization_mse``: mean squared length of what the last level leaves over, divided by D;
    ``hr1``, ``hr10``: see :func:`hit_rates`;
    ``mean_cosine_by_shared_prefix``: for 0 ... L shared levels (and no more) the mean cosine of
    the pairs of items, None if there is no such pair; ``vq``: use of pool rows, and mean cosine
    with the first and with all neighbours; with ``facts`` also ``behaviour``, see
    :func:`behaviour_figures`, and ``worst_buckets``, see :func:`worst_buckets`.

    Args:
        codebook: The codebook that made ``codes``.
        codes: Codes of the items, each item once.
        x_ND: Their aligned embeddings, in the same order.
        facts: Behavioural neighbours and titles, in the same order.
        seed: Seed of the sample of queries.

    Returns:
        Figures by name: numbers, lists of numbers, and dicts of them.

    Raises:
        DataError: If there are fewer than two items.
    """
    if len(x_ND) < 2 or len(x_ND) != len(codes.rq_NL):
        raise DataError(
            f"quality needs at least two items and a code for each, got {len(x_ND)} vectors and "
            f"{len(codes.rq_NL)} codes"
        )
    unit_ND = unit_rows(x_ND)
    residuals = [
        residual_figures(unit_ND, codebook.decode_rq(codes.rq_NL[:, :length]))
        for length in range(1, codes.rq_NL.shape[1] + 1)
    ]
    hr1, hr10 = hit_rates(codes.rq_NL, codebook.decode_rq(codes.rq_NL), unit_ND, seed)
    return {
        "num_items": len(x_ND),
        "levels": [
            {**code_use(np.bincount(codes_N, minlength=size)), **residual}
            for codes_N, size, residual in zip(
                codes.rq_NL.T, codebook.manifest.level_sizes, residuals, strict=True
            )
        ],
        **full_code_figures(codes.rq_NL),
        "quantization_mse": residuals[-1]["quantization_mse"],
        "hr1": hr1,
        "hr10": hr10,
        "mean_cosine_by_shared_prefix": mean_cosine_by_shared_prefix(codes.rq_NL, unit_ND),
        "vq": _vq_figures(codebook, codes.vq_NV, unit_ND),
        **({} if facts is None else _figures_of_facts(codes, unit_ND, facts)),
    }


def _figures_of_facts(codes: ItemCodes, unit_ND: Embeddings, facts: ItemFacts) -> dict[str, Any]:
    return {
        "behaviour": behaviour_figures(facts.pairs, codes.item_ids_N, codes.rq_NL),
        "worst_buckets": worst_buckets(codes, unit_ND, facts.titles_N),
    }


def code_use(counts_K: Counts) -> dict[str, float]:
    """Return how evenly items spread over the codes of one level.

    Args:
        counts_K: Items per code; at least one item.

    Returns:
        ``codebook_size``, ``num_used``, ``num_dead``, ``codebook_coverage`` (used / K),
        ``code_entropy_bits``, ``entropy_share`` (of log2 K, the most there can be), ``perplexity``
        (2 to the entropy), ``largest_bucket`` (items) and ``gini`` (0: all codes alike; near 1:
        one code has all items).
    """
    size = len(counts_K)
    share_U = counts_K[counts_K > 0] / counts_K.sum()
    entropy = float(-(share_U * np.log2(share_U)).sum())
    ascending_K = np.sort(counts_K)
    rank_K = np.arange(1, size + 1)
    gini = 2 * (rank_K * ascending_K).sum() / (size * counts_K.sum()) - (size + 1) / size
    return {
        "codebook_size": size,
        "num_used": len(share_U),
        "num_dead": size - len(share_U),
        "codebook_coverage": len(share_U) / size,
        "code_entropy_bits": entropy,
        "entropy_share": entropy / float(np.log2(size)) if size > 1 else 1.0,
        "perplexity": 2.0**entropy,
        "largest_bucket": int(counts_K.max()),
        "gini": float(gini),
    }


def full_code_figures(rq_NL: Codes) -> dict[str, float]:
    """Return how items share full codes.

    Args:
        rq_NL: Codes of at least one item.

    Returns:
        ``num_unique_codes``, ``collision_rate`` (1 - unique / N), ``singleton_share`` (items that
        have their code alone), ``max_bucket`` and ``mean_items_per_shared_code`` (over codes of
        more than one item; 0 if there is none).
    """
    _, counts_U = np.unique(rq_NL, axis=0, return_counts=True)
    shared_U = counts_U[counts_U > 1]
    return {
        "num_unique_codes": len(counts_U),
        "collision_rate": 1 - len(counts_U) / len(rq_NL),
        "singleton_share": int((counts_U == 1).sum()) / len(rq_NL),
        "max_bucket": int(counts_U.max()),
        "mean_items_per_shared_code": float(shared_U.mean()) if len(shared_U) else 0.0,
    }


def mean_cosine_by_shared_prefix(rq_NL: Codes, unit_ND: Embeddings) -> list[float | None]:
    """Return, for 0 ... L shared first levels and no more, the mean cosine of pairs of items.

    Exact over all pairs: the cosines within a group sum up to (|sum of rows|^2 - rows) / 2.

    Args:
        rq_NL: Codes.
        unit_ND: Vectors of length 1, in the same order.

    Returns:
        ``L + 1`` means; None where no pair shares just that many levels.
    """
    num_levels = rq_NL.shape[1]
    at_least = [_pair_sums(rq_NL[:, :length], unit_ND) for length in range(num_levels + 1)]
    at_least.append((0, 0.0))
    means: list[float | None] = []
    for (pairs, cosines), (deeper_pairs, deeper_cosines) in pairwise(at_least):
        num_pairs = pairs - deeper_pairs
        means.append((cosines - deeper_cosines) / num_pairs if num_pairs else None)
    return means


def _pair_sums(prefix_NL: Codes, unit_ND: Embeddings) -> tuple[int, float]:
    """Return how many pairs share the whole prefix, and the sum of their cosines."""
    if prefix_NL.shape[1] == 0:
        group_N = np.zeros(len(prefix_NL), dtype=np.int64)
    else:
        group_N = np.unique(prefix_NL, axis=0, return_inverse=True)[1].reshape(-1)
    order_N = np.argsort(group_N, kind="stable")
    counts_G = np.bincount(group_N)
    starts_G = np.cumsum(counts_G) - counts_G
    sums_GD = np.add.reduceat(unit_ND[order_N], starts_G, axis=0, dtype=np.float64)
    own = np.square(unit_ND, dtype=np.float64).sum()
    num_pairs = int((counts_G * (counts_G - 1) // 2).sum())
    return num_pairs, float((np.square(sums_GD).sum() - own) / 2)


def residual_figures(unit_ND: Embeddings, decoded_ND: Embeddings) -> dict[str, float]:
    """Return how far decoded vectors lie from those that they stand for.

    Args:
        unit_ND: Vectors of length 1.
        decoded_ND: What their codes decode to.

    Returns:
        ``quantization_mse`` (squared length of the residual, divided by D) and
        ``relative_residual_norm`` (its root mean square length).
    """
    left_ND = unit_ND - decoded_ND
    left = float(np.square(left_ND, dtype=np.float64).sum())
    return {
        "quantization_mse": left / left_ND.size,
        "relative_residual_norm": float(np.sqrt(left / len(left_ND))),
    }


def worst_buckets(
    codes: ItemCodes, unit_ND: Embeddings, titles_N: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the full codes that most items share, most first; of equal ones the least alike.

    Args:
        codes: Codes of the items.
        unit_ND: Their vectors of length 1.
        titles_N: Their titles.

    Returns:
        At most ten buckets of more than one item: ``rq_code``, ``num_items``, ``mean_cosine`` of
        its pairs, and for the first few items by id ``item_ids`` and ``titles`` (cut).
    """
    unique_UL, bucket_N, counts_U = np.unique(
        codes.rq_NL, axis=0, return_inverse=True, return_counts=True
    )
    order_N = np.lexsort((codes.item_ids_N, bucket_N.reshape(-1)))
    starts_U = np.cumsum(counts_U) - counts_U
    # The threshold may let in more of one size; the least alike of them are the worst.
    least = max(2, int(np.sort(counts_U)[-NUM_WORST_BUCKETS:][0]))
    found = [
        _bucket(unique_UL[u], order_N[starts_U[u] : starts_U[u] + counts_U[u]], codes, unit_ND)
        for u in np.flatnonzero(counts_U >= least)
    ]
    found.sort(key=lambda bucket: (-bucket["num_items"], bucket["mean_cosine"]))
    title_of = dict(zip(codes.item_ids_N.tolist(), titles_N, strict=True))
    return [
        {**bucket, "titles": [title_of[item][:MAX_TITLE_LENGTH] for item in bucket["item_ids"]]}
        for bucket in found[:NUM_WORST_BUCKETS]
    ]


def _bucket(code_L: Codes, rows: Counts, codes: ItemCodes, unit_ND: Embeddings) -> dict[str, Any]:
    sum_D = unit_ND[rows].sum(axis=0, dtype=np.float64)
    num_pairs = len(rows) * (len(rows) - 1)
    return {
        "rq_code": code_L.tolist(),
        "num_items": len(rows),
        "mean_cosine": float((sum_D @ sum_D - len(rows)) / num_pairs),
        "item_ids": codes.item_ids_N[rows[:NUM_BUCKET_TITLES]].tolist(),
    }


def hit_rates(
    rq_NL: Codes, decoded_ND: Embeddings, unit_ND: Embeddings, seed: int = 0
) -> tuple[float, float]:
    """Return HR@1 and HR@10: how often decoded vectors keep an item's exact nearest neighbour.

    Args:
        rq_NL: Codes of the items.
        decoded_ND: What they decode to; equal codes, equal vectors.
        unit_ND: The items' vectors of length 1.
        seed: Seed of the sample of items that are looked at.

    Returns:
        Chance that the exact nearest other item is among the 1 or 10 nearest by decoded vectors,
        items of one full code in random order, those of the item's own code first.
    """
    num_queries = min(NUM_HIT_QUERIES, len(unit_ND))
    generator = np.random.default_rng(seed)
    queries_Q = np.sort(generator.choice(len(unit_ND), size=num_queries, replace=False))
    neighbor_Q = _nearest_other(unit_ND, queries_Q)
    _, first_U, bucket_N, counts_U = np.unique(
        rq_NL, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    bucket_N = bucket_N.reshape(-1)
    decoded_UD = decoded_ND[first_U].astype(np.float64)
    hits = np.zeros(2)
    step = max(1, _DISTANCES_PER_BLOCK // len(first_U))
    for start in range(0, num_queries, step):
        own_B = bucket_N[queries_Q[start : start + step]]
        wanted_B = bucket_N[neighbor_Q[start : start + step]]
        closer_B, tied_B = _ranks(decoded_UD, counts_U, own_B, wanted_B)
        for position, k in enumerate((1, 10)):
            hits[position] += np.clip((k - closer_B) / tied_B, 0, 1).sum()
    return float(hits[0] / num_queries), float(hits[1] / num_queries)


def _ranks(
    decoded_UD: npt.NDArray[np.float64], counts_U: Counts, own_B: Counts, wanted_B: Counts
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how many other items are closer than the wanted bucket's, and how many are in it."""
    norms_U = np.square(decoded_UD).sum(axis=1)
    scores_BU = norms_U - 2 * decoded_UD[own_B] @ decoded_UD.T
    rows_B = np.arange(len(own_B))
    # Rounding must not put another code before the query's own.
    scores_BU[rows_B, own_B] = -np.inf
    is_closer_BU = scores_BU < scores_BU[rows_B, wanted_B][:, None]
    closer_B = is_closer_BU @ counts_U.astype(np.float64)
    is_same_B = own_B == wanted_B
    tied_B = counts_U[wanted_B] - is_same_B
    return closer_B - ~is_same_B, tied_B.astype(np.float64)


def _nearest_other(unit_ND: Embeddings, queries_Q: Counts) -> Codes:
    """Return the row of each query's nearest vector other than itself."""
    rows_Q2 = nearest(unit_ND[queries_Q], unit_ND, k=2)
    is_self_Q = rows_Q2[:, 0] == queries_Q
    others_Q: Codes = np.where(is_self_Q, rows_Q2[:, 1], rows_Q2[:, 0])
    return others_Q


def _vq_figures(codebook: Codebook, vq_NV: Codes, unit_ND: Embeddings) -> dict[str, float]:
    pool_PD = codebook.vq.pool_vectors_PD
    cosines_V = np.array(
        [np.einsum("nd,nd->n", unit_ND, pool_PD[rows_N]).mean() for rows_N in vq_NV.T]
    )
    return {
        **code_use(np.bincount(vq_NV.reshape(-1), minlength=len(pool_PD))),
        "mean_cosine_first": float(cosines_V[0]),
        "mean_cosine_all": float(cosines_V.mean()),
    }

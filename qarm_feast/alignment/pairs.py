"""Item pairs from behaviour: which items users treat as neighbours.

Two sources, both from positive train rows only. I2I pairs are the Swing neighbours of an item
(:func:`swing_neighbors`). U2I pairs join each positive of a user (target) with the most similar of
the user's latest earlier positives (trigger); similar in a behaviour space, the truncated SVD of
the positive pointwise mutual information of items that share users.

Shape letters in this file: P positives, U users, M items, H history length, B behaviour width,
R pairs, S users of one item, T items of those users.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse
from scipy.sparse.linalg import svds

from qarm_feast.alignment.config import AlignmentConfig, PairConfig
from qarm_feast.artifact import replace_file
from qarm_feast.errors import DataError
from qarm_feast.input_data import InputData
from qarm_feast.schema import EVENT_TIMESTAMP, ITEM_ID, USER_ID

logger = logging.getLogger(__name__)

NO_USER = -1
PAIR_ROWS = pa.schema(
    [
        ("trigger_item_id", pa.int64()),
        ("target_item_id", pa.int64()),
        ("source", pa.string()),
        ("user_row", pa.int64()),
        ("score", pa.float32()),
        ("weight", pa.float32()),
    ]
)
"""``source`` is i2i or u2i; ``user_row`` numbers users (NO_USER for i2i); ``weight`` in (0, 1] is
the score over the best score of the same target and source."""
_TRIGGER_CHUNK = 8192


@dataclass(frozen=True)
class Positives:
    """Positive train rows, sorted by user, time and item.

    ``users_P`` and ``items_P`` are dense rows; ``item_ids_M`` maps an item's row to its id.
    A user's repeated positive of one item counts once, at its first time.
    """

    users_P: np.ndarray
    items_P: np.ndarray
    times_P: np.ndarray
    item_ids_M: np.ndarray
    num_users: int

    def matrix(self) -> sparse.csr_array:
        """Return the 0/1 matrix users x items."""
        ones_P = np.ones(len(self.users_P), dtype=np.float32)
        shape = (self.num_users, len(self.item_ids_M))
        return sparse.csr_array((ones_P, (self.users_P, self.items_P)), shape=shape)


def read_positives(checked: InputData) -> Positives:
    """Return the positive train rows of the data as dense, sorted, unique rows.

    Args:
        checked: Input data.

    Returns:
        At least one row.

    Raises:
        DataError: If no train row is positive.
    """
    table = checked.train_positives()
    if table.num_rows == 0:
        raise DataError(
            f"{checked.directory} has no train row with {checked.positive_label} true, "
            "so no item pairs can be built; choose another data.positive_label"
        )
    users_P = np.unique(table[USER_ID].to_numpy(), return_inverse=True)[1]
    item_ids_M, items_P = np.unique(table[ITEM_ID].to_numpy(), return_inverse=True)
    times_P = table[EVENT_TIMESTAMP].cast(pa.int64()).to_numpy()
    order_P = np.lexsort((items_P, times_P, users_P))
    keys_P = users_P[order_P] * len(item_ids_M) + items_P[order_P]
    first_P = np.sort(np.unique(keys_P, return_index=True)[1])
    order_P = order_P[first_P]
    return Positives(
        users_P=users_P[order_P],
        items_P=items_P[order_P],
        times_P=times_P[order_P],
        item_ids_M=item_ids_M,
        num_users=int(users_P.max()) + 1,
    )


def build_pairs(checked: InputData, config: PairConfig, seed: int) -> pa.Table:
    """Return the pairs of both sources: rows of ``PAIR_ROWS``, i2i first.

    Args:
        checked: Input data; only train rows whose positive label is true are read.
        config: Neighbours, thresholds and caps.
        seed: Seed of the SVD's start vector.

    Returns:
        At least one pair.

    Raises:
        DataError: If there are no positives, or no two items share a user.
    """
    positives = read_positives(checked)
    i2i = _i2i_pairs(positives, config)
    u2i = _u2i_pairs(positives, config, seed)
    logger.info("pairs_built i2i=%d u2i=%d", i2i.num_rows, u2i.num_rows)
    if i2i.num_rows + u2i.num_rows == 0:
        raise DataError(f"no two items of {checked.directory} share a user among its train rows")
    return pa.concat_tables([i2i, u2i])


def write_pairs(checked: InputData, config: AlignmentConfig) -> tuple[Path, pa.Table]:
    """Build the pairs and put them in place of earlier ones of this encoder version.

    Args:
        checked: Input data.
        config: Section ``alignment``.

    Returns:
        The parquet file ``<pairs_uri>/<encoder version>.parquet`` and its rows.

    Raises:
        DataError: If no pair can be built.
    """
    table = build_pairs(checked, config.pairs, config.seed)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(_fingerprint(checked)), sink)
    path = _pairs_path(config)
    replace_file(path, sink.getvalue().to_pybytes())
    return path, table


def read_pairs(checked: InputData, config: AlignmentConfig) -> pa.Table:
    """Return the stored pairs of this encoder version.

    Args:
        checked: Input data that the pairs must have been built from.
        config: Section ``alignment``.

    Returns:
        Rows of ``PAIR_ROWS``.

    Raises:
        DataError: If there are none, or they were built from other train rows.
    """
    path = _pairs_path(config)
    if not path.is_file():
        raise DataError(f"there are no item pairs at {path}; run `qarm align pairs` first")
    table = pq.read_table(path)
    found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    wanted = _fingerprint(checked)
    if any(found.get(key) != value for key, value in wanted.items()):
        raise DataError(
            f"{path} was built from {found or 'unknown data'}, "
            f"but {checked.directory} is {wanted}; run `qarm align pairs` again"
        )
    return table


def _pairs_path(config: AlignmentConfig) -> Path:
    return Path(config.pairs_uri) / f"{config.encoder_version}.parquet"


def _fingerprint(checked: InputData) -> dict[str, str]:
    return {
        "positive_label": checked.positive_label,
        "num_train_positives": str(checked.train_positives().num_rows),
        "behaviour_cutoff": checked.behaviour_cutoff().isoformat(),
    }


def summarise_pairs(pairs: pa.Table) -> str:
    """Return the number of pairs and items per source, in words."""
    parts = []
    for source in ("i2i", "u2i"):
        rows = pairs.filter(pc.equal(pairs["source"], source))
        num_items = pc.count_distinct(rows["target_item_id"]).as_py()
        parts.append(f"{source} {rows.num_rows:,} pairs of {num_items:,} target items")
    return ", ".join(parts)


def swing_neighbors(
    positives: Positives, num_neighbors: int, alpha: float, max_users_per_item: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each item's best neighbours by the Swing score.

    With ``U_i`` the users of item i, ``I_u`` the items of user u and ``w_u = 1 / sqrt(|I_u|)``,

    ``s(i, j) = sum over unordered pairs {u, v}, u != v, of users in U_i and U_j of
    w_u * w_v / (alpha + |I_u and I_v|)``.

    Two users who share few other items say more about the two they share. Of an item with more
    than ``max_users_per_item`` users only those who came to it last are ``U_i``, when its own
    neighbours are sought.

    Args:
        positives: Positive rows.
        num_neighbors: Neighbours kept per item; fewer where fewer have a score above zero.
        alpha: Smooths pairs of users with little in common.
        max_users_per_item: Bounds time and memory, both quadratic in the users of an item.

    Returns:
        Items, their neighbours (dense rows) and scores; items ascending, best neighbour first,
        ties by the lower neighbour.
    """
    rated = positives.matrix()
    weights_U = 1.0 / np.sqrt(rated.sum(axis=1))
    users_by_item = _latest_users_by_item(positives, max_users_per_item)
    items, neighbors, scores = [], [], []
    for item, users_S in enumerate(users_by_item):
        found_K, scores_K = _swing_of_item(rated[users_S], weights_U[users_S], alpha)
        is_other_K = found_K != item
        found_K, scores_K = found_K[is_other_K], scores_K[is_other_K]
        best_K = np.lexsort((found_K, -scores_K))[:num_neighbors]
        items.append(np.full(len(best_K), item))
        neighbors.append(found_K[best_K])
        scores.append(scores_K[best_K])
    return np.concatenate(items), np.concatenate(neighbors), np.concatenate(scores)


def _latest_users_by_item(positives: Positives, max_users: int) -> list[np.ndarray]:
    order_P = np.lexsort((positives.users_P, positives.times_P, positives.items_P))
    ends_M = np.cumsum(np.bincount(positives.items_P, minlength=len(positives.item_ids_M)))
    users_by_item = np.split(positives.users_P[order_P], ends_M[:-1])
    return [users[-max_users:] for users in users_by_item]


def _swing_of_item(
    rated_SM: sparse.csr_array, weights_S: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the items that at least two of the users share, and their scores."""
    items_T, columns = np.unique(rated_SM.indices, return_inverse=True)
    shape = (rated_SM.shape[0], len(items_T))
    rated_ST = sparse.csr_array((rated_SM.data, columns, rated_SM.indptr), shape=shape)
    shared_SS = (rated_ST @ rated_ST.T).toarray()
    pair_weights_SS = np.outer(weights_S, weights_S) / (alpha + shared_SS)
    np.fill_diagonal(pair_weights_SS, 0.0)
    # Every unordered pair of users is summed twice.
    scores_T = rated_ST.multiply(pair_weights_SS @ rated_ST).sum(axis=0) / 2.0
    is_shared_T = scores_T > 0
    return items_T[is_shared_T], scores_T[is_shared_T]


def _i2i_pairs(positives: Positives, config: PairConfig) -> pa.Table:
    items_R, neighbors_R, scores_R = swing_neighbors(
        positives, config.num_neighbors, config.swing_alpha, config.max_users_per_item
    )
    users_R = np.full(len(items_R), NO_USER)
    return _pair_table(positives.item_ids_M, neighbors_R, items_R, users_R, scores_R)


def behaviour_vectors(positives: Positives, width: int, seed: int) -> np.ndarray:
    """Return one L2-normalised float32 vector per item, near where users are shared.

    The truncated SVD (left vectors times the root of the singular values) of the positive
    pointwise mutual information of items by shared users; zero for an item that shares none.

    Args:
        positives: Positive rows.
        width: Dimensions; fewer where there are not enough items.
        seed: Seed of the SVD's start vector.

    Returns:
        Matrix of shape ``[M, B]``.
    """
    rated = positives.matrix()
    shared = (rated.T @ rated).tocoo()
    is_pair = shared.row != shared.col
    rows, columns, counts = shared.row[is_pair], shared.col[is_pair], shared.data[is_pair]
    num_items = len(positives.item_ids_M)
    rank = min(width, num_items - 1)
    if not len(counts) or rank < 1:
        return np.zeros((num_items, 1), dtype=np.float32)
    totals_M = np.bincount(rows, weights=counts, minlength=num_items)
    pmi = np.log(counts * totals_M.sum() / (totals_M[rows] * totals_M[columns]))
    ppmi = sparse.csr_array((np.maximum(pmi, 0.0), (rows, columns)), shape=shared.shape)
    start_M = np.random.default_rng(seed).normal(size=num_items)
    left_MB, values_B, _ = svds(ppmi, k=rank, v0=start_M)
    vectors_MB = left_MB * np.sqrt(values_B)
    norms_M1 = np.linalg.norm(vectors_MB, axis=1, keepdims=True)
    unit_MB: np.ndarray = (vectors_MB / np.maximum(norms_M1, 1e-12)).astype(np.float32)
    return unit_MB


def _u2i_pairs(positives: Positives, config: PairConfig, seed: int) -> pa.Table:
    vectors_MB = behaviour_vectors(positives, config.behaviour_dim, seed)
    triggers_P, scores_P = find_triggers(positives, vectors_MB, config.history_length)
    kept_R = np.flatnonzero(scores_P >= config.min_similarity)
    kept_R = _best_per_group(kept_R, positives.users_P, scores_P, config.max_pairs_per_user)
    kept_R = _best_per_group(kept_R, positives.items_P, scores_P, config.max_pairs_per_item)
    return _pair_table(
        positives.item_ids_M,
        triggers_P[kept_R],
        positives.items_P[kept_R],
        positives.users_P[kept_R],
        scores_P[kept_R],
    )


def find_triggers(
    positives: Positives, vectors_MB: np.ndarray, history_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return for every positive the most similar earlier positive of its user.

    Events of one user at one time do not see each other.

    Args:
        positives: Positive rows.
        vectors_MB: Behaviour vectors, L2-normalised.
        history_length: Latest earlier positives that are searched.

    Returns:
        Trigger items (dense rows) and cosines; cosine ``-inf`` where nothing is earlier.
    """
    starts_P = _group_starts(positives.users_P)
    # The history of a row ends where the rows of its user at its own time begin.
    ends_P = _group_starts(positives.users_P, positives.times_P)
    starts_P = np.maximum(starts_P, ends_P - history_length)
    triggers_P = np.zeros(len(starts_P), dtype=np.int64)
    scores_P = np.full(len(starts_P), -np.inf, dtype=np.float32)
    for begin in range(0, len(starts_P), _TRIGGER_CHUNK):
        chunk = slice(begin, begin + _TRIGGER_CHUNK)
        rows_CH = ends_P[chunk, None] - 1 - np.arange(history_length)
        is_history_CH = rows_CH >= starts_P[chunk, None]
        items_CH = positives.items_P[np.maximum(rows_CH, 0)]
        targets_CB = vectors_MB[positives.items_P[chunk]]
        cosines_CH = np.einsum("cb,chb->ch", targets_CB, vectors_MB[items_CH])
        cosines_CH[~is_history_CH] = -np.inf
        best_C = cosines_CH.argmax(axis=1)
        triggers_P[chunk] = np.take_along_axis(items_CH, best_C[:, None], axis=1)[:, 0]
        scores_P[chunk] = np.take_along_axis(cosines_CH, best_C[:, None], axis=1)[:, 0]
    return triggers_P, scores_P


def _group_starts(*sorted_keys: np.ndarray) -> np.ndarray:
    """Return for every row the index of the first row with the same keys."""
    num_rows = len(sorted_keys[0])
    is_start_P = np.zeros(num_rows, dtype=bool)
    is_start_P[:1] = True
    for key_P in sorted_keys:
        is_start_P[1:] |= key_P[1:] != key_P[:-1]
    return np.maximum.accumulate(np.where(is_start_P, np.arange(num_rows), 0))


def _best_per_group(
    rows_R: np.ndarray, groups_P: np.ndarray, scores_P: np.ndarray, limit: int
) -> np.ndarray:
    """Keep the ``limit`` rows of highest score of each group; ties go to the earlier row."""
    order_R = rows_R[np.lexsort((rows_R, -scores_P[rows_R], groups_P[rows_R]))]
    rank_R = np.arange(len(order_R)) - _group_starts(groups_P[order_R])
    return np.sort(order_R[rank_R < limit])


def _pair_table(
    item_ids_M: np.ndarray,
    triggers_R: np.ndarray,
    targets_R: np.ndarray,
    users_R: np.ndarray,
    scores_R: np.ndarray,
) -> pa.Table:
    is_i2i = not len(users_R) or users_R[0] == NO_USER
    best_M = np.full(len(item_ids_M), 1e-12)
    np.maximum.at(best_M, targets_R, scores_R)
    columns = [
        item_ids_M[triggers_R],
        item_ids_M[targets_R],
        pa.repeat(pa.scalar("i2i" if is_i2i else "u2i"), len(triggers_R)),
        users_R.astype(np.int64),
        scores_R.astype(np.float32),
        np.clip(scores_R / best_M[targets_R], 1e-6, 1.0).astype(np.float32),
    ]
    return pa.table(columns, schema=PAIR_ROWS)

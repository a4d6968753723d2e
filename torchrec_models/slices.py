"""Slices of evaluation rows by how much train data their item has.

An item without a train row is ``cold``. The others are ordered by their train positives (of the
rows' first label): the most popular ones that together make 80 % of all train positives are
``head``, those up to 95 % ``middle``, the rest ``tail``. Items of equal count stay together, in
the upper slice where a cut falls among them.
Shape letters: V rows of the item vocabulary's table.
May import: numpy, pyarrow.
"""

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from torchrec_models.row_store import RowStore
from torchrec_models.vocabulary import DEFAULT_ROW, IdVocabulary

SLICES = ("cold", "tail", "middle", "head")
COLD, TAIL, MIDDLE, HEAD = range(len(SLICES))
HEAD_SHARE = 0.8
"""Share of the train positives that the head makes."""
MIDDLE_SHARE = 0.95
"""Share of the train positives that head and middle make together."""

SliceNumbers = npt.NDArray[np.uint8]


def item_slices(store: RowStore, item_ids: IdVocabulary) -> SliceNumbers:
    """Return the slice of each row of the item vocabulary's table.

    Args:
        store: Rows of one service; the train rows are read in pieces.
        item_ids: Their vocabulary of items.

    Returns:
        Places in :data:`SLICES`, shape ``[V]``, uint8; :data:`COLD` for the default row.
    """
    return popularity_slices(_train_positives(store, item_ids))


def popularity_slices(positives_V: npt.NDArray[np.int64]) -> SliceNumbers:
    """Return the slice of each table row from its item's number of train positives.

    Args:
        positives_V: Train positives; the default row's count is not read.

    Returns:
        Places in :data:`SLICES`, shape ``[V]``, uint8.
    """
    slices_V = np.full(len(positives_V), TAIL, dtype=np.uint8)
    slices_V[DEFAULT_ROW] = COLD
    counts = np.delete(positives_V, DEFAULT_ROW)
    distinct, places = np.unique(counts, return_inverse=True)
    made = np.bincount(places, weights=counts, minlength=len(distinct))
    # Share of the positives that more popular items make.
    share_above = 1 - np.cumsum(made) / max(made.sum(), 1)
    is_positive = distinct > 0
    for number, share in ((MIDDLE, MIDDLE_SHARE), (HEAD, HEAD_SHARE)):
        # Rounding of the shares must not move an item that lies exactly on a cut.
        is_within = is_positive & (share_above < share - 1e-12)
        slices_V[1:][is_within[places]] = number
    return slices_V


def _train_positives(store: RowStore, item_ids: IdVocabulary) -> npt.NDArray[np.int64]:
    positives_V = np.zeros(item_ids.num_embeddings, dtype=np.int64)
    label = store.manifest.label_names[0]
    with pq.ParquetFile(store.split_path("train")) as file:
        for part in file.iter_batches(columns=["item_id", label]):
            liked = part.filter(part[label])
            rows = item_ids.rows(liked["item_id"].to_numpy())
            # Not a bincount of all V rows: there are many parts.
            found, counts = np.unique(rows, return_counts=True)
            positives_V[found] += counts
    return positives_V

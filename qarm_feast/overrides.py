"""The override table: codes that are served as stored, not as computed.

A code once published never moves, and a cap or a refresh may give an item another code than the
nearest. Such a code holds for one item with one content: an edit gets a fresh code.

Shape letters in this file: N items, M overrides (or known items), L levels, W bytes of a hash.
May import: NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers.base import Arrays, Codes

NO_ROW = -1
"""In place of a row number: this item with this content is not listed."""

_ItemIds = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class Overrides:
    """Stored RQ codes by (item id, content hash); empty by default."""

    item_ids_M: npt.NDArray[np.int64]
    content_hashes_MW: npt.NDArray[np.uint8]
    rq_ML: Codes

    def __len__(self) -> int:
        return len(self.item_ids_M)

    @classmethod
    def empty(cls, num_levels: int) -> "Overrides":
        """Return a table without rows for codes of ``num_levels`` levels."""
        return cls.from_rows(np.empty(0, np.int64), [], np.empty((0, num_levels), np.int64))

    @classmethod
    def from_rows(
        cls,
        item_ids_M: npt.NDArray[np.int64],
        content_hashes_M: Sequence[str] | _Hashes,
        rq_ML: Codes,
    ) -> "Overrides":
        """Return a table, ordered by item id and content hash.

        Args:
            item_ids_M: Items.
            content_hashes_M: Hash of the content that the code belongs to, ASCII.
            rq_ML: The code to serve.

        Returns:
            The table.

        Raises:
            CodebookError: If an (item id, content hash) comes twice, or lengths differ.
        """
        if not len(item_ids_M) == len(content_hashes_M) == len(rq_ML):
            raise CodebookError(
                f"{len(item_ids_M)} items came with {len(content_hashes_M)} content hashes and "
                f"{len(rq_ML)} codes"
            )
        hashes_M = hash_array(content_hashes_M)
        order_M = content_order(item_ids_M, hashes_M)
        ids_M, hashes_M = item_ids_M[order_M], hashes_M[order_M]
        is_repeat_M = (ids_M[1:] == ids_M[:-1]) & (hashes_M[1:] == hashes_M[:-1])
        if is_repeat_M.any():
            raise CodebookError(
                f"{int(is_repeat_M.sum())} overrides come twice; the first is that of item "
                f"{int(ids_M[1:][np.argmax(is_repeat_M)])}"
            )
        width = hashes_M.dtype.itemsize
        return cls(
            item_ids_M=ids_M,
            content_hashes_MW=hashes_M.view(np.uint8).reshape(len(ids_M), width),
            rq_ML=rq_ML[order_M],
        )

    def with_rows(
        self, item_ids_M: _ItemIds, content_hashes_M: Sequence[str], rq_ML: Codes
    ) -> "Overrides":
        """Return a table that holds these codes too, in place of others of the same content."""
        is_kept_M = np.ones(len(self), dtype=np.bool_)
        rows_M = self.rows_of(item_ids_M, content_hashes_M)
        is_kept_M[rows_M[rows_M != NO_ROW]] = False
        return Overrides.from_rows(
            np.concatenate([self.item_ids_M[is_kept_M], item_ids_M]),
            np.concatenate([self._hashes[is_kept_M], hash_array(content_hashes_M)]),
            np.concatenate([self.rq_ML[is_kept_M], rq_ML]),
        )

    def apply(self, item_ids_N: _ItemIds, content_hashes_N: Sequence[str], rq_NL: Codes) -> Codes:
        """Return ``rq_NL`` with the stored code in every row that has one."""
        rows_N = self.rows_of(item_ids_N, content_hashes_N)
        if (rows_N == NO_ROW).all():
            return rq_NL
        served_NL = rq_NL.copy()
        served_NL[rows_N != NO_ROW] = self.rq_ML[rows_N[rows_N != NO_ROW]]
        return served_NL

    def rows_of(
        self, item_ids_N: _ItemIds, content_hashes_N: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        """Return the row that holds each item with just that content, or ``NO_ROW``."""
        rows_N = np.full(len(item_ids_N), NO_ROW, dtype=np.int64)
        # Few items are listed: only theirs is worth the look at the hashes.
        listed_N = np.flatnonzero(np.isin(item_ids_N, self.item_ids_M))
        hashes = [content_hashes_N[row] for row in listed_N.tolist()]
        rows_N[listed_N] = find_content(
            self.item_ids_M, self._hashes, item_ids_N[listed_N], hash_array(hashes)
        )
        return rows_N

    def arrays(self) -> Arrays:
        """Return the three columns by name: what an artifact stores."""
        return {
            "item_ids": self.item_ids_M,
            "content_hashes": self.content_hashes_MW,
            "rq_codes": self.rq_ML,
        }

    @property
    def _hashes(self) -> _Hashes:
        width = self.content_hashes_MW.shape[1]
        return np.ascontiguousarray(self.content_hashes_MW).view(f"S{width}")[:, 0]


def hash_array(content_hashes_N: Sequence[str] | _Hashes) -> _Hashes:
    """Return content hashes as one array of bytes, which sorts and compares as they do.

    Args:
        content_hashes_N: Hashes, ASCII.

    Returns:
        An array of fixed-width bytes.

    Raises:
        DataError: If a hash is not ASCII.
    """
    try:
        return np.array(content_hashes_N, dtype=np.bytes_)
    except UnicodeEncodeError as error:
        raise DataError(
            f"content_hash must be ASCII, found {error.object!r}; run `qarm align export` again"
        ) from error


def content_order(item_ids_M: _ItemIds, hashes_M: _Hashes) -> npt.NDArray[np.int64]:
    """Return the order of rows by item id, then by content hash."""
    return np.lexsort((hashes_M, item_ids_M))


def find_content(
    item_ids_M: _ItemIds, hashes_M: _Hashes, item_ids_N: _ItemIds, hashes_N: _Hashes
) -> npt.NDArray[np.int64]:
    """Return where each (item id, content hash) stands in a sorted list.

    Args:
        item_ids_M: Items of the list, ascending; an item may come with several contents.
        hashes_M: The hash of each.
        item_ids_N: Items that are looked for, in any order.
        hashes_N: The hash of each.

    Returns:
        Row numbers of shape ``[N]``, ``NO_ROW`` for what is not listed.
    """
    rows_N = np.searchsorted(item_ids_M, item_ids_N, side="left")
    ends_N = np.searchsorted(item_ids_M, item_ids_N, side="right")
    found_N = np.full(len(item_ids_N), NO_ROW, dtype=np.int64)
    open_N = np.flatnonzero(rows_N < ends_N)
    # One turn per content of the item that has most of them.
    while len(open_N):
        is_same_N = hashes_M[rows_N[open_N]] == hashes_N[open_N]
        found_N[open_N[is_same_N]] = rows_N[open_N[is_same_N]]
        rows_N[open_N] += 1
        open_N = open_N[~is_same_N]
        open_N = open_N[rows_N[open_N] < ends_N[open_N]]
    return found_N

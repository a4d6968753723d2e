"""The override table: codes that are served as stored, not as computed.

A code once published never moves, and a cap or a refresh may give an item another code than the
nearest. Such a code holds for one item with one content: an edit gets a fresh code. A codebook has
one table of RQ codes and one of VQ lists.

Shape letters in this file: N items, M overrides (or known items), C codes per item, W bytes of a
hash.
May import: NumPy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers.base import Arrays, Codes

NO_ROW = -1
"""In place of a row number: this item with this content is not listed."""

_ItemIds = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.bytes_]
_Stored = npt.NDArray[np.int64] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class Overrides:
    """Stored codes by (item id, content hash): int64, or int32 to hold the lists of a catalogue."""

    item_ids_M: npt.NDArray[np.int64]
    content_hashes_MW: npt.NDArray[np.uint8]
    codes_MC: _Stored

    def __len__(self) -> int:
        return len(self.item_ids_M)

    @classmethod
    def empty(cls, num_codes: int) -> "Overrides":
        """Return a table without rows for items of ``num_codes`` codes each."""
        return cls.from_rows(np.empty(0, np.int64), [], np.empty((0, num_codes), np.int64))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], codes_name: str) -> "Overrides":
        """Return the table that :meth:`arrays` gave under the same name."""
        return cls(arrays["item_ids"], arrays["content_hashes"], arrays[codes_name])

    @classmethod
    def from_rows(
        cls,
        item_ids_M: npt.NDArray[np.int64],
        content_hashes_M: Sequence[str] | _Hashes,
        codes_MC: _Stored,
    ) -> "Overrides":
        """Return a table, ordered by item id and content hash.

        Args:
            item_ids_M: Items.
            content_hashes_M: Hash of the content that the code belongs to, ASCII.
            codes_MC: The codes to serve.

        Returns:
            The table.

        Raises:
            CodebookError: If an (item id, content hash) comes twice, or lengths differ.
        """
        if not len(item_ids_M) == len(content_hashes_M) == len(codes_MC):
            raise CodebookError(
                f"{len(item_ids_M)} items came with {len(content_hashes_M)} content hashes and "
                f"{len(codes_MC)} codes"
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
            codes_MC=codes_MC[order_M],
        )

    def with_rows(
        self, item_ids_M: _ItemIds, content_hashes_M: Sequence[str], codes_MC: Codes
    ) -> "Overrides":
        """Return a table that holds these codes too, in place of others of the same content."""
        is_kept_M = np.ones(len(self), dtype=np.bool_)
        rows_M = self.rows_of(item_ids_M, content_hashes_M)
        is_kept_M[rows_M[rows_M != NO_ROW]] = False
        return Overrides.from_rows(
            np.concatenate([self.item_ids_M[is_kept_M], item_ids_M]),
            np.concatenate([self._hashes[is_kept_M], hash_array(content_hashes_M)]),
            np.concatenate([self.codes_MC[is_kept_M], codes_MC]),
        )

    def apply(
        self, item_ids_N: _ItemIds, content_hashes_N: Sequence[str], codes_NC: Codes
    ) -> Codes:
        """Return ``codes_NC`` with the stored codes in every row that has some."""
        rows_N = self.rows_of(item_ids_N, content_hashes_N)
        if (rows_N == NO_ROW).all():
            return codes_NC
        served_NC = codes_NC.copy()
        served_NC[rows_N != NO_ROW] = self.codes_MC[rows_N[rows_N != NO_ROW]]
        return served_NC

    def rows_of(
        self, item_ids_N: _ItemIds, content_hashes_N: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        """Return the row that holds each item with just that content, or ``NO_ROW``."""
        rows_N = np.full(len(item_ids_N), NO_ROW, dtype=np.int64)
        if len(self) == 0:
            return rows_N
        # By bisection, since the list may be as long as the catalogue; the hashes of those alone
        # that are listed are worth a look.
        places_N = np.searchsorted(self.item_ids_M, item_ids_N).clip(max=len(self) - 1)
        listed_N = np.flatnonzero(self.item_ids_M[places_N] == item_ids_N)
        hashes = [content_hashes_N[row] for row in listed_N.tolist()]
        rows_N[listed_N] = find_content(
            self.item_ids_M, self._hashes, item_ids_N[listed_N], hash_array(hashes)
        )
        return rows_N

    def arrays(self, codes_name: str) -> Arrays:
        """Return the three columns by name, the codes by the given one: what an artifact stores."""
        return {
            "item_ids": self.item_ids_M,
            "content_hashes": self.content_hashes_MW,
            codes_name: self.codes_MC,
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

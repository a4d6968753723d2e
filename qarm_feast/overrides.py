"""The override table: codes that are served as stored, not as computed.

A code once published never moves, and a cap or a refresh may give an item another code than the
nearest. Such a code holds for one item with one content: an edit gets a fresh code.

Shape letters in this file: N items, M overrides, L levels, W bytes of a content hash.
May import: NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qarm_feast.errors import CodebookError
from qarm_feast.quantizers.base import Arrays, Codes


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
        cls, item_ids_M: npt.NDArray[np.int64], content_hashes_M: Sequence[str], rq_ML: Codes
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
        keys = list(zip(item_ids_M.tolist(), content_hashes_M, strict=True))
        if len(set(keys)) != len(rq_ML):
            raise CodebookError(
                f"{len(set(keys))} distinct (item id, content hash) came with {len(rq_ML)} codes"
            )
        order = sorted(range(len(keys)), key=keys.__getitem__)
        hashes_M = np.array([content_hashes_M[row].encode("ascii") for row in order], dtype="S")
        width = hashes_M.dtype.itemsize
        return cls(
            item_ids_M=item_ids_M[order],
            content_hashes_MW=hashes_M.view(np.uint8).reshape(len(order), width),
            rq_ML=rq_ML[order],
        )

    def apply(
        self, item_ids_N: npt.NDArray[np.int64], content_hashes_N: Sequence[str], rq_NL: Codes
    ) -> Codes:
        """Return ``rq_NL`` with the stored code in every row that has one."""
        listed_N = np.flatnonzero(np.isin(item_ids_N, self.item_ids_M))
        if len(listed_N) == 0:
            return rq_NL
        served_NL = rq_NL.copy()
        for row in listed_N.tolist():
            stored = self._row_of.get((int(item_ids_N[row]), content_hashes_N[row]))
            if stored is not None:
                served_NL[row] = self.rq_ML[stored]
        return served_NL

    def arrays(self) -> Arrays:
        """Return the three columns by name: what an artifact stores."""
        return {
            "item_ids": self.item_ids_M,
            "content_hashes": self.content_hashes_MW,
            "rq_codes": self.rq_ML,
        }

    @cached_property
    def _row_of(self) -> dict[tuple[int, str], int]:
        width = self.content_hashes_MW.shape[1]
        hashes_M = np.ascontiguousarray(self.content_hashes_MW).view(f"S{width}")[:, 0]
        ids = self.item_ids_M.tolist()
        texts = [value.decode("ascii") for value in hashes_M.tolist()]
        return {key: row for row, key in enumerate(zip(ids, texts, strict=True))}

"""Memory-mapped snapshot: item id to codes, the time of the code row, and the vector.

Every rank maps the same files (:class:`~torchrec_models.row_store.SnapshotArrays` writes them),
so memory does not grow with ranks but for the index of ids, 8 to 16 bytes per item and rank, and
the cosines of a small catalogue, up to 64 MiB per kind of vectors.
Shape letters: I items, L levels, D vector width, H history items, N looked-up items.
May import: numpy, torch.
"""

import copy
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qarm_feast.errors import ConfigError
from qarm_feast.schema import ABSENT_CODE
from torchrec_models.batch import HistoryCodes
from torchrec_models.id_index import IdIndex
from torchrec_models.row_columns import Ints
from torchrec_models.row_store import vectors_file
from torchrec_models.vector_inputs import HeldVectors


class ItemSnapshot:
    """Codes and vectors of items as of a row's time; a code later than the row is masked.

    Args:
        directory: The snapshot's folder.
        vector_source: Which vectors :meth:`take` returns, see ``ranker.vector_source``.
    """

    def __init__(self, directory: str | Path, vector_source: str = "aligned") -> None:
        folder = Path(directory)
        self._folder = folder
        self._vector_source = vector_source
        self._index = IdIndex(_mapped(folder / "item_ids.npy"))
        self._event_times_I: Ints = _mapped(folder / "event_times.npy")
        self._rq_IL: npt.NDArray[np.int32] = _mapped(folder / "rq.npy")
        self._vectors_ID = _mapped_vectors(folder / vectors_file(vector_source))
        self._counting = threading.Lock()
        self.num_looked_up = 0
        self.num_masked_later = 0

    def with_source(self, vector_source: str) -> "ItemSnapshot":
        """Return the snapshot with these vectors: itself, or one over the same mapped files."""
        if vector_source == self._vector_source:
            return self
        other = copy.copy(self)
        other.__dict__.pop("held", None)
        other._vector_source = vector_source
        other._vectors_ID = _mapped_vectors(self._folder / vectors_file(vector_source))
        return other

    @property
    def masked_share(self) -> float:
        """Share of looked-up history items whose code row is later than the row's label."""
        return self.num_masked_later / max(self.num_looked_up, 1)

    def history_codes(self, item_ids_H: Ints, label_times_H: Ints) -> HistoryCodes:
        """Return the RQ codes of items, absent where unknown or later than the row's time."""
        positions_H, is_known_H, is_in_time_H = self._find(item_ids_H, label_times_H)
        # Several threads build batches, and `+=` is two steps.
        with self._counting:
            self.num_looked_up += len(item_ids_H)
            self.num_masked_later += int((is_known_H & ~is_in_time_H).sum())
        rq_HL = self._rq_IL[positions_H].astype(np.int64)
        present_H = is_known_H & is_in_time_H & (rq_HL[:, 0] != ABSENT_CODE)
        return HistoryCodes(rq_HL=rq_HL, present_H=present_H)

    def find(self, item_ids_N: Ints, label_times_N: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return the places of items, and which are known at given times.

        Args:
            item_ids_N: Items.
            label_times_N: Times of the rows that name them, microseconds.

        Returns:
            Places, 0 for an unknown item, and what is known.
        """
        positions_N, is_known_N, is_in_time_N = self._find(item_ids_N, label_times_N)
        return positions_N, is_known_N & is_in_time_N

    @cached_property
    def held(self) -> HeldVectors | None:
        """All vectors of a small catalogue; every process holds cosines of its own."""
        return None if self._vectors_ID is None else HeldVectors.of(self._vectors_ID)

    def take(self, places_U: Ints) -> torch.Tensor:
        """Return the vectors of places.

        Args:
            places_U: What :meth:`find` gave.

        Returns:
            ``[U, D]`` float32, zero where the item has no vector.

        Raises:
            ConfigError: If the snapshot was built without exported vectors.
        """
        if self._vectors_ID is None:
            raise ConfigError(
                f"{self._folder} holds no {self._vector_source} vectors, but ranker.features asks "
                "for them; run `qarm align export` (raw: with --raw), then `qarm-rank rows`"
            )
        return self._vectors_ID.index_select(0, torch.from_numpy(places_U))

    def _find(
        self, item_ids_N: Ints, label_times_N: Ints
    ) -> tuple[Ints, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        positions_N, is_known_N = self._index.find(item_ids_N)
        is_in_time_N = self._event_times_I[positions_N] <= label_times_N
        return positions_N, is_known_N, is_in_time_N


def _mapped_vectors(path: Path) -> torch.Tensor | None:
    if not path.exists():
        return None
    # A mapping opened copy-on-write is one that torch may wrap; nobody writes to it.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _mapped(path: Path) -> npt.NDArray[Any]:
    # The plain array over the mapping: the subclass makes every lookup slower.
    return np.asarray(np.load(path, mmap_mode="r"))

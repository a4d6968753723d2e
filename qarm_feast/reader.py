"""Codes, recent items and profiles of many entities at once, as arrays.

Shape letters in this file: N entities, B candidates, L levels, V pool neighbours, H history length.
May import: feast (through the feature store that it is given).
"""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qarm_feast import item_vectors, schema, view_tags
from qarm_feast.codebook import ItemCodes
from qarm_feast.errors import ConfigError, DataError
from qarm_feast.online_stores import code_online_store
from qarm_feast.online_stores.blobs import Ints
from qarm_feast.online_stores.codec import Bools, Column
from qarm_feast.online_stores.rows import ITEM_IDS, ITEM_TIMESTAMPS, ColumnBatch

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

    from qarm_feast.serving_log import ServingLog


@dataclass(frozen=True)
class ScoringInputs:
    """What scoring one user's candidates reads of codes and history.

    Attributes:
        candidates: Codes of the candidates, in the order asked for.
        has_codes_B: Which candidates have codes.
        history: Codes of the user's latest items, newest first; ``item_ids_N`` are the items.
        history_has_codes_H: Which of them have codes.
        history_times_H: When each was liked, microseconds since the epoch.
    """

    candidates: ItemCodes
    has_codes_B: Bools
    history: ItemCodes
    history_has_codes_H: Bools
    history_times_H: Ints


class CodeReader:
    """Reads one codebook version's view and the user views from the online store.

    Each method is one round trip, to redis for up to ten thousand entities, but for
    :meth:`read_scoring_inputs`, which is two. Views are looked up in the registry once, on first
    use. Threads may share a reader.

    Args:
        feature_store: The repository.
        codebook_version: Version of the codes.
        serving_log: Where codes that are read are logged by sampling; None: nowhere.
    """

    def __init__(
        self,
        feature_store: "FeatureStore",
        codebook_version: str,
        serving_log: "ServingLog | None" = None,
    ) -> None:
        self.codebook_version = codebook_version
        self._serving_log = serving_log
        self._config = feature_store.config
        self._feature_store = feature_store
        self._online_store = code_online_store(feature_store)
        self._views: dict[str, FeatureView] = {}

    def read_codes(self, item_ids_N: Ints) -> tuple[ItemCodes, Bools]:
        """Return the codes of items in the order asked for, and which of them have codes.

        Args:
            item_ids_N: int64, repeated as one likes.

        Returns:
            The codes and a mask. An item that is unknown or was taken down has ``ABSENT_CODE`` in
            every place and ``False`` in the mask.

        Raises:
            ConfigError: If the view was not applied.
            DataError: If the ids are not int64, or a stored row has a wrong number of codes.
            ServiceUnavailableError: If the store does not answer.
        """
        view = self._view(schema.code_view_name(self.codebook_version))
        batch, inverse_N = self._read_distinct(view, item_ids_N, ["vq_code", "rq_code"])
        width_V = int(view.tags.get(view_tags.NUM_NEIGHBORS, 0))
        width_L = int(view.tags.get(view_tags.NUM_LEVELS, 0))
        vq_NV = _to_matrix(view.name, batch.columns["vq_code"], batch.present_N, width_V)
        rq_NL = _to_matrix(view.name, batch.columns["rq_code"], batch.present_N, width_L)
        codes = ItemCodes(np.asarray(item_ids_N, np.int64), vq_NV[inverse_N], rq_NL[inverse_N])
        if self._serving_log is not None:
            self._serving_log.offer(self.codebook_version, codes)
        return codes, batch.present_N[inverse_N]

    def read_recent_items(self, user_ids_N: Ints, length: int) -> tuple[Ints, Ints, Ints]:
        """Return each user's latest positives, newest first.

        Args:
            user_ids_N: int64, repeated as one likes.
            length: Width H of the result; longer lists are cut to their newest items.

        Returns:
            Item ids ``[N, H]`` (unused places hold ``ABSENT_CODE``), their times ``[N, H]`` in
            microseconds since the epoch (unused: 0), and how many places each user fills.

        Raises:
            ConfigError: If the view was not applied.
            DataError: If the ids are not int64.
            ServiceUnavailableError: If the store does not answer.
        """
        view = self._view(schema.RECENT_ITEMS_VIEW)
        batch, inverse_N = self._read_distinct(view, user_ids_N, [ITEM_IDS, ITEM_TIMESTAMPS])
        item_ids_NH = _pad(batch.columns[ITEM_IDS], length, schema.ABSENT_CODE)
        timestamps_NH = _pad(batch.columns[ITEM_TIMESTAMPS], length, 0)
        lengths_N = np.minimum(batch.columns[ITEM_IDS].lengths_N, length)
        return item_ids_NH[inverse_N], timestamps_NH[inverse_N], lengths_N[inverse_N]

    def read_scoring_inputs(
        self, user_id: int, item_ids_B: Ints, history_length: int
    ) -> ScoringInputs:
        """Return the codes of candidates, one user's latest items, and those items' codes.

        The user's items are one round trip; the codes of candidates and items together the next.

        Args:
            user_id: The user; one without a history is served too.
            item_ids_B: Candidates, int64.
            history_length: Most items of the history.

        Returns:
            Codes and history.

        Raises:
            ConfigError: If a view was not applied.
            DataError: If the ids are no integers, or a stored row has a wrong number of codes.
            ServiceUnavailableError: If the store does not answer.
        """
        user = np.array([user_id], dtype=np.int64)
        recent_1H, times_1H, lengths = self.read_recent_items(user, history_length)
        recent_H, times_H = recent_1H[0, : lengths[0]], times_1H[0, : lengths[0]]
        # An empty array is float64 unless one says otherwise, and would make the items so.
        candidates_B = item_ids_B if len(item_ids_B) else np.empty(0, dtype=np.int64)
        codes, present_N = self.read_codes(np.concatenate([candidates_B, recent_H]))
        num_candidates = len(item_ids_B)
        return ScoringInputs(
            candidates=_part(codes, slice(num_candidates)),
            has_codes_B=present_N[:num_candidates],
            history=_part(codes, slice(num_candidates, None)),
            history_has_codes_H=present_N[num_candidates:],
            history_times_H=times_H,
        )

    def read_profiles(self, user_ids_N: Ints) -> ColumnBatch:
        """Return all features of ``user_profile``.

        Args:
            user_ids_N: int64, repeated as one likes.

        Returns:
            One entity per id, in the order asked for; unknown ones are absent.

        Raises:
            ConfigError: If the view was not applied.
            DataError: If the ids are not int64.
            ServiceUnavailableError: If the store does not answer.
        """
        view = self._view(schema.USER_PROFILE_VIEW)
        names = [field.name for field in view.features]
        return self._online_store.read_columns(self._config, view, user_ids_N, names)

    def code_view_tags(self) -> dict[str, str]:
        """Return what the view of this version says of its codebook, see ``view_tags``."""
        return dict(self._view(schema.code_view_name(self.codebook_version)).tags)

    def vector_view_tags(self) -> dict[str, str]:
        """Return what the view of the version's vectors says of its encoder, see ``view_tags``.

        Returns:
            Its tags.

        Raises:
            ConfigError: If the view was not applied, or the code view does not name its encoder.
        """
        return dict(self._view(schema.vector_view_name(self._encoder_version())).tags)

    def check_reachable(self) -> None:
        """Read one item, there or not, past the serving log.

        Raises:
            ConfigError: If the view was not applied.
            ServiceUnavailableError: If the store does not answer.
        """
        view = self._view(schema.code_view_name(self.codebook_version))
        nobody_N = np.zeros(1, dtype=np.int64)
        self._online_store.read_columns(self._config, view, nobody_N, ["rq_code"])

    def read_vectors(self, item_ids_N: Ints) -> tuple[npt.NDArray[np.float32], Bools]:
        """Return the aligned vectors of items, of the encoder that this version's codes come from.

        Args:
            item_ids_N: int64, repeated as one likes.

        Returns:
            Float32 ``[N, D]``, rounded to float16 when they were written, zero where there is
            none; and which items have one.

        Raises:
            ConfigError: If the view was not applied, or the code view does not name its encoder.
            DataError: If the ids are not int64, or a stored vector has a wrong size.
            ServiceUnavailableError: If the store does not answer.
        """
        view = self._view(schema.vector_view_name(self._encoder_version()))
        batch, inverse_N = self._read_distinct(view, item_ids_N, [item_vectors.EMBEDDING])
        width = int(view.tags.get(view_tags.EMBEDDING_DIM, 0))
        stored = batch.columns[item_vectors.EMBEDDING]
        distinct_ND = np.zeros((len(batch.present_N), width), dtype=np.float32)
        distinct_ND[batch.present_N] = item_vectors.decode_vectors(
            stored.values.tolist(), width, f"view {view.name}"
        )
        return distinct_ND[inverse_N], batch.present_N[inverse_N]

    async def read_codes_async(self, item_ids_N: Ints) -> tuple[ItemCodes, Bools]:
        """Do what :meth:`read_codes` does off the event loop; calls may run side by side."""
        return await asyncio.to_thread(self.read_codes, item_ids_N)

    async def read_recent_items_async(
        self, user_ids_N: Ints, length: int
    ) -> tuple[Ints, Ints, Ints]:
        """Do what :meth:`read_recent_items` does off the event loop."""
        return await asyncio.to_thread(self.read_recent_items, user_ids_N, length)

    async def read_scoring_inputs_async(
        self, user_id: int, item_ids_B: Ints, history_length: int
    ) -> ScoringInputs:
        """Do what :meth:`read_scoring_inputs` does off the event loop."""
        return await asyncio.to_thread(
            self.read_scoring_inputs, user_id, item_ids_B, history_length
        )

    async def read_profiles_async(self, user_ids_N: Ints) -> ColumnBatch:
        """Do what :meth:`read_profiles` does off the event loop."""
        return await asyncio.to_thread(self.read_profiles, user_ids_N)

    def _encoder_version(self) -> str:
        name = schema.code_view_name(self.codebook_version)
        version: str = self._view(name).tags.get(view_tags.ENCODER_VERSION, "")
        if not version:
            raise ConfigError(
                f"view {name} does not say which encoder its codes come from, so their vectors "
                "cannot be found; declare it by item_code_view(version, CodebookFacts(...)) and "
                "run `feast apply`"
            )
        return version

    def _view(self, name: str) -> "FeatureView":
        if name not in self._views:
            self._views[name] = self._look_up(name)
        return self._views[name]

    def _look_up(self, name: str) -> "FeatureView":
        from feast.errors import FeatureViewNotFoundException

        try:
            return self._feature_store.get_feature_view(name)
        except FeatureViewNotFoundException as error:
            raise ConfigError(
                f"the feature repository has no view {name!r}; publish its codebook if it is one "
                f"of codes, then run `feast -c {self._feature_store.repo_path} apply`"
            ) from error

    def _read_distinct(
        self, view: "FeatureView", ids_N: Ints, feature_names: list[str]
    ) -> tuple[ColumnBatch, npt.NDArray[np.intp]]:
        """Fetch each id once; the second array leads back to the order asked for."""
        distinct, inverse_N = np.unique(np.asarray(ids_N), return_inverse=True)
        batch = self._online_store.read_columns(self._config, view, distinct, feature_names)
        return batch, inverse_N


def _part(codes: ItemCodes, places: slice) -> ItemCodes:
    return ItemCodes(codes.item_ids_N[places], codes.vq_NV[places], codes.rq_NL[places])


def _to_matrix(view_name: str, column: Column, present_N: Bools, width: int) -> Ints:
    """Return rows of ``width`` codes; a width of 0 is taken from the first present row."""
    lengths_P = column.lengths_N[present_N]
    width = width or (int(lengths_P[0]) if len(lengths_P) else 0)
    if (lengths_P != width).any():
        wrong = int(lengths_P[lengths_P != width][0])
        raise DataError(
            f"view {view_name} holds a row of {wrong} codes, its codebook has {width}: another "
            "version's rows were written into it; write the version's codes again"
        )
    matrix = np.full((len(present_N), width), schema.ABSENT_CODE, dtype=np.int64)
    matrix[present_N] = column.values.reshape(-1, width) if width else 0
    return matrix


def _pad(column: Column, width: int, fill: int) -> Ints:
    starts_N = np.cumsum(column.lengths_N) - column.lengths_N
    kept_N = np.minimum(column.lengths_N, width)
    rows_M = np.repeat(np.arange(len(kept_N)), kept_N)
    places_M = np.arange(len(rows_M)) - np.repeat(np.cumsum(kept_N) - kept_N, kept_N)
    matrix = np.full((len(kept_N), width), fill, dtype=np.int64)
    matrix[rows_M, places_M] = column.values[starts_N[rows_M] + places_M]
    return matrix

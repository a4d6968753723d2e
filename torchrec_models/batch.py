"""From columns of rows to a :class:`RankingBatch`: the one feature builder of training and serving.

Both doors fill a :class:`RowColumns` (training from parquet, serving from the online store) and
call :class:`BatchBuilder`, so that a feature cannot mean two things.
Shape letters: B rows of a batch, H history items of all rows together, L levels,
K neighbours, D aligned embedding width, W dense width, T tasks.
May import: numpy, pyarrow, torch, torchrec; does no I/O.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from qarm_feast.cross_features import cross_features
from qarm_feast.schema import ABSENT_CODE
from torchrec_models.config import FeatureName, RankerConfig
from torchrec_models.pair_counts import ITEM_PAIRS, prefix_things
from torchrec_models.row_columns import Ints, RowColumns
from torchrec_models.sequence_inputs import (
    PickedItems,
    bag_features,
    most_similar_places,
    picked_lengths,
    sequence_features,
    shared_history,
)
from torchrec_models.side_tables import SideTables
from torchrec_models.tables import (
    HISTORY_ITEM_FEATURE,
    HISTORY_PREFIX_FEATURE,
    HISTORY_SEQUENCE,
    ITEM_ID_FEATURE,
    PREFIX_FEATURE,
    SEARCHED_SEQUENCE,
    USER_ID_FEATURE,
    VQ_FEATURE,
    history_rq_feature,
    item_column_feature,
    rq_feature,
    user_column_feature,
)
from torchrec_models.vector_inputs import (
    NamedVectors,
    VectorLookup,
    cosine_features,
    searched_cosines,
    vector_features,
)
from torchrec_models.vocabulary import DEFAULT_ROW, Vocabularies

_READS_HISTORY_CODES: tuple[FeatureName, ...] = (
    "history_rq_code",
    "cross",
    "attention",
    "shared_history",
    "code_cf",
    "history_prefix",
)


@dataclass
class RankingBatch(Pipelineable):
    """One step's input of one rank; moves between devices as a whole."""

    sparse_features: KeyedJaggedTensor
    dense_features: torch.Tensor
    labels: torch.Tensor
    user_ids: torch.Tensor
    item_rows: torch.Tensor
    """Vocabulary row of each row's item, without ID dropout: what metrics are sliced by."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "RankingBatch":
        """Return the batch on a device."""
        return RankingBatch(
            **{
                part.name: getattr(self, part.name).to(device=device, non_blocking=non_blocking)
                for part in fields(self)
            }
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until the stream has used it."""
        for part in fields(self):
            getattr(self, part.name).record_stream(stream)

    def pin_memory(self) -> "RankingBatch":
        """Return the batch in page-locked memory, from where a GPU copies without waiting."""
        return RankingBatch(
            **{part.name: getattr(self, part.name).pin_memory() for part in fields(self)}
        )


@dataclass(frozen=True)
class HistoryCodes:
    """RQ codes of history items; ``present_H`` is false where there is none to use."""

    rq_HL: Ints
    present_H: npt.NDArray[np.bool_]

    def masked(self) -> Ints:
        """Return ``rq_HL`` with ``ABSENT_CODE`` where there is none to use."""
        return np.where(self.present_H[:, None], self.rq_HL, ABSENT_CODE)


class CodeLookup(Protocol):
    """Codes of history items: the snapshot in training, the online store in serving."""

    def history_codes(self, item_ids_H: Ints, label_times_H: Ints) -> HistoryCodes:
        """Return the codes of items as known at the time of the row that lists them."""
        ...


class _VectorFeatures(Protocol):
    """What is read of candidates' and histories' vectors."""

    def __call__(
        self, targets: NamedVectors, history: NamedVectors, lengths_B: Ints, *, is_one_history: bool
    ) -> list[torch.Tensor]: ...


class _HiddenIds(NamedTuple):
    """Rows whose user, and whose item, ID dropout makes read as unseen."""

    users_B: npt.NDArray[np.bool_]
    items_B: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BatchBuilder:
    """Turns :class:`RowColumns` into a :class:`RankingBatch`."""

    config: RankerConfig
    vocabularies: Vocabularies
    feature_names: tuple[str, ...]
    code_lookup: CodeLookup
    vector_lookup: VectorLookup | None = None
    """Vectors of ``ranker.vector_source``."""
    aligned_lookup: VectorLookup | None = None
    """Vectors of the group ``aligned_cosine``."""
    side_tables: SideTables | None = None
    label_names: tuple[str, ...] = ()
    """Labels of the tasks, whose counts the group ``popularity`` reads."""
    level_sizes: tuple[int, ...] = ()
    """Sizes of the RQ levels; sequences are built with them."""

    def build(
        self, rows: RowColumns, dropout_rng: np.random.Generator | None = None
    ) -> RankingBatch:
        """Return the batch of these rows.

        Args:
            rows: Columns of B rows.
            dropout_rng: Source of ID and code dropout; given for train rows only.

        Returns:
            A batch whose sparse features stand in the order of ``feature_names``.
        """
        if dropout_rng is not None and self.config.code_dropout:
            rows = rows.without_some_codes(self.config.code_dropout, dropout_rng)
        searched = self._searched(rows)
        rows = rows.with_latest_history(self.config.history_length)
        history = self._history_codes(rows)
        hidden = self._hidden(len(rows.user_ids_B), dropout_rng)
        features = self._sparse_features(rows, hidden) | self._code_features(rows, history)
        features |= self._prefix_features(rows, history)
        if picked := self._picked(rows, history, searched):
            features |= sequence_features(picked, rows.rq_BL, self.level_sizes)
            features |= bag_features(picked, self.vocabularies.item_ids)
        ordered = [features[name] for name in self.feature_names]
        item_rows_B = self.vocabularies.item_ids.rows(rows.item_ids_B)
        return RankingBatch(
            sparse_features=KeyedJaggedTensor(
                keys=list(self.feature_names),
                values=torch.from_numpy(np.concatenate([values for values, _ in ordered])),
                lengths=torch.from_numpy(
                    np.concatenate([lengths_B for _, lengths_B in ordered]).astype(np.int32)
                ),
                # Known here, and costly to find again: the keys' shares of the values.
                length_per_key=[len(values) for values, _ in ordered],
            ),
            dense_features=self._dense_features(rows, history, hidden),
            labels=torch.from_numpy(rows.labels_BT),
            user_ids=torch.from_numpy(rows.user_ids_B),
            item_rows=torch.from_numpy(item_rows_B),
        )

    def _hidden(self, num_rows: int, rng: np.random.Generator | None) -> _HiddenIds:
        """Draw the users and the items that read as unseen."""
        if rng is None:
            return _HiddenIds(*np.zeros((2, num_rows), dtype=np.bool_))
        return _HiddenIds(*(rng.random((2, num_rows)) < self.config.id_dropout))

    def _sparse_features(
        self, rows: RowColumns, hidden: _HiddenIds
    ) -> dict[str, tuple[Ints, Ints]]:
        config, vocabularies = self.config, self.vocabularies
        features: dict[str, tuple[Ints, Ints]] = {}
        if config.has("user_id"):
            user_rows_B = vocabularies.user_ids.rows(rows.user_ids_B)
            features[USER_ID_FEATURE] = _one_each(
                np.where(hidden.users_B, DEFAULT_ROW, user_rows_B)
            )
        if config.has("item_id"):
            item_rows_B = vocabularies.item_ids.rows(rows.item_ids_B)
            features[ITEM_ID_FEATURE] = _one_each(
                np.where(hidden.items_B, DEFAULT_ROW, item_rows_B)
            )
        if config.has("history_item_id"):
            item_ids_H, _, num_repeats = rows.one_history()
            history_rows_H = np.tile(vocabularies.item_ids.rows(item_ids_H), num_repeats)
            features[HISTORY_ITEM_FEATURE] = (history_rows_H, rows.history_lengths_B)
        if config.has("user_columns"):
            for name, vocabulary in vocabularies.user_columns.items():
                column_rows_B = vocabulary.rows(rows.user_columns[name])
                features[user_column_feature(name)] = _one_each(column_rows_B)
        if config.has("item_columns"):
            assert self.side_tables is not None
            columns = self.side_tables.item_columns
            for name in vocabularies.item_columns:
                column_rows_B = columns.rows(name, rows.item_ids_B)
                features[item_column_feature(name)] = _one_each(column_rows_B)
        return features

    def _history_codes(self, rows: RowColumns) -> HistoryCodes | None:
        """Look the history's codes up once, whatever reads them; None if nothing does."""
        if not any(self.config.has(name) for name in _READS_HISTORY_CODES):
            return None
        item_ids_H, label_times_H, num_repeats = rows.one_history()
        found = self.code_lookup.history_codes(item_ids_H, label_times_H)
        if num_repeats == 1:
            return found
        return HistoryCodes(
            np.tile(found.rq_HL, (num_repeats, 1)), np.tile(found.present_H, num_repeats)
        )

    def _code_features(
        self, rows: RowColumns, history: HistoryCodes | None
    ) -> dict[str, tuple[Ints, Ints]]:
        features: dict[str, tuple[Ints, Ints]] = {}
        if self.config.has("rq_code"):
            for level, codes_B in enumerate(rows.rq_BL.T):
                features[rq_feature(level)] = _without_absent(codes_B[:, None])
        if self.config.has("vq_code"):
            features[VQ_FEATURE] = _without_absent(rows.vq_BK)
        if self.config.has("history_rq_code"):
            assert history is not None
            lengths_B = _segment_sums(history.present_H.astype(np.int64), rows.history_lengths_B)
            present_HL = history.rq_HL[history.present_H]
            for level in range(rows.rq_BL.shape[1]):
                codes_H = np.ascontiguousarray(present_HL[:, level])
                features[history_rq_feature(level)] = (codes_H, lengths_B)
        return features

    def _prefix_features(
        self, rows: RowColumns, history: HistoryCodes | None
    ) -> dict[str, tuple[Ints, Ints]]:
        features: dict[str, tuple[Ints, Ints]] = {}
        prefixes = self.vocabularies.prefixes
        if self.config.has("prefix"):
            assert prefixes is not None
            features[PREFIX_FEATURE] = _without_absent(prefixes.rows(rows.rq_BL))
        if self.config.has("history_prefix"):
            assert prefixes is not None
            assert history is not None
            values, num_prefixes_H = _without_absent(prefixes.rows(history.masked()))
            lengths_B = _segment_sums(num_prefixes_H, rows.history_lengths_B)
            features[HISTORY_PREFIX_FEATURE] = (values, lengths_B)
        return features

    def _picked(
        self, rows: RowColumns, history: HistoryCodes | None, searched: PickedItems | None
    ) -> dict[str, PickedItems]:
        """Return the sequences over which the target attends."""
        picked: dict[str, PickedItems] = {}
        if self.config.has("attention") or self.config.has("shared_history"):
            assert history is not None
            items = PickedItems(rows.history_item_ids_H, history.masked(), rows.history_lengths_B)
            if self.config.has("attention"):
                picked[HISTORY_SEQUENCE] = items
            if self.config.has("shared_history"):
                picked |= shared_history(rows.rq_BL, items)
        if searched is not None:
            picked[SEARCHED_SEQUENCE] = searched
        return picked

    def _searched(self, rows: RowColumns) -> PickedItems | None:
        """Return the items of the long history that are most like the target by their vectors."""
        if not self.config.has("long_history"):
            return None
        rows = rows.with_latest_history(self.config.long_history_length)
        assert self.vector_lookup is not None
        lengths_B = rows.history_lengths_B
        similarities_H = searched_cosines(
            self.vector_lookup,
            rows.item_ids_B,
            rows.label_times_B,
            rows.history_item_ids_H,
            lengths_B,
        )
        places_S = most_similar_places(similarities_H, lengths_B, self.config.num_searched)
        label_times_H = np.repeat(rows.label_times_B, lengths_B)
        item_ids_S = rows.history_item_ids_H[places_S]
        codes = self.code_lookup.history_codes(item_ids_S, label_times_H[places_S])
        return PickedItems(item_ids_S, codes.masked(), picked_lengths(places_S, lengths_B))

    def _dense_features(
        self, rows: RowColumns, history: HistoryCodes | None, hidden: _HiddenIds
    ) -> torch.Tensor:
        parts = [torch.zeros(len(rows.user_ids_B), 0)]
        if self.config.has("vector"):
            assert self.vector_lookup is not None
            parts += _vector_inputs(self.vector_lookup, rows, vector_features)
        if self.config.has("aligned_cosine"):
            assert self.aligned_lookup is not None
            parts += _vector_inputs(self.aligned_lookup, rows, cosine_features)
        if self.config.has("cross"):
            assert history is not None
            found = cross_features(rows.rq_BL, history.masked(), rows.history_lengths_B)
            parts.append(torch.from_numpy(found.dense_inputs()))
        if self.config.has("popularity"):
            assert self.side_tables is not None
            counts_BW = self.side_tables.popularity.features(
                rows.item_ids_B,
                rows.label_times_B,
                rows.is_train_B,
                self.label_names,
                hidden.items_B,
            )
            parts.append(torch.from_numpy(counts_BW))
        if self.config.has("item_cf"):
            items = {ITEM_PAIRS: rows.item_ids_B}
            parts += self._pair_inputs(rows, items, {ITEM_PAIRS: rows.history_item_ids_H})
        if self.config.has("code_cf"):
            assert history is not None
            codes, history_codes = prefix_things(rows.rq_BL), prefix_things(history.masked())
            parts += self._pair_inputs(rows, codes, history_codes)
        return torch.cat(parts, dim=1)

    def _pair_inputs(
        self, rows: RowColumns, things: Mapping[str, Ints], history_things: Mapping[str, Ints]
    ) -> list[torch.Tensor]:
        """Return the log-lifts of the candidates' things with those of the histories."""
        assert self.side_tables is not None
        return [
            torch.from_numpy(
                self.side_tables.pair_counts(name).features(
                    rows.user_ids_B,
                    things_B,
                    history_things[name],
                    rows.history_lengths_B,
                    rows.is_train_B,
                )
            )
            for name, things_B in things.items()
        ]


def _vector_inputs(
    lookup: VectorLookup, rows: RowColumns, features: _VectorFeatures
) -> list[torch.Tensor]:
    """Return what a function of candidates' and histories' vectors makes of a lookup's."""
    item_ids_H, label_times_H, _ = rows.one_history()
    return features(
        NamedVectors.of(lookup, rows.item_ids_B, rows.label_times_B),
        NamedVectors.of(lookup, item_ids_H, label_times_H),
        rows.history_lengths_B,
        is_one_history=rows.has_one_history,
    )


def _one_each(rows_B: Ints) -> tuple[Ints, Ints]:
    return rows_B, np.ones(len(rows_B), dtype=np.int64)


def _without_absent(codes_BK: Ints) -> tuple[Ints, Ints]:
    present_BK = codes_BK != ABSENT_CODE
    return codes_BK[present_BK], present_BK.sum(axis=1)


def _segment_sums(values_H: Ints, lengths_B: Ints) -> Ints:
    cumulative = np.concatenate([[0], np.cumsum(values_H)])
    ends_B = np.cumsum(lengths_B)
    sums_B: Ints = cumulative[ends_B] - cumulative[ends_B - lengths_B]
    return sums_B

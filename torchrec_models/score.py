"""Scores of candidates for one user, everything read from the online store.

The features come out of the same :class:`~torchrec_models.batch.BatchBuilder` as in training.
Shape letters: B candidates, H history items of all rows, K neighbours, L levels, T tasks.
May import: numpy, pyarrow, torch, torchrec, feast through the code reader.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from qarm_feast.errors import ConfigError
from qarm_feast.online_stores.rows import ColumnBatch
from qarm_feast.reader import CodeReader, ScoringInputs
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.serving_log import open_serving_log
from torchrec_models.batch import BatchBuilder, HistoryCodes, RankingBatch
from torchrec_models.checkpoint import Checkpoint, CheckpointManifest
from torchrec_models.config import FeatureName, RankerConfig
from torchrec_models.dependency import silence_tracing_notice
from torchrec_models.export import Export
from torchrec_models.inputs import resolve_codebook_version
from torchrec_models.leaks import to_microseconds
from torchrec_models.options import TrainedName
from torchrec_models.ranker import ranker_logits
from torchrec_models.row_columns import Floats, Ints, RowColumns
from torchrec_models.side_tables import SideTables
from torchrec_models.tables import ranker_tables, sparse_feature_names
from torchrec_models.vocabulary import Vocabularies


class TrainedRanker(Protocol):
    """A ranker and what it was trained from: a checkpoint, or an export of one."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        ...

    @property
    def manifest(self) -> CheckpointManifest:
        """Service, codebook version, config, tasks and sizes."""
        ...

    def vocabularies(self) -> Vocabularies:
        """Return the vocabularies whose rows the tables hold."""
        ...

    def side_tables(self) -> SideTables:
        """Return item columns and counts as of the rows that it was trained on."""
        ...

    def load_ranker(self) -> nn.Module:
        """Return the ranker, ready to score."""
        ...


SOURCED_VECTORS: tuple[FeatureName, ...] = ("vector", "long_history")
"""Groups that read vectors of ``ranker.vector_source``, of which one is served."""
READS_VECTORS: tuple[FeatureName, ...] = (*SOURCED_VECTORS, "aligned_cosine")
"""Groups for which a request reads `item_vectors_<encoder_version>`."""


class OnlineReader(Protocol):
    """What scoring reads; :class:`qarm_feast.reader.CodeReader` is one."""

    def read_scoring_inputs(
        self, user_id: int, item_ids_B: Ints, history_length: int
    ) -> ScoringInputs:
        """Return the codes of candidates, the user's latest items, and those items' codes."""
        ...

    def read_vectors(self, item_ids_N: Ints) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return the aligned vectors, and which items have one."""
        ...

    def read_profiles(self, user_ids_N: Ints) -> ColumnBatch:
        """Return the user columns."""
        ...


@dataclass(frozen=True)
class ReadHistory:
    """Codes of the history items of one request, which were read with the candidates' codes.

    The online store only holds what is known now, so that no code is later than the request.
    """

    inputs: ScoringInputs

    def history_codes(self, item_ids_H: Ints, label_times_H: Ints) -> HistoryCodes:
        """Return the RQ codes of items of the history, absent where the store has none."""
        read = self.inputs.history
        distinct, firsts = np.unique(read.item_ids_N, return_index=True)
        places_H = firsts[np.searchsorted(distinct, item_ids_H)]
        return HistoryCodes(read.rq_NL[places_H], self.inputs.history_has_codes_H[places_H])


@dataclass(frozen=True)
class ReadVectors:
    """Aligned vectors of one request's candidates and history, read in one round trip."""

    item_ids_N: Ints
    """Ascending, each once."""
    vectors_ND: torch.Tensor
    held: ClassVar[None] = None
    """Nothing: a request reads the vectors that it names, and each pair's cosine once."""

    @staticmethod
    def of(reader: OnlineReader, inputs: ScoringInputs) -> "ReadVectors":
        """Read the vectors of all items of a request."""
        item_ids = [inputs.candidates.item_ids_N, inputs.history.item_ids_N]
        distinct = np.unique(np.concatenate(item_ids))
        vectors_ND, _ = reader.read_vectors(distinct)
        return ReadVectors(distinct, torch.from_numpy(vectors_ND))

    def find(self, item_ids_N: Ints, label_times_N: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return the places of items of the request; the store gives zeros where it has none."""
        places_N = np.searchsorted(self.item_ids_N, item_ids_N)
        return places_N, np.ones(len(places_N), dtype=np.bool_)

    def take(self, places_U: Ints) -> torch.Tensor:
        """Return the vectors of places."""
        return self.vectors_ND.index_select(0, torch.from_numpy(places_U))


@dataclass(frozen=True)
class Ranking:
    """What one request gave.

    Attributes:
        scores: Task name to the probability of each candidate, float32, in the order asked for.
        has_codes_B: Which candidates have codes; the others were scored by what else is known.
        history_length: Items of the user's history that were read.
    """

    scores: Mapping[str, Floats]
    has_codes_B: npt.NDArray[np.bool_]
    history_length: int


class OnlineScorer:
    """A trained ranker over the online store, in one process.

    Args:
        trained: Checkpoint or export of the feature service that the reader serves.
        reader: Codes, recent items, vectors and profiles.

    Raises:
        ConfigError: If the ranker was trained on raw vectors, which are not served.
    """

    def __init__(self, trained: TrainedRanker, reader: OnlineReader) -> None:
        manifest = trained.manifest
        self._config = manifest.config
        self._reads_vectors = any(self._config.has(name) for name in READS_VECTORS)
        is_sourced = any(self._config.has(name) for name in SOURCED_VECTORS)
        if is_sourced and self._config.vector_source != "aligned":
            raise ConfigError(
                f"{trained.folder} was trained with ranker.vector_source "
                f"{self._config.vector_source!r}, whose vectors are in no online view; train with "
                "`aligned` to score online"
            )
        self._reader = reader
        self._sizes = manifest.sizes
        self._vocabularies = trained.vocabularies()
        self._side_tables = trained.side_tables()
        tables = ranker_tables(manifest.sizes, self._vocabularies, self._config)
        self._feature_names = sparse_feature_names(tables)
        self._ranker = trained.load_ranker()
        self._label_names = tuple(task.label_name for task in manifest.tasks)
        self.task_names = tuple(task.name for task in manifest.tasks)

    def batch(self, user_id: int, item_ids_B: Ints, now: datetime) -> RankingBatch:
        """Return the features of one row per candidate, read from the online store.

        Args:
            user_id: The user; one without profile and history is served too.
            item_ids_B: Candidates.
            now: Time of the request, aware.

        Returns:
            A batch without labels.
        """
        return self._build(user_id, self._read(user_id, item_ids_B), now)

    def score(self, user_id: int, item_ids: Sequence[int], now: datetime) -> Mapping[str, Floats]:
        """Return per task the probability of each candidate, in the order given.

        Args:
            user_id: The user.
            item_ids: Candidates; there may be none.
            now: Time of the request, aware.

        Returns:
            Task name to float32 probabilities.
        """
        if not len(item_ids):
            # TorchRec pools no batch without rows.
            return {name: np.empty(0, dtype=np.float32) for name in self.task_names}
        return self.rank(user_id, np.asarray(item_ids, dtype=np.int64), now).scores

    def rank(self, user_id: int, item_ids_B: Ints, now: datetime) -> Ranking:
        """Return the scores of one candidate or more, and what was known of them.

        Args:
            user_id: The user.
            item_ids_B: Candidates, at least one.
            now: Time of the request, aware.

        Returns:
            The scores.
        """
        inputs = self._read(user_id, item_ids_B)
        batch = self._build(user_id, inputs, now)
        with torch.inference_mode():
            scores_BT = torch.sigmoid(ranker_logits(self._ranker, batch)).numpy()
        return Ranking(
            scores={name: scores_BT[:, task] for task, name in enumerate(self.task_names)},
            has_codes_B=inputs.has_codes_B,
            history_length=len(inputs.history.item_ids_N),
        )

    def _read(self, user_id: int, item_ids_B: Ints) -> ScoringInputs:
        return self._reader.read_scoring_inputs(
            user_id, item_ids_B, self._config.read_history_length()
        )

    def _build(self, user_id: int, inputs: ScoringInputs, now: datetime) -> RankingBatch:
        vectors = ReadVectors.of(self._reader, inputs) if self._reads_vectors else None
        builder = BatchBuilder(
            config=self._config,
            vocabularies=self._vocabularies,
            feature_names=self._feature_names,
            code_lookup=ReadHistory(inputs),
            side_tables=self._side_tables,
            label_names=self._label_names,
            level_sizes=self._sizes.level_sizes,
            vector_lookup=vectors,
            aligned_lookup=vectors,
        )
        return builder.build(self._rows(user_id, inputs, now))

    def _rows(self, user_id: int, inputs: ScoringInputs, now: datetime) -> RowColumns:
        user = np.array([user_id], dtype=np.int64)
        item_ids_B, history = inputs.candidates.item_ids_N, inputs.history.item_ids_N
        num_rows = len(item_ids_B)
        return RowColumns(
            user_ids_B=np.repeat(user, num_rows),
            item_ids_B=item_ids_B,
            label_times_B=np.full(num_rows, to_microseconds(now)),
            rq_BL=inputs.candidates.rq_NL,
            vq_BK=inputs.candidates.vq_NV,
            history_item_ids_H=np.tile(history, num_rows),
            history_lengths_B=np.full(num_rows, len(history)),
            has_one_history=True,
            labels_BT=np.zeros((num_rows, len(self.task_names)), dtype=np.float32),
            is_train_B=np.zeros(num_rows, dtype=np.bool_),
            user_columns=self._user_columns(user, num_rows),
        )

    def _user_columns(self, user: Ints, num_rows: int) -> dict[str, pa.Array]:
        names = self._vocabularies.user_columns
        if not names or not self._config.has("user_columns"):
            return {}
        profile = self._reader.read_profiles(user)
        columns = {}
        for name in names:
            values = pa.array(profile.columns[name].values)
            place = pa.array(
                np.zeros(num_rows, dtype=np.int64), mask=np.full(num_rows, not len(values))
            )
            columns[name] = values.take(place)
        return columns


def open_trained(config: RankerConfig, service: str, wanted: TrainedName) -> TrainedRanker:
    """Return the checkpoint or export of a service that was asked for.

    Args:
        config: The ranker section: folders of checkpoints and exports.
        service: Feature service that it must belong to.
        wanted: Which one.

    Returns:
        Either, checked.

    Raises:
        DataError: If there is none.
        CodebookMismatchError: If it belongs to another service.
        CorruptArtifactError: If a file of an export is not the one that was written.
    """
    if wanted.is_export:
        return Export(config.export_dir, service, wanted.name)
    return Checkpoint(config.checkpoint_dir, service, wanted.name)


@contextmanager
def open_scorer(
    config_path: str, config: RankerConfig, trained_name: TrainedName | None = None
) -> Iterator[OnlineScorer]:
    """Give a scorer over the repository's online store and a trained ranker.

    At the end of the block what section ``serving_log`` had sampled is written.

    Args:
        config_path: Path of ``qarm.yaml``, beside ``feature_store.yaml``.
        config: The ranker section: service name, folders of checkpoints and exports.
        trained_name: Checkpoint or export; None: the newest checkpoint.

    Yields:
        The scorer, its weights loaded.
    """
    silence_tracing_notice()
    version = resolve_codebook_version(config_path, config.codebook_version)
    service = config.service_name(version)
    trained = open_trained(config, service, trained_name or TrainedName())
    store = open_feature_store(Path(config_path).resolve().parent)
    with open_serving_log(config_path, store.config) as serving_log:
        yield OnlineScorer(trained, CodeReader(store, version, serving_log))

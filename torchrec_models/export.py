"""``qarm-rank export``: a checkpoint as int8 tables with their manifest, ready to score with.

An export folder appears whole or not at all:

    1. ``model.pt2``, ``vocabularies.json``, ``side_tables`` and ``manifest.json``, which holds the
       SHA-256 of the others, are written into a temporary folder beside it and flushed to disk;
    2. the folder is renamed to ``<dir>/<service>/<name>``, a name that is not taken;
    3. ``<dir>/<service>/LATEST``, which names the newest one, is replaced.

The model is a program, graph and weights together, see :mod:`torchrec_models.program`; no file is
a pickle. The error in the manifest is that of the program as it is read back.
Shape letters: B rows, T tasks.
May import: torch, torchrec.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from qarm_feast.artifact import MANIFEST_NAME, read_verified, sha256
from qarm_feast.errors import CodebookMismatchError, DataError
from torchrec_models.batch import BatchBuilder, RankingBatch
from torchrec_models.checkpoint import Checkpoint, CheckpointManifest
from torchrec_models.config import RankerConfig
from torchrec_models.dataset import RowDataset
from torchrec_models.dependency import silence_tracing_notice
from torchrec_models.inputs import resolve_codebook_version
from torchrec_models.metrics import auc, defined_metrics
from torchrec_models.program import load_program, save_program
from torchrec_models.quantized import quantize_tables
from torchrec_models.ranker import ranker_logits
from torchrec_models.row_store import (
    RowStore,
    parse_manifest,
    publishing,
    sync_folder,
    write_atomically,
)
from torchrec_models.sharding import Ranks
from torchrec_models.side_tables import SIDE_TABLES, SideTables
from torchrec_models.snapshot import ItemSnapshot
from torchrec_models.tables import dense_width, ranker_tables, sparse_feature_names
from torchrec_models.towers import TaskLabels
from torchrec_models.vocabulary import Vocabularies

logger = logging.getLogger(__name__)

Scores = npt.NDArray[np.float64]

_MODEL_FILE = "model.pt2"
_VOCABULARIES_FILE = "vocabularies.json"
_ERROR_SPLIT = "valid"
_POINTER = "LATEST"
_REMEDY = "run `qarm-rank export` again"


class QuantizationError(BaseModel):
    """How far the export's scores lie from the checkpoint's, over the same rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str = Field(description="Split of the rows.")
    num_rows: int
    max_score_difference: float = Field(description="Largest difference of any task's score.")
    mean_score_difference: float = Field(description="Mean absolute difference of the scores.")
    auc_difference: dict[str, float] = Field(
        description="Export minus checkpoint, by task, over the rows that it is judged by."
    )


class ExportManifest(BaseModel):
    """What an export is, and the hashes of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint_name: str = Field(description="Folder of the checkpoint below its service.")
    checkpoint: CheckpointManifest = Field(
        description="Its manifest: service, codebook version, step, config, tasks, sizes."
    )
    torch_version: str = Field(description="Major and minor; no other torch need read the model.")
    table_precision: str = Field(default="int8", description="Numbers in tables, row by row.")
    dense_precision: str = Field(default="float32", description="Everything else.")
    error: QuantizationError
    files: Mapping[str, str] = Field(description="SHA-256 by file name.")


class Export:
    """One export of a service, checked to belong to it and to be whole.

    Args:
        directory: ``ranker.export_dir``.
        service: Feature service whose features the caller will feed.
        name: Folder name; by default what ``LATEST`` names.

    Raises:
        DataError: If there is no such export, or another version of torch made it.
        CodebookMismatchError: If it was made for another feature service.
        CorruptArtifactError: If a file is missing or has another hash than the manifest says.
    """

    def __init__(self, directory: str, service: str, name: str | None = None) -> None:
        folder = Path(directory) / service
        pointer = folder / _POINTER
        if name is None:
            name = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""
        self.folder = folder / name
        manifest_path = self.folder / MANIFEST_NAME
        if not manifest_path.is_file():
            raise DataError(f"no export at {self.folder}; make one by `qarm-rank export`")
        self.facts = parse_manifest(ExportManifest, manifest_path, _REMEDY)
        if self.manifest.service != service:
            raise CodebookMismatchError(
                expected=service,
                found=self.manifest.service,
                where=str(self.folder),
                command="qarm-rank export, from a checkpoint of this service",
            )
        if self.facts.torch_version != _torch_version():
            raise DataError(
                f"{self.folder} was exported by torch {self.facts.torch_version}, this process has "
                f"{_torch_version()}, which need not read it; {_REMEDY}"
            )
        self._files = {
            name: read_verified(self.folder, name, self.facts.files, _REMEDY)
            for name in self.facts.files
        }

    @property
    def manifest(self) -> CheckpointManifest:
        """The manifest of the checkpoint that was exported."""
        return self.facts.checkpoint

    def vocabularies(self) -> Vocabularies:
        """Return the vocabularies whose rows the tables hold."""
        return Vocabularies.from_json(self._files[_VOCABULARIES_FILE].decode("utf-8"))

    def side_tables(self) -> SideTables:
        """Return item columns and counts as of the rows that it was trained on."""
        return SideTables.load(self.folder / SIDE_TABLES)

    def load_ranker(self) -> nn.Module:
        """Return the ranker, its tables in int8, ready to score."""
        return load_program(self._files[_MODEL_FILE])


def export_newest(config_path: str, config: RankerConfig, name: str | None = None) -> Export:
    """Export a checkpoint of the ranker's service, its error measured on the valid rows.

    Args:
        config_path: Path of ``qarm.yaml``.
        config: The ranker section: service name, folders of rows, checkpoints and exports.
        name: Another checkpoint than the newest.

    Returns:
        The export, as it was read back.

    Raises:
        DataError: If there is no checkpoint, or there are no rows.
    """
    silence_tracing_notice()
    service = config.service_name(resolve_codebook_version(config_path, config.codebook_version))
    checkpoint = Checkpoint(config.checkpoint_dir, service, name)
    rows = open_rows(checkpoint, RowStore(config.rows_uri, service), _ERROR_SPLIT)
    folder = export_checkpoint(config.export_dir, checkpoint, rows, _ERROR_SPLIT)
    made = Export(config.export_dir, service, folder.name)
    logger.info(
        "exported service=%s folder=%s max_score_difference=%.2g",
        service,
        folder.name,
        made.facts.error.max_score_difference,
    )
    return made


def export_checkpoint(directory: str, checkpoint: Checkpoint, rows: RowDataset, split: str) -> Path:
    """Write the int8 form of a checkpoint and return its folder.

    Args:
        directory: ``ranker.export_dir``.
        checkpoint: What to export.
        rows: Rows over which the error of the quantization is measured.
        split: Their split, for the manifest.

    Returns:
        ``<directory>/<service>/<checkpoint's name>``, with a suffix where that name is taken.
    """
    program = _program(checkpoint)
    error = _measure_error(checkpoint, load_program(program), rows, split)
    files = {
        _MODEL_FILE: program,
        _VOCABULARIES_FILE: checkpoint.vocabularies().to_json().encode("utf-8"),
    }
    for path in sorted((checkpoint.folder / SIDE_TABLES).iterdir()):
        files[f"{SIDE_TABLES}/{path.name}"] = path.read_bytes()
    manifest = ExportManifest(
        checkpoint_name=checkpoint.folder.name,
        checkpoint=checkpoint.manifest,
        torch_version=_torch_version(),
        error=error,
        files={name: sha256(payload) for name, payload in files.items()},
    )
    return _publish(Path(directory) / checkpoint.manifest.service, manifest, files)


def open_rows(checkpoint: Checkpoint, store: RowStore, split: str) -> RowDataset:
    """Return stored rows as the checkpoint's ranker reads them, all on this process.

    Args:
        checkpoint: Its vocabularies and config make the features.
        store: Rows of its service, be they of a later build.
        split: Split to read.

    Returns:
        The rows.
    """
    manifest, vocabularies = checkpoint.manifest, checkpoint.vocabularies()
    snapshot = ItemSnapshot(store.snapshot_folder, manifest.config.vector_source)
    tables = ranker_tables(manifest.sizes, vocabularies, manifest.config)
    return RowDataset(
        path=store.split_path(split),
        label_names=tuple(task.label_name for task in manifest.tasks),
        user_columns=store.manifest.user_columns,
        builder=BatchBuilder(
            config=manifest.config,
            vocabularies=vocabularies,
            feature_names=sparse_feature_names(tables),
            code_lookup=snapshot,
            vector_lookup=snapshot,
            aligned_lookup=snapshot.with_source("aligned"),
            # Its own, as serving reads them: their table rows are numbered by its vocabularies.
            side_tables=checkpoint.side_tables(),
            label_names=tuple(task.label_name for task in manifest.tasks),
            level_sizes=manifest.sizes.level_sizes,
        ),
        ranks=Ranks(rank=0, world_size=1),
        batch_size=manifest.config.batch_size,
    )


def _torch_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def _program(checkpoint: Checkpoint) -> bytes:
    manifest, ranker = checkpoint.manifest, checkpoint.load_ranker()
    quantize_tables(ranker)
    tables = ranker_tables(manifest.sizes, checkpoint.vocabularies(), manifest.config)
    width = dense_width(manifest.sizes, manifest.config, len(manifest.tasks))
    return save_program(
        ranker, sparse_feature_names(tables), width, len(manifest.sizes.level_sizes)
    )


def _publish(folder: Path, manifest: ExportManifest, files: Mapping[str, bytes]) -> Path:
    with publishing(folder) as temporary:
        (temporary / SIDE_TABLES).mkdir()
        for file_name, payload in files.items():
            (temporary / file_name).write_bytes(payload)
        (temporary / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2), "utf-8")
        sync_folder(temporary)
        final = folder / _free_name(folder, manifest.checkpoint_name)
        os.replace(temporary, final)
        write_atomically(folder / _POINTER, final.name)
    return final


def _free_name(folder: Path, name: str) -> str:
    # A server may read the one that has the name now.
    free, number = name, 1
    while (folder / free).exists():
        number += 1
        free = f"{name}-{number}"
    return free


def _measure_error(
    checkpoint: Checkpoint, exported: nn.Module, rows: RowDataset, split: str
) -> QuantizationError:
    ranker = checkpoint.load_ranker()
    labels = TaskLabels(ranker.task_towers.chain)
    parts = [_scores(ranker, exported, labels, batch) for batch in rows.eval_batches()]
    if not parts:
        raise DataError(
            f"the rows of split {split!r} are none, so the export's error cannot be measured; "
            "build rows of more data by `qarm-rank rows`"
        )
    before_BT, after_BT, labels_BT = (np.concatenate(part) for part in zip(*parts, strict=True))
    differences_BT = np.abs(after_BT - before_BT)
    names = [task.name for task in checkpoint.manifest.tasks]
    columns = zip(names, after_BT.T, before_BT.T, labels_BT.T, strict=True)
    return QuantizationError(
        split=split,
        num_rows=len(differences_BT),
        max_score_difference=float(differences_BT.max()),
        mean_score_difference=float(differences_BT.mean()),
        auc_difference=defined_metrics(
            {
                name: _auc(after_B, labels_B) - _auc(before_B, labels_B)
                for name, after_B, before_B, labels_B in columns
            }
        ),
    )


def _auc(scores_B: Scores, labels_B: Scores) -> float:
    is_labelled_B = ~np.isnan(labels_B)
    return auc(scores_B[is_labelled_B], labels_B[is_labelled_B] > 0.5)


def _scores(
    ranker: nn.Module, exported: nn.Module, labels: TaskLabels, batch: RankingBatch
) -> tuple[Scores, Scores, Scores]:
    """Return both rankers' scores and the labels, NaN where a task has none; ``[B, T]`` each."""
    with torch.inference_mode():
        before_BT = ranker_logits(ranker, batch).double().sigmoid()
        after_BT = ranker_logits(exported, batch).double().sigmoid()
        labels_BT = labels(batch.labels).double()
    return before_BT.numpy(), after_BT.numpy(), labels_BT.numpy()

"""Checkpoints: weights by PyTorch's distributed checkpoint, with a manifest that pins the service.

A checkpoint folder appears whole or not at all:

    1. every rank writes its shards into ``<dir>/<service>/.<name>.tmp``;
    2. the first rank adds ``vocabularies.json``, ``side_tables`` and ``manifest.json`` and flushes
       all to disk;
    3. it renames the folder to ``<dir>/<service>/<name>``, a name that is not taken;
    4. it replaces the pointer that names the newest one: ``<dir>/<service>/LATEST`` for a finished
       run, ``UNFINISHED`` for one that was stopped or goes on;
    5. it removes what is no longer needed: finished checkpoints beyond the number to keep (never
       the one that ``LATEST`` names), unfinished ones of which there is a newer one or a finished
       one, and the halves that dead runs left.

Beside the weights it holds the optimizer's state, and of an unfinished run what each rank needs to
go on exactly where it was. The reader of weights may have any number of ranks, also one process
without a process group; a run goes on with as many ranks as it had.
May import: torch, torchrec.
"""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from qarm_feast.errors import CodebookMismatchError, DataError
from torchrec_models.config import CodeSizes, RankerConfig, TaskConfig
from torchrec_models.early_stopping import StoppingState
from torchrec_models.ranker import MultiTaskRanker, RankerTrainTask, build_ranker
from torchrec_models.row_store import parse_manifest, sync_folder, write_atomically
from torchrec_models.side_tables import SIDE_TABLES, SideTables
from torchrec_models.vocabulary import Vocabularies

_FINISHED_POINTER = "LATEST"
_UNFINISHED_POINTER = "UNFINISHED"


class FitState(BaseModel):
    """How far a run has come: it has trained ``batch`` batches of pass ``epoch``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    batch: int = 0
    step: int = 0
    run_name: str = Field(description="Folder of its logs.")
    stopping: StoppingState = StoppingState()
    valid_metrics: dict[str, float] = Field(
        default={}, description="Of the latest evaluation, if there was one."
    )


class CheckpointManifest(BaseModel):
    """What a checkpoint was trained from: all that is needed to build its model again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    service: str
    codebook_version: str
    rows_build: str = Field(description="Build of the training rows, see the rows' manifest.")
    step: int
    world_size: int
    config: RankerConfig
    tasks: tuple[TaskConfig, ...]
    sizes: CodeSizes
    metrics: dict[str, float] = Field(description="Metrics on valid rows when it was saved.")
    unfinished: FitState | None = Field(
        default=None, description="How far the run was, unless it had come to its end."
    )


def save_checkpoint(
    directory: str,
    state: dict[str, Any],
    manifest: CheckpointManifest,
    vocabularies: Vocabularies,
    side_tables: SideTables,
) -> Path:
    """Save a run from all ranks and return the checkpoint's folder.

    Args:
        directory: ``ranker.checkpoint_dir``.
        state: Tensors in nested dicts: ``model``, ``optimizer``, and what is of one rank only
            under a key of its own.
        manifest: What the checkpoint is.
        vocabularies: Stored beside the weights, whose rows they number.
        side_tables: Stored as they are given: the part that serving reads.

    Returns:
        ``<directory>/<service>/step-<number>``, with a suffix where that name is taken.
    """
    folder = Path(directory) / manifest.service
    name = _free_name(folder, manifest.step)
    temporary = folder / f".{name}.tmp"
    is_first = dist.get_rank() == 0
    if is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    save_distributed(state, checkpoint_id=temporary)
    if is_first:
        (temporary / "vocabularies.json").write_text(vocabularies.to_json(), encoding="utf-8")
        side_tables.save(temporary / SIDE_TABLES)
        (temporary / "manifest.json").write_text(manifest.model_dump_json(indent=2), "utf-8")
        sync_folder(temporary)
        os.replace(temporary, folder / name)
        pointer = _UNFINISHED_POINTER if manifest.unfinished else _FINISHED_POINTER
        write_atomically(folder / pointer, name)
        _remove_old(folder, name, manifest)
    dist.barrier()
    return folder / name


def _remove_old(folder: Path, newest: str, manifest: CheckpointManifest) -> None:
    if not manifest.unfinished:
        (folder / _UNFINISHED_POINTER).unlink(missing_ok=True)
    # One key only: a folder may hold checkpoints of an older form, which need not be understood.
    is_unfinished = {
        path.parent: bool(json.loads(path.read_text("utf-8")).get("unfinished"))
        for path in folder.glob("step-*/manifest.json")
        if path.parent != folder / newest
    }
    finished = [path for path, found in is_unfinished.items() if not found]
    unfinished = [path for path, found in is_unfinished.items() if found]
    finished.sort(key=lambda path: (path / "manifest.json").stat().st_mtime_ns, reverse=True)
    kept = manifest.config.keep_checkpoints - (manifest.unfinished is None)
    # A run that died before step 4 left a newer folder than the one that is named.
    named = folder / _named_by(folder / _FINISHED_POINTER)
    too_old = [path for path in finished[kept:] if path != named]
    for path in [*too_old, *unfinished, *folder.glob(".step-*.tmp")]:
        shutil.rmtree(path)


def _free_name(folder: Path, step: int) -> str:
    """Return the name of a step's checkpoint that the first rank finds not taken."""
    name, number = _step_name(step), 1
    # A finished folder is never moved aside: LATEST may name it until the new one is whole.
    while (folder / name).exists():
        number += 1
        name = f"{_step_name(step)}-{number}"
    chosen = [name]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


class Checkpoint:
    """One saved checkpoint of a service, checked to belong to it.

    Args:
        directory: ``ranker.checkpoint_dir``.
        service: Feature service whose features the caller will feed.
        name: Folder name, for example ``step-00000120``; by default the newest finished one.

    Raises:
        DataError: If there is no such checkpoint.
        CodebookMismatchError: If it was trained on another feature service.
    """

    def __init__(self, directory: str, service: str, name: str | None = None) -> None:
        folder = Path(directory) / service
        self.folder = folder / (name or _named_by(folder / _FINISHED_POINTER))
        manifest_path = self.folder / "manifest.json"
        if not manifest_path.exists():
            raise DataError(
                f"no checkpoint at {self.folder}; train one by `torchrun --standalone "
                "--nproc-per-node 2 -m torchrec_models.train --config feature_repo/qarm.yaml`"
            )
        self.manifest = parse_manifest(
            CheckpointManifest, manifest_path, "train a checkpoint with this version"
        )
        if self.manifest.service != service:
            raise CodebookMismatchError(
                expected=service,
                found=self.manifest.service,
                where=str(self.folder),
                command="qarm-rank rows, then train a checkpoint of this service",
            )

    @staticmethod
    def at(folder: str | Path) -> "Checkpoint":
        """Return the checkpoint of a folder, of whatever service that was saved into it."""
        folder = Path(folder).resolve()
        return Checkpoint(str(folder.parent.parent), folder.parent.name, folder.name)

    @staticmethod
    def to_resume(directory: str, service: str) -> "Checkpoint":
        """Return the checkpoint that the newest run of a service left when it was stopped.

        Args:
            directory: ``ranker.checkpoint_dir``.
            service: Feature service of the run.

        Returns:
            A checkpoint that holds a :class:`FitState`.

        Raises:
            DataError: If no run was stopped since one came to its end.
        """
        pointer = Path(directory) / service / _UNFINISHED_POINTER
        if not pointer.exists():
            raise DataError(
                f"{pointer.parent} holds no unfinished run to resume; train without --resume"
            )
        return Checkpoint(directory, service, _named_by(pointer))

    def vocabularies(self) -> Vocabularies:
        """Return the vocabularies whose rows the tables hold."""
        return Vocabularies.from_json(
            (self.folder / "vocabularies.json").read_text(encoding="utf-8")
        )

    def side_tables(self) -> SideTables:
        """Return item columns and counts as of the rows that it was trained on."""
        return SideTables.load(self.folder / SIDE_TABLES)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the whole shape of every tensor by its dotted name, ``model.`` before weights."""
        found = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        return {
            key: value.size
            for key, value in found.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def read(self, state: dict[str, Any]) -> None:
        """Fill the tensors of nested dicts in place, sharded in any way or not at all.

        Args:
            state: What to fill.

        Raises:
            DataError: If the checkpoint lacks one of them.
        """
        shapes = self.shapes()
        wanted = [
            key for key, value in flat_state(state).items() if isinstance(value, torch.Tensor)
        ]
        if missing := [key for key in wanted if key not in shapes]:
            raise DataError(
                f"{self.folder} has no {missing[0]} (it lacks {len(missing)} of the {len(wanted)} "
                "tensors that this ranker has); train a checkpoint with this version and section "
                "ranker"
            )
        with warnings.catch_warnings():
            # Torch warns that one process loads alone, which is what was asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            # TorchRec 1.8 still shards by the class that torch 2.13 wants to be rid of.
            warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
            load_distributed(state, checkpoint_id=self.folder, no_dist=not dist.is_initialized())

    def load_into(self, model: nn.Module) -> None:
        """Load the weights into a training task, sharded in any way or not at all."""
        state: dict[str, Any] = {"model": model.state_dict()}
        self.read(state)
        model.load_state_dict(state["model"])

    def load_ranker(self) -> MultiTaskRanker:
        """Return the trained ranker in this process, ready to score."""
        ranker = build_trained_ranker(self.manifest, self.vocabularies(), torch.device("cpu"))
        self.load_into(RankerTrainTask(ranker, [task.weight for task in self.manifest.tasks]))
        return ranker.eval()


def build_trained_ranker(
    manifest: CheckpointManifest, vocabularies: Vocabularies, table_device: torch.device
) -> MultiTaskRanker:
    """Return the ranker that a manifest describes, its weights not loaded yet.

    Args:
        manifest: Of a checkpoint, or of an export of it.
        vocabularies: Those stored beside it.
        table_device: Device of the tables; ``meta``: nothing of their size is made.

    Returns:
        The ranker.
    """
    return build_ranker(manifest.config, manifest.tasks, vocabularies, manifest.sizes, table_device)


def flat_state(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dicts by dotted name, as a checkpoint names them."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        flat |= flat_state(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _named_by(pointer: Path) -> str:
    return pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""

"""Checkpoints: weights by PyTorch's distributed checkpoint, with a manifest that pins the service.

A checkpoint folder appears whole or not at all:

    1. every rank writes its shards into ``<dir>/<service>/.<name>.tmp``;
    2. the first rank adds ``vocabularies.json``, ``side_tables`` and ``manifest.json`` and flushes
       all to disk;
    3. it renames the folder to ``<dir>/<service>/<name>``, a name that is not taken;
    4. it replaces ``<dir>/<service>/LATEST``, which names the newest one;
    5. it removes older checkpoints of the same step.

The reader may have any number of ranks, also one process without a process group.
May import: torch, torchrec.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from qarm_feast.errors import CodebookMismatchError, DataError
from torchrec_models.config import CodeSizes, RankerConfig, TaskConfig
from torchrec_models.ranker import MultiTaskRanker, RankerTrainTask, build_ranker
from torchrec_models.row_store import sync_folder, write_atomically
from torchrec_models.side_tables import SIDE_TABLES, SideTables
from torchrec_models.vocabulary import Vocabularies

_POINTER = "LATEST"


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


def save_checkpoint(
    directory: str,
    model: nn.Module,
    manifest: CheckpointManifest,
    vocabularies: Vocabularies,
    side_tables: SideTables,
) -> Path:
    """Save the model from all ranks and return the checkpoint's folder.

    Args:
        directory: ``ranker.checkpoint_dir``.
        model: The sharded training task, the same on all ranks.
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
    save_distributed({"model": model.state_dict()}, checkpoint_id=temporary)
    if is_first:
        (temporary / "vocabularies.json").write_text(vocabularies.to_json(), encoding="utf-8")
        side_tables.save(temporary / SIDE_TABLES)
        (temporary / "manifest.json").write_text(manifest.model_dump_json(indent=2), "utf-8")
        sync_folder(temporary)
        os.replace(temporary, folder / name)
        write_atomically(folder / _POINTER, name)
        for older in folder.glob(f"{_step_name(manifest.step)}*"):
            if older.name != name:
                shutil.rmtree(older)
    dist.barrier()
    return folder / name


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
        name: Folder name, for example ``step-00000120``; by default what ``LATEST`` names.

    Raises:
        DataError: If there is no such checkpoint.
        CodebookMismatchError: If it was trained on another feature service.
    """

    def __init__(self, directory: str, service: str, name: str | None = None) -> None:
        folder = Path(directory) / service
        pointer = folder / _POINTER
        if name is None:
            name = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""
        self.folder = folder / name
        manifest_path = self.folder / "manifest.json"
        if not manifest_path.exists():
            raise DataError(
                f"no checkpoint at {self.folder}; train one by `torchrun --standalone "
                "--nproc-per-node 2 -m torchrec_models.train --config feature_repo/qarm.yaml`"
            )
        self.manifest = CheckpointManifest.model_validate_json(manifest_path.read_text("utf-8"))
        if self.manifest.service != service:
            raise CodebookMismatchError(
                expected=service,
                found=self.manifest.service,
                where=str(self.folder),
                command="qarm-rank rows, then train a checkpoint of this service",
            )

    def vocabularies(self) -> Vocabularies:
        """Return the vocabularies whose rows the tables hold."""
        return Vocabularies.from_json(
            (self.folder / "vocabularies.json").read_text(encoding="utf-8")
        )

    def side_tables(self) -> SideTables:
        """Return item columns and counts as of the rows that it was trained on."""
        return SideTables.load(self.folder / SIDE_TABLES)

    def load_into(self, model: nn.Module) -> None:
        """Load the weights into a training task, sharded in any way or not at all."""
        state: dict[str, Any] = {"model": model.state_dict()}
        is_distributed = dist.is_initialized()
        with warnings.catch_warnings():
            # Torch warns that one process loads alone, which is what was asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load_distributed(state, checkpoint_id=self.folder, no_dist=not is_distributed)
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

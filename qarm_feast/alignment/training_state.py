"""What a training run needs to go on after it was killed: one file, replaced after each epoch.

    <encoder_uri>/.<version>.training/<name>.safetensors

It holds the trained tensors of the last and of the best epoch, the optimizer's, and as metadata
(JSON, no pickle) the rest. A run that goes on from it ends with the bits of one that was not
interrupted: what a step draws depends on the saved generator and on the step's number alone.
Only the first rank reads and writes; the others get what it read.
May import: pydantic, torch, safetensors.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qarm_feast.alignment.gathering import current_ranks, said_by_first
from qarm_feast.alignment.pair_rows import PairRows
from qarm_feast.artifact import replace_file

logger = logging.getLogger(__name__)


class FitProgress(BaseModel):
    """How far a run has come.

    ``valid_losses`` starts with the loss before the first epoch; epoch 0 is the untrained state.
    """

    model_config = ConfigDict(frozen=True)

    generator: dict[str, Any]
    valid_losses: list[float]
    num_steps: int = 0
    best_epoch: int = 0

    @property
    def epoch(self) -> int:
        """Epochs trained so far."""
        return len(self.valid_losses) - 1

    def after_epoch(
        self, valid_loss: float, num_steps: int, generator: Mapping[str, Any]
    ) -> "FitProgress":
        """Return the progress one epoch later; the first of equal losses stays the best."""
        losses = [*self.valid_losses, valid_loss]
        is_best = valid_loss < losses[self.best_epoch]
        return FitProgress(
            generator=dict(generator),
            valid_losses=losses,
            num_steps=num_steps,
            best_epoch=len(losses) - 1 if is_best else self.best_epoch,
        )


@dataclass(frozen=True)
class TrainingState:
    """Progress and tensors; the names of the latter belong to who trains."""

    progress: FitProgress
    tensors: dict[str, Tensor]


class TrainingFile:
    """Keeps the state of one run in a file.

    Args:
        path: Where; its folder is made.
        fingerprint: Names settings and data of the run; a state of another one is not read.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint

    def read(self) -> TrainingState | None:
        """Return the saved state, None if there is none of this run."""
        found = self._read_payload() if current_ranks().is_first else None
        progress, payload = said_by_first(found) or (None, b"")
        if progress is None:
            return None
        return TrainingState(
            FitProgress.model_validate_json(progress), safetensors.torch.load(payload)
        )

    def write(self, state: TrainingState) -> None:
        """Replace the saved state."""
        if not current_ranks().is_first:
            return
        metadata = {
            "fingerprint": self._fingerprint,
            "progress": state.progress.model_dump_json(),
        }
        tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
        replace_file(self._path, safetensors.torch.save(tensors, metadata))

    def _read_payload(self) -> tuple[str, bytes] | None:
        if not self._path.is_file():
            return None
        with safetensors.safe_open(self._path, framework="pt") as file:
            metadata = file.metadata()
        if metadata.get("fingerprint") != self._fingerprint:
            logger.warning(
                "alignment_started_anew path=%s: what lies there is of other settings or data",
                self._path,
            )
            return None
        return metadata["progress"], self._path.read_bytes()


def fingerprint(settings: str, pairs: PairRows, contents: Iterable[bytes]) -> str:
    """Return a hash of all that a run's outcome depends on.

    Args:
        settings: The configuration, as text.
        pairs: All pairs.
        contents: What else it depends on: vectors of the items, weights at the start.

    Returns:
        SHA-256 as hex text.
    """
    digest = hashlib.sha256(settings.encode())
    arrays = [pairs.triggers, pairs.targets, pairs.users, pairs.weights]
    if pairs.item_ids_M is not None:
        # They say which items are held out.
        arrays.append(pairs.item_ids_M)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    for part in contents:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()

"""Where a training run keeps its numbers: JSON lines and TensorBoard events in one folder.

May import: tensorboard through torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class MetricsLog(Protocol):
    """Takes numbers of a step."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of a step."""
        ...

    def close(self) -> None:
        """Give back what is held open."""
        ...


class NoMetricsLog:
    """Keeps nothing: for ranks beside the first, and for runs without a checkpoint."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Forget the values."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


class FileMetricsLog:
    """Writes JSON lines and TensorBoard events, flushed at once: a run may be killed."""

    def __init__(self, folder: Path) -> None:
        # Imported here, by the one rank that writes: it costs a second and more.
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._lines_path = folder / "metrics.jsonl"
        self._writer = SummaryWriter(str(folder))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and one event per value."""
        with self._lines_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | dict(values)) + "\n")
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """End TensorBoard's thread and close its file: many runs may follow in one process."""
        self._writer.close()

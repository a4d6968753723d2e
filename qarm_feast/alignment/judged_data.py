"""Which data an evaluation judged: a fingerprint that is cheap, as no table is read for it.

May import: the input data's configuration.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qarm_feast.artifact import file_sha256
from qarm_feast.input_data import INTERACTIONS_FILE, ITEMS_FILE, DataConfig

_NOT_JUDGED = {"input_dir", "history_length"}
"""Keys that alter no row that an encoder is measured on."""
_ABSENT = "absent"


def data_fingerprint(config: DataConfig) -> dict[str, Any]:
    """Return what tells the data of one evaluation from that of another.

    Args:
        config: Section ``data``.

    Returns:
        SHA-256 of ``items.parquet`` and ``interactions.parquet`` by name (``absent`` where there
        is none), and the settings that say which of their rows are validation rows.
    """
    paths = [Path(config.input_dir) / name for name in (ITEMS_FILE, INTERACTIONS_FILE)]
    hashes = {path.name: file_sha256(path) if path.is_file() else _ABSENT for path in paths}
    settings = config.model_dump(mode="json", exclude=_NOT_JUDGED)
    return hashes | {f"data.{name}": value for name, value in settings.items()}


def differences(judged: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words where two fingerprints differ, each with both values."""
    return [
        f"{name} was {judged.get(name, 'not noted')}, is {now.get(name, 'not noted')}"
        for name in sorted({*judged, *now})
        if judged.get(name) != now.get(name)
    ]

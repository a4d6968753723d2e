"""An export of ``alignment.py`` beside its backbone's forward passes alone."""

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.alignment_steps import Sizes, lora_features, made_titles, pooled, seconds
from qarm_feast.alignment.backbones.text import TextBackbone
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import EncoderManifest, ItemEncoder, backbone_manifests
from qarm_feast.alignment.export_job import export_catalogue
from qarm_feast.alignment.fusion import fusion_sizes
from qarm_feast.alignment.train import start_head

_CREATED = datetime(2024, 1, 1, tzinfo=UTC)


class ExportArms:
    """A stored encoder and a catalogue, and the catalogue's tokens in memory.

    Args:
        sizes: Number of items.
        backbone: Folder of the text model.
        folder: Where data, encoder and vectors go.
    """

    def __init__(self, sizes: Sizes, backbone: str, folder: Path) -> None:
        self._folder = folder
        self._config_path = folder / "qarm.yaml"
        self._config_path.write_text("data: {input_dir: input}\nalignment: {embedding_dim: 128}\n")
        titles = made_titles(sizes.export_items)
        _write_catalogue(folder / "input", titles)
        self._num_items = len(titles)
        config = AlignmentConfig()
        self._reader = TextBackbone(Path(backbone), config.max_tokens)
        head = start_head(lora_features(titles, backbone, config), config)
        manifest = EncoderManifest(
            version=config.encoder_version,
            embedding_dim=head.linear.out_features,
            backbones=backbone_manifests({"text": self._reader}),
            fusion=fusion_sizes(config),
            behaviour_cutoff=_CREATED,
            created=_CREATED,
            training={},
            files={},
        )
        ItemEncoder(manifest, head.eval(), {"text": self._reader}).save(
            str(folder / "data/encoders")
        )
        self._version = config.encoder_version
        self._passes = self._reader.passes(titles, is_fixed=True)

    def export(self) -> float:
        """Return items per second of an export into an empty folder, nothing cached."""
        for name in ("vectors", "features"):
            shutil.rmtree(self._folder / "data" / name, ignore_errors=True)
        started = seconds()
        export_catalogue(str(self._config_path), self._version)
        return self._num_items / (seconds() - started)

    def backbone_alone(self) -> float:
        """Return items per second of the forward passes over tokens that lie in memory."""
        started = seconds()
        with torch.inference_mode():
            for one in self._passes:
                pooled(self._reader.module, one.ids_RT, one.is_token_RT)
        return self._num_items / (seconds() - started)


def _write_catalogue(folder: Path, titles: list[str]) -> None:
    folder.mkdir()
    size = len(titles)
    times = pa.array([_CREATED] * size, pa.timestamp("us", tz="UTC"))
    catalogue = {"item_id": pa.array(range(size)), "upload_timestamp": times, "title": titles}
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    behaviour = {
        "user_id": pa.array([0]),
        "item_id": pa.array([0]),
        "event_timestamp": times[:1],
        "is_click": [True],
    }
    pq.write_table(pa.table(behaviour), folder / "interactions.parquet")

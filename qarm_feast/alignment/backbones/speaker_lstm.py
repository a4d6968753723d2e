"""The speaker LSTM as an audio network: who speaks, or what sounds, in partial utterances.

Architecture and settings are those of the weights (generalised end-to-end loss for speaker
verification, Wan et al. 2018): 40 mel bands of 25 ms windows every 10 ms at 16 kHz, partial
utterances of 1.6 s, three LSTM layers, a linear layer, ReLU, L2 norm. Unlike the package, no voice
detector cuts out what is not speech: items are not only speech.

Shape letters in this file: S samples, F frames, R rows of a forward pass, V partial utterances.
May import: torch, safetensors; librosa is imported on first use.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from qarm_feast.alignment.backbones.base import CONFIG_FILE, WEIGHTS_FILE, weights_file
from qarm_feast.alignment.backbones.packages import packaged_file

SPEAKER_LSTM = "speaker_lstm"
NUM_MELS = 40
HIDDEN_SIZE = 256
FRAME_SAMPLES = 160
WINDOW_SAMPLES = 400
UTTERANCE_FRAMES = 160
STEP_FRAMES = 77
"""Frames between the starts of partial utterances: 1.3 of them per second."""
MIN_COVERAGE = 0.75
"""Share of the last partial utterance that the sound must fill, unless it is the only one."""
TARGET_DBFS = -30.0
"""Loudness to which a more quiet sound is raised."""


class SpeakerNet(nn.Module):
    """The network; parameter names are those of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(NUM_MELS, HIDDEN_SIZE, num_layers=3, batch_first=True)
        self.linear = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, mels_RFM: Tensor) -> Tensor:
        """Return one vector of length 1 per partial utterance, ``[R, 256]``."""
        _, (hidden, _) = self.lstm(mels_RFM)
        return functional.normalize(functional.relu(self.linear(hidden[-1])), dim=1)


class SpeakerLstm:
    """The network and its spectrograms.

    Args:
        folder: Folder with the weights as an artifact holds them; None takes the package's.

    Attributes:
        width: Numbers of a vector.
        sampling_rate: Samples per second that it takes.
    """

    width = HIDDEN_SIZE
    sampling_rate = 16_000

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def load(self) -> nn.Module:
        """Read the network, in evaluation mode."""
        module = SpeakerNet()
        module.load_state_dict(self._weights())
        return module.eval()

    def windows(self, samples_S: np.ndarray) -> np.ndarray:
        """Return the mel spectrograms of a sound's partial utterances, float32 ``[V, 160, 40]``."""
        starts = utterance_starts(len(samples_S))
        needed = (starts[-1] + UTTERANCE_FRAMES) * FRAME_SAMPLES
        raised_S = raise_volume(samples_S)
        mels_FM = mel_frames(np.pad(raised_S, (0, max(0, needed - len(raised_S)))))
        return np.stack([mels_FM[start : start + UTTERANCE_FRAMES] for start in starts])

    def embed(self, module: nn.Module, windows: Tensor) -> Tensor:
        """Return one vector per partial utterance."""
        vectors_RE: Tensor = module(windows)
        return vectors_RE

    def payloads(self, tuned: nn.Module | None) -> dict[str, bytes]:
        """Return the weights, and a file that tells whose they are."""
        weights = self._weights() if tuned is None else tuned.state_dict()
        config = json.dumps({"architecture": SPEAKER_LSTM}).encode()
        return {CONFIG_FILE: config, WEIGHTS_FILE: weights_file(weights)}

    def _weights(self) -> dict[str, Tensor]:
        if self._folder is not None:
            return safetensors.torch.load_file(self._folder / WEIGHTS_FILE)
        path = packaged_file("alignment.audio_backbone", SPEAKER_LSTM, "pretrained.pt")
        weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        # Two more numbers scale the training loss.
        return {name: one for name, one in weights.items() if name.startswith(("lstm.", "linear."))}


def raise_volume(samples_S: np.ndarray) -> np.ndarray:
    """Return the samples, raised to ``TARGET_DBFS`` where their mean power is less."""
    level = float(np.sqrt(np.mean(np.square(samples_S, dtype=np.float64))))
    gain = max(1.0, 10 ** (TARGET_DBFS / 20) / level)
    raised_S: np.ndarray = (samples_S * gain).astype(np.float32)
    return raised_S


def mel_frames(samples_S: np.ndarray) -> np.ndarray:
    """Return the mel power spectrogram, not its logarithm: float32 ``[F, 40]``."""
    import librosa

    mels_MF = librosa.feature.melspectrogram(
        y=samples_S,
        sr=SpeakerLstm.sampling_rate,
        n_fft=WINDOW_SAMPLES,
        hop_length=FRAME_SAMPLES,
        n_mels=NUM_MELS,
    )
    return np.ascontiguousarray(mels_MF.T, dtype=np.float32)


def utterance_starts(num_samples: int) -> list[int]:
    """Return the first frame of each partial utterance.

    Args:
        num_samples: Samples of the sound, more than 0.

    Returns:
        Ascending, the first is 0.
    """
    num_frames = num_samples // FRAME_SAMPLES + 1
    starts = list(range(0, max(1, num_frames - UTTERANCE_FRAMES + STEP_FRAMES + 1), STEP_FRAMES))
    covered = num_samples / FRAME_SAMPLES - starts[-1]
    if covered < MIN_COVERAGE * UTTERANCE_FRAMES and len(starts) > 1:
        starts.pop()
    return starts

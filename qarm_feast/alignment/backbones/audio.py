"""Audio backbones: sounds to feature tokens, by windows of one length.

Each sound is decoded by itself and every forward pass has one shape, so a sound's features do not
depend on which others came with it.

Shape letters in this file: N sounds, S samples, R rows of a forward pass, V windows of a sound,
T feature tokens, E feature width.
May import: torch, numpy; soundfile and librosa are imported on first use.
"""

import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qarm_feast.alignment.backbones.base import (
    Encoded,
    NetworkBackbone,
    TowerInput,
    Weights,
    device_of,
)
from qarm_feast.alignment.modalities import EMPTY, TOO_LARGE, UNDECODABLE
from qarm_feast.errors import MissingDependencyError

ROWS_PER_FORWARD = {"cpu": 8, "cuda": 64}
"""Windows of a forward pass by kind of device; one item costs a stream a whole pass."""
MAX_CHANNELS = 8
MAX_SAMPLING_RATE = 192_000
SILENCE = 2.0**-24
"""Below half a step of 24 bits a sample is none."""


class AudioNetwork(Protocol):
    """An architecture and the windows of sound that it reads."""

    @property
    def width(self) -> int:
        """Width of what :meth:`embed` returns, E."""
        ...

    @property
    def sampling_rate(self) -> int:
        """Samples per second."""
        ...

    def windows(self, samples_S: np.ndarray) -> np.ndarray:
        """Return the network's input for each window of a sound, ``[V, …]``, V at least 1."""
        ...

    def load(self) -> nn.Module:
        """Read the network, in evaluation mode."""
        ...

    def embed(self, module: nn.Module, windows: Tensor) -> Tensor:
        """Return one vector per window, ``[R, E]``."""
        ...

    def payloads(self, tuned: nn.Module | None) -> dict[str, bytes]:
        """Return the files from which it can be opened again, by name."""
        ...


class AudioBackbone(NetworkBackbone):
    """Means of a network's vectors over parts of equal length of a sound's windows.

    Args:
        network: The network.
        max_seconds: How much of a sound is read; the rest is cut off.
        num_tokens: Parts; 1: the mean of all windows.
    """

    def __init__(self, network: AudioNetwork, max_seconds: float, num_tokens: int = 1) -> None:
        self._network = network
        self.max_seconds = max_seconds
        self.num_tokens = num_tokens
        super().__init__(Weights(network.load, network.payloads))

    @property
    def width(self) -> int:
        """Width of the network's vectors."""
        return self._network.width

    @property
    def settings(self) -> dict[str, Any]:
        """What a manifest says beside the files."""
        return {"max_seconds": self.max_seconds, "num_tokens": self.num_tokens}

    def encode(self, values: Sequence[bytes | None]) -> Encoded:
        """Return the features of the sounds, not normalised.

        Args:
            values: Bytes of files that libsndfile knows: WAV, FLAC, OGG, MP3 and others.

        Returns:
            One row per sound; zeros where there is none or it cannot be read.
        """
        features_NTE = np.zeros((len(values), self.num_tokens, self.width), dtype=np.float32)
        is_present_N = np.zeros(len(values), dtype=bool)
        faults: list[str | None] = [None] * len(values)
        for row, value in enumerate(values):
            windows = self._windows(value)
            if isinstance(windows, Tensor):
                with torch.inference_mode():
                    features_NTE[row] = self._tokens(self._embed_in_passes(windows)).cpu().numpy()
                is_present_N[row] = True
            else:
                faults[row] = windows
        return Encoded(features_NTE, is_present_N, faults)

    def forward(self, values: Sequence[bytes | None]) -> tuple[Tensor, Tensor]:
        """Return the features with gradients, and which could be read."""
        device = device_of(self.module)
        rows, is_present = [], []
        for value in values:
            windows = self._windows(value)
            is_present.append(isinstance(windows, Tensor))
            if isinstance(windows, Tensor):
                rows.append(self._tokens(self.tower(windows)))
            else:
                rows.append(torch.zeros((self.num_tokens, self.width), device=device))
        return torch.stack(rows), torch.tensor(is_present, device=device)

    def tower(self, *inputs: Tensor) -> Tensor:
        """Return one vector per window, ``[R, E]``; of several the mean is a sound's token."""
        return self._network.embed(self.module, inputs[0].to(device_of(self.module)))

    def tower_inputs(self) -> list[TowerInput]:
        """Return two windows of noise."""
        rate = self._network.sampling_rate
        samples_S = np.random.default_rng(0).normal(size=rate).astype(np.float32)
        windows = torch.from_numpy(self._network.windows(samples_S)[:1])
        return [TowerInput("windows", torch.cat([windows, windows]))]

    def _windows(self, value: bytes | None) -> Tensor | str | None:
        """Return the network's input; None for no sound, or the reason why there is none."""
        if value is None:
            return None
        samples_S = read_samples(value, self._network.sampling_rate, self.max_seconds)
        if isinstance(samples_S, str):
            return samples_S
        return torch.from_numpy(self._network.windows(samples_S))

    def _embed_in_passes(self, windows: Tensor) -> Tensor:
        num_rows = ROWS_PER_FORWARD[device_of(self.module).type]
        parts = []
        for begin in range(0, len(windows), num_rows):
            part = windows[begin : begin + num_rows]
            dummies = part.new_zeros((num_rows - len(part), *part.shape[1:]))
            vectors_RE = self.tower(torch.cat([part, dummies]))
            parts.append(vectors_RE[: len(part)])
        return torch.cat(parts)

    def _tokens(self, vectors_VE: Tensor) -> Tensor:
        count = len(vectors_VE)
        tokens = []
        for part in range(self.num_tokens):
            begin = part * count // self.num_tokens
            # A sound of fewer windows than tokens has some windows in several.
            end = max((part + 1) * count // self.num_tokens, begin + 1)
            tokens.append(vectors_VE[begin:end].mean(dim=0))
        return torch.stack(tokens)


def read_samples(payload: bytes, sampling_rate: int, max_seconds: float) -> np.ndarray | str:
    """Return the beginning of a sound as one channel.

    Args:
        payload: Bytes of a file.
        sampling_rate: Samples per second that are wanted.
        max_seconds: How much is decoded at most.

    Returns:
        Float32 samples, cut off at -1 and 1 before they are mixed, and not silent; or the
        reason why there are none.

    Raises:
        MissingDependencyError: If librosa, which brings soundfile, is not installed.
    """
    try:
        import librosa
        import soundfile
    except ImportError as error:
        raise MissingDependencyError(
            package="librosa",
            needed_for="an audio encoder",
            command='pip install "qarm-feast[audio]"',
        ) from error
    try:
        with soundfile.SoundFile(io.BytesIO(payload)) as file:
            given_rate = file.samplerate
            if file.channels > MAX_CHANNELS or given_rate > MAX_SAMPLING_RATE:
                return TOO_LARGE
            samples_SC = file.read(int(max_seconds * given_rate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, OSError):
        return UNDECODABLE
    if not np.isfinite(samples_SC).all():
        return UNDECODABLE
    # A file of floats may hold anything: beyond 1 nothing could be played, and the powers of huge
    # samples, as the gain of tiny ones, would be infinite.
    samples_S = samples_SC.clip(-1.0, 1.0).mean(axis=1)
    if _is_silent(samples_S):
        return EMPTY
    if given_rate != sampling_rate:
        samples_S = librosa.resample(samples_S, orig_sr=given_rate, target_sr=sampling_rate)
    # A resampled blip may leave nothing.
    return EMPTY if _is_silent(samples_S) else np.asarray(samples_S, dtype=np.float32)


def _is_silent(samples_S: np.ndarray) -> bool:
    return bool(np.abs(samples_S).max(initial=0.0) < SILENCE)

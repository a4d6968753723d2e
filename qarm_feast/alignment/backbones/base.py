"""What every backbone can do, and what an artifact says of it.

Shape letters in this file: N items, T feature tokens, E feature width.
May import: torch, numpy, safetensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from qarm_feast.artifact import sha256

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class Encoded(NamedTuple):
    """Feature tokens of some values.

    Attributes:
        features_NTE: Float32; a row that is not present holds what the backbone gives for nothing:
            the features of an empty text, zeros for the others.
        is_present_N: Which values there were and could be read.
        faults: Per row, why a value that there is cannot be read; else None.
    """

    features_NTE: np.ndarray
    is_present_N: np.ndarray
    faults: Sequence[str | None]


class TowerInput(NamedTuple):
    """An input of a backbone's network: its name, an example, and the dimensions that vary."""

    name: str
    example: Tensor
    free_dims: tuple[int, ...] = (0,)


class Backbone(Protocol):
    """A model of one modality."""

    @property
    def hash(self) -> str:
        """SHA-256 over weights and every setting that alters features."""
        ...

    @property
    def num_tokens(self) -> int:
        """Feature tokens per item, T."""
        ...

    @property
    def width(self) -> int:
        """Feature width, E."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that alter features, as an artifact's manifest holds them."""
        ...

    def encode(self, values: Sequence[Any]) -> Encoded:
        """Return the features of the values; the same bits whatever else is among them.

        Args:
            values: What ``modalities.content_values`` gives for this modality.

        Returns:
            One row per value.
        """
        ...

    def payloads(self) -> dict[str, bytes]:
        """Return the files from which the same backbone can be opened again, by name."""
        ...


class TunableBackbone(Backbone, Protocol):
    """A backbone with weights."""

    @property
    def module(self) -> nn.Module:
        """The network; the one that :meth:`encode` runs."""
        ...

    def replace_module(self, module: nn.Module) -> None:
        """Put a tuned network of the same architecture in place."""
        ...

    def tower(self, *inputs: Tensor) -> Tensor:
        """Return what the network makes of prepared values.

        Args:
            *inputs: As :meth:`tower_inputs` names them.

        Returns:
            Feature tokens; of sounds one vector per window.
        """
        ...

    def tower_inputs(self) -> list[TowerInput]:
        """Return what :meth:`tower` reads, with examples of two values."""
        ...

    def forward(self, values: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return what :meth:`encode` does, with gradients, on the module's device.

        Args:
            values: As for :meth:`encode`.

        Returns:
            Features float32 ``[N, T, E]``, and which are present, bool ``[N]``.
        """
        ...


def is_tunable(backbone: Backbone) -> TypeGuard[TunableBackbone]:
    """Tell whether a backbone has weights; nothing is loaded for that."""
    return hasattr(backbone, "replace_module")


def hash_files(payloads: Mapping[str, bytes], settings: Mapping[str, Any]) -> str:
    """Return one SHA-256 over files and settings, as hex text."""
    hashes = [f"{name} {sha256(payload)}" for name, payload in sorted(payloads.items())]
    lines = [*hashes, *(f"{key}={settings[key]}" for key in sorted(settings))]
    return sha256("\n".join(lines).encode())


class Weights:
    """A network that is read on first use, and the files from which it can be opened again.

    Args:
        load: Reads the network, in evaluation mode.
        payloads: Gives its files by name; of a tuned network with the weights that it is handed,
            else (None) as they were.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        payloads: Callable[[nn.Module | None], dict[str, bytes]],
    ) -> None:
        self._load = load
        self._payloads = payloads
        self._module: nn.Module | None = None
        self._tuned: nn.Module | None = None
        self._hash: str | None = None

    @property
    def module(self) -> nn.Module:
        """The network."""
        if self._module is None:
            self._module = self._load()
        return self._module

    def replace(self, module: nn.Module) -> None:
        """Put a tuned network of the same architecture in place."""
        self._module = self._tuned = module
        self._hash = None

    def payloads(self) -> dict[str, bytes]:
        """Return the files by name."""
        return self._payloads(self._tuned)

    def hash(self, settings: Mapping[str, Any]) -> str:
        """Return one SHA-256 over files and settings."""
        if self._hash is None:
            self._hash = hash_files(self.payloads(), settings)
        return self._hash


class NetworkBackbone(ABC):
    """What backbones with weights have in common."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a manifest says beside the files."""

    @property
    def hash(self) -> str:
        """SHA-256 over files and settings."""
        return self._weights.hash(self.settings)

    @property
    def module(self) -> nn.Module:
        """The network, read when it is first needed."""
        return self._weights.module

    def replace_module(self, module: nn.Module) -> None:
        """Put a tuned network of the same architecture in place."""
        self._weights.replace(module)

    def payloads(self) -> dict[str, bytes]:
        """Return the network's files."""
        return self._weights.payloads()


def weights_file(weights: Mapping[str, Tensor]) -> bytes:
    """Return a network's weights as a safetensors file."""
    kept = {name: value.cpu().contiguous() for name, value in weights.items()}
    return safetensors.torch.save(kept, {"format": "pt"})


def device_of(module: nn.Module) -> torch.device:
    """Return where a network's weights lie."""
    return next(module.parameters()).device

"""A ranker as one ``torch.export`` program over plain tensors: what an export holds.

    values [V] int64, lengths [F, B] int32, dense [B, W] float32 -> logits [B, T] float32

Features stand one behind the other in the order of the batch's keys, rows within a feature; B is
1 or more, V may be 0. ``torch.export.load(path).module()`` runs it in any process that has
imported torch and fbgemm_gpu, whose operators look the tables up; nothing of this project or of
TorchRec is needed. The archive holds the graph as JSON and the tensors as raw bytes, no pickle:
only example inputs would be one, and they are left out. It is a program all the same, which the
loader trusts: hashes in the manifest tell damage, not malice.
Shape letters: B rows, F features, V values of all features, W dense width, T tasks.
May import: torch, torchrec.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_EXAMPLE_ROWS = 3
_NOISY = "torch._export.serde.serialize"
"""Logger that names, at each load, every size of a batch that the graph does not ask for."""


class ProgramRanker(nn.Module):
    """A loaded program behind the ranker's own signature.

    Args:
        program: Module of an exported program.
    """

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(
        self, sparse_features: KeyedJaggedTensor, dense_features_BW: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits ``[B, T]`` of a batch with the keys that were exported."""
        lengths_FB = sparse_features.lengths().view(len(sparse_features.keys()), -1)
        logits_BT: torch.Tensor = self.program(
            sparse_features.values(), lengths_FB, dense_features_BW
        )
        return logits_BT


class _PlainRanker(nn.Module):
    """A ranker that takes plain tensors."""

    def __init__(self, ranker: nn.Module, feature_names: Sequence[str]) -> None:
        super().__init__()
        self.ranker = ranker
        self.feature_names = list(feature_names)

    def forward(
        self, values_V: torch.Tensor, lengths_FB: torch.Tensor, dense_BW: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits ``[B, T]``."""
        features = KeyedJaggedTensor(
            keys=self.feature_names, values=values_V, lengths=lengths_FB.reshape(-1)
        )
        logits_BT: torch.Tensor = self.ranker(features, dense_BW)
        return logits_BT


def save_program(
    ranker: nn.Module, feature_names: Sequence[str], dense_width: int, num_levels: int
) -> bytes:
    """Return the archive of a ranker's program.

    Args:
        ranker: With quantized tables, in evaluation mode.
        feature_names: The batch's keys, in their order.
        dense_width: W.
        num_levels: Levels of the RQ codes: sequences hold a multiple of them per row.

    Returns:
        What ``torch.export.load`` reads.
    """
    # Traced with more rows than one, which torch would take for a constant; row 0 is in each table.
    lengths_FB = torch.full((len(feature_names), _EXAMPLE_ROWS), 2 * num_levels, dtype=torch.int32)
    values_V = torch.zeros(int(lengths_FB.sum()), dtype=torch.int64)
    example = (values_V, lengths_FB, torch.zeros(_EXAMPLE_ROWS, dense_width))
    with torch.no_grad():
        program = torch.export.export(
            _PlainRanker(ranker, feature_names),
            example,
            dynamic_shapes=({0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}),
            strict=False,
        )
    program.example_inputs = None
    _own_storage(program.state_dict)
    _own_storage(program.constants)
    archive = io.BytesIO()
    torch.export.save(program, archive)
    return archive.getvalue()


def load_program(archive: bytes) -> ProgramRanker:
    """Return the ranker of an archive, ready to score."""
    with _quiet():
        program = torch.export.load(io.BytesIO(archive))
    return ProgramRanker(program.module())


def _own_storage(tensors: dict[str, Any]) -> None:
    """Copy what lies within a larger storage, all of which torch would write."""
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(_NOISY)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

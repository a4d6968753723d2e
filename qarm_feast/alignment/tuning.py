"""Backbones whose weights are trained: low-rank adapters on attention (LoRA), or every weight.

Shape letters in this file: n items of a batch, D embedding width.
May import: torch; peft is imported on first use.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from qarm_feast.alignment.backbones.base import Backbone, TunableBackbone, is_tunable
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures
from qarm_feast.alignment.fusion import ContentFusion
from qarm_feast.alignment.modalities import content_values
from qarm_feast.errors import ConfigError, MissingDependencyError

logger = logging.getLogger(__name__)

_ATTENTION_NAMES = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))
"""What models call the layers that make queries and values: BERT and ViT, CLIP and wav2vec,
DistilBERT, MPNet and T5."""


def start_tuning(
    backbones: Mapping[str, Backbone], config: AlignmentConfig
) -> dict[str, TunableBackbone]:
    """Make the weights trainable that ``alignment.tuning`` names; all others are left frozen.

    Args:
        backbones: By modality; their modules are changed in place.
        config: Section ``alignment``, ``tuning`` being ``lora`` or ``full``.

    Returns:
        Those that have trainable weights now. With ``lora`` a backbone without attention stays
        frozen.

    Raises:
        ConfigError: If not one has any.
        MissingDependencyError: If ``peft`` is needed and not installed.
    """
    networks = {name: one for name, one in backbones.items() if is_tunable(one)}
    if config.tuning == "full":
        tuned = networks
        for backbone in tuned.values():
            backbone.module.requires_grad_(True)
    else:
        tuned = {name: one for name, one in networks.items() if _attention_layers(one.module)}
        for backbone in tuned.values():
            backbone.replace_module(_with_adapters(backbone.module, config.lora_rank))
    if not tuned:
        raise ConfigError(
            f"alignment.tuning is {config.tuning!r}, and none of the backbones of "
            f"{', '.join(backbones)} has layers for it (lora: attention with queries and values); "
            "set it to frozen or full, or name a transformer as backbone"
        )
    logger.info("tuning kind=%s modalities=%s", config.tuning, ",".join(tuned))
    return tuned


def finish_tuning(backbones: Mapping[str, Backbone]) -> None:
    """Add the adapters' products to the weights that they stand beside, and end all training."""
    for backbone in backbones.values():
        if not is_tunable(backbone):
            continue
        module = backbone.module
        if (merge := getattr(module, "merge_and_unload", None)) is not None:
            module = merge()
        backbone.replace_module(module.requires_grad_(False).eval())


class TunedItems(nn.Module):
    """Items whose embeddings have gradients down to the tuned backbones' weights.

    Args:
        items: Any content columns.
        features: Their features by the backbones as they were; still used for what is frozen, and
            for what is absent.
        tuned: Backbones to run again at every step, by modality.
        fusion: Makes embeddings of features.
        media_dir: Folder at which relative paths start.
    """

    def __init__(
        self,
        items: pa.Table,
        features: ItemFeatures,
        tuned: Mapping[str, TunableBackbone],
        fusion: ContentFusion,
        media_dir: Path | None,
    ) -> None:
        super().__init__()
        self._items = items
        self._features = features
        self._tuned = dict(tuned)
        self._media_dir = media_dir
        self.fusion = fusion
        self.backbones = nn.ModuleDict({name: one.module for name, one in tuned.items()})

    @property
    def module(self) -> nn.Module:
        """Backbones and fusion."""
        return self

    @property
    def present(self) -> Mapping[str, np.ndarray]:
        """Which items have a modality, bool ``[M]``, by modality."""
        return self._features.present

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._features)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return what is trained in the backbones."""
        return [one for one in self.backbones.parameters() if one.requires_grad]

    def train(self, mode: bool = True) -> "TunedItems":
        """Switch dropout; means and spreads of batch normalisation stay those of pre-training.

        A batch of pairs is no sample of the catalogue, and an export normalises no batch at all.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def embed(self, rows: np.ndarray) -> Tensor:
        """Return the embeddings of some items, L2-normalised: ``[n, D]``.

        Args:
            rows: Positions of the items; one that stands there twice is read twice.

        Returns:
            Embeddings on the fusion's device.
        """
        return self._embed(rows, tuple(self._tuned), self._features.present)

    def embed_view(self, modality: str, rows: np.ndarray) -> Tensor:
        """Return what one modality alone says of some items that have it ``[n, D]``."""
        read = (modality,) if modality in self._tuned else ()
        present = {
            name: is_present & (name == modality)
            for name, is_present in self._features.present.items()
        }
        return self._embed(rows, read, present)

    def _embed(
        self, rows: np.ndarray, read: Sequence[str], present: Mapping[str, np.ndarray]
    ) -> Tensor:
        """Embed items by features that are computed anew for some modalities."""
        device = next(self.fusion.parameters()).device
        features, _ = self._features.take(rows).tensors()
        items = self._items.take(pa.array(rows))
        for name in read:
            values = content_values(items, name, self._media_dir).values
            features[name], _ = self._tuned[name].forward(values)
        embeddings_nD: Tensor = self.fusion(
            {name: tokens.to(device) for name, tokens in features.items()},
            {name: torch.from_numpy(one[rows]).to(device) for name, one in present.items()},
        )
        return embeddings_nD


def _attention_layers(module: nn.Module) -> list[str]:
    """Return the last names of the layers for queries and values; none for other networks."""
    names = {
        name.rpartition(".")[2]
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return next((list(pair) for pair in _ATTENTION_NAMES if names.issuperset(pair)), [])


def _with_adapters(module: nn.Module, rank: int) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            package="peft",
            needed_for="alignment.tuning: lora",
            command='pip install "qarm-feast[lora]"',
        ) from error
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=_attention_layers(module)
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 for a property under its old name.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        adapted: nn.Module = peft.get_peft_model(module, settings)
    return adapted

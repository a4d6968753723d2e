"""The stage in which backbones are trained, together with a head that is trained already.

A head that starts at random would pull the backbones away from what they know (Kumar et al.,
"Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022).
Shape letters in this file: M train items, D embedding width.
May import: torch, pyarrow.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from qarm_feast.alignment.backbones.base import Backbone
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.features import ItemFeatures
from qarm_feast.alignment.fitting import RunFiles, TrainingRun
from qarm_feast.alignment.fusion import ContentFusion
from qarm_feast.alignment.pair_rows import PairRows
from qarm_feast.alignment.trainable import HeadItems, training_device
from qarm_feast.alignment.training import Training, TrainingData
from qarm_feast.alignment.tuning import TunedItems, finish_tuning, start_tuning


@dataclass(frozen=True)
class TunedContent:
    """Items and what reads them.

    Attributes:
        items: The train items.
        features: Their features by the backbones as they were.
        backbones: By modality; tuned in place.
        media_dir: Folder at which relative paths start.
    """

    items: pa.Table
    features: ItemFeatures
    backbones: dict[str, Backbone]
    media_dir: Path


class Tuning:
    """Trains backbones and head together.

    Args:
        content: Items and backbones.
        start: The head before its training; the geometry term keeps its cosines.
        config: Section ``alignment``.
        anchor_weight: Weight of the term that keeps items where ``start`` has them.
    """

    def __init__(
        self,
        content: TunedContent,
        start: ContentFusion,
        config: AlignmentConfig,
        anchor_weight: float = 0.0,
    ) -> None:
        self._content = content
        self._start = start
        self._anchor_weight = anchor_weight
        # That stage has been before, with the head alone.
        self._config = config.model_copy(update={"inter_content_epochs": 0})
        self._device = training_device(config)

    def train(
        self, head: ContentFusion, pairs: PairRows, head_run: TrainingRun, files: RunFiles | None
    ) -> TrainingRun:
        """Train, merge adapters, and leave all on the CPU.

        With ``auto`` the weight is that of the head, and the tuned model has to be surely better
        than the head alone.

        Args:
            head: The trained head; trained on in place.
            pairs: Pairs as rows of the items.
            head_run: How the head was trained.
            files: Where the run is kept.

        Returns:
            The run's figures.
        """
        assert head_run.geometry_weight is not None, "an untrained head is not tuned"
        content = self._content
        content_MD = HeadItems(self._start, content.features, self._device).embeddings()
        with torch.random.fork_rng(devices=[]):
            # Adapters start at random.
            torch.manual_seed(self._config.seed)
            tuned = start_tuning(content.backbones, self._config)
        items = TunedItems(content.items, content.features, tuned, head, content.media_dir)
        raw_ME = content.features.raw_vectors()
        data = TrainingData(items.to(self._device), pairs, content_MD, raw_ME, self._anchor_weight)
        run = Training(data, self._config, files, "tuned").run([head_run.geometry_weight])
        items.cpu()
        finish_tuning(content.backbones)
        return run

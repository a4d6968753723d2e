"""One training: pairs split by items, the geometry term's weight given or chosen, figures.

Shape letters in this file: M train items, D embedding width, E feature width, Q held-out items.
May import: torch, numpy.
"""

import copy
import logging
from dataclasses import replace

import numpy as np
from torch import Tensor

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.fitting import Fit, RunFiles, TrainingRun
from qarm_feast.alignment.gathering import said_by_first
from qarm_feast.alignment.geometry_choice import GEOMETRY_WEIGHTS, choose
from qarm_feast.alignment.held_out import HeldOutRanking, hold_items_out
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.trainer import PairTask, TrainableItems, embeddings, trained_tensors

logger = logging.getLogger(__name__)


class Training:
    """Trains a model in place on pairs of its items.

    Args:
        items: Items and model.
        content_MD: Embeddings whose cosines the geometry term keeps, on the model's device.
        raw_ME: Content vectors without any model, L2-normalised: a chosen weight has to beat
            them, too; None: there are none.
        pairs: All pairs.
        config: Section ``alignment``.
        files: Where the run is kept.
    """

    def __init__(
        self,
        items: TrainableItems,
        content_MD: Tensor,
        raw_ME: np.ndarray | None,
        pairs: PairRows,
        config: AlignmentConfig,
        files: RunFiles,
    ) -> None:
        self._generator = np.random.default_rng(config.seed)
        self._items = items
        self._content_MD = content_MD
        self._raw_ME = raw_ME
        self._config = config
        self._files = files
        self._negatives = BatchNegatives(pairs, len(items))
        self._split = hold_items_out(pairs, len(items), config.valid_item_share, self._generator)
        self._ranking = None
        if self._split.is_held_M.any():
            self._ranking = HeldOutRanking(self._split, self._negatives, config.seed)
        else:
            logger.warning(
                "alignment_validation num_pairs=%d: too few to hold any out, so training pairs "
                "tell when to stop", len(pairs),
            )  # fmt: skip

    def run(self) -> TrainingRun:
        """Train and return the figures; the model is the best one, in evaluation mode."""
        aucs = self._aucs_now("untrained") | self._raw_aucs()
        weight = self._config.geometry_weight
        if weight == "auto":
            run, tried = self._choose(list(aucs.values()))
            aucs |= tried
        else:
            run = self._fit(weight, self._config)
        aucs |= self._aucs_now("trained")
        means = {name: round(float(aucs_Q.mean()), 5) for name, aucs_Q in aucs.items()}
        return replace(run, held_out_auc=means)

    def _choose(self, content: list[np.ndarray]) -> tuple[TrainingRun, dict[str, np.ndarray]]:
        """Train with each weight and keep the best model, or the untrained one.

        Without held-out items nothing can prove itself, and nothing is tried.
        """
        start = self._snapshot()
        runs: dict[str, TrainingRun] = {}
        models: dict[str, dict[str, Tensor]] = {}
        aucs: dict[str, np.ndarray] = {}
        for weight in GEOMETRY_WEIGHTS if self._ranking is not None else ():
            self._put_back(start)
            name = f"weight_{weight:g}"
            runs[name] = self._fit(weight, self._config)
            models[name] = self._snapshot()
            aucs |= self._aucs_now(name)
        chosen = said_by_first(choose(aucs, content))
        logger.info("alignment_geometry_weight chosen=%s of=%s", chosen, list(aucs))
        self._put_back(start if chosen is None else models[chosen])
        if chosen is not None:
            return runs[chosen], aucs
        no_training = self._config.model_copy(update={"num_epochs": 0})
        return replace(self._fit(0.0, no_training), geometry_weight=None), aucs

    def _fit(self, weight: float, config: AlignmentConfig) -> TrainingRun:
        task = PairTask(self._items, self._content_MD, self._negatives, weight)
        fit = Fit(task, self._split, config, self._files, f"weight_{weight:g}")
        # Each weight sees the same batches.
        return fit.run(copy.deepcopy(self._generator))

    def _aucs_now(self, name: str) -> dict[str, np.ndarray]:
        """Return the AUC per held-out item under a name; nothing where no item is held out."""
        if self._ranking is None:
            return {}
        embeddings_UD = embeddings(self._items, self._ranking.items)
        return {name: self._ranking.aucs(embeddings_UD.cpu().numpy())}

    def _raw_aucs(self) -> dict[str, np.ndarray]:
        if self._ranking is None or self._raw_ME is None:
            return {}
        return {"raw": self._ranking.aucs(self._raw_ME[self._ranking.items])}

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in trained_tensors(self._items.module).items()}

    def _put_back(self, snapshot: dict[str, Tensor]) -> None:
        for name, tensor in trained_tensors(self._items.module).items():
            tensor.copy_(snapshot[name])

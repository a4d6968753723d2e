"""One training: pairs split by items, a first stage if wanted, the geometry weight given or chosen.

Shape letters in this file: M train items, D embedding width, E feature width.
May import: torch, numpy.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.fitting import Fit, RunFiles, RunPlace, TrainingRun
from qarm_feast.alignment.gathering import said_by_first
from qarm_feast.alignment.geometry_choice import DEFAULT_WEIGHT, GEOMETRY_WEIGHTS, choose
from qarm_feast.alignment.held_out import HeldOutRanking, hold_items_out
from qarm_feast.alignment.inter_content import ItemsWithViews, inter_content_task
from qarm_feast.alignment.pair_rows import BatchNegatives, PairRows
from qarm_feast.alignment.trainer import PairTask, embeddings, trained_tensors
from qarm_feast.alignment.training_state import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What a training learns from.

    Attributes:
        items: Items and model; the model is trained in place.
        pairs: All pairs.
        content_MD: Embeddings whose cosines the geometry term keeps, on the model's device.
        raw_ME: Content vectors without any model, L2-normalised: what is chosen by ``auto`` has to
            beat them, too.
        anchor_weight: Weight of the term that keeps items at ``content_MD`` itself.
    """

    items: ItemsWithViews
    pairs: PairRows
    content_MD: Tensor
    raw_ME: np.ndarray
    anchor_weight: float = 0.0


class Training:
    """Trains a model in place on pairs of its items.

    Args:
        data: What is learnt from.
        config: Section ``alignment``.
        files: Where its runs are kept; None: nowhere.
        name: Names it among the trainings of one encoder.
    """

    def __init__(
        self,
        data: TrainingData,
        config: AlignmentConfig,
        files: RunFiles | None,
        name: str,
    ) -> None:
        self._generator = np.random.default_rng(config.seed)
        self._items = data.items
        self._data = data
        self._config = config
        self._files = files
        self._name = name
        self._negatives = BatchNegatives(data.pairs, len(data.items))
        self._split = hold_items_out(
            data.pairs, len(data.items), config.valid_item_share, config.seed
        )
        self._ranking = None
        if self._split.is_held_M.any():
            self._ranking = HeldOutRanking(self._split, self._negatives, config.seed)
        else:
            logger.warning(
                "alignment_validation num_pairs=%d: too few to hold any out, so training pairs "
                "tell when to stop",
                len(data.pairs),
            )
        # Of the model as it is given, before anything of it is trained.
        self._fingerprint = self._run_fingerprint()

    def run(self, weights: Sequence[float] | None = None) -> TrainingRun:
        """Train and return the figures; the model is the best one, in evaluation mode.

        Args:
            weights: What ``auto`` tries, heaviest first; None: ``GEOMETRY_WEIGHTS``.

        Returns:
            Figures of the run whose model is kept.
        """
        start = self._snapshot()
        aucs = self._aucs_now("untrained") | self._raw_aucs()
        content = list(aucs.values())
        if self._config.inter_content_epochs:
            self._tie_modalities()
        weight = self._config.geometry_weight
        if weight == "auto":
            run, tried = self._choose(weights or GEOMETRY_WEIGHTS, content, start)
            aucs |= tried
        else:
            run = self._fit(weight, self._config)
        aucs |= self._aucs_now("trained")
        means = {name: round(float(aucs_Q.mean()), 5) for name, aucs_Q in aucs.items()}
        return replace(run, held_out_auc=means)

    def _tie_modalities(self) -> None:
        weight = self._config.geometry_weight
        task = inter_content_task(
            self._items,
            self._data.content_MD,
            self._split.is_held_M,
            DEFAULT_WEIGHT if weight == "auto" else weight,
        )
        config = self._config.model_copy(update={"num_epochs": self._config.inter_content_epochs})
        run = Fit(task, config, self._place("inter_content")).run(copy.deepcopy(self._generator))
        logger.info(
            "alignment_inter_content best_epoch=%d valid_losses=%s",
            run.best_epoch,
            run.valid_losses,
        )

    def _choose(
        self, weights: Sequence[float], content: list[np.ndarray], start: dict[str, Tensor]
    ) -> tuple[TrainingRun, dict[str, np.ndarray]]:
        """Train with each weight and keep the best model, or the one from before all training.

        Without held-out items nothing can prove itself, and nothing is tried.
        """
        tied = self._snapshot()
        runs: dict[str, TrainingRun] = {}
        models: dict[str, dict[str, Tensor]] = {}
        aucs: dict[str, np.ndarray] = {}
        for weight in weights if self._ranking is not None else ():
            self._put_back(tied)
            name = f"weight_{weight:g}"
            runs[name] = self._fit(weight, self._config)
            models[name] = self._snapshot()
            aucs |= self._aucs_now(name)
        chosen = said_by_first(choose(aucs, content))
        logger.info("alignment_geometry_weight chosen=%s of=%s", chosen, ",".join(aucs))
        self._put_back(start if chosen is None else models[chosen])
        if chosen is not None:
            return runs[chosen], aucs
        no_training = self._config.model_copy(update={"num_epochs": 0})
        return replace(self._fit(0.0, no_training), geometry_weight=None), aucs

    def _fit(self, weight: float, config: AlignmentConfig) -> TrainingRun:
        data = self._data
        task = PairTask(
            data.items, data.content_MD, self._split, self._negatives, weight, data.anchor_weight
        )
        place = self._place(f"weight_{weight:g}") if config.num_epochs else RunPlace("untrained")
        # Each weight sees the same batches.
        return Fit(task, config, place).run(copy.deepcopy(self._generator))

    def _place(self, run_name: str) -> RunPlace:
        return RunPlace(f"{self._name}_{run_name}", self._files, self._fingerprint)

    def _run_fingerprint(self) -> str:
        """Return a hash of settings, pairs, content and start; empty where nothing is kept."""
        if self._files is None:
            return ""
        tensors = [self._data.content_MD, *trained_tensors(self._items.module).values()]
        settings = self._config.model_dump_json(
            exclude={name for name in AlignmentConfig.model_fields if name.endswith("_uri")}
        )
        contents = (tensor.cpu().contiguous().numpy().tobytes() for tensor in tensors)
        return fingerprint(settings, self._data.pairs, contents)

    def _aucs_now(self, name: str) -> dict[str, np.ndarray]:
        """Return the AUC per held-out item under a name; nothing where no item is held out."""
        if self._ranking is None:
            return {}
        embeddings_UD = embeddings(self._items, self._ranking.items)
        return {name: self._ranking.aucs(embeddings_UD.cpu().numpy())}

    def _raw_aucs(self) -> dict[str, np.ndarray]:
        if self._ranking is None:
            return {}
        return {"raw": self._ranking.aucs(self._data.raw_ME[self._ranking.items])}

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in trained_tensors(self._items.module).items()}

    def _put_back(self, snapshot: dict[str, Tensor]) -> None:
        for name, tensor in trained_tensors(self._items.module).items():
            tensor.copy_(snapshot[name])

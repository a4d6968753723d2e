"""The arms of ``ranking_quality.py`` and their tuned settings.

An arm names the codes that it reads (``aligned``, ``raw``: codebooks on vectors of the aligned head
or of the content model; ``third_party``) and the keys of section ``ranker`` in which it differs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ALIGNED, RAW, THIRD_PARTY = "aligned", "raw", "third_party"

ID = ("user_id", "item_id", "user_columns", "item_columns", "history_item_id", "popularity")
RQ = ("rq_code", "history_rq_code")
VQ = ("vq_code",)
FULL_PARTS: Mapping[str, tuple[str, ...]] = {
    "rq": RQ,
    "vq": VQ,
    "vector": ("vector",),
    "cross": ("cross",),
    "attention": ("attention",),
    "shared_history": ("shared_history",),
    "code_cf": ("code_cf",),
}
"""Parts of the full model; each is left out once."""
FROZEN: Mapping[str, Any] = {"code_table_training": "frozen"}
RANDOM: Mapping[str, Any] = {"enable_centroid_start": False}
FULL = (*ID, *(feature for features in FULL_PARTS.values() for feature in features))

COMMON: Mapping[str, Any] = {
    "embedding_dim": 32,
    "expert_layer_sizes": (64,),
    "over_arch_layer_sizes": (64, 1),
    "batch_size": 512,
    "num_epochs": 8,
    "early_stopping_patience": 3,
}
EVALUATIONS_PER_EPOCH = 2
QUICK_ARMS = ("id", "fixed", "rq_vq", "full")


@dataclass(frozen=True)
class Arm:
    """One arm: its name, the codes it reads, its features, and further keys."""

    name: str
    codes: str
    features: tuple[str, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return the keys of section ``ranker`` that the arm sets, tuned ones included."""
        tuned = TUNED.get(self.name, TUNED_DEFAULT)
        return {**COMMON, **tuned, **self.overrides, "features": self.features}


TUNED_DEFAULT: Mapping[str, Any] = {"id_dropout": 0.8, "sparse_learning_rate": 0.02}
TUNED: Mapping[str, Mapping[str, Any]] = {}
"""What each arm's search found on valid rows, see ``ranking_tuning.py``."""


def all_arms(has_third_party_codes: bool) -> tuple[Arm, ...]:
    """Return every arm that the data allows, the baseline and the full model among them."""
    arms = [
        Arm("id", ALIGNED, ID),
        Arm("fixed", ALIGNED, (*ID, "vector"), {"vector_source": "raw"}),
        Arm("fixed_item_cf", ALIGNED, (*ID, "vector", "item_cf"), {"vector_source": "raw"}),
        Arm("fixed_aligned", ALIGNED, (*ID, "vector"), {"vector_source": "aligned"}),
        Arm("rq", ALIGNED, (*ID, *RQ)),
        Arm("vq", ALIGNED, (*ID, *VQ)),
        Arm("rq_vq", ALIGNED, (*ID, *RQ, *VQ)),
        Arm("raw_codes", RAW, (*ID, *RQ, *VQ)),
        Arm("frozen_centroid", ALIGNED, (*ID, *RQ, *VQ), FROZEN),
        Arm("frozen_random", ALIGNED, (*ID, *RQ, *VQ), {**FROZEN, **RANDOM}),
        Arm("trained_random", ALIGNED, (*ID, *RQ, *VQ), RANDOM),
        Arm("cross_attention", ALIGNED, (*ID, *RQ, *VQ, "cross", "attention")),
        Arm("code_cf", ALIGNED, (*ID, *RQ, *VQ, "code_cf")),
        Arm("full", ALIGNED, FULL),
    ]
    if has_third_party_codes:
        arms.append(Arm("third_party", THIRD_PARTY, (*ID, *RQ)))
    for part, features in FULL_PARTS.items():
        rest = tuple(feature for feature in FULL if feature not in features)
        arms.append(Arm(f"full_minus_{part}", ALIGNED, rest))
    return tuple(arms)


def chosen_arms(arms: Sequence[Arm], names: str | None) -> tuple[Arm, ...]:
    """Return the arms of a comma-separated list, or all.

    Args:
        arms: All arms.
        names: Names, or None.

    Raises:
        SystemExit: If there is no arm of that name.
    """
    if names is None:
        return tuple(arms)
    known = {arm.name: arm for arm in arms}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no such arms: {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in wanted)

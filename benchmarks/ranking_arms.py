"""The arms of ``ranking_quality.py`` and their tuned settings.

An arm names the codes that it reads (``aligned``, ``raw``: codebooks on vectors of the aligned head
or of the content model; ``third_party``) and the keys of section ``ranker`` in which it differs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ALIGNED, RAW, THIRD_PARTY = "aligned", "raw", "third_party"

ID = ("user_id", "item_id", "user_columns", "item_columns", "history_item_id", "popularity")
RQ = ("rq_code", "history_rq_code")
VQ = ("vq_code",)
FULL_PARTS: Mapping[str, tuple[str, ...]] = {
    "rq": RQ,
    "vq": VQ,
    "vector": ("vector", "aligned_cosine"),
    "cross": ("cross",),
    "cf": ("item_cf", "code_cf"),
}
"""Parts of the full model; each is left out once."""
FINER_PARTS: Mapping[str, tuple[str, ...]] = {
    "rq_vq": (*RQ, *VQ),
    "aligned_cosine": ("aligned_cosine",),
    "item_cf": ("item_cf",),
    "code_cf": ("code_cf",),
}
"""Left out where that is asked for."""
FULL = (*ID, *(feature for features in FULL_PARTS.values() for feature in features))
EXTRA_PARTS: Mapping[str, tuple[str, ...]] = {
    "prefix": ("prefix",),
    "attention": ("attention",),
    "shared_history": ("shared_history",),
}
"""Parts that did not pay on valid rows; each is added to the full model where it is asked for."""
EXTRA_ARM = "full_plus_"
BY_NAME_ONLY = (
    "trained_random",
    "fixed_code_cf",
    "code_cf",
    *(f"full_minus_{part}" for part in FINER_PARTS),
    *(f"{EXTRA_ARM}{part}" for part in EXTRA_PARTS),
)
"""Arms that no difference of the protocol asks for."""

FROZEN: Mapping[str, Any] = {"code_table_training": "frozen"}
RANDOM: Mapping[str, Any] = {"enable_centroid_start": False}
RAW_VECTOR: Mapping[str, Any] = {"vector_source": "raw"}
COMMON: Mapping[str, Any] = {
    "batch_size": 2048,
    "embedding_dim": 32,
    "dense_arch_layer_sizes": (64,),
    "head": "shared_bottom",
    "expert_layer_sizes": (64,),
    "over_arch_layer_sizes": (64, 1),
    "id_dropout": 0.8,
    "code_dropout": 0.4,
    "dense_average_decay": 0.98,
    "num_epochs": 8,
    "early_stopping_patience": 3,
    "held_eval_rows": 65536,
    # Runs share the cores: nothing is gained by reading ahead.
    "num_input_threads": 0,
}
EVALUATIONS_PER_EPOCH = 2
SETTINGS_PATH = Path(__file__).with_name("ranking_settings.json")
SEARCHED: tuple[Mapping[str, Any], ...] = tuple(
    {
        "sparse_learning_rate": sparse_rate,
        "centroid_scale": scale,
        "embedding_dropout": dropout,
        "learning_rate": rate,
    }
    for sparse_rate, scale, dropout, rate in (
        (0.02, 0.1, 0.2, 2e-3),
        (0.02, 0.1, 0.0, 2e-3),
        (0.005, 0.3, 0.2, 2e-3),
        (0.02, 0.1, 0.2, 4e-3),
    )
)
"""What every arm may choose from, on valid rows."""
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
        return {**COMMON, **tuned(self.name), **self.overrides, "features": self.features}


def tuned(arm_name: str) -> Mapping[str, Any]:
    """Return what an arm's search found, see ``ranking_tuning.py``.

    Variants of the full model that were not searched for take what it found.
    """
    found: Mapping[str, Mapping[str, Any]] = json.loads(SETTINGS_PATH.read_text("utf-8"))
    return found.get(arm_name, found["full"] if arm_name.startswith("full_") else SEARCHED[0])


def all_arms(has_third_party_codes: bool) -> tuple[Arm, ...]:
    """Return every arm that the data allows, the baseline and the full model among them."""
    coded = (*ID, *RQ, *VQ)
    arms = [
        Arm("id", ALIGNED, ID),
        Arm("fixed", ALIGNED, (*ID, "vector"), RAW_VECTOR),
        Arm("full", ALIGNED, FULL, RAW_VECTOR),
        Arm("rq_vq", ALIGNED, coded),
        Arm("raw_codes", RAW, coded),
        Arm("frozen_centroid", ALIGNED, coded, FROZEN),
        Arm("frozen_random", ALIGNED, coded, {**FROZEN, **RANDOM}),
        Arm("trained_random", ALIGNED, coded, RANDOM),
        Arm("fixed_item_cf", ALIGNED, (*ID, "vector", "item_cf"), RAW_VECTOR),
        Arm("fixed_code_cf", ALIGNED, (*ID, "vector", "code_cf"), RAW_VECTOR),
        Arm("fixed_aligned", ALIGNED, (*ID, "vector")),
        Arm("rq", ALIGNED, (*ID, *RQ)),
        Arm("vq", ALIGNED, (*ID, *VQ)),
        Arm("prefix", ALIGNED, (*coded, "prefix")),
        Arm("cross_attention", ALIGNED, (*coded, "cross", "attention")),
        Arm("code_cf", ALIGNED, (*coded, "code_cf")),
    ]
    if has_third_party_codes:
        arms.append(Arm("third_party", THIRD_PARTY, (*ID, *RQ)))
    for part, features in {**FULL_PARTS, **FINER_PARTS}.items():
        rest = tuple(feature for feature in FULL if feature not in features)
        arms.append(Arm(f"full_minus_{part}", ALIGNED, rest, RAW_VECTOR))
    for part, features in EXTRA_PARTS.items():
        arms.append(Arm(f"{EXTRA_ARM}{part}", ALIGNED, (*FULL, *features), RAW_VECTOR))
    return tuple(arms)


def chosen_arms(arms: Sequence[Arm], names: str | None) -> tuple[Arm, ...]:
    """Return the arms of a comma-separated list, or those that run by default.

    Args:
        arms: All arms.
        names: Names, or None for all arms but those of :data:`BY_NAME_ONLY`.

    Raises:
        SystemExit: If there is no arm of that name.
    """
    if names is None:
        return tuple(arm for arm in arms if arm.name not in BY_NAME_ONLY)
    known = {arm.name: arm for arm in arms}
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no such arms: {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in wanted)

"""Does alignment place items as users do: raw, aligned and decoded vectors side by side.

The command reads validation rows alone, because what it prints may choose an encoder; test rows
are for a finished benchmark.

Shape letters in this file: M items (rows of ``items``), D vector width, S samples (query items or
users), B bootstrap draws.
May import: numpy, the protocols, the input data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qarm_feast.alignment.config import EvaluationConfig
from qarm_feast.alignment.later_behaviour import LaterBehaviour, read_behaviour
from qarm_feast.alignment.protocols import (
    RECALL_AT,
    item_cf_hits,
    neighbor_auc,
    zero_shot_hits,
)
from qarm_feast.input_data import InputData
from qarm_feast.quantizers.base import Embeddings

NEIGHBOR_AUC = "neighbor_auc"
ZERO_SHOT = f"zero_shot_recall_at_{RECALL_AT}"
ITEM_CF = f"item_cf_recall_at_{RECALL_AT}"
_PROTOCOLS: dict[str, Callable[[LaterBehaviour, Embeddings], np.ndarray]] = {
    NEIGHBOR_AUC: neighbor_auc,
    ZERO_SHOT: zero_shot_hits,
    ITEM_CF: item_cf_hits,
}
MEASURES = tuple(_PROTOCOLS)
SLICES = ("all", "warm", "cold")
RAW = "raw"
INTERVAL = (0.025, 0.975)
_DRAWS_PER_BLOCK = 64


@dataclass(frozen=True)
class Measured:
    """One measure of every kind of vectors, sample by sample.

    Attributes:
        values_by_name: Per kind of vectors float64 ``[S]``, in one order of samples.
        is_cold_S: Whether a sample's item (of a user: the next item) has no train row.
    """

    values_by_name: dict[str, np.ndarray]
    is_cold_S: np.ndarray

    def slices(self) -> dict[str, np.ndarray]:
        """Return the mask of each slice that holds a sample, by name."""
        masks = (np.ones(len(self.is_cold_S), dtype=bool), ~self.is_cold_S, self.is_cold_S)
        return {key: mask for key, mask in zip(SLICES, masks, strict=True) if mask.any()}


def evaluate_vectors(
    checked: InputData,
    vectors: Mapping[str, Embeddings],
    config: EvaluationConfig = EvaluationConfig(),  # noqa: B008 - frozen, without arguments
) -> dict[str, Any]:
    """Return the measures of each kind of vectors on validation rows, ready for JSON.

    Args:
        checked: Input data.
        vectors: Vectors of ``checked.items`` by name; ``raw`` is what others are
            held against.
        config: Draws and most queries.

    Returns:
        See :func:`report_of`.
    """
    behaviour = read_behaviour(checked, "valid", max_queries=config.max_queries)
    return report_of(measure_vectors(behaviour, vectors), config.num_draws)


def measure_vectors(
    behaviour: LaterBehaviour, vectors: Mapping[str, Embeddings]
) -> dict[str, Measured]:
    """Return every measure of every kind of vectors.

    Args:
        behaviour: What users did later.
        vectors: Vectors by name: L2-normalised, or decoded.

    Returns:
        ``Measured`` by name of the measure, in the order of ``MEASURES``.
    """
    is_cold_query = behaviour.is_cold_M[behaviour.query_items_Q]
    is_cold_next = behaviour.is_cold_M[behaviour.next_items_U]
    return {
        measure: Measured(
            {name: protocol(behaviour, vectors_MD) for name, vectors_MD in vectors.items()},
            is_cold_next if measure == ZERO_SHOT else is_cold_query,
        )
        for measure, protocol in _PROTOCOLS.items()
    }


def report_of(measured: Mapping[str, Measured], num_draws: int) -> dict[str, Any]:
    """Return means, intervals and gains over raw vectors, by slice.

    Args:
        measured: What :func:`measure_vectors` returned.
        num_draws: Bootstrap draws of samples.

    Returns:
        Per kind of vectors ``<measure>_<slice>``: means; a slice (all, warm, cold) that holds no
        sample is left out. ``counts``: ``num_queries_<slice>`` (items) and ``num_users_<slice>``.
        ``intervals``: per kind and ``<measure>_<slice>`` the 95 % interval of the mean. ``gains``:
        per kind but raw and ``<measure>_<slice>`` the paired difference to raw: ``gain``, ``low``,
        ``high``, ``num_samples``.
    """
    names = list(measured[NEIGHBOR_AUC].values_by_name)
    report: dict[str, Any] = {"counts": _counts(measured)}
    report |= {name: {} for name in names}
    report["intervals"] = {name: {} for name in names}
    report["gains"] = {name: {} for name in names if name != RAW and RAW in names}
    for measure, each in measured.items():
        for key, mask_S in each.slices().items():
            values = {name: values_S[mask_S] for name, values_S in each.values_by_name.items()}
            drawn = bootstrap_means(np.column_stack(list(values.values())), num_draws)
            draws = dict(zip(names, drawn.T, strict=True))
            for name in names:
                report[name][f"{measure}_{key}"] = float(values[name].mean())
                report["intervals"][name][f"{measure}_{key}"] = interval(draws[name])
            for name, gains in report["gains"].items():
                low, high = interval(draws[name] - draws[RAW])
                gains[f"{measure}_{key}"] = {
                    "gain": float(values[name].mean() - values[RAW].mean()),
                    "low": low,
                    "high": high,
                    "num_samples": int(mask_S.sum()),
                }
    return report


def _counts(measured: Mapping[str, Measured]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for noun, measure in (("num_queries", NEIGHBOR_AUC), ("num_users", ZERO_SHOT)):
        counts |= {f"{noun}_{key}": 0 for key in SLICES}
        counts |= {f"{noun}_{k}": int(mask.sum()) for k, mask in measured[measure].slices().items()}
    return counts


def bootstrap_means(values_SX: np.ndarray, num_draws: int, seed: int = 0) -> np.ndarray:
    """Return the means of as many samples as there are, drawn with replacement.

    Args:
        values_SX: At least one sample per row; columns are drawn together, so that differences of
            them are paired.
        num_draws: Draws.
        seed: Seed of the draws.

    Returns:
        Float64 ``[B, X]``.
    """
    generator = np.random.default_rng(seed)
    num_samples = len(values_SX)
    chances_S = np.full(num_samples, 1.0 / num_samples)
    parts = []
    for begin in range(0, num_draws, _DRAWS_PER_BLOCK):
        size = min(_DRAWS_PER_BLOCK, num_draws - begin)
        weights_BS = generator.multinomial(num_samples, chances_S, size)
        parts.append(weights_BS @ values_SX / num_samples)
    return np.concatenate(parts)


def interval(draws_B: np.ndarray) -> list[float]:
    """Return low and high end of the 95 % interval of bootstrap draws."""
    return [float(end) for end in np.quantile(draws_B, INTERVAL)]


def vector_names(report: Mapping[str, Any]) -> list[str]:
    """Return the kinds of vectors of a report, in their order."""
    return list(report["intervals"])


def format_report(report: Mapping[str, Any]) -> str:
    """Return the report as a text table: per measure each kind of vectors, and its gain over raw.

    Args:
        report: What :func:`report_of` returned.

    Returns:
        Lines without a last line break.
    """
    names = vector_names(report)
    measures = list(dict.fromkeys(key for name in names for key in report[name]))
    width = max([12, *(len(name) + 2 for name in names)])
    lines = [f"{'validation rows':<28}" + "".join(f"{name:>{width}}" for name in names)]
    for measure in measures:
        cells = "".join(f"{report[name][measure]:>{width}.4f}" for name in names)
        lines.append(f"{measure:<28}{cells}")
    for name, gains in report["gains"].items():
        for measure, gain in gains.items():
            ends = f"[{gain['low']:+.4f}, {gain['high']:+.4f}]"
            lines.append(f"{name} - raw {measure}: {gain['gain']:+.4f} {ends}")
    if not measures:
        lines = ["nothing was measured: no validation row is positive (see data.valid_days)"]
    counts = ", ".join(f"{key} {int(value):,}" for key, value in report["counts"].items())
    return "\n".join([*lines, counts])

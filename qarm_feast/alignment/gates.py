"""May an encoder be exported: its evaluation held against ``alignment.gates``.

A gate reads one gain (aligned less raw) of the report. It refuses when the upper end of the 95 %
paired bootstrap interval of that gain lies below its limit, so that at the default limit of 0 only
an encoder that is worse than raw vectors beyond noise is refused. A gain of fewer than
``min_num_samples`` items or users is not read; if none can be read at all, the encoder is refused
unless ``allow_unmeasured`` says otherwise.

May import: the configuration and the errors.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from qarm_feast.alignment.config import EncoderGateConfig
from qarm_feast.errors import GateRefusedError

GATE_MEASURES = {
    "min_neighbor_auc_gain": "neighbor_auc_all",
    "min_neighbor_auc_gain_warm": "neighbor_auc_warm",
    "min_neighbor_auc_gain_cold": "neighbor_auc_cold",
    "min_zero_shot_gain": "zero_shot_recall_at_10_all",
    "min_item_cf_gain": "item_cf_recall_at_10_all",
}
"""Gate to the measure of the report that it reads."""


class EncoderGateReading(NamedTuple):
    """What a gate measures, and its limit (None: switched off).

    ``raw``, ``aligned``, ``low`` and ``high`` (the interval of their difference) are None where
    nothing was measured.
    """

    name: str
    measure: str
    num_samples: int
    raw: float | None
    aligned: float | None
    low: float | None
    high: float | None
    limit: float | None
    verdict: Literal["kept", "missed", "off", "unmeasured"]

    def __str__(self) -> str:
        """Return what stands in the error and in the output."""
        if self.limit is None:
            return f"{self.name}: off"
        if self.raw is None or self.aligned is None:
            return f"{self.name}: not read, {self.measure} was not measured"
        told = (
            f"{self.name}: {self.measure} of aligned {self.aligned:.4f}, of raw {self.raw:.4f}, "
            f"difference {self.aligned - self.raw:+.4f} [{self.low:+.4f}, {self.high:+.4f}] over "
            f"{self.num_samples:,} samples"
        )
        if self.verdict == "unmeasured":
            return f"{told}: not read, too few samples"
        return f"{told}, least upper end {self.limit:+.4f}: {self.verdict}"


def gate_readings(report: Mapping[str, Any], gates: EncoderGateConfig) -> list[EncoderGateReading]:
    """Return what each gate says of an evaluation.

    Args:
        report: What :func:`qarm_feast.alignment.evaluate.evaluate_vectors` returned for vectors
            ``raw`` and ``aligned``, also after a way through JSON.
        gates: The limits.

    Returns:
        One reading per gate, in the order of ``GATE_MEASURES``.
    """
    return [_reading(report, gates, name) for name in GATE_MEASURES]


def check_gates(report: Mapping[str, Any], gates: EncoderGateConfig) -> list[EncoderGateReading]:
    """Return what each gate says; refuse an encoder that a gate does not let pass.

    Args:
        report: An evaluation, see :func:`gate_readings`.
        gates: The limits.

    Returns:
        One reading per gate; some may be off or unmeasured.

    Raises:
        GateRefusedError: If a gate is missed, or gates are on and none could be read while
            ``allow_unmeasured`` is false.
    """
    readings = gate_readings(report, gates)
    missed = [reading for reading in readings if reading.verdict == "missed"]
    name = report.get("encoder_version", "")
    if missed:
        lines = "\n".join(f"  - {reading}" for reading in missed)
        raise GateRefusedError(
            f"encoder {name!r} is worse than the raw vectors on validation rows:\n{lines}\n"
            "train another with a larger alignment.geometry_weight or other pairs "
            "(`qarm align train` under a new alignment.encoder_version), or change alignment.gates"
        )
    is_read = any(reading.verdict == "kept" for reading in readings)
    is_on = any(reading.verdict != "off" for reading in readings)
    if is_on and not is_read and not gates.allow_unmeasured:
        raise GateRefusedError(
            f"no gate can be read for encoder {name!r}: {_counts(report)} in the validation rows, "
            f"a gate needs {gates.min_num_samples}; give the data validation rows "
            "(data.valid_days) and run `qarm align evaluate` again, or set "
            "alignment.gates.allow_unmeasured: true"
        )
    return readings


def _reading(report: Mapping[str, Any], gates: EncoderGateConfig, name: str) -> EncoderGateReading:
    measure, limit = GATE_MEASURES[name], getattr(gates, name)
    gain = report.get("gains", {}).get("aligned", {}).get(measure)
    if gain is None:
        verdict: Literal["off", "unmeasured"] = "off" if limit is None else "unmeasured"
        return EncoderGateReading(name, measure, 0, None, None, None, None, limit, verdict)
    return EncoderGateReading(
        name=name,
        measure=measure,
        num_samples=gain["num_samples"],
        raw=report["raw"][measure],
        aligned=report["aligned"][measure],
        low=gain["low"],
        high=gain["high"],
        limit=limit,
        verdict=_verdict(gain, limit, gates.min_num_samples),
    )


def _verdict(
    gain: Mapping[str, Any], limit: float | None, min_num_samples: int
) -> Literal["kept", "missed", "off", "unmeasured"]:
    if limit is None:
        return "off"
    if gain["num_samples"] < min_num_samples:
        return "unmeasured"
    return "kept" if gain["high"] >= limit else "missed"


def _counts(report: Mapping[str, Any]) -> str:
    counts = report.get("counts", {})
    return f"{counts.get('num_queries_all', 0)} items and {counts.get('num_users_all', 0)} users"

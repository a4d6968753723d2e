import json
from typing import Any

import pytest

from qarm_feast.alignment.config import EncoderGateConfig
from qarm_feast.alignment.gates import GATE_MEASURES, check_gates, gate_readings
from qarm_feast.errors import GateRefusedError


def a_report(**gains: tuple[float, float, float, int]) -> dict[str, Any]:
    """Return an evaluation: per measure gain, ends of its interval, samples; raw is at 0.5."""
    return {
        "encoder_version": "e3",
        "counts": {"num_queries_all": 7, "num_users_all": 5},
        "raw": dict.fromkeys(gains, 0.5),
        "aligned": {measure: 0.5 + gain for measure, (gain, *_) in gains.items()},
        "gains": {
            "aligned": {
                measure: {"gain": gain, "low": low, "high": high, "num_samples": num_samples}
                for measure, (gain, low, high, num_samples) in gains.items()
            }
        },
    }


def test_worse_within_noise_passes_and_beyond_noise_is_refused_with_both_values() -> None:
    noise = a_report(neighbor_auc_all=(-0.01, -0.03, 0.001, 500))
    worse = a_report(
        neighbor_auc_all=(0.02, 0.01, 0.03, 500), neighbor_auc_cold=(-0.02, -0.03, -0.001, 60)
    )

    readings = check_gates(json.loads(json.dumps(noise)), EncoderGateConfig())
    with pytest.raises(GateRefusedError) as refused:
        check_gates(worse, EncoderGateConfig())

    assert [each.verdict for each in readings] == ["kept"] + ["unmeasured"] * 4
    message = str(refused.value)
    assert "encoder 'e3' is worse than the raw vectors" in message
    assert "min_neighbor_auc_gain_cold: neighbor_auc_cold of aligned 0.4800, of raw 0.5000" in (
        message
    )
    assert "[-0.0300, -0.0010] over 60 samples" in message
    assert "min_neighbor_auc_gain:" not in message
    assert "qarm align train" in message


@pytest.mark.parametrize("gate", GATE_MEASURES)
def test_every_gate_refuses_what_it_reads_and_null_switches_it_off(gate: str) -> None:
    report = a_report(**{GATE_MEASURES[gate]: (0.03, 0.01, 0.05, 100)})

    kept = check_gates(report, EncoderGateConfig(**{gate: 0.05}))
    off = check_gates(report, EncoderGateConfig(**{gate: None}, allow_unmeasured=True))
    with pytest.raises(GateRefusedError, match=f"{gate}: .* least upper end"):
        check_gates(report, EncoderGateConfig(**{gate: 0.06}))

    place = list(GATE_MEASURES).index(gate)
    assert (kept[place].verdict, off[place].verdict) == ("kept", "off")


def test_few_samples_are_not_read() -> None:
    report = a_report(neighbor_auc_cold=(-0.2, -0.3, -0.1, 19), neighbor_auc_all=(0.1, 0, 0.2, 20))

    readings = check_gates(report, EncoderGateConfig())

    assert [each.verdict for each in readings[:3]] == ["kept", "unmeasured", "unmeasured"]
    assert "too few samples" in str(readings[2])
    with pytest.raises(GateRefusedError, match="neighbor_auc_cold"):
        check_gates(report, EncoderGateConfig(min_num_samples=19))


def test_an_encoder_of_which_nothing_was_measured_is_refused_unless_that_is_allowed() -> None:
    report = a_report()

    with pytest.raises(GateRefusedError, match="7 items and 5 users in the validation rows") as no:
        check_gates(report, EncoderGateConfig())
    readings = check_gates(report, EncoderGateConfig(allow_unmeasured=True))
    all_off = EncoderGateConfig(**dict.fromkeys(GATE_MEASURES))

    assert "alignment.gates.allow_unmeasured: true" in str(no.value)
    assert {each.verdict for each in readings} == {"unmeasured"}
    # Who switches every gate off asks for no measurement.
    assert {each.verdict for each in check_gates(report, all_off)} == {"off"}
    assert gate_readings(report, all_off) == check_gates(report, all_off)

"""The refresh and the trainer benchmark: their made data, and shortened runs.

Shape letters in this file: N items.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from benchmarks import refresh
from benchmarks.drift import Drift, planted_drift
from benchmarks.trainer_ranks import growth, measured
from benchmarks.trainer_rows import publish_made_rows
from qarm_feast.alignment.config import AlignmentConfig
from torchrec_models.config import RankerConfig
from torchrec_models.sharding import process_group


@pytest.fixture(scope="module")
def drift(tmp_path_factory: pytest.TempPathFactory) -> Drift:
    return planted_drift(tmp_path_factory.mktemp("made") / "data", num_items=200, num_users=30)


def test_the_planted_part_alone_changes_its_neighbours(drift: Drift) -> None:
    first_NN, second_NN = (
        each.aligned_ND @ each.aligned_ND.T for each in (drift.before, drift.after)
    )
    kept = ~drift.is_moved_N

    assert 0.1 < drift.is_moved_N.mean() < 0.4
    np.testing.assert_allclose(
        first_NN[np.ix_(kept, kept)], second_NN[np.ix_(kept, kept)], atol=1e-5
    )
    changed_N = np.abs(first_NN - second_NN)[:, kept].max(axis=1)
    assert changed_N[drift.is_moved_N].min() > 0.5
    assert np.abs(drift.before.aligned_ND - drift.after.aligned_ND).mean() > 0.1


def test_a_refresh_learns_from_train_and_valid_rows_and_test_rows_stay(drift: Drift) -> None:
    before = drift.checked.interactions["split"].to_pylist()

    after = refresh.refreshed_data(drift.checked).interactions["split"].to_pylist()

    assert [name.replace("valid", "train") for name in before] == after
    assert pc.sum(pc.equal(drift.checked.interactions["split"], "valid")).as_py() == 300


def test_the_refreshed_encoder_goes_on_from_the_first_unless_told_not_to(drift: Drift) -> None:
    config = AlignmentConfig(num_epochs=1, embedding_dim=32, geometry_weight=100.0)

    before, after = refresh.vectors_of_both(drift.checked, config, goes_on=True)
    _, fresh = refresh.vectors_of_both(drift.checked, config, goes_on=False)

    def moved(x_ND: np.ndarray) -> float:
        return float(1 - (x_ND * before.aligned_ND).sum(axis=1).mean())

    assert moved(after.aligned_ND) < 0.05
    assert moved(after.aligned_ND) < moved(fresh.aligned_ND)


def test_a_shortened_run_reports_every_arm_with_intervals_and_truth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(refresh, "DRIFT_SIZES", {True: (300, 60)})
    arguments = ["refresh.py", "--quick", "--cases", "drift", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", arguments)

    refresh.main()

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = result["figures"]
    for suffix in ("", "_retrained"):
        stale, naive, kept = (figures[f"auc_{arm}{suffix}_drift"] for arm in refresh.ARMS)
        assert figures[f"kept_minus_stale{suffix}_auc_drift"] == pytest.approx(
            kept - stale, abs=2e-5
        )
        low, high = (
            figures[f"naive_minus_stale{suffix}_auc_{end}_drift"] for end in ("low", "high")
        )
        assert low <= naive - stale + 2e-5
        assert naive - stale - 2e-5 <= high
    assert figures["churn_kept_drift"] < figures["churn_naive_drift"]
    assert figures["churn_lists_kept_drift"] <= figures["churn_lists_nearest_drift"]
    assert 0.5 < figures["list_neighbor_recall_kept_drift"] <= 1
    assert result["targets"] == {"kept_minus_stale_auc_drift": {"op": "ge", "value": 0.0}}


def test_the_trainer_is_measured_against_its_rivals_in_one_run(tmp_path: Path) -> None:
    keys = {"embedding_dim": 8, "batch_size": 64, "num_epochs": 1, "enable_centroid_start": False}
    config = RankerConfig.model_validate(keys | {"eval_every_steps": 10**9})
    inputs = publish_made_rows(tmp_path / "rows", num_rows=400, num_items=50)

    with process_group() as ranks:
        figures = measured(config, inputs, ranks) | growth(config, num_rows=1000)

    ratios = ("trainer_vs_bare_loop", "input_vs_training", "trainer_vs_plain_torch")
    assert all(figures[name] > 0 for name in (*ratios, "samples_per_second_1e3_rows"))
    parts = [figures[f"time_share_{name}"] for name in ("embedding", "dense", "input")]
    assert sum(parts) == pytest.approx(1)

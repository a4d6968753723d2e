"""The ranker benchmarks' own parts, and a quick run on tiny data.

Shape letters in this file: N rows, B draws, S seeds.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import ranking_arms, ranking_quality, ranking_tuning
from benchmarks.ranking_arms import all_arms, chosen_arms
from benchmarks.ranking_data import moved_back, third_party_items, with_fewer_users
from benchmarks.user_bootstrap import interval, seed_mean_aucs, user_weights, weighted_aucs
from qarm_feast.input_data import DataConfig, load_input_data
from torchrec_models.metrics import auc

DAY = 86_400_000_000
TIME = pa.timestamp("us", tz="UTC")


def _write_data(folder: Path, *, num_tasks: int, has_users: bool, has_split: bool) -> Path:
    """Write items of two kinds with ready vectors; a user likes those of one kind."""
    generator = np.random.default_rng(0)
    num_items, num_users, rows_per_user = 60, 30, 20
    kinds = np.arange(num_items) % 2
    vectors = generator.normal(size=(num_items, 16)) + 2 * kinds[:, None]
    folder.mkdir()
    pq.write_table(
        pa.table(
            {
                "item_id": pa.array(np.arange(num_items) + 100),
                "upload_timestamp": pa.array(np.zeros(num_items, dtype=np.int64), TIME),
                "genre": pa.array([f"g{kind}" for kind in kinds]),
                "embedding": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.astype(np.float32).ravel()), 16
                ),
            }
        ),
        folder / "items.parquet",
    )
    users = np.repeat(np.arange(num_users), rows_per_user)
    items = generator.integers(0, num_items, len(users))
    columns = {
        "user_id": pa.array(users),
        "item_id": pa.array(items + 100),
        "event_timestamp": pa.array(
            DAY + np.tile(np.arange(rows_per_user), num_users) * DAY + users, TIME
        ),
        "is_like": pa.array(kinds[items] == users % 2),
    }
    if num_tasks == 2:
        columns["is_love"] = pa.array((kinds[items] == users % 2) & (items % 3 == 0))
    if has_split:
        parts = np.array(["train", "valid", "test"])
        places = np.tile(np.arange(rows_per_user), num_users)
        columns["split"] = pa.array(parts[(places >= 12).astype(int) + (places >= 16)])
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    if has_users:
        ids = np.arange(num_users)
        users_table = pa.table({"user_id": pa.array(ids), "age": pa.array(ids % 5)})
        pq.write_table(users_table, folder / "users.parquet")
    return folder


def _result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict:
    monkeypatch.setattr(sys, "argv", ["ranking_quality.py", *arguments])

    ranking_quality.main()

    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_auc_of_weighted_rows_is_the_auc_of_rows_repeated_so_often() -> None:
    generator = np.random.default_rng(0)
    scores_N = generator.integers(0, 5, 40).astype(np.float32)
    labels_N = generator.random(40) < 0.4
    weights_NB = generator.integers(0, 4, (40, 7)).astype(np.float32)

    found_B = weighted_aucs(scores_N, labels_N, weights_NB)

    expected_B = []
    for weights_N in weights_NB.T.astype(int):
        rows = np.repeat(np.arange(40), weights_N)
        expected_B.append(auc(scores_N[rows].astype(float), labels_N[rows]))
    np.testing.assert_allclose(found_B, expected_B)


def test_an_auc_without_both_classes_is_not_a_number() -> None:
    weights_NB = np.array([[1, 0], [1, 1]], dtype=np.float32)

    found_B = weighted_aucs(np.array([0.1, 0.2]), np.array([False, True]), weights_NB)

    assert found_B[0] == 1
    assert np.isnan(found_B[1])


def test_a_draw_takes_all_rows_of_a_user_and_as_many_users_as_there_are() -> None:
    users_N = np.array([7, 9, 7, 3])

    weights_NB = user_weights(users_N, num_draws=50)

    assert (weights_NB[:, 0] == 1).all()
    assert (weights_NB[0] == weights_NB[2]).all()
    assert (weights_NB[[0, 1, 3]].sum(axis=0) == 3).all()


def test_aucs_are_averaged_over_seeds_and_the_interval_leaves_the_first_value_out() -> None:
    labels_N = np.array([False, True, True])
    scores_SN = [np.array([0.0, 1.0, 2.0]), np.array([2.0, 1.0, 0.0])]

    mean_B = seed_mean_aucs(scores_SN, labels_N, np.ones((3, 1), dtype=np.float32))
    low, high = interval(np.array([99.0, *np.linspace(0, 1, 41)]))

    assert mean_B.tolist() == [0.5]
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_arms_have_names_of_their_own_and_only_known_ones_can_be_chosen() -> None:
    arms = all_arms(has_third_party_codes=True)

    assert len({arm.name for arm in arms}) == len(arms)
    assert [arm.name for arm in chosen_arms(arms, "full,id")] == ["full", "id"]
    by_default = [arm.name for arm in chosen_arms(arms, None)]
    assert {arm.name for arm in arms} - set(by_default) == {
        "trained_random",
        "full_minus_rq_vq",
        "full_minus_aligned_cosine",
        "full_minus_item_cf",
        "full_minus_code_cf",
        "fixed_code_cf",
        "code_cf",
        "full_plus_prefix",
        "full_plus_attention",
        "full_plus_shared_history",
    }
    with pytest.raises(SystemExit, match="no such arms: nothing; there are id, fixed"):
        chosen_arms(arms, "id,nothing")


def test_a_varied_key_leaves_an_arm_all_else_that_it_runs_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"fixed": ranking_arms.SEARCHED[1]}))
    monkeypatch.setattr(ranking_arms, "SETTINGS_PATH", settings)
    (arm,) = chosen_arms(all_arms(has_third_party_codes=False), "fixed")

    low, high = ranking_tuning._varied(arm, "id_dropout", [0.1, 0.9])

    assert (low.name, high.name) == ("fixed id_dropout=0.1", "fixed id_dropout=0.9")
    assert low.settings() == {**arm.settings(), "id_dropout": 0.1}
    assert high.settings() == {**arm.settings(), "id_dropout": 0.9}


def test_a_key_is_varied_over_json_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ranking_tuning._key_and_values("expert_layer_sizes=[64],[32, 16]")

    assert found == ("expert_layer_sizes", [[64], [32, 16]])
    for text in ("id_dropout", "id_dropout=", "head=mmoe"):
        monkeypatch.setattr(sys, "argv", ["ranking_tuning.py", "--vary", text])
        with pytest.raises(SystemExit):
            ranking_tuning.main()
        assert f"'{text}' is not KEY=A,B with JSON values" in capsys.readouterr().err


def test_a_quick_run_reports_both_tasks_with_intervals_and_writes_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = _write_data(tmp_path / "made", num_tasks=2, has_users=True, has_split=True)
    codes = [[n % 2, n % 5] for n in range(60)]
    third_party = pa.table({"item_id": np.arange(60) + 100, "rq_code": codes})
    pq.write_table(third_party, data / "third_party_codes.parquet")
    page = tmp_path / "page.html"

    result = _result(
        monkeypatch,
        capsys,
        "--quick",
        "--processes",
        "1",
        "--data",
        str(data),
        "--page",
        str(page),
        "--arms",
        "fixed,third_party,full,full_minus_vq",
        "--train-share",
        "0.5",
    )

    figures = result["figures"]
    assert set(result["tasks"]) == {"is_like", "is_love"}
    assert figures["auc_full"] == result["tasks"]["is_like"]["auc_full"]
    assert figures["full_minus_fixed_auc"] == pytest.approx(
        figures["auc_full"] - figures["auc_fixed"], abs=2e-5
    )
    low, high = (figures[f"full_minus_fixed_auc_{end}"] for end in ("low", "high"))
    assert low <= figures["full_minus_fixed_auc"] <= high
    assert {"third_party_minus_fixed_auc_low", "worth_of_vq_auc_high"} <= set(figures)
    text = page.read_text("utf-8")
    assert "full less fixed" in text
    assert "Train rows of 50 % of their users" in text
    assert "less raw codes" not in text, "its arms were not run"
    assert '<td class="left">third_party</td><td class="left">third_party</td>' in text


def test_every_arm_runs_with_just_one_of_the_settings_that_all_tried() -> None:
    keys = set(ranking_arms.SEARCHED[0])

    assert all(set(setting) == keys for setting in ranking_arms.SEARCHED)
    for arm in all_arms(has_third_party_codes=True):
        ran = {key: value for key, value in arm.settings().items() if key in keys}
        assert ran in ranking_arms.SEARCHED


def test_of_fewer_users_only_some_teach_and_all_keep_their_histories(tmp_path: Path) -> None:
    folder = _write_data(tmp_path / "data", num_tasks=1, has_users=False, has_split=True)
    checked = load_input_data(DataConfig(input_dir=str(folder)))

    fewer = with_fewer_users(checked, 0.4)

    kept = fewer.train_interactions().group_by("user_id").aggregate([("item_id", "count")])
    assert kept.num_rows == 12
    assert set(kept["item_id_count"].to_pylist()) == {12}
    assert fewer.positives().num_rows == checked.positives().num_rows


def test_moved_back_the_newest_train_rows_are_ranked_and_no_test_row_is(tmp_path: Path) -> None:
    folder = _write_data(tmp_path / "data", num_tasks=1, has_users=False, has_split=True)
    checked = load_input_data(DataConfig(input_dir=str(folder)))

    moved = moved_back(checked, 0.5)

    columns = [checked.interactions[name].to_numpy() for name in ("event_timestamp", "split")]
    times_R, old_R = columns
    new_R = moved.interactions["split"].to_numpy()
    assert set(new_R[old_R == "test"]) == {"none"}
    assert set(new_R[old_R == "valid"]) == {"test"}
    is_train_R = old_R == "train"
    shares = [(new_R[is_train_R] == name).mean() for name in ("train", "valid", "test")]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.02)
    ends = [(times_R[new_R == name].min(), times_R[new_R == name].max()) for name in set(new_R)]
    ends.sort()
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))


def test_a_run_moved_back_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = _write_data(tmp_path / "made", num_tasks=1, has_users=False, has_split=True)
    page = tmp_path / "page.html"
    options = ("--processes", "1", "--data", str(data), "--page", str(page), "--arms", "id")

    result = _result(monkeypatch, capsys, "--quick", *options, "--moved-back", "0.5")

    assert result["settings"]["moved_back"] == 0.5
    assert "trained on the oldest 50 % of the train rows" in page.read_text("utf-8")
    for wrong in (["--moved-back", "0.9"], ["--moved-back", "0.5", "--train-share", "0.5"]):
        with pytest.raises(SystemExit):
            _result(monkeypatch, capsys, *wrong)
        assert "--moved-back" in capsys.readouterr().err


def test_no_users_at_all_cannot_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in ("0", "1.5"):
        with pytest.raises(SystemExit):
            _result(monkeypatch, capsys, "--train-share", share)
        assert "--train-share is above 0 and at most 1" in capsys.readouterr().err


def test_third_party_codes_must_be_there_for_every_item(tmp_path: Path) -> None:
    data = _write_data(tmp_path / "made", num_tasks=1, has_users=False, has_split=False)
    codes = pa.table({"item_id": np.arange(58) + 100, "rq_code": [[0, 1]] * 58})
    pq.write_table(codes, data / "third_party_codes.parquet")
    checked = load_input_data(DataConfig(input_dir=str(data)))

    with pytest.raises(SystemExit, match="codes of 58 items, 2 of the catalogue's 60 are not"):
        third_party_items(checked, np.ones((60, 4), dtype=np.float32))


def test_a_quick_run_takes_data_with_one_task_and_neither_users_nor_split(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = _write_data(tmp_path / "made", num_tasks=1, has_users=False, has_split=False)
    page = str(tmp_path / "page.html")

    result = _result(
        monkeypatch,
        capsys,
        "--quick",
        "--processes",
        "1",
        "--data",
        str(data),
        "--page",
        page,
        "--arms",
        "id",
    )

    assert set(result["tasks"]) == {"is_like"}
    assert "auc_id" in result["figures"]
    assert result["settings"] == {
        "data": "made",
        "seeds": 1,
        "arms": ["id"],
        "quick": True,
        "train_share": 1.0,
        "moved_back": None,
    }

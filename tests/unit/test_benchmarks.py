"""The benchmarks' own parts: the table of `make bench`, and the quantizers beside ours.

Shape letters in this file: N items, D width.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
RESULT = {
    "benchmark": "speed",
    "device": "a machine",
    "figures": {"ratio": 0.9, "share": 0.2, "other": 1.0},
    "targets": {
        "ratio": {"op": "le", "value": 0.8},
        "share": {"op": "ge", "value": 0.2},
        "absent": {"op": "ge", "value": 1},
    },
}


def _module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


def test_the_table_shows_met_missed_and_absent_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _module("run_all", monkeypatch).table_lines(RESULT)

    assert [line.split()[1:] for line in lines] == [
        ["ratio", "0.9", "<=", "0.8", "MISSED"],
        ["share", "0.2", ">=", "0.2", "yes"],
        ["absent", "-", ">=", "1", "not", "measured", "in", "this", "run"],
        ["1", "more,", "on", "a", "machine"],
    ]


def test_a_missed_target_is_no_failure_and_a_script_that_ends_badly_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all = _module("run_all", monkeypatch)
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    (tmp_path / "part.py").write_text("raise SystemExit(9)")
    (tmp_path / "good.py").write_text(
        f'{{"benchmark": 1}}; print("x"); print({json.dumps(RESULT)!r})'
    )

    run_all.main()
    printed = capsys.readouterr().out
    (tmp_path / "bad.py").write_text('{"benchmark": 1}; raise SystemExit(3)')
    with pytest.raises(SystemExit, match=r"did not run: bad\.py"):
        run_all.main()

    assert "MISSED" in printed
    assert "ended with status 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kmeans", "faiss_rq_beam1", "faiss_rq_beam5", "torcheasyrec"])
def test_codes_of_a_peer_name_the_centroids_that_it_decodes_to(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = _module("peer_quantizers", monkeypatch).PEERS[name]
    x_ND = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)

    coded = method(x_ND[:200], x_ND, 8, 0)

    summed_ND = sum(
        codebook_KD[codes_N]
        for codebook_KD, codes_N in zip(coded.codebooks, coded.rq_NL.T, strict=True)
    )
    assert coded.rq_NL.shape == (300, 3)
    np.testing.assert_allclose(coded.decoded_ND, summed_ND, atol=1e-5)
    assert np.square(x_ND - coded.decoded_ND).mean() < 0.5


def test_mini_batch_codes_are_nearest_by_direction_on_the_first_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = _module("peer_quantizers", monkeypatch).PEERS["grid"]
    x_ND = np.repeat(np.eye(4), 50, axis=0) * np.arange(1, 201)[:, None]
    x_ND = x_ND.astype(np.float32)

    coded = grid(x_ND, x_ND, 4, 0)

    firsts = coded.rq_NL[:, 0].reshape(4, 50)
    assert (firsts == firsts[:, :1]).all()
    assert len(np.unique(firsts)) == 4


def test_every_script_with_a_result_is_run_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [path.name for path in _module("run_all", monkeypatch).benchmark_scripts()]

    assert names == ["codebook_options.py", "codebook_quality.py", "continuity.py", "quantize.py"]

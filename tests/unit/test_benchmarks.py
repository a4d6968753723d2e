"""The benchmarks' own parts: the table of `make bench`, and the quantizers beside ours.

Shape letters in this file: N items, D width.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.stream_bench import (
    ROWS_PER_ARROW_RECORD,
    START,
    MadeItems,
    cpu_seconds,
    resident_mib,
)
from benchmarks.stream_waits import Probe
from benchmarks.stream_write import Stopwatch, records_of
from streaming.columns import decode_items
from streaming.messages import Message, decode_item_event, encode_item_event

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

    assert names == [
        "alignment.py",
        "alignment_quality.py",
        "backfill.py",
        "codebook_options.py",
        "codebook_quality.py",
        "continuity.py",
        "feature_store.py",
        "offline_store.py",
        "pairs.py",
        "quantize.py",
        "ranking_quality.py",
        "refresh.py",
        "serving.py",
        "stream.py",
        "trainer.py",
    ]


def test_items_made_as_text_are_the_messages_that_a_producer_encodes() -> None:
    items = MadeItems(num_vectors=3)

    message = items.json_message(item_id=7, event_timestamp=START + 7)

    decoded = decode_item_event(records_of([message], slice(0, 1), 1)[0])
    assert encode_item_event(decoded) == message
    assert (decoded.item_id, decoded.event_timestamp) == (7, START + 7)


def test_both_forms_of_made_items_decode_to_the_same_rows() -> None:
    items, num_items = MadeItems(num_vectors=3), 2 * ROWS_PER_ARROW_RECORD
    forms = [list(make(0, num_items)) for make in (items.json_messages, items.arrow_messages)]

    rows = [decode_items(records_of(each, slice(0, num_items), num_items)).rows for each in forms]

    columns = ["item_id", "event_timestamp", "embedding", "encoder_version"]
    assert [len(each) for each in forms] == [num_items, 2]
    assert rows[0].select(columns).equals(rows[1].select(columns))


def test_processor_time_and_memory_of_a_process_are_read_from_the_kernel() -> None:
    before, spent = cpu_seconds(os.getpid()), time.process_time()

    while time.process_time() - spent < 0.05:
        pass

    assert 0.02 <= cpu_seconds(os.getpid()) - before <= 1.0
    assert 10 < resident_mib(os.getpid()) < 100_000


def test_a_stopwatch_adds_up_the_time_of_each_part() -> None:
    watch = Stopwatch()

    results = [watch.run("write", sum, [1, 2]), watch.run("write", sum, [3])]

    assert results == [3, 3]
    assert list(watch.wall) == list(watch.cpu) == ["write"]
    assert watch.wall["write"] > 0


def test_the_figure_of_both_forms_is_the_one_further_from_its_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slower_form = _module("stream", monkeypatch).slower_form
    figures = {
        "cpu_per_item_vs_stages_json": 1.1,
        "cpu_per_item_vs_stages_arrow": 1.2,
        "write_path_vs_feast_push_json": 3.0,
        "write_path_vs_feast_push_arrow": 6.0,
    }

    assert slower_form(figures, "cpu_per_item_vs_stages") == {"cpu_per_item_vs_stages": 1.2}
    assert slower_form(figures, "write_path_vs_feast_push") == {"write_path_vs_feast_push": 3.0}


def test_the_whole_chain_is_compared_with_a_push_where_both_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole_ratios = _module("stream", monkeypatch).whole_ratios
    whole = {"whole_us_json": 100.0, "whole_us_arrow": 50.0}

    assert whole_ratios({"push_us": 200.0, **whole}) == {
        "whole_vs_feast_push": 2.0,
        "whole_vs_feast_push_json": 2.0,
        "whole_vs_feast_push_arrow": 4.0,
    }
    assert whole_ratios(whole) == {}


def test_a_probe_counts_from_sending_to_being_seen_and_what_was_never_seen_until_now() -> None:
    seen = {1}
    probe = Probe(
        "takedown",
        "items",
        np.array([1, 2, 3]),
        rate=1.0,
        make=lambda identity, time_us: Message(b"%d" % identity, None, []),
        is_done=lambda ids_N: np.isin(ids_N, list(seen)),
    )
    now = time.monotonic()
    # The third one is not sent yet, so nobody looks for it.
    probe.sent_N[:2] = now - 10, now - 20
    seen.add(3)

    probe.look()

    assert np.isnan(probe.seen_N).tolist() == [False, True, True]
    assert not probe.is_complete
    probe.sent_N[2] = now - 30
    figures = probe.figures()
    assert figures["takedown_p50_seconds"] == pytest.approx(20, abs=5)
    assert figures["takedown_max_seconds"] == pytest.approx(30, abs=5)
    seen.add(2)
    probe.look()
    assert probe.is_complete

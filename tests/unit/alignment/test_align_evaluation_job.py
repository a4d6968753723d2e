"""Shape letters in this file: N items, D width, L levels, V listed neighbours."""

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from qarm_feast.alignment import evaluation_job
from qarm_feast.alignment.cli import align_group
from qarm_feast.alignment.config import AlignmentConfig, EncoderGateConfig
from qarm_feast.alignment.encoder import load_encoder
from qarm_feast.alignment.evaluation_job import (
    Evaluation,
    check_accepted,
    decoded_vectors,
    evaluate_encoder,
)
from qarm_feast.alignment.evaluation_page import evaluation_page
from qarm_feast.alignment.gates import GATE_MEASURES, EncoderGateReading, gate_readings
from qarm_feast.artifact import MANIFEST_NAME, sha256
from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.config import load_section
from qarm_feast.encode import content_hashes
from qarm_feast.errors import CodebookMismatchError, GateRefusedError
from qarm_feast.input_data import DataConfig, InputData
from qarm_feast.overrides import Overrides
from qarm_feast.quantizers.rq import RqConfig
from qarm_feast.quantizers.vq import VqConfig
from qarm_feast.schema import ITEM_ID

CREATED = datetime(2024, 3, 1, tzinfo=UTC)


@pytest.fixture
def config_path(clustered: InputData, tmp_path: Path) -> Path:
    """A trained encoder e7 of the clustered items, not evaluated yet."""
    path = tmp_path / "qarm.yaml"
    path.write_text(
        "data: {input_dir: input}\n"
        "codebook: {uri: data/codebooks}\n"
        "alignment: {encoder_version: e7, embedding_dim: 16, batch_size: 64, num_epochs: 2}\n"
    )
    for verb in ("pairs", "train"):
        arguments = [verb, "--config", str(path), "--log-level", "error"]
        CliRunner().invoke(align_group, arguments, catch_exceptions=False)
    return path


def settings(config_path: Path) -> AlignmentConfig:
    return load_section(str(config_path), "alignment", AlignmentConfig)


def accepted(config_path: Path) -> list[EncoderGateReading]:
    return check_accepted(settings(config_path), load_section(str(config_path), "data", DataConfig))


def train_codebook(config_path: Path, items: InputData, version: str) -> Codebook:
    config = settings(config_path)
    encoder = load_encoder(config.encoder_uri, "e7")
    manifest = Path(config.encoder_uri) / "e7" / MANIFEST_NAME
    codebook = Codebook.train(
        version,
        items.items[ITEM_ID].to_numpy(),
        encoder.encode(items.items),
        config=QuantizerConfig(
            rq=RqConfig(num_levels=2, codebook_size=4), vq=VqConfig(num_neighbors=3)
        ),
        encoder=EncoderFacts("e7", sha256(manifest.read_bytes()), None),
        created=CREATED,
    )
    codebook.save(str(config_path.parent / "data/codebooks"))
    return codebook


def test_an_evaluation_is_stored_with_the_hash_of_its_encoder(config_path: Path) -> None:
    evaluation = evaluate_encoder(str(config_path))

    stored = json.loads(evaluation.report_path.read_text())
    manifest = config_path.parent / "data/encoders/e7" / MANIFEST_NAME
    assert stored == evaluation.report
    assert stored["encoder_hash"] == sha256(manifest.read_bytes())
    assert stored["codebook_version"] is None
    assert evaluation.page_path.read_text() == evaluation_page(stored, evaluation.readings)
    assert accepted(config_path) == evaluation.readings


def test_another_encoder_than_that_of_the_configuration_can_be_evaluated(config_path: Path) -> None:
    text = config_path.read_text()
    config_path.write_text(text.replace("e7", "e8"))

    evaluation = evaluate_encoder(str(config_path), encoder_version="e7")

    assert evaluation.report["encoder_version"] == "e7"
    assert evaluation.report_path.parent.name == "e7"
    config_path.write_text(text)
    assert accepted(config_path)


def test_codes_of_the_newest_codebook_of_the_encoder_are_decoded_beside_the_vectors(
    config_path: Path, clustered: InputData
) -> None:
    train_codebook(config_path, clustered, "v1")

    report = evaluate_encoder(str(config_path)).report

    assert report["codebook_version"] == "v1"
    assert list(report["gains"]) == ["aligned", "decoded_rq", "decoded_vq"]
    # Items without a train row have neighbours in the pool, so their codes find the cluster.
    assert report["decoded_vq"]["neighbor_auc_cold"] > 0.6


def test_decoded_vectors_are_sums_of_centroids_and_means_of_listed_items(
    config_path: Path, clustered: InputData
) -> None:
    codebook = train_codebook(config_path, clustered, "v1")
    aligned_ND = load_encoder(settings(config_path).encoder_uri, "e7").encode(clustered.items)

    decoded = decoded_vectors(clustered.items, codebook, aligned_ND)

    ids_N = clustered.items[ITEM_ID].to_numpy()
    codes = codebook.encode(ids_N, content_hashes(clustered.items), aligned_ND)
    levels = [codebook.rq.arrays()[name] for name in sorted(codebook.rq.arrays())]
    for row in range(40):
        rq_D = sum(level_KD[code] for level_KD, code in zip(levels, codes.rq_NL[row], strict=True))
        listed_ids = codebook.vq.pool_item_ids_P[codes.vq_NV[row]]
        vq_D = aligned_ND[np.searchsorted(ids_N, listed_ids)].mean(axis=0)
        for name, expected_D in (("decoded_rq", rq_D), ("decoded_vq", vq_D)):
            np.testing.assert_allclose(decoded[name][row], expected_D, atol=1e-5)


def test_a_codebook_of_another_encoder_is_refused_by_name_and_passed_over_otherwise(
    config_path: Path, clustered: InputData
) -> None:
    train_codebook(config_path, clustered, "v1")
    manifest = config_path.parent / "data/encoders/e7" / MANIFEST_NAME
    manifest.write_text(manifest.read_text() + "\n")

    assert evaluate_encoder(str(config_path)).report["codebook_version"] is None
    with pytest.raises(CodebookMismatchError, match="codebook version 'v1'"):
        evaluate_encoder(str(config_path), "v1")


def test_an_encoder_that_was_not_evaluated_as_it_is_is_refused(config_path: Path) -> None:
    with pytest.raises(GateRefusedError, match=r"holds nothing.*run `qarm align evaluate` first"):
        accepted(config_path)
    evaluate_encoder(str(config_path))
    manifest = config_path.parent / "data/encoders/e7" / MANIFEST_NAME
    manifest.write_text(manifest.read_text() + "\n")

    with pytest.raises(GateRefusedError, match="was not evaluated as it is"):
        accepted(config_path)


@pytest.mark.parametrize("name", ["items", "interactions"])
def test_an_encoder_that_was_judged_on_other_data_is_refused_with_both_hashes(
    config_path: Path, clustered: InputData, name: str
) -> None:
    path = clustered.directory / f"{name}.parquet"
    judged = sha256(path.read_bytes())
    evaluate_encoder(str(config_path))
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)
    now = sha256(path.read_bytes())

    told = rf"other data .*{name}.parquet was {judged}, is {now}; run `qarm align evaluate` first"
    with pytest.raises(GateRefusedError, match=told):
        accepted(config_path)


def test_an_encoder_that_was_judged_on_other_validation_rows_is_refused(config_path: Path) -> None:
    evaluate_encoder(str(config_path))
    text = config_path.read_text()
    config_path.write_text(text.replace("{input_dir: input}", "{input_dir: input, valid_days: 3}"))

    with pytest.raises(GateRefusedError, match=r": data.valid_days was auto, is 3.0; run `qarm al"):
        accepted(config_path)

    # How much of a history is read alters none of them.
    config_path.write_text(text.replace("input}", "input, history_length: 7}"))
    assert accepted(config_path)


def test_a_report_that_does_not_name_its_data_is_refused_with_the_next_command(
    config_path: Path,
) -> None:
    evaluation = evaluate_encoder(str(config_path))
    del evaluation.report["data"]["fingerprint"]
    evaluation.report_path.write_text(json.dumps(evaluation.report))

    with pytest.raises(GateRefusedError, match=r"does not say which data.*`qarm align evaluate` a"):
        accepted(config_path)


def test_a_missed_gate_is_told_by_the_command_and_refuses_the_encoder(config_path: Path) -> None:
    text = config_path.read_text().replace(
        "num_epochs: 2", "num_epochs: 2, gates: {min_neighbor_auc_gain: 0.9}"
    )
    config_path.write_text(text)

    arguments = ["evaluate", "--config", str(config_path), "--log-level", "error"]
    told = CliRunner().invoke(align_group, arguments, catch_exceptions=False)

    assert told.exit_code == 0
    assert "least upper end +0.9000: missed" in told.stdout
    with pytest.raises(GateRefusedError, match="min_neighbor_auc_gain: neighbor_auc_all"):
        accepted(config_path)


def test_an_evaluation_killed_at_any_point_leaves_no_page_of_other_figures(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate_encoder(str(config_path))
    real = evaluation_job.replace_file

    def die_at_page(path: Path, payload: bytes) -> None:
        if path.suffix == ".html":
            raise KeyboardInterrupt
        real(path, payload)

    monkeypatch.setattr(evaluation_job, "replace_file", die_at_page)
    with pytest.raises(KeyboardInterrupt):
        evaluate_encoder(str(config_path))

    assert first.report_path.is_file()
    assert not first.page_path.exists()


class _Tags(HTMLParser):
    """Collects what is open, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "line", "circle", "rect", "polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_text(evaluation: Evaluation) -> str:
    page = evaluation_page(evaluation.report, evaluation.readings)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert not re.search(r'(src|href)="', page)
    return " ".join(tags.text)


def test_the_page_shows_gates_protocols_gains_and_figures(
    config_path: Path, clustered: InputData
) -> None:
    train_codebook(config_path, clustered, "v1")
    evaluation = evaluate_encoder(str(config_path))

    text = page_text(evaluation)

    gain = evaluation.report["gains"]["aligned"]["neighbor_auc_all"]
    assert "All gates that could be read are kept." in text
    assert "codes of codebook v1" in text
    assert f"{gain['gain']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]" in text
    for title in ("Neighbour AUC", "Zero-shot Recall@10", "Item-CF Recall@10"):
        assert title in text
    assert "What decoded vq vectors gain over raw ones" in text
    assert f"{evaluation.report['decoded_rq']['item_cf_recall_at_10_all']:.4f}" in text


def test_the_page_shows_how_figures_fall_when_a_modality_is_masked(config_path: Path) -> None:
    evaluation = evaluate_encoder(str(config_path))
    # An encoder of ready vectors alone has nothing to mask.
    assert evaluation.report["masked"] == {}
    assert "Mask-modality" not in page_text(evaluation)
    means = {"neighbor_auc_all": 0.61234, "zero_shot_recall_at_10_all": 0.01}
    masked = {"image": {"0.5": {"raw": means, "aligned": means}}}

    text = page_text(evaluation._replace(report={**evaluation.report, "masked": masked}))

    assert "Neighbour AUC, image masked" in text
    assert "image, 50 %" in text
    assert "0.6123" in text


def test_the_page_tells_a_missed_gate_and_an_evaluation_without_data(config_path: Path) -> None:
    evaluation = evaluate_encoder(str(config_path))
    report = json.loads(json.dumps(evaluation.report))
    gain = report["gains"]["aligned"]["zero_shot_recall_at_10_all"]
    gain.update(gain=-0.2, low=-0.3, high=-0.1)
    report["encoder_version"] = "<b>e7"
    config = settings(config_path).gates
    missed = page_text(evaluation._replace(report=report, readings=gate_readings(report, config)))
    empty = {**report, "raw": {}, "aligned": {}, "gains": {"aligned": {}}, "masked": {}}
    empty["counts"] = dict.fromkeys(report["counts"], 0)

    unread = page_text(evaluation._replace(report=empty, readings=gate_readings(empty, config)))

    assert "Export is refused, worse than raw vectors: Zero-shot Recall@10 over raw." in missed
    assert "Encoder <b>e7: evaluation" in missed
    assert "No gate could be read." in unread
    assert "Protocols" not in unread


def test_the_page_does_not_call_gates_that_are_off_missed_or_kept(config_path: Path) -> None:
    evaluation = evaluate_encoder(str(config_path))
    gates = EncoderGateConfig(**dict.fromkeys(GATE_MEASURES))

    text = page_text(evaluation._replace(readings=gate_readings(evaluation.report, gates)))

    assert "Every gate is switched off" in text
    assert "No gate could be read" not in text


def test_codes_of_changed_content_are_not_those_that_are_stored(
    config_path: Path, clustered: InputData
) -> None:
    codebook = train_codebook(config_path, clustered, "v1")
    aligned_ND = load_encoder(settings(config_path).encoder_uri, "e7").encode(clustered.items)
    item_ids_N, hashes = clustered.items[ITEM_ID].to_numpy(), content_hashes(clustered.items)
    nearest_L = codebook.rq.encode(aligned_ND[:1])[0]
    stored = Overrides.from_rows(item_ids_N[:1], hashes[:1], (nearest_L[None] + 1) % 4)
    stored_book = codebook.with_overrides(stored)
    is_changed_N = np.arange(len(item_ids_N)) == 0

    kept = decoded_vectors(clustered.items, stored_book, aligned_ND)["decoded_rq"]
    fresh = decoded_vectors(clustered.items, stored_book, aligned_ND, is_changed_N)["decoded_rq"]

    np.testing.assert_array_equal(kept[0], codebook.decode_rq((nearest_L[None] + 1) % 4)[0])
    np.testing.assert_array_equal(fresh[0], codebook.decode_rq(nearest_L[None])[0])


def test_a_damaged_report_is_refused_with_the_next_command(config_path: Path) -> None:
    evaluate_encoder(str(config_path)).report_path.write_text("{")

    with pytest.raises(GateRefusedError, match=r"damaged.*run `qarm align evaluate` again"):
        accepted(config_path)

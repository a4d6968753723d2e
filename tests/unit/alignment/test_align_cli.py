import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from click.testing import CliRunner

from qarm_feast.alignment.cli import align_group
from qarm_feast.alignment.encoder import load_encoder
from qarm_feast.encode import content_hashes
from qarm_feast.input_data import InputData, embedding_matrix


def run(verb: str, config_path: Path) -> str:
    arguments = [verb, "--config", str(config_path), "--log-level", "error"]
    result = CliRunner().invoke(align_group, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_four_steps_end_in_vectors_that_the_stored_encoder_repeats(
    clustered: InputData, tmp_path: Path
) -> None:
    config_path = tmp_path / "qarm.yaml"
    config_path.write_text(
        "data: {input_dir: input}\n"
        "alignment: {encoder_version: e7, embedding_dim: 16, batch_size: 64, num_epochs: 2}\n"
    )

    outputs = {verb: run(verb, config_path) for verb in ("pairs", "train", "evaluate", "export")}

    assert "swing" in outputs["pairs"]
    assert "e7.json" in outputs["pairs"]
    report = json.loads(outputs["evaluate"].splitlines()[-1])
    assert report["gains"].keys() == {"aligned"}
    stored = tmp_path / "data/encoders/.reports/e7/evaluation.json"
    assert json.loads(stored.read_text()) == report
    table = pq.read_table(tmp_path / "data/vectors/e7")
    assert table.column_names == ["item_id", "embedding", "content_hash", "upload_timestamp"]
    assert table["item_id"].equals(clustered.items["item_id"])
    assert table["content_hash"].to_pylist() == content_hashes(clustered.items)
    encoder = load_encoder(str(tmp_path / "data/encoders"), "e7")
    stored_ND = embedding_matrix(table["embedding"])
    assert np.array_equal(stored_ND, encoder.encode(clustered.items))
    # Nothing but finished files: no temporary one is left, and no pickle anywhere.
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    logs = tmp_path / "data/encoders/e7.logs/head_weight_10"
    assert {path.name.split(".")[0] for path in files if path.parent == logs} == {
        "metrics",
        "events",
    }
    suffixes = {path.suffix for path in files if path.parent != logs}
    assert suffixes == {".parquet", ".safetensors", ".json", ".html", ".lock"}

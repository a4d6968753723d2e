"""`--engine ray` in local mode: the rows of the local engine, written by other processes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from click.testing import CliRunner

from qarm_feast import backfill_parts
from qarm_feast.backfill import backfill_codes
from qarm_feast.codebook_cli import codebook_group
from qarm_feast.errors import DataError, MissingDependencyError
from tests.backfill_repo import (
    LoggedStream,
    newest,
    offline_rows,
    online_codes,
    save_vector_encoder,
    takedown,
    upload,
    write_catalogue,
)
from tests.stream_repo import build_repo, publish_codebook

pytestmark = [
    pytest.mark.integration,
    # Ray Data 2.60 sets options of its own that it has deprecated.
    pytest.mark.filterwarnings("ignore:`use_[a-z_0-9]+` is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> LoggedStream:
    """Three parts of a content log; v2 is of the log's encoder, v3 of one that is missing."""
    directory = tmp_path_factory.mktemp("ray") / "repo"
    repo = build_repo(directory, {"data": {"input_dir": "data/input"}})
    v2 = publish_codebook(directory, "v2", seed=1)
    publish_codebook(directory, "v3", seed=2, encoder_version="e2")
    repo.apply()
    stream = LoggedStream(repo, {"v1": repo.codebook, "v2": v2})
    stream.log(upload(1, title="mug"), upload(2), upload(3))
    stream.log(upload(2, minute=5), upload(1, title="mug"), partition=1)
    stream.log(takedown(3, minute=7), upload(4, minute=1))
    return stream


@pytest.fixture
def running_ray() -> Iterator[None]:
    """Ray as a program that uses it for other things as well has it."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_ray_writes_the_same_rows_bit_for_bit_and_ends_with_the_command(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backfill_parts, "SMALL_PARTS_BYTES", 1)
    options = ["--config", str(stream.repo.config_path), "--codebook-version", "v2"]
    init, addresses = ray.init, []

    def note_address(address: str | None, **others: object) -> object:
        addresses.append(address)
        return init(address=address, **others)

    monkeypatch.setattr(ray, "init", note_address)

    result = CliRunner().invoke(
        codebook_group, ["backfill", *options, "--engine", "ray"], catch_exceptions=False
    )
    again = backfill_codes(stream.repo.config_path, "v2", engine="ray")

    assert "backfilled v2: 7 rows of codes (6 from stored vectors" in result.output
    assert offline_rows(stream.repo, "v2") == stream.rows("v2")
    assert online_codes(stream.repo, "v2", 1, 2, 3, 4) == newest(stream.rows("v2"))
    assert again.num_pieces == 0
    assert addresses == ["local"]
    assert not ray.is_initialized()


def test_ray_encodes_anew_for_another_encoder_bit_for_bit(tmp_path: Path) -> None:
    x_NW = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(x_NW.ravel()), 5)
    rows = {}
    for engine in ("local", "ray"):
        repo = build_repo(tmp_path / engine, {"data": {"input_dir": "data/input"}})
        publish_codebook(repo.directory, "v3", seed=2, encoder_version="e2")
        repo.apply()
        save_vector_encoder(repo.directory / "data" / "encoders")
        path = write_catalogue(repo, item_id=list(range(50)), embedding=embedding)
        pq.write_table(pq.read_table(path), path, row_group_size=16)

        counts = backfill_codes(repo.config_path, "v3", engine=engine)

        assert (counts.num_pieces, counts.num_reencoded, counts.num_requantized) == (4, 50, 0)
        rows[engine] = offline_rows(repo, "v3")

    assert len(rows["ray"]) == 50
    assert rows["ray"] == rows["local"]


@pytest.mark.usefixtures("running_ray")
def test_an_error_in_a_ray_process_is_that_of_the_local_engine_and_leaves_a_given_ray_running(
    stream: LoggedStream,
) -> None:
    with pytest.raises(DataError) as of_ray:
        backfill_codes(stream.repo.config_path, "v3", engine="ray")
    with pytest.raises(DataError) as of_local:
        backfill_codes(stream.repo.config_path, "v3")

    assert str(of_ray.value) == str(of_local.value)
    assert "no encoder at" in str(of_ray.value)
    assert ray.is_initialized()


def test_ray_that_is_not_installed_is_named_with_the_command(
    stream: LoggedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)

    with pytest.raises(MissingDependencyError, match=r'pip install "qarm-feast\[ray\]"'):
        backfill_codes(stream.repo.config_path, "v2", engine="ray")

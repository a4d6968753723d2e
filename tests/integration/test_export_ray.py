"""`qarm align export --engine ray` in local mode: the files of the local engine, bit for bit."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from qarm_feast.alignment.export_job import export_catalogue
from tests.backfill_repo import save_vector_encoder

pytestmark = [
    pytest.mark.integration,
    # Ray Data 2.60 sets options of its own that it has deprecated.
    pytest.mark.filterwarnings("ignore:`use_[a-z_0-9]+` is deprecated:DeprecationWarning"),
]


@pytest.fixture
def config_path(tmp_path: Path) -> str:
    """A catalogue of 50 ready vectors, its encoder, and parts of 16 items."""
    x_NW = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)
    times = pa.array([1_700_000_000_000_000] * 50, pa.int64())
    items = pa.table(
        {
            "item_id": pa.array(range(50), pa.int64()),
            "upload_timestamp": times.cast(pa.timestamp("us", tz="UTC")),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(x_NW.ravel()), 5),
        }
    )
    (tmp_path / "input").mkdir()
    pq.write_table(items, tmp_path / "input" / "items.parquet", row_group_size=20)
    save_vector_encoder(tmp_path / "data" / "encoders")
    path = tmp_path / "qarm.yaml"
    path.write_text(
        "data: {input_dir: input}\nalignment: {encoder_version: e2, export_rows_per_part: 16}\n"
    )
    return str(path)


def test_ray_writes_the_same_files_bit_for_bit(
    config_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = export_catalogue(config_path, "e2", include_raw=True)
    vectors = local.folder.parent
    monkeypatch.setenv("QARM_ALIGNMENT__VECTORS_URI", str(vectors.with_name("by_ray")))

    by_ray = export_catalogue(config_path, "e2", include_raw=True, engine="ray")

    assert (by_ray.num_parts, by_ray.num_written) == (4, 4)
    for name in ("e2", "e2.raw"):
        files = [
            {path.name: path.read_bytes() for path in (folder / name).iterdir()}
            for folder in (vectors, by_ray.folder.parent)
        ]
        assert len(files[0]) == 5
        assert files[0] == files[1]
    assert not ray.is_initialized()

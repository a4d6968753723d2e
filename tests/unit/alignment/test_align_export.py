import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qarm_feast.alignment import export_job, export_parts
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import ItemEncoder
from qarm_feast.alignment.export import raw_and_aligned_vectors, raw_vectors_folder
from qarm_feast.alignment.export_job import ExportSummary, export_accepted, export_catalogue
from qarm_feast.alignment.export_parts import PartTask, PartWriter, read_items
from qarm_feast.alignment.features import FeatureCache, ItemFeatures
from qarm_feast.errors import AlreadyRunningError, DataError, GateRefusedError
from qarm_feast.input_data import InputData
from qarm_feast.vector_files import EXPORT_MANIFEST, VectorFiles
from tests.backfill_repo import save_vector_encoder

ROWS_PER_PART = 7


class Killed(BaseException):
    """Ends an export as a signal would: no ``except Exception`` holds it up."""


@pytest.fixture
def encoder(tmp_path: Path) -> ItemEncoder:
    return save_vector_encoder(tmp_path / "data" / "encoders")


@pytest.fixture
def export(
    tmp_path: Path, clustered: InputData, encoder: ItemEncoder
) -> Callable[..., ExportSummary]:
    """Export 40 items with ready vectors, seven per part."""
    assert (clustered.items.num_rows, encoder.version) == (40, "e2")
    config_path = tmp_path / "qarm.yaml"
    config_path.write_text(
        "data: {input_dir: input}\n"
        f"alignment: {{encoder_version: e2, export_rows_per_part: {ROWS_PER_PART}}}\n"
    )
    return lambda **options: export_catalogue(str(config_path), "e2", **options)


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the export end when it begins the part after so many."""
    write = PartWriter.__call__

    def set_up(num_parts: int) -> None:
        left = iter(range(num_parts))

        def die_later(writer: PartWriter, task: PartTask) -> object:
            if next(left, None) is None:
                raise Killed
            return write(writer, task)

        monkeypatch.setattr(PartWriter, "__call__", die_later)

    return set_up


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden_folders(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name[0] == "." and path.is_dir()]


def test_parts_hold_every_item_once_in_the_order_of_the_catalogue(
    export: Callable[..., ExportSummary], clustered: InputData, encoder: ItemEncoder
) -> None:
    summary = export()

    assert (summary.num_items, summary.num_parts, summary.num_written) == (40, 6, 6)
    paths = sorted(summary.folder.glob("*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in paths] == [7, 7, 7, 7, 7, 5]
    vectors = VectorFiles.open(summary.folder).read()
    assert np.array_equal(vectors.item_ids_N, clustered.items["item_id"].to_numpy())
    # Bit for bit what the streaming worker makes of the same items, whatever comes with them.
    assert np.array_equal(vectors.x_ND, encoder.encode(clustered.items))


def test_a_killed_export_goes_on_with_the_missing_parts_and_ends_with_the_same_bytes(
    export: Callable[..., ExportSummary],
    kill_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = export()
    expected = files_of(whole.folder)
    for path in whole.folder.iterdir():
        path.unlink()
    whole.folder.rmdir()

    kill_after(2)
    with pytest.raises(Killed):
        export()
    monkeypatch.undo()
    assert not whole.folder.exists()
    (whole.folder.parent / ".e2.partial" / ".part-00003.parquet.1.tmp").write_bytes(b"half")
    rest = export()

    assert (rest.num_parts, rest.num_written) == (6, 4)
    assert files_of(whole.folder) == expected
    assert hidden_folders(whole.folder.parent) == []


def test_an_export_that_stands_is_not_made_again_unless_a_part_is_gone(
    export: Callable[..., ExportSummary],
) -> None:
    folder = export().folder
    before = files_of(folder)

    assert export().num_written == 0
    next(folder.glob("part-00002-*")).unlink()
    with pytest.raises(DataError, match=r"holds 5 parquet files.*names 6"):
        VectorFiles.open(folder)

    assert export().num_written == 6
    assert files_of(folder) == before


def test_an_export_beside_which_a_file_has_come_is_made_again_as_its_reader_says(
    export: Callable[..., ExportSummary],
) -> None:
    folder = export().folder
    before = files_of(folder)
    shutil.copy(next(folder.glob("part-00000-*")), folder / "a-copy.parquet")
    with pytest.raises(DataError, match=r"holds 7 .*names 6.* a-copy.parquet; run `qarm align exp"):
        VectorFiles.open(folder)

    export()

    assert files_of(folder) == before


def test_parts_of_another_catalogue_are_replaced_whether_finished_or_not(
    export: Callable[..., ExportSummary],
    kill_after: Callable[[int], None],
    clustered: InputData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = export().folder
    old_names = set(files_of(old))
    path = clustered.directory / "items.parquet"
    pq.write_table(clustered.items.slice(0, 20), path)
    kill_after(1)
    with pytest.raises(Killed):
        export()
    monkeypatch.undo()
    # While the new export is half done, readers have the old one.
    assert len(VectorFiles.open(old).item_ids()) == 40
    pq.write_table(clustered.items.slice(0, 30), path)

    summary = export()

    assert (summary.num_items, summary.num_written) == (30, 5)
    assert VectorFiles.open(summary.folder).item_ids().tolist() == list(range(30))
    assert old_names & set(files_of(summary.folder)) == {EXPORT_MANIFEST}


def test_a_catalogue_that_is_replaced_meanwhile_ends_the_export_and_the_next_begins_anew(
    export: Callable[..., ExportSummary], clustered: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = export().folder
    pq.write_table(clustered.items.slice(0, 35), clustered.directory / "items.parquet")
    write = PartWriter.__call__

    def replace_before_third(writer: PartWriter, task: PartTask) -> object:
        if task.first == 2 * ROWS_PER_PART:
            pq.write_table(clustered.items.slice(5, 35), clustered.directory / "items.parquet")
        return write(writer, task)

    monkeypatch.setattr(PartWriter, "__call__", replace_before_third)
    with pytest.raises(DataError, match=r"items.parquet changed while .*`qarm align export` again"):
        export()
    monkeypatch.undo()
    assert len(VectorFiles.open(old).item_ids()) == 40

    assert export().num_written == 5
    assert VectorFiles.open(old).item_ids().tolist() == list(range(5, 40))


def test_an_export_that_was_killed_between_its_two_renames_is_put_in_place_by_the_next(
    export: Callable[..., ExportSummary], clustered: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export().folder
    pq.write_table(clustered.items.slice(0, 20), clustered.directory / "items.parquet")
    rename = Path.rename

    def die_after_first(path: Path, target: Path) -> Path:
        if target.name == ".e2.replaced":
            rename(path, target)
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", die_after_first)
    with pytest.raises(Killed):
        export()
    monkeypatch.undo()
    with pytest.raises(DataError, match="run `qarm align export` first"):
        VectorFiles.open(folder)

    assert export().num_written == 0
    assert len(VectorFiles.open(folder).item_ids()) == 20
    assert hidden_folders(folder.parent) == []


def test_raw_vectors_that_stand_are_always_of_the_catalogue_of_the_aligned_ones(
    export: Callable[..., ExportSummary], clustered: InputData, encoder: ItemEncoder
) -> None:
    folder = export().folder
    raw_folder = raw_vectors_folder(str(folder.parent), "e2")
    assert not raw_folder.exists()

    assert export(include_raw=True).num_written == 6
    raw = raw_and_aligned_vectors(clustered.items, encoder, AlignmentConfig())["raw"]
    assert np.array_equal(VectorFiles.open(raw_folder).read().x_ND, raw)
    pq.write_table(clustered.items.slice(0, 20), clustered.directory / "items.parquet")
    export()

    assert len(VectorFiles.open(folder).item_ids()) == 20
    assert len(VectorFiles.open(raw_folder).item_ids()) == 20


def test_a_second_export_of_the_same_encoder_is_told_so(
    export: Callable[..., ExportSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = export_job.LocalEngine.run

    def export_meanwhile(*arguments: object) -> Iterator[object]:
        with pytest.raises(AlreadyRunningError, match="another process exports the vectors"):
            export()
        return run(*arguments)

    monkeypatch.setattr(export_job.LocalEngine, "run", export_meanwhile)

    assert export().num_written == 6


def test_a_reader_is_told_when_another_export_took_the_place_of_its_files(
    export: Callable[..., ExportSummary], clustered: InputData
) -> None:
    files = VectorFiles.open(export().folder)
    pq.write_table(clustered.items.slice(0, 20), clustered.directory / "items.parquet")
    export()

    with pytest.raises(DataError, match="another export took its place"):
        files.read()


def test_the_manifest_tells_what_the_vectors_were_made_from(
    export: Callable[..., ExportSummary],
) -> None:
    manifest = json.loads((export().folder / EXPORT_MANIFEST).read_bytes())

    assert (manifest["encoder_version"], manifest["num_items"]) == ("e2", 40)
    assert [part["num_items"] for part in manifest["parts"].values()] == [7, 7, 7, 7, 7, 5]
    assert all(len(manifest[name]) == 64 for name in ("encoder_hash", "catalogue_hash"))


@pytest.mark.parametrize(("first", "end"), [(0, 40), (3, 18), (11, 12), (30, 40)])
def test_rows_of_the_catalogue_are_read_across_its_row_groups(
    clustered: InputData, first: int, end: int
) -> None:
    path = clustered.directory / "items.parquet"
    pq.write_table(clustered.items, path, row_group_size=11)

    (read,) = read_items(path, first, end)

    assert read["item_id"].to_pylist() == list(range(first, end))
    expected = clustered.items.slice(first, end - first)
    assert read["embedding"].to_pylist() == expected["embedding"].to_pylist()


def test_an_encoder_that_no_evaluation_accepts_is_exported_only_against_the_gates(
    export: Callable[..., ExportSummary], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_path = str(tmp_path / "qarm.yaml")

    with pytest.raises(GateRefusedError, match="run `qarm align evaluate` first"):
        export_accepted(config_path)
    assert not (tmp_path / "data" / "vectors" / "e2").exists()
    with caplog.at_level("WARNING", logger="qarm_feast"):
        summary = export_accepted(config_path, ignore_gates=True)

    assert "export_gates_ignored encoder_version=e2" in caplog.text
    manifest = json.loads((summary.folder / EXPORT_MANIFEST).read_bytes())
    (refusal,) = manifest["ignored_gates"]
    assert "was not evaluated" in refusal
    # The override is told again whenever the export is looked at, and alters no byte of it.
    assert export().ignored_gates == (refusal,)


def test_an_export_reads_what_is_cached_while_it_is_small_and_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "0a" * 16
    FeatureCache(str(tmp_path)).write("text", "b" * 64, {key: np.ones((1, 3), np.float32)})
    cached = next(tmp_path.iterdir()).read_bytes()

    known = export_parts.KnownFeatures(str(tmp_path))
    first = known.read("text", "b" * 64)
    first["0b" * 16] = np.zeros((1, 3), np.float32)
    known.write("text", "b" * 64, first)

    assert list(known.read("text", "b" * 64)) == [key]
    assert next(tmp_path.iterdir()).read_bytes() == cached
    monkeypatch.setattr(export_parts, "_CACHE_BYTES", len(cached) - 1)
    assert export_parts.KnownFeatures(str(tmp_path)).read("text", "b" * 64) == {}


def test_what_is_wrong_with_items_is_counted_and_what_was_cached_is_not() -> None:
    is_present = {"text": np.array([True, True]), "image": np.array([False, True])}
    counts = {
        "text": {"present": 2, "encoded": 1, "repeated": 1},
        "image": {"present": 1, "encoded": 2, "repeated": 0, "unreadable": 1},
        "all": {"items": 2, "without_content": 0},
    }

    told = export_parts.content_counts(ItemFeatures({}, is_present, counts))

    assert dict(told) == {"without_content": 0, "image_unreadable": 1}

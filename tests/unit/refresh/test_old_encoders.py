"""Which encoders go when a refresh is over, and what of a removal that was killed."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qarm_feast.alignment.encoder import read_encoder_manifest
from qarm_feast.errors import DataError, GateRefusedError
from qarm_feast.refresh import old_encoders
from qarm_feast.refresh.job import RefreshOptions, refresh
from qarm_feast.refresh.old_encoders import remove_old_encoders
from qarm_feast.refresh.plan import RefreshRequest, Sections
from qarm_feast.refresh.state import EncoderMade, Inputs, RefreshState, read_state
from qarm_feast.shared_state import exclusive
from tests.refresh_repo import SETTINGS, write_data, write_repo

START = datetime(2024, 3, 1, tzinfo=UTC)
KEEP_TWO = "refresh: {keep_encoders: 2}\n"


class Killed(BaseException):
    """Ends a refresh as a signal would: no ``except Exception`` holds it up."""


@pytest.fixture(scope="module")
def first_refresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with v1 and e1; nobody alters it."""
    config_path = write_repo(tmp_path_factory.mktemp("first"), num_days=20)
    refresh(str(config_path), RefreshRequest(), RefreshOptions(), lambda _: None)
    return config_path.parent


@pytest.fixture
def config_path(first_refresh: Path, tmp_path: Path) -> Path:
    path = shutil.copytree(first_refresh, tmp_path / "repo") / "qarm.yaml"
    path.write_text(SETTINGS + KEEP_TWO)
    return path


def made(version: str) -> EncoderMade:
    return EncoderMade(version=version, started=START + timedelta(days=int(version[1:])))


def files_of(data: Path, version: str) -> set[str]:
    """Return all files that belong to an encoder, but locks."""
    paths = [path for path in data.rglob("*") if path.is_file() and path.suffix != ".lock"]
    names = {path.relative_to(data).as_posix() for path in paths}
    return {name for name in names if version in name.replace("/", ".").split(".")}


@pytest.fixture
def state(config_path: Path) -> RefreshState:
    """A run that has made e6, after others that made e2 to e5, all as e1 but for the name."""
    data = config_path.parent / "data"
    for version in ("e2", "e3", "e4", "e5", "e6"):
        folder = shutil.copytree(data / "encoders/e1", data / "encoders" / version)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        own = {"version": version, "created": made(version).started.isoformat()}
        (folder / "manifest.json").write_text(json.dumps(manifest | own))
        shutil.copy(data / "pairs/e1.parquet", data / f"pairs/{version}.parquet")
        for name in (
            f"vectors/{version}", f"vectors/{version}.raw", f"vectors/.{version}.partial",
            f"encoders/{version}.logs", f"encoders/{version}.onnx", f"encoders/.{version}.training",
            f"encoders/.reports/{version}",
        ):  # fmt: skip
            (data / name).mkdir(parents=True)
            (data / name / "file").touch()
    return RefreshState(
        inputs=Inputs(files={}, settings={}, taken_down=""),
        parent=None,
        encoder_version="e6",
        codebook_version="v2",
        started=made("e6").started,
        earlier_encoders=[made(version) for version in ("e2", "e3", "e4", "e5")],
    )


def remove(config_path: Path, state: RefreshState) -> None:
    remove_old_encoders(Sections.load(str(config_path)), state)


def test_the_oldest_go_with_all_that_is_theirs_and_their_names_stay_taken(
    config_path: Path, state: RefreshState
) -> None:
    data = config_path.parent / "data"
    kept = {version: files_of(data, version) for version in ("e1", "e5", "e6")}
    assert len(files_of(data, "e2")) == len(kept["e5"]) > 8

    remove(config_path, state)

    assert state.removed_encoders == ["e2", "e3", "e4"]
    assert state.earlier_encoders == [made("e5")]
    for version in ("e2", "e3", "e4"):
        assert files_of(data, version) == {f"encoders/{version}/removed.json"}
        with pytest.raises(DataError, match=f"no encoder at .*{version}; it was removed; name ano"):
            read_encoder_manifest(str(data / "encoders"), version)
    # No refresh of this list made e1.
    assert {version: files_of(data, version) for version in kept} == kept


def test_without_a_limit_all_stay(config_path: Path, state: RefreshState) -> None:
    config_path.write_text(SETTINGS)

    remove(config_path, state)

    assert (state.removed_encoders, len(state.earlier_encoders)) == ([], 4)
    assert (config_path.parent / "data/encoders/e2/manifest.json").is_file()


@pytest.mark.parametrize("place", ["codebooks", "codebooks/.drafts"])
def test_an_encoder_that_a_codebook_names_stays_and_goes_once_that_is_purged(
    config_path: Path, state: RefreshState, place: str
) -> None:
    books = config_path.parent / "data" / place
    shutil.copytree(config_path.parent / "data/codebooks/v1", books / "v7")
    manifest = json.loads((books / "v7/manifest.json").read_bytes())
    names = {"version": "v7", "encoder_version": "e3"}
    (books / "v7/manifest.json").write_text(json.dumps(manifest | names))

    remove(config_path, state)

    assert state.removed_encoders == ["e2", "e4"]
    assert state.earlier_encoders == [made("e3"), made("e5")]
    shutil.rmtree(books / "v7")
    remove(config_path, state)
    assert state.removed_encoders == ["e3"]


def test_the_parent_that_of_the_settings_and_what_no_refresh_made_stay(
    config_path: Path, state: RefreshState
) -> None:
    config_path.write_text(
        SETTINGS.replace("embedding_dim", "encoder_version: e2, embedding_dim") + KEEP_TWO
    )
    # Somebody has put another encoder in the place of e3.
    path = config_path.parent / "data/encoders/e3/manifest.json"
    path.write_text(path.read_text().replace("2024-03-04", "2024-05-05"))

    remove(config_path, state)

    assert state.removed_encoders == ["e4"]
    assert path.is_file()
    assert (config_path.parent / "data/encoders/e2/manifest.json").is_file()


def test_an_encoder_that_is_exported_just_now_stays_until_the_next_time(
    config_path: Path, state: RefreshState
) -> None:
    with exclusive(config_path.parent / "data/vectors/.e3.lock", wait_seconds=0):
        remove(config_path, state)

    assert state.removed_encoders == ["e2", "e4"]
    assert (config_path.parent / "data/encoders/e3/manifest.json").is_file()
    remove(config_path, state)
    assert state.removed_encoders == ["e3"]


@pytest.mark.parametrize(
    ("name", "num_calls"),
    [
        ("replace_file", 0),
        ("replace_file", 1),
        ("remove_file", 0),
        ("remove_file", 2),
        ("_delete", 0),
        ("_delete", 7),
        ("_delete", 12),
    ],
)
def test_a_removal_that_was_killed_is_brought_to_its_end(
    config_path: Path,
    state: RefreshState,
    name: str,
    num_calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function: Callable[..., object] = getattr(old_encoders, name)
    calls: list[object] = []

    def until_killed(*given: object) -> object:
        calls.append(given)
        if len(calls) > num_calls:
            raise Killed
        return function(*given)

    killed = state.model_copy(deep=True)
    monkeypatch.setattr(old_encoders, name, until_killed)
    with pytest.raises(Killed):
        remove(config_path, killed)
    monkeypatch.undo()

    # What the killed one noted was never written.
    remove(config_path, state)

    assert state.removed_encoders == ["e2", "e3", "e4"]
    data = config_path.parent / "data"
    for version in ("e2", "e3", "e4"):
        assert files_of(data, version) == {f"encoders/{version}/removed.json"}


def test_a_refresh_killed_after_the_removal_reports_the_same_when_it_goes_on(
    config_path: Path, state: RefreshState
) -> None:
    killed = state.model_copy(deep=True)
    remove(config_path, killed)

    remove(config_path, state)

    assert state == killed


def test_refused_encoders_of_nightly_refreshes_do_not_pile_up(config_path: Path) -> None:
    gates = "num_epochs: 1, gates: {min_neighbor_auc_gain: 1.0}"
    config_path.write_text(SETTINGS.replace("num_epochs: 1", gates) + KEEP_TWO)
    data = config_path.parent / "data"
    lines: list[str] = []

    for num_days in (21, 22, 23):
        write_data(data / "input", num_days)
        with pytest.raises(GateRefusedError):
            refresh(str(config_path), RefreshRequest(), RefreshOptions(), lines.append)

    # The parent's encoder e1 stays, the two newest, and of e2 the name.
    assert files_of(data, "e2") == {"encoders/e2/removed.json"}
    standing = {path.parent.name for path in (data / "encoders").glob("*/manifest.json")}
    assert standing == {"e1", "e3", "e4"}
    assert lines[-1] == "removed 1 old encoder(s): e2"
    report = json.loads((data / "refresh/reports/v2.json").read_bytes())
    assert (report["num_removed_encoders"], report["removed_encoders"]) == (1, ["e2"])
    after = read_state(data / "refresh")
    assert after is not None
    assert [one.version for one in after.encoders()] == ["e1", "e3", "e4"]

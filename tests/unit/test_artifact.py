"""A folder takes the place of another one as a whole."""

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qarm_feast import artifact
from qarm_feast.artifact import replace_folder
from qarm_feast.errors import ConfigError


def new_folder(path: Path, content: str) -> Path:
    path.mkdir()
    for name in ("first", "second"):
        (path / name).write_text(content)
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


NEW = {"first": "new", "second": "new"}
OLD = {"first": "old", "second": "old"}


def test_a_folder_takes_a_free_name_and_the_name_of_another_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        replace_folder(new_folder(tmp_path / "filled", content), tmp_path / "final")

        assert contents(tmp_path / "final") == {"first": content, "second": content}
        assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_files_are_safe_before_the_name_is_given_and_the_name_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_folder(tmp_path / "final", "old")
    filled = new_folder(tmp_path / "filled", "new")
    calls: list[str] = []

    def noted(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*given: object, **named: object) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{given[0]}")) if name == "fsync" else given[0]
            calls.append(f"{name} {Path(str(path)).name}")
            function(*given, **named)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(artifact, "_exchange", noted("exchange", artifact._exchange))
    monkeypatch.setattr(shutil, "rmtree", noted("rmtree", shutil.rmtree))

    replace_folder(filled, tmp_path / "final")

    assert set(calls[:2]) == {"fsync first", "fsync second"}
    after = ["fsync filled", "exchange filled", f"fsync {tmp_path.name}", "rmtree filled"]
    assert calls[2:] == after


@pytest.mark.parametrize("num_calls", range(6))
def test_a_kill_at_any_point_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_calls: int
) -> None:
    new_folder(tmp_path / "final", "old")
    filled = new_folder(tmp_path / "filled", "new")
    left = num_calls

    def until_killed(function: Callable[..., None]) -> Callable[..., None]:
        def call(*given: object, **named: object) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            function(*given, **named)

        return call

    monkeypatch.setattr(os, "fsync", until_killed(os.fsync))
    monkeypatch.setattr(artifact, "_exchange", until_killed(artifact._exchange))
    monkeypatch.setattr(shutil, "rmtree", until_killed(shutil.rmtree))

    with pytest.raises(KeyboardInterrupt):
        replace_folder(filled, tmp_path / "final")

    # Two files, the folder, then the exchange.
    assert contents(tmp_path / "final") == (NEW if num_calls >= 4 else OLD)


def test_where_names_cannot_be_exchanged_the_old_folder_stays_and_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = new_folder(tmp_path / "final", "old")
    filled = new_folder(tmp_path / "filled", "new")

    class NoExchange:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(22)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", NoExchange)

    with pytest.raises(ConfigError, match=r"final.*Invalid argument.*remove it, then run"):
        replace_folder(filled, final)

    assert contents(final) == OLD

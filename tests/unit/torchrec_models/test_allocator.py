import ctypes
from types import SimpleNamespace

import pytest

from torchrec_models.allocator import keep_freed_memory

TUNED_BY_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Calls of a ``mallopt`` that stands in for the C library's, in an untuned environment."""
    found: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda name, value: found.append((name, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for word in TUNED_BY_USERS:
        monkeypatch.delenv(word, raising=False)
    return found


def test_blocks_of_32_mib_and_2_gib_are_kept(calls: list[tuple[int, int]]) -> None:
    keep_freed_memory()

    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
    assert calls == [(-3, 32 * 1024**2), (-1, 2**31 - 1)]


@pytest.mark.parametrize("word", TUNED_BY_USERS)
def test_what_the_environment_says_stands(
    word: str, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(word, "1")

    keep_freed_memory()

    assert calls == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())

    keep_freed_memory()

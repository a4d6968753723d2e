"""Shape letters in this file: R seeds, S samples."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import alignment_emoji
from benchmarks.alignment_emoji import (
    EmojiUnavailableError,
    drawn_means,
    emoji_figures,
    fetch_package,
    read_emojis,
    subcategory_pairs,
)
from benchmarks.alignment_quality import figures_over_seeds, seed_and_sample_interval
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.evaluate import Measured


def listed(name: str, order: int, **changed: object) -> dict[str, object]:
    """Return an emoji as the package lists it."""
    row = {"name": name, "image": f"{order}.png", "sort_order": order, "category": "Objects"}
    return {**row, "subcategory": "tool", "has_img_google": True, **changed}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    rows = [
        listed("HAMMER", 3),
        listed("AXE", 1),
        listed("PALE SKIN", 2, category="Component"),
        listed("UNDRAWN", 4, has_img_google=False),
        listed("RED APPLE", 5, category="Food & Drink", subcategory="food-fruit"),
    ]
    folder = tmp_path / "package"
    (folder / "img/google/64").mkdir(parents=True)
    (folder / "emoji.json").write_text(json.dumps(rows))
    for row in rows:
        (folder / "img/google/64" / str(row["image"])).write_bytes(str(row["name"]).encode())
    return folder


def test_emojis_are_base_ones_with_a_picture_in_unicode_order(package: Path) -> None:
    emojis = read_emojis(package)

    assert emojis.items["title"].to_pylist() == ["axe", "hammer", "red apple"]
    assert emojis.items["image"].to_pylist() == [b"AXE", b"HAMMER", b"RED APPLE"]
    assert emojis.categories_N.tolist() == ["Objects", "Objects", "Food & Drink"]
    assert read_emojis(package, 2).items["title"].to_pylist() == ["axe", "red apple"]


def test_pairs_join_train_emojis_of_one_subcategory_and_no_held_out_one() -> None:
    subcategories_N = np.array(["tool", "fruit", "tool", "tool", "fruit", "alone"])
    is_train_N = np.array([True, True, False, True, True, True])

    triggers, targets = subcategory_pairs(subcategories_N, is_train_N, seed=0)

    # Rows of the five train emojis: tool, fruit, tool, fruit, alone.
    found = sorted(zip(triggers.tolist(), targets.tolist(), strict=True))
    assert found == [(0, 2), (1, 3), (2, 0), (3, 1)]
    many, _ = subcategory_pairs(np.full(30, "tool"), np.ones(30, dtype=bool), seed=0)
    assert np.bincount(many).tolist() == [alignment_emoji.PAIRS_PER_EMOJI] * 30


def test_a_fetched_package_is_unpacked_once_and_checked(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(package, "package")
    archive_bytes, runs = packed.getvalue(), []

    def pack(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        runs.append(command[1:3])
        (Path(command[-1]) / "emoji-datasource-google-16.0.0.tgz").write_bytes(archive_bytes)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pack)
    monkeypatch.setattr(alignment_emoji.shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(EmojiUnavailableError, match=r"has SHA-256 .*npm cache clean"):
        fetch_package(cache)
    digest = alignment_emoji.hashlib.sha256(archive_bytes).hexdigest()
    monkeypatch.setattr(alignment_emoji, "SHA256", digest)

    folders = {fetch_package(cache) for _ in range(2)}

    assert folders == {cache / "emoji-datasource-google-16.0.0"}
    assert runs == [["pack", "emoji-datasource-google@16.0.0"]] * 2
    assert read_emojis(folders.pop()).items.num_rows == 3
    assert len(list(cache.iterdir())) == 1


def test_without_npm_the_emoji_task_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment_emoji.shutil, "which", lambda name: None)

    figures, skipped = emoji_figures(tmp_path, AlignmentConfig(), 1, is_quick=True)

    assert figures == {}
    assert skipped is not None
    assert "no npm" in skipped
    assert "npm pack emoji-datasource-google@16.0.0" in skipped
    failed = subprocess.CompletedProcess(["npm"], 1)
    monkeypatch.setattr(alignment_emoji.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EmojiUnavailableError, match="npm ended with status 1"):
        fetch_package(tmp_path)


def test_figures_are_means_over_seeds_and_gains_are_paired_with_raw() -> None:
    is_cold_S = np.array([False, False, True])
    raw_S = np.array([0.5, 0.7, 0.2])
    measured = [
        {"neighbor_auc": Measured({"raw": raw_S, "aligned": raw_S + gain}, is_cold_S)}
        for gain in (0.1, 0.3)
    ]

    measured[0]["neighbor_auc"].values_by_name["lora"] = raw_S + 0.4

    figures = figures_over_seeds(measured)

    # Only the first seed was tuned.
    assert figures["lora_minus_raw_neighbour_auc"] == pytest.approx(0.4)
    assert figures["lora_minus_aligned_neighbour_auc"] == pytest.approx(0.3)
    assert figures["neighbour_auc_raw"] == pytest.approx(1.4 / 3)
    assert figures["warm_neighbour_auc_aligned"] == pytest.approx(0.8)
    assert figures["cold_neighbour_auc_aligned"] == pytest.approx(0.4)
    assert figures["aligned_minus_raw_neighbour_auc"] == pytest.approx(0.2)
    # Samples gain alike, so the interval is that of the two seeds.
    assert figures["aligned_minus_raw_cold_neighbour_auc_low"] == pytest.approx(0.1)
    assert figures["aligned_minus_raw_cold_neighbour_auc_high"] == pytest.approx(0.3)


def test_an_interval_over_one_seed_is_that_of_its_samples() -> None:
    values_RS = np.random.default_rng(0).normal(size=(1, 400))

    low, high = seed_and_sample_interval(values_RS)
    low_of_copies, high_of_copies = seed_and_sample_interval(np.repeat(values_RS, 3, axis=0))

    assert high - low == pytest.approx(4 / 400**0.5, rel=0.1)
    assert [low_of_copies, high_of_copies] == pytest.approx([low, high])


def test_as_many_of_the_held_out_emojis_are_masked_as_the_percentage_says() -> None:
    is_held = alignment_emoji.held_out(3000, seed=0)

    shares = {
        percent: is_masked[is_held].mean()
        for percent, is_masked in alignment_emoji.masks(3000, seed=0).items()
    }

    # Five standard errors of a share among a thousand.
    assert shares == pytest.approx({25: 0.25, 50: 0.5, 100: 1.0}, abs=0.08)


def test_an_emoji_that_several_splits_hold_out_is_drawn_with_all_its_values() -> None:
    values_H, rows_H = np.array([1.0, 0.0, 1.0, 0.0]), np.array([4, 7, 4, 7])

    means_B = drawn_means(values_H, rows_H, 400)

    assert set(means_B.tolist()) == {0.0, 0.5, 1.0}
    # Two emojis, not four values: a quarter of the draws takes one of them twice.
    assert 0.15 < (means_B == 1).mean() < 0.35

"""Text and picture together: do both find the category of an emoji better than either alone.

Part of ``alignment_quality.py``. Google's pictures (64 pixels) with Unicode names, categories and
subcategories come from the npm package ``emoji-datasource-google``, which `npm pack` fetches once
into ``.cache``; without it this part is left out, and the result says why.

An emoji is an item: its name in lower case is the text, its picture the image. A third of them is
held out. Pairs to train on are emojis of one Unicode subcategory, both of the other two thirds: of
held-out emojis the encoder sees neither pair nor category, and training tells when to stop by pairs
that it holds out itself. A held-out emoji gets the category of the nearest of the others (1-NN).
Nothing is chosen here: settings are the defaults, dimensions aside.

Figures: ``emoji_1nn_text``, ``…_image``, ``…_both`` (an encoder of each, same pairs),
``emoji_1nn_raw_…`` (features before training), ``emoji_1nn_<modality>_masked_<percent>`` (the
encoder of both, held-out emojis losing a modality), ``emoji_both_minus_text`` and
``emoji_both_minus_image`` with ``…_low`` and ``…_high``: 95 %, emojis drawn with replacement.

Shape letters in this file: N emojis, H held-out ones (U distinct), P pairs, B draws.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import project_features
from qarm_feast.alignment.evaluate import bootstrap_means, interval
from qarm_feast.alignment.features import ItemFeatures, content_features
from qarm_feast.alignment.masking import masked_features
from qarm_feast.alignment.train import PairRows, train_head
from qarm_feast.quantizers.base import Embeddings

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
PICTURES = "package/img/google/64/"
LISTING = "package/emoji.json"
FETCH_SECONDS = 600
HELD_OUT_SHARE = 1 / 3
PAIRS_PER_EMOJI = 10
QUICK_STEP = 10
KINDS = {"text": ("text",), "image": ("image",), "both": ("text", "image")}
MASKED_PERCENTS = (25, 50, 100)
NUM_DRAWS = 1000

Figures = dict[str, float]


class EmojiUnavailableError(Exception):
    """The package cannot be fetched here; the text says why and what to do."""


class Emojis(NamedTuple):
    """Items and what Unicode says of them, row by row."""

    items: pa.Table
    categories_N: np.ndarray
    subcategories_N: np.ndarray


def emoji_figures(
    cache: Path, config: AlignmentConfig, seeds: int, *, is_quick: bool
) -> tuple[Figures, str | None]:
    """Return the figures of this task, or none and the reason.

    Args:
        cache: Folder where the package is kept.
        config: Section ``alignment``; modalities and seed are replaced.
        seeds: Splits, each with its own encoders.
        is_quick: Take every tenth emoji.
    """
    try:
        emojis = read_emojis(fetch_package(cache), QUICK_STEP if is_quick else 1)
    except EmojiUnavailableError as error:
        _say(f"emoji: left out, {error}")
        return {}, str(error)
    _say(f"emoji: features of {emojis.items.num_rows} emojis")
    # The picture model lies in a package that `make setup` unpacks there; it is not installed.
    sys.path.append(str(cache / "packages"))
    features = content_features(
        emojis.items, config.model_copy(update={"modalities": KINDS["both"]})
    )
    runs = []
    for seed in range(seeds):
        runs.append(_seed_hits(emojis, features, config.model_copy(update={"seed": seed})))
        told = "  ".join(f"{name} {hits.mean():.4f}" for name, hits in runs[-1].items())
        _say(f"emoji seed {seed}: {told}")
    num_emojis = emojis.items.num_rows
    rows_H = np.concatenate([np.flatnonzero(held_out(num_emojis, seed)) for seed in range(seeds)])
    hits = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    figures = {f"emoji_1nn_{name}": float(values.mean()) for name, values in hits.items()}
    for single in ("text", "image"):
        gains_H = hits["both"] - hits[single]
        low, high = interval(drawn_means(gains_H, rows_H, NUM_DRAWS))
        name = f"emoji_both_minus_{single}"
        figures |= {name: float(gains_H.mean()), f"{name}_low": low, f"{name}_high": high}
    return {"emoji_num_emojis": num_emojis, **figures}, None


def drawn_means(values_H: np.ndarray, rows_H: np.ndarray, num_draws: int) -> np.ndarray:
    """Return the mean in each of so many draws of emojis, each with its values of all splits.

    Args:
        values_H: One per split and emoji that it holds out.
        rows_H: Which emoji that is; one may be held out in several splits.
        num_draws: Draws.

    Returns:
        Float64 ``[B]``.
    """
    _, emojis_H, counts_U = np.unique(rows_H, return_inverse=True, return_counts=True)
    sums_U = np.bincount(emojis_H, values_H)
    drawn_B2 = bootstrap_means(np.stack([sums_U, counts_U], axis=1), num_draws)
    means_B: np.ndarray = drawn_B2[:, 0] / drawn_B2[:, 1]
    return means_B


def fetch_package(cache: Path) -> Path:
    """Return the folder of the unpacked package; fetched by `npm pack` if it is not there.

    Args:
        cache: Folder where it is kept.

    Raises:
        EmojiUnavailableError: If it cannot be fetched, or is another than expected.
    """
    folder = cache / f"{PACKAGE}-{VERSION}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        archive = _pack(Path(temporary))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise EmojiUnavailableError(
                f"{archive.name} has SHA-256 {found}, expected {SHA256}; run `npm cache clean "
                "--force` and this benchmark again"
            )
        with tarfile.open(archive) as packed:
            wanted = [member for member in packed if member.name.startswith((LISTING, PICTURES))]
            packed.extractall(temporary, members=wanted, filter="data")
        # In place at once: a killed run leaves no half of a package.
        (Path(temporary) / "package").rename(folder)
    return folder


def _pack(destination: Path) -> Path:
    npm = shutil.which("npm")
    remedy = f"put `npm pack {PACKAGE}@{VERSION}` to work and run this benchmark again"
    if npm is None:
        raise EmojiUnavailableError(f"there is no npm on the PATH; {remedy}")
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination"]
    try:
        done = subprocess.run(
            [*command, str(destination)],
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EmojiUnavailableError(
            f"npm took more than {FETCH_SECONDS} seconds; {remedy}"
        ) from None
    archive = destination / f"{PACKAGE}-{VERSION}.tgz"
    if done.returncode or not archive.is_file():
        raise EmojiUnavailableError(f"npm ended with status {done.returncode}; {remedy}")
    return archive


def read_emojis(folder: Path, step: int = 1) -> Emojis:
    """Return every ``step``-th base emoji that has a picture, skin tones left out.

    Args:
        folder: The unpacked package.
        step: Distance of those that are taken, in Unicode's order.
    """
    listed = json.loads((folder / "emoji.json").read_text("utf-8"))
    kept = [row for row in listed if row["has_img_google"] and row["category"] != "Component"]
    kept = sorted(kept, key=lambda row: row["sort_order"])[::step]
    pictures = folder / PICTURES.removeprefix("package/")
    items = pa.table(
        {
            "item_id": np.arange(len(kept)),
            "title": [row["name"].lower() for row in kept],
            "image": pa.array([(pictures / row["image"]).read_bytes() for row in kept]),
        }
    )
    columns = (np.array([row[key] for row in kept]) for key in ("category", "subcategory"))
    return Emojis(items, *columns)


def subcategory_pairs(
    subcategories_N: np.ndarray, is_train_N: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of different train emojis of one subcategory, as rows of the train emojis.

    Args:
        subcategories_N: Of all emojis; those of held-out ones are not looked at.
        is_train_N: Which are not held out.
        seed: Seed of the choice of partners.

    Returns:
        Triggers and targets; every emoji with a partner has ``PAIRS_PER_EMOJI`` pairs, or as many
        as it has partners.
    """
    generator = np.random.default_rng(seed)
    names_T = subcategories_N[is_train_N]
    triggers, targets = [], []
    for row, name in enumerate(names_T):
        partners = np.flatnonzero(names_T == name)
        partners = partners[partners != row]
        chosen = generator.permutation(partners)[:PAIRS_PER_EMOJI]
        triggers.append(np.full(len(chosen), row))
        targets.append(chosen)
    return np.concatenate(triggers), np.concatenate(targets)


def _seed_hits(
    emojis: Emojis, features: ItemFeatures, config: AlignmentConfig
) -> dict[str, np.ndarray]:
    """Return per way of encoding whether each held-out emoji's neighbour has its category."""
    num_emojis = emojis.items.num_rows
    is_held_N = held_out(num_emojis, config.seed)
    triggers_P, targets_P = subcategory_pairs(emojis.subcategories_N, ~is_held_N, config.seed)
    ones_P = np.ones(len(triggers_P), dtype=np.float32)
    pairs = PairRows(triggers_P, targets_P, np.full(len(triggers_P), -1), ones_P)

    def hits(vectors_ND: Embeddings, queries_ND: Embeddings | None = None) -> np.ndarray:
        queries_HD = (vectors_ND if queries_ND is None else queries_ND)[is_held_N]
        nearest_H = (queries_HD @ vectors_ND[~is_held_N].T).argmax(axis=1)
        found_H = emojis.categories_N[~is_held_N][nearest_H]
        return (found_H == emojis.categories_N[is_held_N]).astype(np.float64)

    by_name = {}
    for kind, modalities in KINDS.items():
        part = only(features, modalities)
        head, _ = train_head(part.take(~is_held_N), pairs, config)
        vectors_ND = project_features(head, part, config.embedding_dim)
        by_name[kind] = hits(vectors_ND)
        by_name[f"raw_{kind}"] = hits(part.raw_vectors())
        if kind == "both":
            for name, masked in _masked_parts(part, config.seed).items():
                queries_ND = project_features(head, masked, config.embedding_dim)
                by_name[name] = hits(vectors_ND, queries_ND)
    return by_name


def held_out(num_emojis: int, seed: int) -> np.ndarray:
    """Return which emojis are held out: bool ``[N]``."""
    chance_N: np.ndarray = np.random.default_rng([seed, 0]).random(num_emojis)
    return chance_N < HELD_OUT_SHARE


def masks(num_emojis: int, seed: int) -> dict[int, np.ndarray]:
    """Return by percent which emojis lose a modality, bool ``[N]``: not those held out alone."""
    chance_N = np.random.default_rng([seed, 1]).random(num_emojis)
    return {percent: chance_N < percent / 100 for percent in MASKED_PERCENTS}


def only(features: ItemFeatures, modalities: tuple[str, ...]) -> ItemFeatures:
    """Return some of the modalities of items."""
    return ItemFeatures(
        {name: features.by_modality[name] for name in modalities},
        {name: features.present[name] for name in modalities},
    )


def _masked_parts(features: ItemFeatures, seed: int) -> dict[str, ItemFeatures]:
    # Every emoji has name and picture, so none is left without content.
    return {
        f"{modality}_masked_{percent}": masked_features(
            features, modality, is_masked_N, features.take(slice(0, 1))
        )
        for modality in features.by_modality
        for percent, is_masked_N in masks(len(features), seed).items()
    }


def _say(text: Any) -> None:
    print(text, file=sys.stderr, flush=True)

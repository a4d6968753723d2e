"""Training of an item encoder: features once, a fusion over them, then backbones if wanted.

Alone, or on all processes that torchrun starts:

    torchrun --standalone --nproc-per-node 2 -m qarm_feast.alignment.train --config PATH/qarm.yaml

A process that dies ends the run. Only the first rank writes. What was killed goes on when it is
started again on the same settings and data.
May import: torch, numpy, pyarrow.
"""

import copy
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from qarm_feast.alignment.backbones.base import Backbone
from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import (
    EncoderManifest,
    ItemEncoder,
    backbone_manifests,
    check_version_is_free,
)
from qarm_feast.alignment.features import FeatureCache, ItemFeatures, read_features
from qarm_feast.alignment.fitting import RunFiles, TrainingRun
from qarm_feast.alignment.fusion import ContentFusion, build_fusion, content_width, fusion_sizes
from qarm_feast.alignment.gathering import first_rank_first, is_first_process, joined_ranks
from qarm_feast.alignment.modalities import choose_modalities
from qarm_feast.alignment.pair_rows import PairRows, pair_rows
from qarm_feast.alignment.trainable import HeadItems, training_device
from qarm_feast.alignment.training import Training, TrainingData
from qarm_feast.alignment.tuning_run import TunedContent, Tuning
from qarm_feast.errors import AlreadyRunningError
from qarm_feast.input_data import InputData
from qarm_feast.schema import ITEM_ID
from qarm_feast.shared_state import LockTakenError, exclusive

logger = logging.getLogger(__name__)


def train_and_save(
    checked: InputData,
    pairs: pa.Table,
    config: AlignmentConfig,
    created: datetime,
    parent: ItemEncoder | None = None,
) -> ItemEncoder:
    """Train an encoder on all ranks that torchrun started, and save it.

    1. Each epoch's state goes into ``<encoder_uri>/.<version>.training``.
    2. The first rank saves the artifact.
    3. The states are removed; numbers of the run stay in ``<encoder_uri>/<version>.logs``.

    A process that was killed before 3 goes on where it was when it is started again. Two that train
    one version at once would write over each other's states: the first rank holds a lock, which the
    system gives back when it dies.

    Args:
        checked: Input data.
        pairs: Rows of ``pairs.PAIR_ROWS``.
        config: Section ``alignment``.
        created: Time that the manifest says, aware UTC.
        parent: The encoder that the new one refreshes; see :func:`train_encoder`.

    Returns:
        The encoder, saved.

    Raises:
        DataError: If the items have no content that an encoder reads, or there are no pairs.
        ConfigError: If that version exists.
        AlreadyRunningError: If another process trains that version.
    """
    folder = Path(config.encoder_uri)
    files = RunFiles(
        states=folder / f".{config.encoder_version}.training",
        logs=folder / f"{config.encoder_version}.logs",
    )
    with _lock(folder, config.encoder_version), joined_ranks() as ranks:
        encoder = train_encoder(checked, pairs, config, created, parent, files)
        if ranks.is_first:
            encoder.save(config.encoder_uri)
            shutil.rmtree(files.states, ignore_errors=True)
    return encoder


@contextmanager
def _lock(folder: Path, version: str) -> Iterator[None]:
    """Keep others from training this version; ranks but the first rest on the first one's lock."""
    if not is_first_process():
        yield
        return
    try:
        with exclusive(folder / f".{version}.lock", wait_seconds=0):
            # Only now: another process may just have saved it.
            check_version_is_free(str(folder), version)
            yield
    except LockTakenError as error:
        raise AlreadyRunningError(
            f"another process trains encoder {version!r} in {folder}; let it finish, set "
            f"alignment.encoder_version to another name, or {error}"
        ) from error


def train_encoder(
    checked: InputData,
    pairs: pa.Table,
    config: AlignmentConfig,
    created: datetime,
    parent: ItemEncoder | None = None,
    files: RunFiles | None = None,
) -> ItemEncoder:
    """Return an encoder trained on pairs of train rows.

    Args:
        checked: Input data; of its items only those with a train row are read.
        pairs: Rows of ``pairs.PAIR_ROWS``.
        config: Section ``alignment``.
        created: Time that the manifest says, aware UTC.
        parent: The encoder that the new one refreshes; the manifest names it. Where both read the
            same and have the same sizes, training goes on from it; see :func:`train_head`.
        files: Where the runs are kept; by default nowhere.

    Returns:
        The encoder, not yet saved.

    Raises:
        DataError: If the items have no content that an encoder reads, or there are no pairs.
    """
    items = checked.items.filter(
        pc.is_in(checked.items[ITEM_ID], pa.array(checked.train_item_ids()))
    )
    backbones = open_backbones(choose_modalities(items, config.modalities), items, config)
    with first_rank_first():
        cache = FeatureCache(config.features_uri)
        features = read_features(items, backbones, cache, checked.directory)
    rows = pair_rows(pairs, items[ITEM_ID].to_numpy())
    start = None if parent is None else parent_head(parent, backbones, config)
    head, run = train_head(features, rows, config, files, start)
    figures = asdict(run)
    # Behaviour that no head could learn from tunes no backbone either.
    if config.tuning != "frozen" and run.geometry_weight is not None:
        content = TunedContent(items, features, backbones, checked.directory)
        anchor_weight = _anchor_weight(start, config)
        tuning = Tuning(content, start or start_head(features, config), config, anchor_weight)
        figures = {**asdict(tuning.train(head, rows, run, files)), "head": figures}
    manifest = EncoderManifest(
        version=config.encoder_version,
        parent=None if parent is None else parent.version,
        embedding_dim=head.linear.out_features,
        backbones=backbone_manifests(backbones),
        fusion=fusion_sizes(config),
        behaviour_cutoff=checked.behaviour_cutoff(),
        created=created,
        training={
            **figures,
            "num_train_items": items.num_rows,
            "content": features.counts,
            "seed": config.seed,
            "start": "content" if start is None else "parent",
        },
        files={},
    )
    return ItemEncoder(manifest, head, backbones, checked.directory)


def train_head(
    features: ItemFeatures,
    pairs: PairRows,
    config: AlignmentConfig,
    files: RunFiles | None = None,
    parent: ContentFusion | None = None,
) -> tuple[ContentFusion, TrainingRun]:
    """Train the head until the loss on held-out items stops falling.

    It starts from the content geometry and is held to it, or it starts from a parent and is held to
    the parent's, and each item to its place there (``parent_weight``): then what behaviour does not
    move stays where it is, and so do its codes.

    Args:
        features: Content features of the train items.
        pairs: Pairs as rows of these items.
        config: Sizes, weights, schedule and seed.
        files: Where the runs are kept; by default nowhere.
        parent: A trained head of the same sizes over the same features; it stays as it is.

    Returns:
        The head of the best epoch, in evaluation mode on the CPU, and the run's figures.
    """
    head = start_head(features, config) if parent is None else copy.deepcopy(parent)
    items = HeadItems(head, features, training_device(config))
    raw_ME = features.raw_vectors()
    data = TrainingData(items, pairs, items.embeddings(), raw_ME, _anchor_weight(parent, config))
    run = Training(data, config, files, "head").run()
    return head.cpu(), run


def _anchor_weight(parent: ContentFusion | None, config: AlignmentConfig) -> float:
    """Return the weight of an item's place in the parent: none where there is no parent."""
    return 0.0 if parent is None else config.parent_weight


def start_head(features: ItemFeatures, config: AlignmentConfig) -> ContentFusion:
    """Return the head before any training: the content geometry of the given items."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        width = min(config.embedding_dim, content_width(features.shapes))
        head = build_fusion(features.shapes, width, fusion_sizes(config))
    head.start_from_content(*features.tensors(), is_centred=config.center_content)
    return head


def parent_head(
    parent: ItemEncoder, backbones: Mapping[str, Backbone], config: AlignmentConfig
) -> ContentFusion | None:
    """Return the head that a refresh goes on from.

    Args:
        parent: The encoder that is refreshed.
        backbones: What the new encoder reads.
        config: Section ``alignment``.

    Returns:
        The parent's head; None, and a warning, if it has other sizes or reads something else.
    """
    manifest = parent.manifest
    shapes = {name: (each.num_tokens, each.width) for name, each in backbones.items()}
    facts = {
        "backbones": (
            {name: backbone.hash for name, backbone in manifest.backbones.items()},
            {name: backbone.hash for name, backbone in backbones.items()},
        ),
        "fusion": (manifest.fusion, fusion_sizes(config)),
        "embedding_dim": (
            manifest.embedding_dim,
            min(config.embedding_dim, content_width(shapes)),
        ),
    }
    if differing := [name for name, (old, new) in facts.items() if old != new]:
        logger.warning(
            "alignment_parent_not_continued parent=%s: its %s differ, so training starts from the "
            "content; more codes will change", parent.version, " and ".join(differing),
        )  # fmt: skip
        return None
    assert isinstance(parent.head, ContentFusion), "what build_fusion returned"
    return parent.head


if __name__ == "__main__":
    from qarm_feast.alignment.cli import train
    from qarm_feast.command import run_command_line

    run_command_line(train)

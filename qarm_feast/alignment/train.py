"""Training of the alignment head on item pairs, the backbone frozen.

May import: torch, numpy, pyarrow.
"""

import os
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import torch

from qarm_feast.alignment.backbones.opening import open_backbones
from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import EncoderManifest, ItemEncoder, backbone_manifests
from qarm_feast.alignment.features import FeatureCache, ItemFeatures, read_features
from qarm_feast.alignment.fitting import RunFiles, TrainingRun
from qarm_feast.alignment.fusion import ContentFusion, build_fusion, content_width, fusion_sizes
from qarm_feast.alignment.modalities import choose_modalities
from qarm_feast.alignment.pair_rows import PairRows, pair_rows
from qarm_feast.alignment.trainable import HeadItems
from qarm_feast.alignment.training import Training
from qarm_feast.errors import ConfigError
from qarm_feast.input_data import InputData
from qarm_feast.schema import ITEM_ID


def train_encoder(
    checked: InputData,
    pairs: pa.Table,
    config: AlignmentConfig,
    created: datetime,
    parent: ItemEncoder | None = None,
) -> ItemEncoder:
    """Return an encoder trained on pairs of train rows.

    Args:
        checked: Input data; of its items only those with a train row are read.
        pairs: Rows of ``pairs.PAIR_ROWS``.
        config: Section ``alignment``.
        created: Time that the manifest says, aware UTC.
        parent: The encoder that the new one refreshes; the manifest names it.

    Returns:
        The encoder, not yet saved.

    Raises:
        DataError: If the items have no content that an encoder reads, or there are no pairs.
    """
    items = checked.items.filter(
        pc.is_in(checked.items[ITEM_ID], pa.array(checked.train_item_ids()))
    )
    backbones = open_backbones(choose_modalities(items, config.modalities), items, config)
    cache = FeatureCache(config.features_uri)
    features = read_features(items, backbones, cache, checked.directory)
    rows = pair_rows(pairs, items[ITEM_ID].to_numpy())
    head, run = train_head(features, rows, config)
    manifest = EncoderManifest(
        version=config.encoder_version,
        parent=None if parent is None else parent.version,
        embedding_dim=head.linear.out_features,
        backbones=backbone_manifests(backbones),
        fusion=fusion_sizes(config),
        behaviour_cutoff=checked.behaviour_cutoff(),
        created=created,
        training={
            **vars(run),
            "num_train_items": items.num_rows,
            "content": features.counts,
            "seed": config.seed,
        },
        files={},
    )
    return ItemEncoder(manifest, head, backbones, checked.directory)


def train_head(
    features: ItemFeatures,
    pairs: PairRows,
    config: AlignmentConfig,
    files: RunFiles | None = None,
) -> tuple[ContentFusion, TrainingRun]:
    """Train the head until the loss on held-out items stops falling.

    Args:
        features: Content features of the train items.
        pairs: Pairs as rows of these items.
        config: Sizes, weights, schedule and seed.
        files: Where the run is kept; by default nowhere.

    Returns:
        The head of the best epoch, in evaluation mode on the CPU, and the run's figures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        width = min(config.embedding_dim, content_width(features.shapes))
        head = build_fusion(features.shapes, width, fusion_sizes(config))
    head.start_from_content(*features.tensors(), is_centred=config.center_content)
    items = HeadItems(head, features, training_device(config))
    training = Training(
        items, items.embeddings(), features.raw_vectors(), pairs, config, files or RunFiles()
    )
    run = training.run()
    return head.cpu(), run


def training_device(config: AlignmentConfig) -> torch.device:
    """Return where this rank trains: its GPU of this machine, or the CPU.

    Args:
        config: Section ``alignment``.

    Returns:
        The device, made the current one.

    Raises:
        ConfigError: If a GPU is wanted and there is none.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "alignment.device is cuda, and torch finds no GPU here; set it to auto or cpu"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device

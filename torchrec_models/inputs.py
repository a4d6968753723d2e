"""What training runs share: the current rows of a service and the codebook they were coded with.

Shape letters: P pool rows, D aligned embedding width.
May import: numpy and qarm_feast's codebook and registry; neither torch nor torchrec.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qarm_feast.codebook import Codebook
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.registry import CodebookRegistry
from torchrec_models.config import RankerConfig
from torchrec_models.row_store import RowStore

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CodebookVectors:
    """Centroids per RQ level and the VQ pool's vectors: what code tables start from."""

    codebooks: Sequence[Weights]
    pool_vectors_PD: Weights


@dataclass(frozen=True)
class TrainInputs:
    """Everything that runs on the same rows share."""

    store: RowStore
    codebook: CodebookVectors | None


def resolve_codebook_version(config_path: str, codebook_version: str) -> str:
    """Return the version itself, or what the codebook registry calls default.

    Args:
        config_path: Path of ``qarm.yaml``.
        codebook_version: A version name, or ``default``.

    Returns:
        A version name.
    """
    if codebook_version != "default":
        return codebook_version
    codebooks = load_section(config_path, "codebook", CodebookConfig)
    return CodebookRegistry(codebooks.uri).default_version()


def load_train_inputs(config_path: str, config: RankerConfig) -> TrainInputs:
    """Return the current rows of the ranker's service and, where needed, its codebook's vectors.

    Args:
        config_path: Path of ``qarm.yaml``.
        config: The ranker section.

    Returns:
        Rows, and the codebook if its centroids start the code tables.

    Raises:
        DataError: If the service has no rows yet.
    """
    version = resolve_codebook_version(config_path, config.codebook_version)
    store = RowStore(config.rows_uri, config.service_name(version))
    if not config.enable_centroid_start:
        return TrainInputs(store=store, codebook=None)
    codebooks = load_section(config_path, "codebook", CodebookConfig)
    # Only its vectors are read: no place on a GPU is needed for the search.
    codebook = Codebook.load(codebooks.uri, version)
    vectors = CodebookVectors(
        codebooks=codebook.rq.codebooks, pool_vectors_PD=codebook.vq.pool_vectors_PD
    )
    return TrainInputs(store=store, codebook=vectors)

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_models.config import FeatureName, RankerConfig, TaskConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.program import load_program, save_program
from torchrec_models.quantized import quantize_tables
from torchrec_models.ranker import build_ranker
from torchrec_models.row_store import code_sizes
from torchrec_models.tables import dense_width, ranker_tables, sparse_feature_names

NUM_LEVELS = 2
TASKS = (
    TaskConfig(name="like", label_name="is_like"),
    TaskConfig(name="love", label_name="is_love", after="like"),
)
ALL_FEATURES = get_args(FeatureName)


def random_features(
    tables: list[BaseEmbeddingConfig], num_rows: int, is_bare: bool
) -> KeyedJaggedTensor:
    """Up to three values per row and feature, whole items of a sequence; none in bare rows."""
    rng = np.random.default_rng(num_rows)
    values, lengths = [], []
    for table in tables:
        for name in table.feature_names:
            step = NUM_LEVELS if isinstance(table, EmbeddingConfig) else 1
            most = 0 if is_bare else 1 if name.startswith("target") else 3
            lengths_B = step * rng.integers(0, most + 1, num_rows)
            values.append(rng.integers(0, table.num_embeddings, lengths_B.sum()))
            lengths.append(lengths_B.astype(np.int32))
    return KeyedJaggedTensor(
        list(sparse_feature_names(tables)),
        torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )


@pytest.mark.parametrize(
    "parts",
    [
        {"head": "ple", "features": ("user_id", "history_item_id", "cross", "attention")},
        {
            "head": "home",
            "interaction": "dcn",
            "features": ALL_FEATURES,
            "vector_source": "raw",
        },
        {
            "head": "shared_bottom",
            "interaction": "fgcnn",
            "features": ("item_id", "rq_code", "vq_code"),
        },
        {"head": "mmoe", "enable_esmm": True, "features": ("rq_code", "vq_code")},
    ],
    ids=["ple", "home", "fgcnn", "esmm"],
)
def test_a_program_scores_any_number_of_rows_to_the_bit_as_its_ranker(
    inputs: TrainInputs, parts: dict[str, Any]
) -> None:
    config = RankerConfig(tasks=TASKS, embedding_dim=8, **parts)
    sizes, vocabularies = code_sizes(inputs.store.manifest), inputs.store.run_vocabularies(config)
    tables = ranker_tables(sizes, vocabularies, config)
    width = dense_width(sizes, config, len(TASKS))
    torch.manual_seed(0)
    ranker = build_ranker(config, TASKS, vocabularies, sizes).eval()
    quantize_tables(ranker)

    program = load_program(save_program(ranker, sparse_feature_names(tables), width, NUM_LEVELS))

    with torch.inference_mode():
        for num_rows in (1, 7, 1000):
            for is_bare in (False, True):
                features = random_features(tables, num_rows, is_bare)
                dense_BW = torch.randn(num_rows, width)
                assert torch.equal(program(features, dense_BW), ranker(features, dense_BW))

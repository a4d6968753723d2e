from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import write_synthetic_rows

from qarm_feast.errors import DataError
from torchrec_models.checkpoint import Checkpoint
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs
from torchrec_models.label_maps import LabelMap
from torchrec_models.prefixes import PrefixVocabulary, build_prefixes
from torchrec_models.sharding import Ranks
from torchrec_models.tables import centroid_start
from torchrec_models.training import train
from torchrec_models.vocabulary import (
    BucketVocabulary,
    CategoryVocabulary,
    IdVocabulary,
    Vocabularies,
)
from torchrec_models.warm_start import WarmStart, row_maps

FEATURES = ("user_id", "item_id", "user_columns", "rq_code", "vq_code", "attention")
# Of eight codes, the first three have moved by one place and the last one is new.
LEVEL = np.array([1, 2, 0, 3, 4, 5, 6, -1])
WARM_ITEMS, MORE_WARM_ITEMS = 54, 63


@pytest.fixture
def older(inputs: TrainInputs, ranks: Ranks, tmp_path: Path) -> Checkpoint:
    result = train(_config(tmp_path / "older", num_epochs=1), inputs)
    assert result.checkpoint is not None
    return Checkpoint.at(result.checkpoint)


def _config(folder: Path, **keys: object) -> RankerConfig:
    small = {"checkpoint_dir": str(folder), "batch_size": 400, "embedding_dim": 8}
    return RankerConfig.model_validate(small | {"features": FEATURES} | keys)


def _weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Whole tables by name, and their optimizer state under `<name>.momentum1`."""
    weights = {}
    for key, shape in checkpoint.shapes().items():
        if "embedding" in key:
            tensor = torch.zeros(shape)
            checkpoint.read({key: tensor})
            name = key.removesuffix(".weight").rpartition(".")
            weights[name[2] if key.endswith(".weight") else ".".join(key.split(".")[-2:])] = tensor
    return weights


def test_rows_go_on_by_label_pool_row_and_id(older: Checkpoint, tmp_path: Path) -> None:
    # Seven items more, the pool as much longer; its row 2 was given to another item.
    pool_P = np.where(np.arange(MORE_WARM_ITEMS) < WARM_ITEMS, np.arange(MORE_WARM_ITEMS), -1)
    pool_P[2] = -1
    start = WarmStart(older, LabelMap((LEVEL, np.arange(8)), pool_P))
    inputs = write_synthetic_rows(tmp_path / "rows", num_items=70)
    assert inputs.codebook is not None
    config = _config(tmp_path / "newer", num_epochs=0)

    result = train(config, inputs, warm_start=start)

    assert result.checkpoint is not None
    old, new = _weights(older), _weights(Checkpoint.at(result.checkpoint))
    own = centroid_start(inputs.codebook.codebooks, inputs.codebook.pool_vectors_PD, config)
    assert torch.equal(new["rq_0"][:7], old["rq_0"][LEVEL[:7]])
    assert torch.equal(new["rq_0"][7], torch.from_numpy(own["rq_0"][7]))
    assert torch.equal(new["rq_1"], old["rq_1"])
    assert torch.equal(new["sequence_rq"][:7], old["sequence_rq"][LEVEL[:7]])
    assert torch.equal(new["sequence_rq"][8:], old["sequence_rq"][8:])
    kept = torch.from_numpy(pool_P != -1)
    assert torch.equal(new["vq_code"][kept], old["vq_code"][:WARM_ITEMS][kept[:WARM_ITEMS]])
    assert torch.equal(new["vq_code"][~kept], torch.from_numpy(own["vq_code"])[~kept])
    assert torch.equal(new["item_id"][: WARM_ITEMS + 1], old["item_id"])
    assert torch.equal(new["item_id"][-1], old["item_id"][0])
    assert old["rq_0.momentum1"].min() > 0
    assert torch.equal(new["rq_0.momentum1"][:7], old["rq_0.momentum1"][LEVEL[:7]])
    assert new["rq_0.momentum1"][7] == new["item_id.momentum1"][-1] == 0


def test_the_same_codebook_and_rows_give_the_older_rankers_scores(
    older: Checkpoint, inputs: TrainInputs, tmp_path: Path
) -> None:
    expected = train(_config(tmp_path / "again", num_epochs=1), inputs)
    sizes = older.manifest.sizes
    start = WarmStart(older, LabelMap.same_numbers(sizes.level_sizes, sizes.pool_size))

    result = train(_config(tmp_path / "newer", num_epochs=0), inputs, warm_start=start)

    assert result.num_steps == 0
    assert torch.equal(result.test_predictions.logits_NT, expected.test_predictions.logits_NT)


def test_a_ranker_of_other_parts_is_refused(
    older: Checkpoint, inputs: TrainInputs, tmp_path: Path
) -> None:
    start = WarmStart(older, LabelMap.same_numbers((8, 8), WARM_ITEMS))
    wider = _config(tmp_path / "newer", expert_layer_sizes=(16,))
    other_tables = _config(tmp_path / "newer", features=("user_id", "item_id"))

    with pytest.raises(DataError, match=r"has shape \(.*and .* here.*and \d+ more; take its"):
        train(wider, inputs, warm_start=start)
    with pytest.raises(DataError, match="cannot start this ranker"):
        train(other_tables, inputs, warm_start=start)


def test_columns_go_on_by_value_and_bucket(
    older: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = IdVocabulary(np.array([5, 7]))
    old = Vocabularies(
        user_ids=ids,
        item_ids=ids,
        user_columns={
            "gender": CategoryVocabulary(("F", "M")),
            "age": BucketVocabulary((20.0, 30.0, 40.0)),
            "town": CategoryVocabulary(("A",)),
        },
    )
    new = Vocabularies(
        user_ids=IdVocabulary(np.array([4, 7])),
        item_ids=ids,
        user_columns={
            "gender": CategoryVocabulary(("M", "X")),
            "age": BucketVocabulary((25.0, 40.0)),
            "town": BucketVocabulary((1.0,)),
        },
    )
    monkeypatch.setattr(Checkpoint, "vocabularies", lambda _: old)

    maps = row_maps(older, new, LabelMap.same_numbers((8, 8), WARM_ITEMS))

    assert maps["user_id"].source_R.tolist() == [0, 0, 2]
    assert maps["user_id"].goes_on_R.tolist() == [True, False, True]
    assert maps["user_gender"].source_R.tolist() == [0, 2, 0]
    # Buckets from nothing, 25 and 40 on: the old ones below 20, from 20 on and from 40 on.
    assert maps["user_age"].source_R.tolist() == [0, 1, 2, 4]
    assert maps["user_town"].source_R.tolist() == [-1, -1, -1]


def test_prefixes_go_on_by_the_codes_that_do(
    older: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = IdVocabulary(np.array([5]))
    # Rows 0, 1: (0), (1); rows 2, 3: (0, 0), (1, 1).
    old = Vocabularies(ids, ids, prefixes=build_prefixes(np.array([[0, 0], [1, 1]]), 2, 10))
    # Rows 0 to 2: (0), (1), (2); then (0, 1), (1, 0), (2, 0).
    new = build_prefixes(np.array([[0, 1], [1, 0], [2, 0]]), 2, 10)
    labels = LabelMap((np.array([1, 0, -1]), np.array([0, 1])), np.arange(1))
    hashed = build_prefixes(np.array([[0, 1], [1, 0]]), 2, max_rows=3)
    monkeypatch.setattr(Checkpoint, "vocabularies", lambda _: old)

    def sources(prefixes: PrefixVocabulary, map_: LabelMap) -> list[int]:
        rows = row_maps(older, Vocabularies(ids, ids, prefixes=prefixes), map_)
        return rows["prefix"].source_R.tolist()

    # (0, 1) was (1, 1), row 3; (1, 0) was (0, 0), row 2; code 2 began anew.
    assert sources(new, labels) == [1, 0, -1, 3, 2, -1]
    assert sources(hashed, LabelMap.same_numbers((2, 2), 1)) == [-1, -1, -1]
    old = Vocabularies(ids, ids, prefixes=hashed)
    assert sources(hashed, LabelMap.same_numbers((2, 2), 1)) == [0, 1, 2]
    assert sources(hashed, LabelMap((np.array([1, 0]), np.arange(2)), np.arange(1))) == [-1] * 3

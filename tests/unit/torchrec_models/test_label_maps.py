from datetime import UTC, datetime

import numpy as np
import pytest

from qarm_feast.errors import DataError
from qarm_feast.registry import Manifest
from torchrec_models.label_maps import LabelMap, label_map


def _manifest(version: str, parent: str | None, **keys: object) -> Manifest:
    facts = {
        "version": version,
        "parent": parent,
        "encoder_version": "e1",
        "encoder_hash": "hash",
        "behaviour_cutoff": None,
        "embedding_dim": 2,
        "level_sizes": (3,),
        "num_neighbors": 1,
        "pool_size": 4,
        "seed": 0,
        "num_training_items": 4,
        "files": {},
        "created": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Manifest.model_validate(facts | keys)


V1 = _manifest("v1", None)
V2 = _manifest("v2", "v1", label_map=((2, 0, -1),), reset_pool_rows=(1,))
# One code and one pool row more than its parent.
V3 = _manifest(
    "v3", "v2", level_sizes=(4,), label_map=((1, 2, 0, -1),), pool_size=5, reset_pool_rows=(3, 4)
)


def _lists(labels: LabelMap) -> tuple[list[list[int]], list[int]]:
    return [rows.tolist() for rows in labels.levels], labels.pool_P.tolist()


def test_a_map_names_the_parents_code_and_the_pool_rows_that_stay() -> None:
    labels = label_map({"v1": V1, "v2": V2}, old="v1", new="v2")

    assert _lists(labels) == ([[2, 0, -1]], [0, -1, 2, 3])


def test_maps_of_several_versions_are_chained() -> None:
    # v3's code 0 goes on from v2's 1, that from v1's 0; its 1 from v2's 2, which began anew.
    labels = label_map({"v1": V1, "v2": V2, "v3": V3}, old="v1", new="v3")

    assert _lists(labels) == ([[0, -1, 2, -1]], [0, -1, 2, -1, -1])


def test_a_codebook_goes_on_from_itself_and_a_level_that_the_old_one_lacks_from_nothing() -> None:
    same = label_map({"v1": V1}, old="v1", new="v1")
    longer = LabelMap((np.array([0, 1, 2]), np.array([1, 0])), np.arange(4)).after(same)

    assert _lists(same) == ([[0, 1, 2]], [0, 1, 2, 3])
    assert _lists(longer)[0] == [[0, 1, 2], [-1, -1]]


def test_a_codebook_that_does_not_descend_from_the_old_one_is_refused() -> None:
    with pytest.raises(DataError, match=r"'v1' has no parent.* go on from 'v0'"):
        label_map({"v1": V1, "v2": V2}, old="v0", new="v2")

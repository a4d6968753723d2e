import numpy as np
import pytest

from torchrec_models.id_index import IdIndex


@pytest.mark.parametrize("spread", [1, 1 << 10, 1 << 40], ids=["dense", "powers", "wide"])
def test_ids_are_found_where_a_dict_finds_them(spread: int) -> None:
    rng = np.random.default_rng(spread)
    ids_V = rng.permutation(np.arange(-500, 500) * spread)
    asked_N = rng.permutation(np.concatenate([ids_V, ids_V, np.arange(2000) * spread + 7]))

    places_N, is_known_N = IdIndex(ids_V).find(asked_N)

    place_of = {int(id_): place for place, id_ in enumerate(ids_V)}
    assert is_known_N.tolist() == [int(id_) in place_of for id_ in asked_N]
    assert places_N.tolist() == [place_of.get(int(id_), 0) for id_ in asked_N]


@pytest.mark.parametrize("ids", [[], [7]])
def test_no_id_and_one_id_can_be_indexed(ids: list[int]) -> None:
    places_N, is_known_N = IdIndex(np.array(ids, dtype=np.int64)).find(np.array([7, 8]))

    assert places_N.tolist() == [0, 0]
    assert is_known_N.tolist() == [bool(ids), False]

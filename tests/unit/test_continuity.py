"""Shape letters in this file: N items, D embedding width, L levels, K codes, P pool rows."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from qarm_feast.codebook import Codebook, EncoderFacts, ItemVectors, QuantizerConfig
from qarm_feast.codebook_config import ContinuityConfig
from qarm_feast.continuity import (
    NO_CODE,
    NUM_HELD_MEANS,
    FittedLevel,
    ParentCodes,
    codes_churn,
    held_codes,
    match_labels,
    refresh_codebook,
)
from qarm_feast.errors import CodebookError, DataError
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.quantizers.base import unit_rows

DIM = 8
NUM_ITEMS = 600
CONFIG = QuantizerConfig(rq=RqConfig(codebook_size=(8, 8)), vq=VqConfig(num_neighbors=3))
ENCODER = EncoderFacts("e2", "b" * 64, datetime(2024, 3, 1, tzinfo=UTC))
CREATED = datetime(2024, 4, 1, tzinfo=UTC)
KEEP = ContinuityConfig()


def _vectors(
    num_items: int = NUM_ITEMS, seed: int = 0, first_id: int = 1000, dim: int = DIM
) -> ItemVectors:
    """Items around 8 centres, so that codes mean something."""
    rng = np.random.default_rng(seed)
    centres_KD = np.random.default_rng(99).standard_normal((8, dim))
    x_ND = centres_KD[rng.integers(8, size=num_items)] + 0.3 * rng.standard_normal((num_items, dim))
    ids_N = np.arange(first_id, first_id + num_items, dtype=np.int64)
    return ItemVectors(ids_N, [f"h{item}" for item in ids_N], x_ND.astype(np.float32))


def _train(vectors: ItemVectors, version: str = "v1", config: QuantizerConfig = CONFIG) -> Codebook:
    return Codebook.train(
        version, vectors.item_ids_N, vectors.x_ND, config=config, encoder=ENCODER, created=CREATED
    )


def _parent(vectors: ItemVectors, config: QuantizerConfig = CONFIG) -> ParentCodes:
    return ParentCodes.served_by(_train(vectors, config=config), vectors)


def _refresh(
    vectors: ItemVectors,
    parent: ParentCodes,
    keep: ContinuityConfig = KEEP,
    config: QuantizerConfig = CONFIG,
    version: str = "v2",
) -> Codebook:
    naive = _train(vectors, version, config)
    return refresh_codebook(naive, vectors, vectors.item_ids_N, parent, keep, config.rq)


def _drifted(vectors: ItemVectors, scale: float, seed: int) -> ItemVectors:
    noise_ND = np.random.default_rng(seed).standard_normal(vectors.x_ND.shape)
    return replace(vectors, x_ND=(vectors.x_ND + scale * noise_ND).astype(np.float32))


def _rotated(vectors: ItemVectors) -> ItemVectors:
    square_DD = np.random.default_rng(4).standard_normal((DIM, DIM))
    rotation_DD = np.linalg.qr(square_DD)[0]
    return replace(vectors, x_ND=(vectors.x_ND @ rotation_DD).astype(np.float32))


def _excess(codebook: Codebook) -> float:
    figures = codebook.manifest.continuity
    return float(figures["quantization_mse"] / figures["naive_quantization_mse"] - 1)


def test_an_old_code_is_kept_up_to_the_hysteresis_and_on_what_kept_codes_leave() -> None:
    levels = [
        FittedLevel(np.array([[0], [10]], dtype=np.float32), np.array([0, 1]), "warm"),
        FittedLevel(np.array([[0], [1], [6]], dtype=np.float32), np.array([0, 1, 2]), "warm"),
    ]
    # To the old centroid 0 and the nearest 10: squared distances 36 and 16 (2.25 times as far).
    x_ND = np.array([[6], [6]], dtype=np.float32)
    old_NL = np.array([[0, NO_CODE], [1, NO_CODE]])

    assert held_codes(levels, x_ND, old_NL, 1.25).tolist() == [[0, 2], [1, 0]]
    assert held_codes(levels, x_ND, old_NL, 1.24).tolist() == [[1, 0], [1, 0]]


def _reference_held(
    levels: list[FittedLevel], x_ND: np.ndarray, old_NL: np.ndarray, h: float
) -> np.ndarray:
    rows = []
    for x_D, old_L in zip(x_ND.astype(np.float64), old_NL, strict=True):
        row = []
        for level, old in zip(levels, old_L, strict=True):
            squared_K = ((x_D - level.centroids_KD.astype(np.float64)) ** 2).sum(axis=1)
            code = int(squared_K.argmin())
            mine = np.flatnonzero(level.parent_code_K == old) if old != NO_CODE else []
            if len(mine) and squared_K[mine[0]] <= (1 + h) * squared_K[code]:
                code = int(mine[0])
            row.append(code)
            x_D = x_D - level.centroids_KD[code]
        rows.append(row)
    return np.array(rows)


def test_held_codes_equal_a_plain_reference() -> None:
    rng = np.random.default_rng(1)
    levels = [
        FittedLevel(rng.standard_normal((6, 4)).astype(np.float32), names_K, "matched")
        for names_K in (np.array([3, NO_CODE, 0, 9, 1, 2]), np.array([5, 4, 3, 2, 1, 0]))
    ]
    x_ND = rng.standard_normal((300, 4)).astype(np.float32)
    old_NL = rng.integers(NO_CODE, 10, size=(300, 2))

    for hysteresis in (0.0, 0.1, 0.5):
        expected_NL = _reference_held(levels, x_ND, old_NL, hysteresis)
        np.testing.assert_array_equal(held_codes(levels, x_ND, old_NL, hysteresis), expected_NL)


@pytest.mark.parametrize(("mse_budget", "num_iterations"), [(1.0, 0), (0.01, 3)])
def test_the_centroids_equal_a_plain_reference(mse_budget: float, num_iterations: int) -> None:
    parent = _parent(_vectors())
    new = _drifted(_vectors(), 0.15, seed=3)
    keep = ContinuityConfig(hysteresis=0.1, num_iterations=3, mse_budget=mse_budget)

    refreshed = _refresh(new, parent, keep)

    assert refreshed.manifest.continuity["num_iterations"] == num_iterations
    assert refreshed.manifest.continuity["hysteresis"] == keep.hysteresis
    residual_ND = unit_rows(new.x_ND).astype(np.float64)
    for number, centroids_KD in enumerate(refreshed.rq.codebooks):
        old_N = parent.rq_NL[:, number]
        codes_N = old_N
        for step in range(num_iterations + NUM_HELD_MEANS + 1):
            means_KD = np.stack([residual_ND[codes_N == code].mean(axis=0) for code in range(8)])
            squared_NK = ((residual_ND[:, None] - means_KD) ** 2).sum(axis=2)
            h = keep.hysteresis if step >= num_iterations else 0.0
            own_N = squared_NK[np.arange(len(old_N)), old_N]
            codes_N = np.where(
                own_N <= (1 + h) * squared_NK.min(axis=1), old_N, squared_NK.argmin(axis=1)
            )
        np.testing.assert_allclose(centroids_KD, means_KD, atol=1e-5)
        residual_ND -= means_KD[codes_N]


def test_labels_are_matched_so_that_most_items_agree() -> None:
    old_N = np.array([0, 0, 0, 1, 1, 2])
    new_N = np.array([2, 2, 1, 0, 0, 1])

    # Old 0 -> new 2 (two items), old 1 -> new 0 (two), old 2 -> new 1 (one).
    assert match_labels(old_N, new_N, 3, 3).tolist() == [1, 2, 0]
    # Of two old codes only the larger gets the one new code; an unshared one gets none.
    assert match_labels(old_N, np.zeros(6, dtype=np.int64), 3, 2).tolist() == [0, NO_CODE]


def test_churn_is_read_through_the_label_map() -> None:
    old_NL = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    new_NL = np.array([[1, 0], [1, 0], [0, 0], [1, 1]])
    label_map = [np.array([1, 0]), np.array([0, 1])]

    churn = codes_churn(old_NL, new_NL, label_map)
    fewer_levels = codes_churn(old_NL, new_NL[:, :1], label_map)
    nothing = codes_churn(old_NL[:0], new_NL[:0], label_map)

    assert churn == {"full": 0.5, "prefixes": [0.25, 0.5], "levels": [0.25, 0.25]}
    assert fewer_levels == {"full": 1.0, "prefixes": [0.25], "levels": [0.25]}
    assert nothing["full"] == 0.0


@pytest.mark.parametrize("move", [lambda vectors: vectors, _rotated])
def test_in_the_same_or_a_rotated_space_at_most_one_percent_of_codes_change(
    move: Callable[[ItemVectors], ItemVectors],
) -> None:
    old = _vectors()

    refreshed = _refresh(move(old), _parent(old))

    figures = refreshed.manifest.continuity
    assert figures["churn"]["full"] <= 0.01
    assert figures["level_starts"] == ["warm", "warm"]
    assert refreshed.manifest.label_map == (tuple(range(8)),) * 2


def test_where_some_items_drift_away_the_others_keep_their_codes() -> None:
    old = _vectors()
    parent = _parent(old)
    x_ND = old.x_ND.copy()
    # The first 60 items come to lie where the last 60 are.
    x_ND[:60] = x_ND[-60:]
    moved_N = (parent.rq_NL[:60] != parent.rq_NL[-60:]).any(axis=1)

    refreshed = _refresh(replace(old, x_ND=x_ND), parent)

    codes = refreshed.encode(old.item_ids_N, old.content_hashes_N, x_ND)
    is_same_N = (codes.rq_NL == parent.rq_NL).all(axis=1)
    assert is_same_N[60:].mean() > 0.9
    assert is_same_N[:60][moved_N].mean() < 0.1
    assert refreshed.manifest.continuity["naive_churn"]["full"] > 0.5


def test_kept_codes_are_served_by_encode_until_the_content_changes(tmp_path: Path) -> None:
    old = _vectors()
    parent = _parent(old)
    new = _drifted(old, 0.15, seed=3)
    refreshed = _refresh(new, parent)
    refreshed.save(str(tmp_path))
    loaded = Codebook.load(str(tmp_path), "v2")

    served_NL = loaded.encode(new.item_ids_N, new.content_hashes_N, new.x_ND).rq_NL
    edited_NL = loaded.encode(new.item_ids_N, ["edited"] * NUM_ITEMS, new.x_ND).rq_NL

    num_overrides = int((served_NL != edited_NL).any(axis=1).sum())
    label_map = [np.array(names) for names in loaded.manifest.label_map or ()]
    assert loaded.manifest == refreshed.manifest
    assert num_overrides == loaded.manifest.num_overrides > 0
    np.testing.assert_array_equal(edited_NL, loaded.rq.encode(unit_rows(new.x_ND)))
    assert codes_churn(parent.rq_NL, served_NL, label_map) == loaded.manifest.continuity["churn"]


def test_over_a_chain_of_five_the_error_stays_within_the_budget() -> None:
    vectors = _vectors()
    parent = _parent(vectors)
    for number in range(2, 7):
        vectors = _drifted(vectors, 0.1, seed=number)
        refreshed = _refresh(vectors, parent, version=f"v{number}")
        parent = ParentCodes.served_by(refreshed, vectors)

        assert _excess(refreshed) <= KEEP.mse_budget
        figures = refreshed.manifest.continuity
        assert figures["churn"]["full"] < 0.5 * figures["naive_churn"]["full"]


def test_the_budget_buys_iterations_then_less_hysteresis_then_the_naive_refit() -> None:
    parent = _parent(_vectors())
    new = _drifted(_vectors(), 0.6, seed=3)
    loose, tight = (
        _refresh(new, parent, ContinuityConfig(hysteresis=1.0, mse_budget=budget))
        for budget in (1.0, 0.1)
    )
    beaten = _refresh(_vectors(seed=8), parent, ContinuityConfig(num_iterations=1, mse_budget=0.0))

    loose_figures, tight_figures = loose.manifest.continuity, tight.manifest.continuity
    assert (loose_figures["hysteresis"], loose_figures["num_iterations"]) == (1.0, 0)
    assert tight_figures["hysteresis"] < 1.0
    assert tight_figures["num_iterations"] == CONFIG.rq.num_iterations
    assert _excess(tight) <= 0.1 < _excess(loose)
    assert _excess(beaten) <= 0.0


def test_out_of_reach_of_the_budget_the_naive_refit_gets_matched_labels(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parent = _parent(_vectors())
    vectors = _vectors()
    shuffled = replace(parent, rq_NL=np.random.default_rng(0).permutation(parent.rq_NL))
    keep = ContinuityConfig(num_iterations=1, mse_budget=0.0)
    few = CONFIG.rq.model_copy(update={"num_iterations": 1})

    naive = _train(vectors, "v2")
    refreshed = refresh_codebook(naive, vectors, vectors.item_ids_N, shuffled, keep, few)

    assert refreshed.manifest.continuity["level_starts"] == ["matched", "matched"]
    assert refreshed.manifest.num_overrides == 0
    assert _excess(refreshed) == pytest.approx(0.0, abs=1e-6)
    assert "codebook_refresh_over_budget" in caplog.text


def test_with_few_items_per_code_the_budget_is_stretched_before_the_naive_refit_is_taken() -> None:
    old, new = _vectors(120), _drifted(_vectors(120), 0.3, seed=3)
    thin = CONFIG.model_copy(update={"rq": CONFIG.rq.model_copy(update={"codebook_size": (32,)})})
    few = thin.rq.model_copy(update={"num_iterations": 1})
    parent, naive = _parent(old, thin), _train(new, "v2", thin)

    # 120 items for 32 codes of 39 each: 10.4 times too few.
    kept, refit = (
        refresh_codebook(
            naive, new, new.item_ids_N, parent, ContinuityConfig(mse_budget=budget), few
        )
        for budget in (0.03, 0.0)
    )

    assert 0.03 < _excess(kept) <= 10.4 * 0.03
    assert kept.manifest.continuity["level_starts"] == ["warm"]
    assert refit.manifest.continuity["level_starts"] == ["matched"]
    churns = [each.manifest.continuity["churn"]["full"] for each in (kept, refit)]
    assert churns[0] < 0.5 * churns[1]


def test_pool_items_that_survive_keep_their_row_and_freed_rows_are_recycled() -> None:
    old = _vectors(20)
    parent = replace(_parent(_vectors()), pool_item_ids_P=old.item_ids_N[::-1].copy())
    # Items 1000 and 1005 are gone, 1020 and 1021 are new: rows 19 and 14 come free.
    new = _vectors(22)
    stays_N = ~np.isin(new.item_ids_N, [1000, 1005])
    new = ItemVectors(
        new.item_ids_N[stays_N],
        [hash_ for hash_, stays in zip(new.content_hashes_N, stays_N, strict=True) if stays],
        new.x_ND[stays_N],
    )
    config = QuantizerConfig(rq=RqConfig(codebook_size=(2,)), vq=VqConfig(num_neighbors=3))

    refreshed = _refresh(new, parent, config=config)

    expected_P = old.item_ids_N[::-1].copy()
    expected_P[[14, 19]] = [1020, 1021]
    assert refreshed.vq.pool_item_ids_P.tolist() == expected_P.tolist()
    assert refreshed.manifest.reset_pool_rows == (14, 19)
    pool = refreshed.manifest.continuity["pool"]
    assert (pool["num_kept"], pool["num_reset"], pool["churn"]) == (18, 2, pytest.approx(0.1))
    rows_N = np.searchsorted(new.item_ids_N, refreshed.vq.pool_item_ids_P)
    np.testing.assert_array_equal(refreshed.vq.pool_vectors_PD, unit_rows(new.x_ND)[rows_N])


@pytest.mark.parametrize(("pool_size", "num_reset"), [(15, 0), (25, 5)])
def test_a_pool_that_shrinks_or_grows_keeps_what_it_can(pool_size: int, num_reset: int) -> None:
    old = _vectors(20)
    parent = replace(_parent(_vectors()), pool_item_ids_P=old.item_ids_N[::-1].copy())
    config = QuantizerConfig(
        rq=RqConfig(codebook_size=(2,)), vq=VqConfig(num_neighbors=3, pool_size=pool_size)
    )

    refreshed = _refresh(_vectors(40), parent, config=config)

    ids_P = refreshed.vq.pool_item_ids_P
    kept = min(pool_size, 20)
    assert len(np.unique(ids_P)) == len(ids_P) == pool_size
    assert ids_P[:kept].tolist() == old.item_ids_N[::-1][:kept].tolist()
    assert refreshed.manifest.reset_pool_rows == tuple(range(20, 20 + num_reset))


def test_a_survivor_whose_row_is_cut_off_moves_to_a_free_row_that_starts_anew() -> None:
    # Rows 0 ... 3 of the parent's pool hold items that are gone; rows 4 ... 7 hold survivors.
    pool = np.array([1, 2, 3, 4, 1000, 1001, 1002, 1003])
    parent = replace(_parent(_vectors()), pool_item_ids_P=pool)
    config = QuantizerConfig(
        rq=RqConfig(codebook_size=(2,)), vq=VqConfig(num_neighbors=3, pool_size=6)
    )

    refreshed = _refresh(_vectors(30), parent, config=config)

    ids_P = refreshed.vq.pool_item_ids_P
    assert ids_P[4:].tolist() == [1000, 1001]
    assert ids_P[:2].tolist() == [1002, 1003]
    assert refreshed.manifest.reset_pool_rows == (0, 1, 2, 3)


def test_vectors_may_have_another_width_than_the_parents() -> None:
    old = _vectors()
    wide_ND = np.hstack([old.x_ND, np.zeros((NUM_ITEMS, 5), dtype=np.float32)])

    refreshed = _refresh(replace(old, x_ND=wide_ND), _parent(old))

    assert refreshed.embedding_dim == DIM + 5
    assert refreshed.manifest.continuity["churn"]["full"] <= 0.01


def test_items_that_are_gone_new_or_edited_are_counted_and_get_fresh_codes() -> None:
    old = _vectors()
    parent = _parent(old)
    new = _vectors(NUM_ITEMS, seed=0, first_id=1100)
    # The same ids 1100 ... 1599 keep vector and content, but for ten edits.
    x_ND = np.vstack([old.x_ND[100:], new.x_ND[500:]])
    hashes = [*old.content_hashes_N[100:], *new.content_hashes_N[500:]]
    hashes[:10] = ["edited"] * 10

    refreshed = _refresh(ItemVectors(new.item_ids_N, hashes, x_ND), parent)

    expected = {"compared": 490, "edited": 10, "new": 100, "gone": 100}
    assert refreshed.manifest.continuity["num_items"] == expected
    fresh = {*range(1100, 1110), *range(1600, 1700)}
    assert not fresh & set(refreshed.overrides.item_ids_M.tolist())


def test_items_that_do_not_train_may_keep_codes_and_shape_nothing() -> None:
    old = _vectors()
    parent = _parent(old)
    new = _drifted(old, 0.15, seed=3)
    train_ids = new.item_ids_N[:500]
    trained = ItemVectors(train_ids, new.content_hashes_N[:500], new.x_ND[:500])

    alone = _refresh(trained, parent)
    refreshed = refresh_codebook(_train(trained, "v2"), new, train_ids, parent, KEEP, CONFIG.rq)

    for mine_KD, other_KD in zip(alone.rq.codebooks, refreshed.rq.codebooks, strict=True):
        np.testing.assert_array_equal(mine_KD, other_KD)
    assert (refreshed.overrides.item_ids_M >= new.item_ids_N[500]).any()
    assert set(refreshed.vq.pool_item_ids_P.tolist()) == set(train_ids.tolist())


@pytest.mark.parametrize("size", [6, 12])
def test_a_level_of_another_size_is_matched(size: int) -> None:
    old = _vectors()
    config = QuantizerConfig(rq=RqConfig(codebook_size=(8, size)), vq=CONFIG.vq)

    refreshed = _refresh(old, _parent(old), config=config)

    manifest = refreshed.manifest
    second = [code for code in (manifest.label_map or ())[1] if code != NO_CODE]
    assert manifest.continuity["level_starts"] == ["warm", "matched"]
    assert min(size, 8) - 1 <= len(second) == len(set(second))
    # A label is a code of the parent, not of this level.
    assert min(size, 7) <= max(second) <= 7
    assert manifest.continuity["churn"]["levels"][0] <= 0.01
    assert _excess(refreshed) <= KEEP.mse_budget


def test_levels_that_the_parent_lacks_are_fresh() -> None:
    old = _vectors()
    config = QuantizerConfig(rq=RqConfig(codebook_size=(8, 8, 4)), vq=CONFIG.vq)

    refreshed = _refresh(old, _parent(old), config=config)

    assert refreshed.manifest.continuity["level_starts"] == ["warm", "warm", "fresh"]
    assert (refreshed.manifest.label_map or ())[2] == (NO_CODE,) * 4
    assert refreshed.manifest.continuity["churn"]["full"] == 1.0
    assert refreshed.manifest.continuity["churn"]["prefixes"][1] <= 0.01


def test_below_half_of_the_codes_with_members_a_level_is_matched() -> None:
    old = _vectors()
    parent = _parent(old)
    is_low_N = (parent.rq_NL < 3).all(axis=1)
    hashes = [
        hash_ if is_low else "edited"
        for hash_, is_low in zip(old.content_hashes_N, is_low_N, strict=True)
    ]

    refreshed = _refresh(replace(old, content_hashes_N=hashes), parent)

    assert refreshed.manifest.continuity["level_starts"] == ["matched", "matched"]
    assert sorted((refreshed.manifest.label_map or ())[0])[:5] == [NO_CODE] * 5


def test_a_code_that_lost_its_members_starts_anew() -> None:
    old = _vectors()
    parent = _parent(old)
    stays_N = parent.rq_NL[:, 0] != 5
    new = ItemVectors(
        old.item_ids_N[stays_N],
        [hash_ for hash_, stays in zip(old.content_hashes_N, stays_N, strict=True) if stays],
        old.x_ND[stays_N],
    )

    refreshed = _refresh(new, parent)

    assert refreshed.manifest.label_map is not None
    assert refreshed.manifest.label_map[0][5] == NO_CODE
    assert refreshed.manifest.continuity["level_starts"] == ["warm", "warm"]


def test_without_a_common_item_everything_is_fresh() -> None:
    refreshed = _refresh(_vectors(first_id=50_000), _parent(_vectors()))

    figures = refreshed.manifest.continuity
    assert figures["num_items"] == {"compared": 0, "edited": 0, "new": 600, "gone": 600}
    assert figures["level_starts"] == ["fresh", "fresh"]
    assert refreshed.manifest.reset_pool_rows == tuple(range(NUM_ITEMS))


def test_the_order_of_the_items_changes_nothing() -> None:
    parent = _parent(_vectors())
    new = _drifted(_vectors(), 0.15, seed=3)
    order_N = np.random.default_rng(1).permutation(NUM_ITEMS)
    shuffled = ItemVectors(
        new.item_ids_N[order_N],
        [new.content_hashes_N[row] for row in order_N],
        new.x_ND[order_N],
    )

    assert _refresh(shuffled, parent).manifest == _refresh(new, parent).manifest


def test_the_cutoff_is_never_older_than_the_parents() -> None:
    later = datetime(2025, 1, 1, tzinfo=UTC)
    parent = replace(_parent(_vectors()), behaviour_cutoff=later)

    assert _refresh(_vectors(), parent).manifest.behaviour_cutoff == later


def test_what_cannot_be_refreshed_is_refused() -> None:
    vectors = _vectors()
    parent = _parent(vectors)
    naive = _train(vectors, "v2")
    twice = replace(vectors, item_ids_N=np.full(NUM_ITEMS, 7))
    missing = np.append(vectors.item_ids_N, 1)

    with pytest.raises(CodebookError, match="'v1' cannot be its own parent"):
        _refresh(vectors, parent, version="v1")
    with pytest.raises(DataError, match="599 item ids come more than once; the first is 7"):
        refresh_codebook(naive, twice, vectors.item_ids_N, parent, KEEP, CONFIG.rq)
    with pytest.raises(DataError, match="1 items to train on have no vector"):
        refresh_codebook(naive, vectors, missing, parent, KEEP, CONFIG.rq)


@pytest.mark.parametrize(
    "values", [{"hysteresis": -0.1}, {"hysteresis": 1.1}, {"num_iterations": 0}, {"mse_budget": -1}]
)
def test_settings_out_of_bounds_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ContinuityConfig(**values)


FSQ = QuantizerConfig(
    rq=RqConfig(codebook_size=(8, 32), last_level="fsq"), vq=VqConfig(num_neighbors=3)
)


@pytest.mark.parametrize("move", [lambda vectors: vectors, _rotated])
def test_an_fsq_level_keeps_its_bits_in_the_same_or_a_rotated_space(
    move: Callable[[ItemVectors], ItemVectors],
) -> None:
    old = _vectors()

    refreshed = _refresh(move(old), _parent(old, FSQ), config=FSQ)

    manifest = refreshed.manifest
    assert manifest.level_kinds == ("kmeans", "fsq")
    assert manifest.continuity["level_starts"] == ["warm", "warm"]
    assert (manifest.label_map or ())[1] == tuple(range(32))
    assert manifest.continuity["churn"]["full"] <= 0.01
    assert _excess(refreshed) <= KEEP.mse_budget
    # A lattice still: opposite corners have one and the same middle.
    lattice_KD = refreshed.rq.codebooks[1].astype(np.float64)
    middles_KD = (lattice_KD + lattice_KD[::-1]) / 2
    np.testing.assert_allclose(middles_KD, np.tile(middles_KD[:1], (32, 1)), atol=1e-6)


def test_an_fsq_level_changes_fewer_codes_than_a_naive_refit_in_a_moved_space() -> None:
    old = _vectors()

    refreshed = _refresh(_drifted(_rotated(old), 0.15, seed=3), _parent(old, FSQ), config=FSQ)

    figures = refreshed.manifest.continuity
    assert figures["churn"]["full"] < 0.6 < figures["naive_churn"]["full"]
    assert _excess(refreshed) <= KEEP.mse_budget


def test_a_parent_of_another_kind_leaves_an_fsq_level_fresh_and_the_levels_before_warm() -> None:
    old = _vectors()
    kmeans = QuantizerConfig(rq=RqConfig(codebook_size=(8, 32)), vq=CONFIG.vq)

    to_fsq = _refresh(old, _parent(old, kmeans), config=FSQ)
    to_kmeans = _refresh(old, _parent(old, FSQ), config=kmeans)

    assert to_fsq.manifest.continuity["level_starts"] == ["warm", "fresh"]
    assert (to_fsq.manifest.label_map or ())[1] == (NO_CODE,) * 32
    assert to_kmeans.manifest.continuity["level_starts"] == ["warm", "matched"]


def test_out_of_reach_of_the_budget_the_naive_lattice_gets_the_parents_bits() -> None:
    old = _vectors()
    keep = ContinuityConfig(num_iterations=1, mse_budget=0.0)
    few = FSQ.rq.model_copy(update={"num_iterations": 1})
    parent = _parent(old, FSQ)
    shuffled = replace(parent, rq_NL=np.random.default_rng(0).permutation(parent.rq_NL))

    naive = _train(old, "v2", FSQ)
    refreshed = refresh_codebook(naive, old, old.item_ids_N, shuffled, keep, few)

    assert refreshed.manifest.continuity["level_starts"] == ["matched", "matched"]
    assert _excess(refreshed) == pytest.approx(0.0, abs=1e-6)

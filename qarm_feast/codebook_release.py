"""The jobs behind `qarm codebook publish` and `diff`: what is served, and what changes with it.

Shape letters in this file: N items, L levels, V VQ neighbours, P pool rows.
May import: the codebook, its jobs, caps and registry.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.caps import NO_PUBLISHED_CODE, capped_codes
from qarm_feast.codebook import Codebook, ItemCodes, ItemVectors
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.codebook_evaluation import item_facts, store_evaluation
from qarm_feast.codebook_jobs import read_parent_codes
from qarm_feast.config import load_section
from qarm_feast.continuity import NO_CODE, ParentCodes, codes_churn
from qarm_feast.errors import CodebookError, CodebookNotFoundError
from qarm_feast.overrides import content_order, find_content, hash_array
from qarm_feast.quality import ItemFacts, codebook_quality, full_code_figures, hit_rates
from qarm_feast.quantizers.base import Codes, Embeddings, unit_rows
from qarm_feast.registry import (
    CodebookRegistry,
    Manifest,
    ServedArtifact,
    VersionState,
    publish_codebook,
    quality_of,
    read_manifest,
    trained_uri,
)
from qarm_feast.vector_files import VectorFiles

logger = logging.getLogger(__name__)

_COMPARED_FIELDS = (
    "parent", "encoder_version", "encoder_hash", "behaviour_cutoff", "embedding_dim",
    "level_sizes", "level_kinds", "num_neighbors", "pool_size", "search", "search_settings",
    "search_recall", "seed", "num_training_items", "num_overrides", "num_list_overrides",
    "forced_gates", "created",
)  # fmt: skip


def publish_version(config_path: str, version: str, *, force: bool = False) -> VersionState:
    """Publish a trained version; with ``codebook.max_items_per_code``, capped and measured anew.

    Nothing is written before :func:`~qarm_feast.registry.publish_codebook` does, so a process
    killed in between leaves the draft as it was.

    Args:
        config_path: Path of ``qarm.yaml``.
        version: A draft; a version that is published already keeps its state.
        force: Publish against a gate; the manifest then says which.

    Returns:
        The version's state.

    Raises:
        GateRefusedError: If a gate is not kept; names which, how much.
        CodebookNotFoundError: If no such version was trained.
        CodebookError: If the version was purged or is stored with other content, or a cap is set
            and its parent was purged.
        DataError: If a cap is set and the vectors are missing or broken.
    """
    config = load_section(config_path, "codebook", CodebookConfig)
    registry = CodebookRegistry(config.uri)
    source_uri = trained_uri(config.uri, version)
    capped = None
    if config.max_items_per_code is not None and version not in registry.states():
        codebook = Codebook.load(source_uri, version)
        if source_uri == config.uri:
            # What lies beside the drafts is stored for good; it can be published, not changed.
            raise CodebookError(
                f"codebook version {version!r} is no draft but saved in {config.uri} itself, so "
                "codebook.max_items_per_code cannot be applied to it; run `qarm codebook train "
                f"--codebook-version {registry.next_name(version)}`"
            )
        capped = _capped(config_path, codebook, config.uri, config.max_items_per_code)
    served = None if capped is None else capped.artifact
    state = publish_codebook(config.uri, version, config.gates, force=force, served=served)
    if capped is not None:
        # The report of the draft is not that of the codes that are served now.
        manifest = read_manifest(config.uri, version)
        store_evaluation(config, manifest, manifest.quality, capped.codes, capped.facts)
    return state


@dataclass(frozen=True)
class _Capped:
    """A draft with its caps applied, and what its report is made of."""

    artifact: ServedArtifact
    codes: ItemCodes
    facts: ItemFacts


def _capped(config_path: str, codebook: Codebook, uri: str, max_items_per_code: int) -> _Capped:
    alignment = load_section(config_path, "alignment", AlignmentConfig)
    vectors = VectorFiles.open(
        Path(alignment.vectors_uri) / codebook.manifest.encoder_version
    ).read()
    codes = codebook.encode(vectors.item_ids_N, vectors.content_hashes_N, vectors.x_ND)
    published_N = np.full(len(vectors.item_ids_N), NO_PUBLISHED_CODE, dtype=np.int64)
    parent = None
    if codebook.manifest.parent is not None:
        parent = read_parent_codes(alignment, uri, codebook.manifest.parent)
        published_N = published_last_codes(codebook.manifest, vectors, codes.rq_NL, parent)
    unit_ND = unit_rows(vectors.x_ND)
    capped = capped_codes(
        codebook.rq,
        vectors.item_ids_N,
        unit_ND,
        codes.rq_NL,
        published_N,
        max_items_per_code,
    )
    logger.info(
        "codebook_capped version=%s max_items_per_code=%d num_moved=%d num_without_room=%d",
        codebook.version, max_items_per_code, capped.num_moved, capped.num_without_room,
    )  # fmt: skip
    served = _with_codes(codebook, vectors, codes.rq_NL, capped.rq_NL)
    caps = {
        "max_items_per_code": max_items_per_code,
        "num_moved": capped.num_moved,
        "num_without_room": capped.num_without_room,
        "num_held": int((published_N == capped.rq_NL[:, -1]).sum()),
        "without_caps": _full_code_quality(codebook, codes.rq_NL, unit_ND),
        "with_caps": _full_code_quality(codebook, capped.rq_NL, unit_ND),
        "churn": parent and _served_churn(codebook.manifest, vectors, capped.rq_NL, parent),
    }
    item_codes = ItemCodes(vectors.item_ids_N, codes.vq_NV, capped.rq_NL)
    facts = item_facts(config_path, vectors.item_ids_N)
    quality = codebook_quality(served, item_codes, vectors.x_ND, facts)
    manifest = served.manifest.model_copy(update={"caps": caps, "quality": quality})
    return _Capped(ServedArtifact(manifest, served.payloads()), item_codes, facts)


def _full_code_quality(codebook: Codebook, rq_NL: Codes, unit_ND: Embeddings) -> dict[str, Any]:
    _, hr10 = hit_rates(rq_NL, codebook.decode_rq(rq_NL), unit_ND)
    return {**full_code_figures(rq_NL), "hr10": hr10}


def _with_codes(
    codebook: Codebook, vectors: ItemVectors, rq_NL: Codes, wanted_NL: Codes
) -> Codebook:
    rows = np.flatnonzero((rq_NL != wanted_NL).any(axis=1))
    hashes = [vectors.content_hashes_N[row] for row in rows.tolist()]
    overrides = codebook.overrides.with_rows(vectors.item_ids_N[rows], hashes, wanted_NL[rows])
    return codebook.with_overrides(overrides)


def _served_churn(
    manifest: Manifest, vectors: ItemVectors, rq_NL: Codes, parent: ParentCodes
) -> dict[str, Any]:
    """Return the churn of the codes as served: the refresh measured those before the cap."""
    old_NL = parent.codes_of(vectors.item_ids_N, vectors.content_hashes_N)
    is_known_N = (old_NL != NO_CODE).any(axis=1)
    label_map = [np.array(names_K, dtype=np.int64) for names_K in manifest.label_map or ()]
    return codes_churn(old_NL[is_known_N], rq_NL[is_known_N], label_map)


def published_last_codes(
    manifest: Manifest, vectors: ItemVectors, rq_NL: Codes, parent: ParentCodes
) -> Codes:
    """Return the last code that the parent publishes for each item, in the new version's numbers.

    Args:
        manifest: That of the refreshed version.
        vectors: The catalogue.
        rq_NL: Its codes in the refreshed version.
        parent: The codes that the parent serves.

    Returns:
        Codes of shape ``[N]``; ``NO_PUBLISHED_CODE`` for new content, and where the label map does
        not read the item's prefix as the parent's.
    """
    old_NL = parent.codes_of(vectors.item_ids_N, vectors.content_hashes_N)
    published_N = np.full(len(rq_NL), NO_PUBLISHED_CODE, dtype=np.int64)
    if manifest.label_map is None or old_NL.shape[1] != rq_NL.shape[1]:
        return published_N
    *before, last_K = (np.array(names_K, dtype=np.int64) for names_K in manifest.label_map)
    is_same_N = old_NL[:, -1] != NO_CODE
    for names_K, codes_N, old_N in zip(before, rq_NL.T, old_NL.T, strict=False):
        is_same_N &= names_K[codes_N] == old_N
    goes_on_K = np.flatnonzero(last_K != NO_CODE)
    own_of_old = np.full(parent.level_sizes[-1], NO_PUBLISHED_CODE, dtype=np.int64)
    own_of_old[last_K[goes_on_K]] = goes_on_K
    published_N[is_same_N] = own_of_old[old_NL[is_same_N, -1]]
    return published_N


def diff_versions(config_path: str, version: str, against: str) -> dict[str, Any]:
    """Return what differs between two trained or published versions, ready for JSON.

    Keys: ``manifest`` (both values of each field that differs); ``labels`` (``map`` if codes are
    read through the label maps that lead from ``version`` to ``against``, else ``number``);
    ``codes_that_go_on`` (per level, of how many; None without a label map); ``recorded_churn``
    (what the refresh of ``version`` from ``against`` measured, else None); ``pool`` (rows);
    ``catalogue`` (share of items whose codes differ, None where vectors are missing);
    ``quality`` (both values of each figure).

    Args:
        config_path: Path of ``qarm.yaml``.
        version: A draft or a published version.
        against: Another one.

    Returns:
        Figures by name, pairs in the order (version, against).

    Raises:
        CodebookNotFoundError: If one of them is not stored.
        CorruptArtifactError: If a file of one is damaged.
    """
    uri = load_section(config_path, "codebook", CodebookConfig).uri
    alignment = load_section(config_path, "alignment", AlignmentConfig)
    new, old = (Codebook.load(trained_uri(uri, name), name) for name in (version, against))
    label_map = _label_map(uri, new.manifest, against)
    is_child = new.manifest.parent == against
    return {
        "version": version,
        "against": against,
        "manifest": _manifest_changes(new.manifest, old.manifest),
        "labels": "number" if label_map is None else "map",
        "codes_that_go_on": None if label_map is None else _num_going_on(label_map),
        "recorded_churn": new.manifest.continuity.get("churn") if is_child else None,
        "pool": _pool_changes(new, old),
        "catalogue": _catalogue_changes(new, old, label_map, Path(alignment.vectors_uri)),
        "quality": _quality_changes(quality_of(uri, new.manifest), quality_of(uri, old.manifest)),
    }


def _manifest_changes(new: Manifest, old: Manifest) -> dict[str, list[Any]]:
    new_fields, old_fields = (manifest.model_dump(mode="json") for manifest in (new, old))
    caps = [fields["caps"].get("max_items_per_code") for fields in (new_fields, old_fields)]
    changes = {
        name: [new_fields[name], old_fields[name]]
        for name in _COMPARED_FIELDS
        if new_fields[name] != old_fields[name]
    }
    return changes if caps[0] == caps[1] else {**changes, "max_items_per_code": caps}


def _label_map(uri: str, new: Manifest, against: str) -> list[Codes] | None:
    """Return per level and code the code of ``against`` that it goes on from, over all parents."""
    label_map: list[Codes] = []
    manifest = new
    while manifest.version != against:
        if manifest.parent is None or manifest.label_map is None:
            return None
        step = [np.array(names_K, dtype=np.int64) for names_K in manifest.label_map]
        label_map = _composed(label_map, step) if manifest is not new else step
        if manifest.parent == against:
            break
        try:
            manifest = read_manifest(uri, manifest.parent)
        except CodebookNotFoundError:
            # A purged version between the two: the names do not reach across it.
            return None
    return label_map or None


def _composed(later: Sequence[Codes], earlier: Sequence[Codes]) -> list[Codes]:
    composed = []
    for number, names_K in enumerate(later):
        through_K = np.full(len(names_K), NO_CODE, dtype=np.int64)
        goes_on_K = names_K != NO_CODE
        if number < len(earlier):
            through_K[goes_on_K] = earlier[number][names_K[goes_on_K]]
        composed.append(through_K)
    return composed


def _num_going_on(label_map: Sequence[Codes]) -> list[list[int]]:
    return [[int((names_K != NO_CODE).sum()), len(names_K)] for names_K in label_map]


def _pool_changes(new: Codebook, old: Codebook) -> dict[str, int]:
    new_ids_P, old_ids_P = new.vq.pool_item_ids_P, old.vq.pool_item_ids_P
    num_kept = int(_same_rows(new_ids_P, old_ids_P).sum())
    return {
        "num_rows": len(new_ids_P),
        "num_rows_against": len(old_ids_P),
        "num_kept": num_kept,
        "num_reset": len(new_ids_P) - num_kept,
        "num_items_in_both": int(np.isin(new_ids_P, old_ids_P).sum()),
    }


def _same_rows(
    new_ids_P: npt.NDArray[np.int64], old_ids_P: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    is_same_P = np.zeros(len(new_ids_P), dtype=np.bool_)
    both = min(len(new_ids_P), len(old_ids_P))
    is_same_P[:both] = new_ids_P[:both] == old_ids_P[:both]
    return is_same_P


def _catalogue_changes(
    new: Codebook, old: Codebook, label_map: Sequence[Codes] | None, vectors_uri: Path
) -> dict[str, Any] | None:
    folders = [vectors_uri / codebook.manifest.encoder_version for codebook in (new, old)]
    if not all(any(folder.glob("*.parquet")) for folder in folders):
        return None
    new_items, old_items = (VectorFiles.open(folder).read() for folder in folders)
    old_hashes_N = hash_array(old_items.content_hashes_N)
    order_N = content_order(old_items.item_ids_N, old_hashes_N)
    found_N = find_content(
        old_items.item_ids_N[order_N],
        old_hashes_N[order_N],
        new_items.item_ids_N,
        hash_array(new_items.content_hashes_N),
    )
    rows_N = np.flatnonzero(found_N >= 0)
    new_codes = _codes_of(new, new_items, rows_N)
    old_codes = _codes_of(old, old_items, order_N[found_N[rows_N]])
    if label_map is None:
        label_map = [np.arange(size) for size in new.manifest.level_sizes]
    return {
        "num_items": len(new_items.item_ids_N),
        "num_compared": len(rows_N),
        "rq_churn": codes_churn(old_codes.rq_NL, new_codes.rq_NL, label_map),
        "vq_churn": _vq_churn(new, old, new_codes.vq_NV, old_codes.vq_NV),
    }


def _codes_of(codebook: Codebook, items: ItemVectors, rows_N: npt.NDArray[np.int64]) -> ItemCodes:
    hashes = [items.content_hashes_N[row] for row in rows_N.tolist()]
    return codebook.encode(items.item_ids_N[rows_N], hashes, items.x_ND[rows_N])


def _vq_churn(new: Codebook, old: Codebook, new_NV: Codes, old_NV: Codes) -> float:
    """Return the share of items whose set of pool rows differs, or one of whose rows was reset."""
    if len(new_NV) == 0 or new_NV.shape != old_NV.shape:
        return float(len(new_NV) > 0)
    is_same_P = _same_rows(new.vq.pool_item_ids_P, old.vq.pool_item_ids_P)
    is_changed_N = (np.sort(new_NV, axis=1) != np.sort(old_NV, axis=1)).any(axis=1)
    is_changed_N |= ~is_same_P[new_NV].all(axis=1)
    return float(is_changed_N.mean())


def _quality_changes(new: dict[str, Any], old: dict[str, Any]) -> dict[str, list[float | None]]:
    names = [
        name
        for name in dict.fromkeys([*new, *old])
        if isinstance(new.get(name, old.get(name)), int | float)
    ]
    return {name: [new.get(name), old.get(name)] for name in names}

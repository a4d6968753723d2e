"""The job behind `qarm codebook evaluate`: figures, and the page that shows them.

Shape letters in this file: N items.
May import: pyarrow, the codebook, the vector files, the input data and section ``alignment``.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.artifact import remove_file, replace_file
from qarm_feast.behaviour import follow_up_pairs
from qarm_feast.codebook import Codebook, ItemCodes
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.input_data import DataConfig, load_input_data
from qarm_feast.object_store import Place
from qarm_feast.quality import ItemFacts, codebook_quality
from qarm_feast.quality_page.page import PageInput, quality_page
from qarm_feast.registry import (
    GateReading,
    Manifest,
    gate_readings,
    report_path,
    trained_uri,
    write_report,
)
from qarm_feast.schema import ITEM_ID
from qarm_feast.vector_files import VectorFiles

PAGE_NAME = "quality.html"
_TITLE = "title"


class Evaluation(NamedTuple):
    """Figures and gates of a version, and where they were written: as JSON and as a page."""

    manifest: Manifest
    quality: dict[str, Any]
    gates: list[GateReading]
    report_path: Place
    page_path: Place


def evaluate_codebook(config_path: str, version: str) -> Evaluation:
    """Measure a trained version on all vectors of its encoder; store figures and page beside it.

    Behavioural neighbours are read from the test rows of section ``data``, titles from its items.

    Args:
        config_path: Path of ``qarm.yaml``.
        version: A draft or a published version.

    Returns:
        Manifest, figures, what each gate says of them, and the files that hold them.

    Raises:
        CodebookNotFoundError: If no such version was trained.
        DataError: If the data or the vectors are missing or broken.
    """
    alignment = load_section(config_path, "alignment", AlignmentConfig)
    config = load_section(config_path, "codebook", CodebookConfig)
    codebook = Codebook.load(trained_uri(config.uri, version), version)
    vectors = VectorFiles.open(
        Path(alignment.vectors_uri) / codebook.manifest.encoder_version
    ).read()
    codes = codebook.encode(vectors.item_ids_N, vectors.content_hashes_N, vectors.x_ND)
    facts = item_facts(config_path, vectors.item_ids_N)
    quality = codebook_quality(codebook, codes, vectors.x_ND, facts)
    return store_evaluation(config, codebook.manifest, quality, codes, facts)


def item_facts(config_path: str, item_ids_N: npt.NDArray[np.int64]) -> ItemFacts:
    """Return what section ``data`` tells of some items: titles, and pairs from its test rows.

    Args:
        config_path: Path of ``qarm.yaml``.
        item_ids_N: The items.

    Returns:
        Titles in the order of the ids.

    Raises:
        DataError: If the data is missing or broken.
    """
    checked = load_input_data(load_section(config_path, "data", DataConfig))
    return ItemFacts(follow_up_pairs(checked), titles_of(checked.items, item_ids_N))


def store_evaluation(
    config: CodebookConfig,
    manifest: Manifest,
    quality: dict[str, Any],
    codes: ItemCodes,
    facts: ItemFacts,
) -> Evaluation:
    """Write figures and page of one version beside the registry's versions.

    1. The page of the evaluation before is removed.
    2. The figures are put in place of those before.
    3. The page is written.

    Killed at any point, a page that is there is of the figures beside it.

    Args:
        config: Where the registry lies, and the gates that the page shows.
        manifest: The manifest of the codebook that was measured.
        quality: Its figures.
        codes: The codes that were measured.
        facts: Titles of the items, in the order of ``codes``.

    Returns:
        Manifest, figures, what each gate says of them, and the files that hold them.
    """
    gates = gate_readings(quality, config.gates)
    page = quality_page(
        PageInput(
            manifest=manifest,
            quality=quality,
            gates=gates,
            item_ids_N=codes.item_ids_N,
            rq_NL=codes.rq_NL,
            titles_N=facts.titles_N,
        )
    )
    page_path = report_path(config.uri, manifest.version).with_name(PAGE_NAME)
    remove_file(page_path)
    figures_path = write_report(config.uri, manifest, quality)
    replace_file(page_path, page.encode())
    return Evaluation(manifest, quality, gates, figures_path, page_path)


def titles_of(items: pa.Table, item_ids_N: npt.NDArray[np.int64]) -> list[str]:
    """Return the title of each item; ``item <id>`` where there is none.

    Args:
        items: Input items.
        item_ids_N: The items to name; one that ``items`` does not hold has no title either.

    Returns:
        Titles in the order of the ids.
    """
    names = [f"item {item_id}" for item_id in item_ids_N.tolist()]
    if _TITLE not in items.column_names:
        return names
    rows = pc.index_in(pa.array(item_ids_N), items[ITEM_ID].combine_chunks())
    titles = pc.take(items[_TITLE], rows).to_pylist()
    return [title or name for title, name in zip(titles, names, strict=True)]

"""The job behind `qarm align evaluate`, and what `qarm align export` asks before it writes.

Shape letters in this file: N items.
May import: the configuration, the encoder, the codebook, the input data.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.alignment.encoder import load_encoder, read_encoder_manifest
from qarm_feast.alignment.evaluate import RAW, measure_vectors, report_of
from qarm_feast.alignment.evaluation_page import evaluation_page
from qarm_feast.alignment.export import catalogue_features
from qarm_feast.alignment.gates import EncoderGateReading, check_gates, gate_readings
from qarm_feast.alignment.judged_data import data_fingerprint, differences
from qarm_feast.alignment.later_behaviour import read_behaviour
from qarm_feast.alignment.masking import mask_figures
from qarm_feast.artifact import MANIFEST_NAME, remove_file, replace_file, sha256
from qarm_feast.codebook import Codebook
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import load_section
from qarm_feast.encode import content_hashes
from qarm_feast.errors import CodebookMismatchError, CodebookNotFoundError, GateRefusedError
from qarm_feast.input_data import DataConfig, InputData, load_input_data
from qarm_feast.quantizers.base import Embeddings
from qarm_feast.registry import drafts_uri, read_manifest, stored_versions, trained_uri
from qarm_feast.schema import ITEM_ID

_REPORTS_NAME = ".reports"
_REPORT_NAME = "evaluation.json"
_PAGE_NAME = "evaluation.html"


class Evaluation(NamedTuple):
    """Figures and gates of an encoder, and where they were written: as JSON and as a page."""

    report: dict[str, Any]
    readings: list[EncoderGateReading]
    report_path: Path
    page_path: Path


def evaluate_encoder(
    config_path: str, codebook_version: str | None = None, encoder_version: str | None = None
) -> Evaluation:
    """Measure an encoder on validation rows; store figures and page.

    1. The page of the evaluation before is removed.
    2. The figures are put in place of those before.
    3. The page is written.

    Killed at any point, a page that is there is of the figures beside it.

    Args:
        config_path: Path of ``qarm.yaml``.
        codebook_version: The codebook whose codes are decoded; None takes the newest one that was
            trained on this encoder's vectors, if there is any.
        encoder_version: The encoder; None takes that of ``qarm.yaml``.

    Returns:
        The report of :func:`qarm_feast.alignment.evaluate.report_of`, with ``encoder_version``,
        ``encoder_hash``, ``codebook_version``, ``data`` (which names the data: ``fingerprint``) and
        ``masked`` (see :func:`qarm_feast.alignment.masking.mask_figures`); what each gate says of
        it; the files ``<encoder_uri>/.reports/<version>/evaluation.json`` and ``.html``.

    Raises:
        DataError: If data or encoder are missing or broken.
        CodebookError: If the codebook is missing, or of another encoder.
    """
    config = load_section(config_path, "alignment", AlignmentConfig)
    if encoder_version is not None:
        config = config.model_copy(update={"encoder_version": encoder_version})
    data = load_section(config_path, "data", DataConfig)
    # Before the data is read: what is replaced meanwhile is refused, not let pass.
    fingerprint = data_fingerprint(data)
    checked = load_input_data(data)
    codebook = _codebook_of(
        load_section(config_path, "codebook", CodebookConfig), config, codebook_version
    )
    report = _measure(checked, config, codebook)
    report["data"]["fingerprint"] = fingerprint
    readings = gate_readings(report, config.gates)
    report_path = evaluation_path(config)
    page_path = report_path.with_name(_PAGE_NAME)
    remove_file(page_path)
    replace_file(report_path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    replace_file(page_path, evaluation_page(report, readings).encode())
    return Evaluation(report, readings, report_path, page_path)


def _measure(
    checked: InputData, config: AlignmentConfig, codebook: Codebook | None
) -> dict[str, Any]:
    encoder = load_encoder(config.encoder_uri, config.encoder_version, checked.directory)
    features = catalogue_features(checked.items, encoder, config)
    vectors = {RAW: features.raw_vectors(), "aligned": encoder.project(features)}
    decode = None
    if codebook is not None:
        decode = partial(decoded_vectors, checked.items, codebook)
        vectors |= decode(vectors["aligned"])
    behaviour = read_behaviour(checked, "valid", max_queries=config.evaluation.max_queries)
    return {
        "encoder_version": encoder.version,
        "encoder_hash": _encoder_hash(config),
        "codebook_version": None if codebook is None else codebook.version,
        "data": _data_facts(checked),
        **report_of(measure_vectors(behaviour, vectors), config.evaluation.num_draws),
        "masked": mask_figures(encoder, features, behaviour, decode),
    }


def check_accepted(config: AlignmentConfig, data: DataConfig) -> list[EncoderGateReading]:
    """Return what each gate says of the encoder's last evaluation; refuse it if one is missed.

    Args:
        config: Section ``alignment``.
        data: Section ``data``: what the encoder must have been judged on.

    Returns:
        One reading per gate.

    Raises:
        DataError: If there is no such encoder.
        GateRefusedError: If exactly this encoder was not evaluated on exactly this data, or see
            :func:`check_gates`.
    """
    read_encoder_manifest(config.encoder_uri, config.encoder_version)
    path = evaluation_path(config)
    report = _read_report(path)
    if report.get("encoder_hash") != _encoder_hash(config):
        raise GateRefusedError(
            f"encoder {config.encoder_version!r} was not evaluated as it is ({path} holds "
            f"{report.get('encoder_hash', 'nothing')}, the encoder is {_encoder_hash(config)}); "
            "run `qarm align evaluate` first"
        )
    _check_data(report, path, config.encoder_version, data)
    return check_gates(report, config.gates)


def _check_data(report: Mapping[str, Any], path: Path, version: str, data: DataConfig) -> None:
    """Refuse a report that is not of the data as it lies there now."""
    judged = report.get("data", {}).get("fingerprint")
    if judged is None:
        raise GateRefusedError(
            f"{path} does not say which data encoder {version!r} was judged on (an "
            f"earlier qarm-feast wrote it), and {data.input_dir} may be other data; run `qarm "
            "align evaluate` again"
        )
    if changed := differences(judged, data_fingerprint(data)):
        raise GateRefusedError(
            f"encoder {version!r} was judged on other data ({path}) than lies in "
            f"{data.input_dir}: {'; '.join(changed)}; run `qarm align evaluate` first"
        )


def _read_report(path: Path) -> Mapping[str, Any]:
    """Return the stored report, an empty one where there is none."""
    if not path.is_file():
        return {}
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GateRefusedError(
            f"{path} is damaged ({error}); run `qarm align evaluate` again"
        ) from error
    return report


def evaluation_path(config: AlignmentConfig) -> Path:
    """Return the file that holds the last evaluation of the configured encoder."""
    return Path(config.encoder_uri) / _REPORTS_NAME / config.encoder_version / _REPORT_NAME


def decoded_vectors(
    items: pa.Table,
    codebook: Codebook,
    aligned_ND: Embeddings,
    is_changed_N: np.ndarray | None = None,
) -> dict[str, Embeddings]:
    """Return what the codes of items stand for, not scaled.

    A sum of centroids is the mean of the vectors in a cell, so its inner product with a vector is
    the mean cosine of the cell's items with it. Scaled to length 1, the means of wide cells would
    come near to everything.

    Args:
        items: Items with their content.
        codebook: A codebook of the encoder.
        aligned_ND: Aligned vectors of the items.
        is_changed_N: Which of the vectors are of other content than that of ``items``; such an
            item gets fresh codes, as after an edit.

    Returns:
        ``decoded_rq``: the sums of centroids; ``decoded_vq``: the means of the listed pool vectors.
    """
    hashes = content_hashes(items)
    if is_changed_N is not None:
        # No content has the empty hash, so no stored code is found.
        for row in np.flatnonzero(is_changed_N).tolist():
            hashes[row] = ""
    codes = codebook.encode(items[ITEM_ID].to_numpy(), hashes, aligned_ND)
    return {
        "decoded_rq": codebook.decode_rq(codes.rq_NL),
        "decoded_vq": codebook.vq.decode(codes.vq_NV),
    }


def _codebook_of(
    config: CodebookConfig, alignment: AlignmentConfig, codebook_version: str | None
) -> Codebook | None:
    read_encoder_manifest(alignment.encoder_uri, alignment.encoder_version)
    encoder_hash = _encoder_hash(alignment)
    if codebook_version is None:
        codebook_version = _newest_version(config.uri, encoder_hash)
        if codebook_version is None:
            return None
    codebook = Codebook.load(trained_uri(config.uri, codebook_version), codebook_version)
    if codebook.manifest.encoder_hash != encoder_hash:
        raise CodebookMismatchError(
            expected=alignment.encoder_version,
            found=codebook.manifest.encoder_version,
            where=f"codebook version {codebook_version!r} (by the hash of its encoder)",
            command="qarm align evaluate` without --codebook-version, or `qarm codebook train",
        )
    return codebook


def _newest_version(uri: str, encoder_hash: str) -> str | None:
    """Return the codebook of exactly this encoder that was created last, draft or published."""
    manifests = []
    for folder in (uri, drafts_uri(uri)):
        for version in stored_versions(folder):
            try:
                manifests.append(read_manifest(folder, version))
            except CodebookNotFoundError:
                # Published or purged by another process since it was listed.
                continue
    own = [found for found in manifests if found.encoder_hash == encoder_hash]
    return max(own, key=lambda found: found.created).version if own else None


def _encoder_hash(config: AlignmentConfig) -> str:
    manifest = Path(config.encoder_uri) / config.encoder_version / MANIFEST_NAME
    return sha256(manifest.read_bytes())


def _data_facts(checked: InputData) -> dict[str, Any]:
    return {
        "directory": checked.directory.name,
        "positive_label": checked.positive_label,
        "num_items": checked.items.num_rows,
        "behaviour_cutoff": checked.behaviour_cutoff().isoformat(),
    }

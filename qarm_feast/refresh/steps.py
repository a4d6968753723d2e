"""The steps of a refresh. Each may be repeated: killed before it is noted, it comes to the same.

    pairs      item pairs from the train rows
    train      the encoder, from its parent where there is one
    evaluate   its figures on validation rows; the gates of ``alignment.gates``
    export     vectors of the whole catalogue, of the parent's encoder as well: items that came
               since its last export have codes of the parent, too, which are to be kept
    codebook   a draft that keeps the parent's labels
    quality    its figures; the gates of ``refresh``
    publish    the gates of ``codebook.gates``; from here on the version is staged
    report     the encoder's page with decoded codes

May import: the jobs behind the single commands.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from qarm_feast.alignment.encoder import ItemEncoder, load_encoder, read_encoder_manifest
from qarm_feast.alignment.evaluate import NEIGHBOR_AUC
from qarm_feast.alignment.evaluation_job import check_accepted, evaluate_encoder
from qarm_feast.alignment.export_job import EngineName, export_accepted, export_catalogue
from qarm_feast.alignment.pairs import read_pairs, report_of, write_pairs
from qarm_feast.alignment.train import train_and_save
from qarm_feast.artifact import MANIFEST_NAME, file_sha256
from qarm_feast.codebook_evaluation import evaluate_codebook
from qarm_feast.codebook_jobs import train_codebook
from qarm_feast.codebook_release import publish_version
from qarm_feast.errors import ConfigError, DataError, GateRefusedError
from qarm_feast.input_data import InputData, load_input_data
from qarm_feast.refresh.config import RefreshConfig
from qarm_feast.refresh.plan import Sections
from qarm_feast.refresh.state import RefreshState
from qarm_feast.registry import GateReading, Manifest

logger = logging.getLogger(__name__)

STEPS = ("pairs", "train", "evaluate", "export", "codebook", "quality", "publish", "report")


class StepResult(NamedTuple):
    """What a step found: in a line for people, and by name for programs."""

    summary: str
    figures: dict[str, Any]


class RefreshSteps:
    """Does the steps of one run.

    Args:
        sections: What ``qarm.yaml`` says.
        state: The run: its parent, its names, when it began.
        engine: Where vectors are exported.
        include_raw: Whether raw vectors are exported as well.
    """

    def __init__(
        self, sections: Sections, state: RefreshState, *, engine: EngineName, include_raw: bool
    ) -> None:
        self._sections = sections
        self._state = state
        self._engine = engine
        self._include_raw = include_raw
        self._alignment = sections.alignment_of(state.encoder_version)

    def by_name(self) -> dict[str, Callable[[], StepResult]]:
        """Return the steps in order."""
        return {name: getattr(self, name) for name in STEPS}

    def pairs(self) -> StepResult:
        """Build the item pairs."""
        _, table = write_pairs(self._checked, self._alignment)
        report = report_of(table)
        told = ", ".join(f"{name} {one.num_pairs:,}" for name, one in report.sources.items())
        return StepResult(
            f"{report.num_pairs:,} pairs ({told}) of {report.items_covered:,} items",
            json.loads(report.to_json()),
        )

    def train(self) -> StepResult:
        """Train the encoder, unless a run that was killed has stored it.

        Returns:
            Its parent, its width, and the figures of its training.

        Raises:
            ConfigError: If another process has taken the name.
        """
        folder = Path(self._alignment.encoder_uri) / self._state.encoder_version
        if not folder.exists():
            pairs = read_pairs(self._checked, self._alignment)
            parent = self._parent_encoder()
            train_and_save(self._checked, pairs, self._alignment, self._state.started, parent)
        manifest = read_encoder_manifest(self._alignment.encoder_uri, self._state.encoder_version)
        if manifest.created != self._state.started:
            raise ConfigError(
                f"{folder} was made by another process after this refresh had chosen its name; "
                "run `qarm refresh --encoder-version OTHER`"
            )
        # Folders that runs leave behind which were killed while they saved, or right after it.
        for left_over in list(folder.parent.glob(f".{folder.name}.*/")):
            shutil.rmtree(left_over)
        return StepResult(
            f"encoder {manifest.version} of {manifest.embedding_dim} numbers, parent "
            f"{manifest.parent or 'none'}, behaviour until {manifest.behaviour_cutoff:%Y-%m-%d}",
            {"behaviour_cutoff": manifest.behaviour_cutoff.isoformat(), **manifest.training},
        )

    def evaluate(self) -> StepResult:
        """Measure the encoder on validation rows, and ask its gates.

        Returns:
            Gains over the raw vectors.

        Raises:
            GateRefusedError: If it is worse than the raw vectors.
        """
        found = evaluate_encoder(
            self._sections.config_path, encoder_version=self._state.encoder_version
        )
        check_accepted(self._alignment, self._sections.data)
        gates = [str(reading) for reading in found.readings]
        return StepResult(
            f"{gain_words(found.report, 'aligned')}; gates kept",
            {"gains": found.report["gains"], "gates": gates, "page": str(found.page_path)},
        )

    def export(self) -> StepResult:
        """Write the vectors of the catalogue, of the parent's encoder first."""
        parent = self._parent_version()
        if parent is not None and parent != self._state.encoder_version:
            # Without gates: its codes are served, whatever is thought of it today.
            export_catalogue(self._sections.config_path, parent, engine=self._engine)
        made = export_accepted(
            self._sections.config_path,
            self._state.encoder_version,
            include_raw=self._include_raw,
            engine=self._engine,
        )
        return StepResult(
            f"{made.num_items:,} vectors in {made.num_parts} part(s), "
            f"{made.counts.get('without_content', 0):,} without content",
            {"num_items": made.num_items, "num_parts": made.num_parts, "counts": made.counts},
        )

    def codebook(self) -> StepResult:
        """Train the draft."""
        parent = self._state.parent
        manifest = train_codebook(
            self._sections.config_path,
            self._state.codebook_version,
            self._state.started,
            None if parent is None else parent.codebook_version,
            self._state.encoder_version,
        )
        kept = churn_words(manifest)
        sizes = "x".join(map(str, manifest.level_sizes))
        return StepResult(
            f"{manifest.num_training_items:,} items, RQ {sizes}, pool {manifest.pool_size:,}; "
            f"{kept}",
            {"continuity": manifest.continuity},
        )

    def quality(self) -> StepResult:
        """Measure the draft, and ask the gates on churn.

        Returns:
            Figures of the codes, and what each gate says of them.

        Raises:
            GateRefusedError: If too many codes change.
        """
        version = self._state.codebook_version
        found = evaluate_codebook(self._sections.config_path, version)
        readings = churn_readings(found.manifest, self._sections.refresh)
        missed = [reading for reading in readings if reading.missed_by > 0]
        if missed:
            raise GateRefusedError(
                f"codebook version {version!r} changes more codes than section refresh allows:\n"
                + "\n".join(f"  - {_gate_words(reading)}" for reading in missed)
                + "\nlook at `qarm codebook diff`, raise codebook.continuity.hysteresis, or change "
                "the gate"
            )
        figures = found.quality
        return StepResult(
            f"collision rate {figures['collision_rate']:.4f}, HR@10 {figures['hr10']:.4f}",
            {
                "collision_rate": figures["collision_rate"],
                "hr10": figures["hr10"],
                "gates": [_gate_words(reading) for reading in [*readings, *found.gates]],
                "page": str(found.page_path),
            },
        )

    def publish(self) -> StepResult:
        """Publish the draft; a gate of ``codebook.gates`` may refuse it."""
        version = self._state.codebook_version
        state = publish_version(self._sections.config_path, version)
        return StepResult(f"{version} is {state.value}", {"state": state.value})

    def report(self) -> StepResult:
        """Measure the encoder once more, beside what its codes decode to."""
        found = evaluate_encoder(
            self._sections.config_path,
            self._state.codebook_version,
            self._state.encoder_version,
        )
        told = ", ".join(gain_words(found.report, kind) for kind in ("decoded_rq", "decoded_vq"))
        return StepResult(told, {"gains": found.report["gains"]})

    @cached_property
    def _checked(self) -> InputData:
        return load_input_data(self._sections.data)

    def _parent_version(self) -> str | None:
        """Return the parent's encoder, if it is stored as the parent codebook knew it."""
        parent = self._state.parent
        if parent is None:
            return None
        uri = self._alignment.encoder_uri
        try:
            read_encoder_manifest(uri, parent.encoder_version)
        except DataError as error:
            logger.warning("refresh_parent_encoder_missing error=%s", error)
            return None
        found = file_sha256(Path(uri) / parent.encoder_version / MANIFEST_NAME)
        if found != parent.encoder_hash:
            raise DataError(
                f"encoder {parent.encoder_version!r} in {uri} has the hash {found}, codebook "
                f"{parent.codebook_version!r} was made with {parent.encoder_hash}: they are not of "
                "one kind; put the encoder of that codebook back, or name another --parent"
            )
        return parent.encoder_version

    def _parent_encoder(self) -> ItemEncoder | None:
        parent = self._parent_version()
        if parent is None:
            return None
        media_folder = Path(self._sections.data.input_dir)
        return load_encoder(self._alignment.encoder_uri, parent, media_folder)


def gain_words(report: Mapping[str, Any], kind: str) -> str:
    """Return in words how much nearer vectors bring later behaviour's neighbours than raw ones.

    Args:
        report: An evaluation of the encoder.
        kind: A kind of vectors in it.

    Returns:
        The difference of the neighbour AUC with its 95 % interval.
    """
    gain = report["gains"][kind].get(f"{NEIGHBOR_AUC}_all")
    if gain is None:
        return f"{kind}: no neighbours to measure"
    interval = f"[{gain['low']:+.4f}, {gain['high']:+.4f}]"
    return f"{kind}: neighbour AUC {gain['gain']:+.4f} {interval} against raw"


def churn_readings(manifest: Manifest, config: RefreshConfig) -> list[GateReading]:
    """Return what the gates on churn measure; nothing where there is no parent.

    Args:
        manifest: That of the refreshed codebook.
        config: The limits.

    Returns:
        One reading per gate.
    """
    if manifest.parent is None:
        return []
    churn = manifest.continuity["churn"]
    return [
        GateReading("max_level1_churn", churn["levels"][0], config.max_level1_churn),
        GateReading("max_full_churn", churn["full"], config.max_full_churn),
    ]


def churn_words(manifest: Manifest) -> str:
    """Return in words how many codes go on from the parent's."""
    if manifest.parent is None:
        return "no parent"
    churn, naive = manifest.continuity["churn"], manifest.continuity["naive_churn"]
    return (
        f"against {manifest.parent} {churn['levels'][0]:.1%} of items change level 1 (naive refit "
        f"{naive['levels'][0]:.1%}), {churn['full']:.1%} their full code ({naive['full']:.1%})"
    )


def _gate_words(reading: GateReading) -> str:
    limit = "off" if reading.limit is None else f"limit {reading.limit:.4f}"
    return f"{reading.name}: measured {reading.value:.4f}, {limit}"

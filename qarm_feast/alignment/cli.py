"""``qarm align``: the offline encoder job, one command per step."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import click

from qarm_feast.alignment.config import AlignmentConfig
from qarm_feast.command import config_option, log_level_option, start_logging
from qarm_feast.config import load_section
from qarm_feast.input_data import DataConfig, InputData, load_input_data


def _read_sections(config_path: str) -> tuple[InputData, AlignmentConfig]:
    alignment = load_section(config_path, "alignment", AlignmentConfig)
    return load_input_data(load_section(config_path, "data", DataConfig)), alignment


@click.group("align", epilog="Example: qarm align pairs --config feature_repo/qarm.yaml")
def align_group() -> None:
    """Train the item encoder on behaviour and export aligned vectors.

    The steps in order: pairs, train, evaluate, export.
    """


@align_group.command("pairs", epilog="Example: qarm align pairs --config feature_repo/qarm.yaml")
@config_option
@log_level_option
def pairs(config_path: str, log_level: str | None) -> None:
    """Build item pairs from the positive train rows."""
    from qarm_feast.alignment.pairs import report_of, write_pairs

    start_logging(config_path, log_level)
    checked, config = _read_sections(config_path)
    path, table = write_pairs(checked, config)
    for line in report_of(table).lines():
        click.echo(line)
    click.echo(f"{table.num_rows:,} pairs -> {path}; the report is {path.with_suffix('.json')}")


@align_group.command("train", epilog="Example: qarm align train --config feature_repo/qarm.yaml")
@config_option
@click.option("--parent", help="Encoder version that the new one refreshes, like e1.")
@log_level_option
def train(config_path: str, parent: str | None, log_level: str | None) -> None:
    """Train the encoder on the pairs and store it as an immutable artifact.

    A training that was killed goes on when it is started again. On many processes: torchrun
    --nproc-per-node 2 -m qarm_feast.alignment.train --config feature_repo/qarm.yaml.
    """
    from qarm_feast.alignment.encoder import load_encoder
    from qarm_feast.alignment.gathering import is_first_process
    from qarm_feast.alignment.pairs import read_pairs
    from qarm_feast.alignment.train import train_and_save

    # Of many processes the first one tells; the others only what went wrong.
    start_logging(config_path, log_level if is_first_process() else "error")
    checked, config = _read_sections(config_path)
    known = None if parent is None else load_encoder(config.encoder_uri, parent)
    pairs = read_pairs(checked, config)
    encoder = train_and_save(checked, pairs, config, datetime.now(UTC), known)
    if is_first_process():
        path = Path(config.encoder_uri) / encoder.version
        click.echo(f"encoder {encoder.version}: {json.dumps(encoder.manifest.training)} -> {path}")


@align_group.command(
    "evaluate", epilog="Example: qarm align evaluate --config feature_repo/qarm.yaml"
)
@config_option
@click.option("--codebook-version", help="Codebook to decode codes of; default: the newest.")
@log_level_option
def evaluate(config_path: str, codebook_version: str | None, log_level: str | None) -> None:
    """Compare raw, aligned and decoded vectors on validation rows; the last line is JSON."""
    from qarm_feast.alignment.evaluate import format_report
    from qarm_feast.alignment.evaluation_job import evaluate_encoder

    start_logging(config_path, log_level)
    evaluation = evaluate_encoder(config_path, codebook_version)
    click.echo(format_report(evaluation.report))
    for reading in evaluation.readings:
        click.echo(f"gate {reading}")
    click.echo(f"written to {evaluation.report_path} and {evaluation.page_path}")
    click.echo(json.dumps(evaluation.report))


@align_group.command(
    "export", epilog="Example: qarm align export --config feature_repo/qarm.yaml --raw"
)
@config_option
@click.option("--raw", "include_raw", is_flag=True, help="Also write what the head reads.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: Ray Data, on this machine's cores or the cluster of RAY_ADDRESS.",
)
@click.option(
    "--ignore-gates", is_flag=True, help="Export against the gates; the manifest keeps which."
)
@log_level_option
def export(
    config_path: str,
    include_raw: bool,
    engine: Literal["local", "ray"],
    ignore_gates: bool,
    log_level: str | None,
) -> None:
    """Write the aligned vectors of the whole catalogue, as parquet parts.

    An encoder that is worse than the raw vectors by the gates of alignment.gates is refused; it
    is evaluated first (`qarm align evaluate`). An export that was stopped goes on with the parts
    that are missing. Readers see the old export or the new one; where the vectors of this encoder
    and catalogue stand, nothing is done.
    """
    from qarm_feast.alignment.export_job import export_accepted

    start_logging(config_path, log_level)
    summary = export_accepted(
        config_path, include_raw=include_raw, engine=engine, ignore_gates=ignore_gates
    )
    click.echo(
        f"{summary.num_items:,} vectors in {summary.num_parts} part(s), {summary.num_written} of "
        f"them written now -> {summary.folder}"
    )
    click.echo(json.dumps(summary.counts))
    for refusal in summary.ignored_gates:
        click.echo(f"exported AGAINST THE GATES: {refusal}", err=True)


@align_group.command("onnx", epilog="Example: qarm align onnx --config feature_repo/qarm.yaml")
@config_option
@log_level_option
def onnx(config_path: str, log_level: str | None) -> None:
    """Write the encoder as ONNX graphs, for servers without torch."""
    from qarm_feast.alignment.encoder import load_encoder
    from qarm_feast.alignment.onnx_export import export_onnx

    start_logging(config_path, log_level)
    config = load_section(config_path, "alignment", AlignmentConfig)
    encoder = load_encoder(config.encoder_uri, config.encoder_version)
    folder = export_onnx(encoder, config.encoder_uri)
    click.echo(f"{len(list(folder.iterdir()))} graphs of encoder {encoder.version} -> {folder}")

"""``qarm-rank``: the ranker's command line; training itself is started by torchrun."""

import json
from datetime import UTC, datetime

import click

from qarm_feast.command import (
    config_option,
    log_level_option,
    run_command_line,
    start_logging,
)
from qarm_feast.config import load_section
from torchrec_models.dependency import require_torchrec
from torchrec_models.options import TrainedName, load_ranker_config, set_option, trained_options


@click.group(
    epilog="Example: qarm-rank score --config feature_repo/qarm.yaml --user-id 42 --items 7,8,9"
)
@click.version_option(package_name="qarm-feast")
def qarm_rank() -> None:
    """Build training rows, export what was trained, and score candidates.

    Training: torchrun --standalone --nproc-per-node 2 -m torchrec_models.train
    """


@qarm_rank.command(epilog="Example: qarm-rank rows --config feature_repo/qarm.yaml")
@config_option
@click.option("--codebook-version", help="Overrides ranker.codebook_version.")
@set_option
@log_level_option
def rows(
    config_path: str,
    codebook_version: str | None,
    assignments: tuple[str, ...],
    log_level: str | None,
) -> None:
    """Join, check and store training rows; print what they hold as JSON."""
    from torchrec_models.rows import build_training_rows

    start_logging(config_path, log_level)
    config = load_ranker_config(config_path, assignments)
    manifest = build_training_rows(config_path, config, codebook_version)
    click.echo(manifest.model_dump_json(indent=2))


@qarm_rank.command(epilog="Example: qarm-rank export --config feature_repo/qarm.yaml")
@config_option
@click.option("--checkpoint", help="Checkpoint folder name; default: the newest.")
@set_option
@log_level_option
def export(
    config_path: str, checkpoint: str | None, assignments: tuple[str, ...], log_level: str | None
) -> None:
    """Write a checkpoint with int8 tables; print its folder and its error on valid rows as JSON."""
    require_torchrec()
    from torchrec_models.export import export_newest

    start_logging(config_path, log_level)
    config = load_ranker_config(config_path, assignments)
    made = export_newest(config_path, config, checkpoint)
    click.echo(json.dumps({"export": str(made.folder), "error": made.facts.error.model_dump()}))


@qarm_rank.command(
    epilog="Example: qarm-rank score --config feature_repo/qarm.yaml --user-id 42 --items 7,8,9"
)
@config_option
@click.option("--user-id", type=int, required=True, help="The user.")
@click.option("--items", "item_list", required=True, help="Candidate item ids, comma-separated.")
@trained_options
@set_option
@log_level_option
def score(
    config_path: str,
    user_id: int,
    item_list: str,
    trained: TrainedName,
    assignments: tuple[str, ...],
    log_level: str | None,
) -> None:
    """Score candidates of one user from the online store; one JSON object per line."""
    require_torchrec()
    from torchrec_models.score import open_scorer

    try:
        item_ids = [int(text) for text in item_list.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{item_list!r} is no list of integers separated by commas", param_hint="--items"
        ) from error
    start_logging(config_path, log_level)
    config = load_ranker_config(config_path, assignments)
    with open_scorer(config_path, config, trained) as scorer:
        scores = scorer.score(user_id, item_ids, datetime.now(UTC))
    for row, item_id in enumerate(item_ids):
        values = {name: round(float(values_B[row]), 6) for name, values_B in scores.items()}
        click.echo(json.dumps({"item_id": item_id, "scores": values}))


@qarm_rank.command(epilog="Example: qarm-rank serve --config feature_repo/qarm.yaml --export")
@config_option
@click.option("--host", help="Overrides serving.host.")
@click.option("--port", type=int, help="Overrides serving.port; 0 takes a free one.")
@trained_options
@log_level_option
def serve(
    config_path: str,
    host: str | None,
    port: int | None,
    trained: TrainedName,
    log_level: str | None,
) -> None:
    """Score over HTTP until SIGTERM: POST /rank, GET /health, GET /metrics."""
    require_torchrec()
    from torchrec_models.server import serve as serve_until_signal
    from torchrec_models.serving import ServingConfig, open_served

    start_logging(config_path, log_level)
    overrides = {
        key: value for key, value in {"host": host, "port": port}.items() if value is not None
    }
    config = load_section(config_path, "serving", ServingConfig, overrides)
    ranker = load_ranker_config(config_path)
    with open_served(config_path, ranker, trained) as served:
        serve_until_signal(
            served,
            config,
            announce=lambda host, port: click.echo(
                json.dumps({"service": served.manifest.service, "host": host, "port": port})
            ),
        )


def main() -> None:
    """Entry point of the installed command."""
    run_command_line(qarm_rank)


if __name__ == "__main__":
    main()

"""Trains the ranker on all processes that torchrun starts.

Run it:

    torchrun --standalone --nproc-per-node 2 -m torchrec_models.train --config PATH/qarm.yaml

The logic lives in :mod:`torchrec_models.training`; nothing imports this module.
"""

import json

import click
from torch.distributed.elastic.multiprocessing.errors import record

from qarm_feast.command import config_option, log_level_option, run_command_line, start_logging
from torchrec_models.dependency import require_torchrec
from torchrec_models.inputs import load_train_inputs
from torchrec_models.options import load_ranker_config, set_option


@click.command(
    epilog="Example: torchrun --standalone --nproc-per-node 2 -m torchrec_models.train "
    "--config feature_repo/qarm.yaml --set ranker.batch_size=1024"
)
@config_option
@set_option
@click.option("--resume", is_flag=True, help="Go on with the run that was stopped or died.")
@click.option(
    "--init-from",
    type=click.Path(file_okay=False, exists=True),
    help="Folder of a checkpoint, of this codebook or an older one, whose weights are taken over.",
)
@log_level_option
def main(
    config_path: str,
    assignments: tuple[str, ...],
    resume: bool,
    init_from: str | None,
    log_level: str | None,
) -> None:
    """Train the ranker; the first rank prints its metrics on test rows as one JSON line.

    SIGTERM and SIGINT stop it after a checkpoint; it then ends with 143 or 130 (torchrun itself
    with 1), and --resume goes on.
    """
    require_torchrec()
    from torchrec_models.interruption import stop_on_signals
    from torchrec_models.metrics import defined_metrics
    from torchrec_models.sharding import process_group
    from torchrec_models.training import train
    from torchrec_models.warm_start import load_warm_start

    start_logging(config_path, log_level)
    config = load_ranker_config(config_path, assignments)
    inputs = load_train_inputs(config_path, config)
    warm_start = None
    if init_from is not None:
        version = inputs.store.manifest.codebook_version
        warm_start = load_warm_start(config_path, init_from, version)
    with stop_on_signals() as stop, process_group() as ranks:
        result = train(config, inputs, resume=resume, warm_start=warm_start, stop=stop)
    if ranks.is_first:
        click.echo(
            json.dumps(
                {
                    "checkpoint": str(result.checkpoint),
                    "num_steps": result.num_steps,
                    "samples_per_second": round(result.samples_per_second),
                    "masked_history_share": result.masked_history_share,
                    "metrics": defined_metrics(result.metrics),
                }
            )
        )


@record
def _run() -> None:
    """Run the command; an exception's traceback also goes into torchrun's summary."""
    run_command_line(main)


if __name__ == "__main__":
    _run()

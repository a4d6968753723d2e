"""Trains the arms of a comparison over several seeds in one process group.

Run it:

    torchrun --standalone --nproc-per-node 2 -m torchrec_models.comparison --output figures.json

An arm is a named set of overrides of the ranker section; everything else, ID dropout, sizes and
epochs included, is the same for all arms. May import: what :mod:`torchrec_models.training` does.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import Field, ValidationError

from qarm_feast.command import config_option, log_level_option, run_command_line, start_logging
from qarm_feast.config import ConfigPath, Section, load_section
from qarm_feast.errors import ConfigError
from torchrec_models.config import RankerConfig
from torchrec_models.inputs import TrainInputs, load_train_inputs
from torchrec_models.metrics import defined_metrics
from torchrec_models.options import load_ranker_config, set_option
from torchrec_models.row_store import write_atomically
from torchrec_models.sharding import process_group
from torchrec_models.training import train

logger = logging.getLogger(__name__)

_ID_FEATURES = ("user_id", "item_id", "user_columns", "history_item_id")
_SHARED_KEYS = ("name", "rows_uri", "codebook_version", "seed")
"""Keys that no arm may set: they choose the rows and seeds that all arms share."""


class ArmConfig(Section):
    """One arm: a name and the ranker keys in which it differs."""

    name: str = Field(description="Name in the printed table.")
    overrides: dict[str, Any] = Field(description="Keys of section `ranker`.")


class ComparisonConfig(Section):
    """Section ``comparison``: arms, seeds, and where the figures go."""

    output_path: ConfigPath = Field(
        default="data/comparison.json", description="JSON file with metrics per arm and seed."
    )
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="Seeds per arm.")
    arms: tuple[ArmConfig, ...] = Field(
        default=(
            ArmConfig(name="ID only", overrides={"features": _ID_FEATURES}),
            ArmConfig(name="ID + fixed vector", overrides={"features": (*_ID_FEATURES, "vector")}),
            ArmConfig(
                name="ID + codes",
                overrides={"features": (*_ID_FEATURES, "rq_code", "vq_code", "history_rq_code")},
            ),
        ),
        min_length=1,
        description="Arms, trained on the same rows with the same seeds.",
    )


def compare(
    config: RankerConfig, comparison: ComparisonConfig, inputs: TrainInputs, *, is_first: bool
) -> list[dict[str, Any]]:
    """Train every arm with every seed and return one record per run.

    Args:
        config: The ranker section that all arms start from.
        comparison: Arms and seeds.
        inputs: Rows and codebook.
        is_first: Whether this rank logs.

    Returns:
        Records ``{arm, seed, seconds, samples_per_second, metrics, valid_metrics}``; undefined
        metrics left out.

    Raises:
        ConfigError: If an arm cannot be trained; before the first one is.
    """
    arm_configs = _arm_configs(config, comparison.arms)
    runs = []
    for seed in comparison.seeds:
        for arm, arm_config in zip(comparison.arms, arm_configs, strict=True):
            seeded = arm_config.model_copy(update={"seed": seed})
            result = train(seeded, inputs, enable_checkpoint=False)
            metrics = defined_metrics(result.metrics)
            runs.append(
                {
                    "arm": arm.name,
                    "seed": seed,
                    "seconds": round(result.seconds, 3),
                    "samples_per_second": round(result.samples_per_second),
                    "metrics": metrics,
                    "valid_metrics": defined_metrics(result.valid_metrics),
                }
            )
            if is_first:
                shown = " ".join(f"{k}={v:.4f}" for k, v in metrics.items() if "auc" in k)
                logger.info(
                    "compared arm=%r seed=%d seconds=%.1f %s", arm.name, seed, result.seconds, shown
                )
    return runs


def _arm_configs(config: RankerConfig, arms: Sequence[ArmConfig]) -> list[RankerConfig]:
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ConfigError(f"comparison.arms uses a name twice: {names}; give each arm its own")
    for arm in arms:
        if shared := sorted(set(arm.overrides) & set(_SHARED_KEYS)):
            raise ConfigError(
                f"comparison.arms: arm {arm.name!r} overrides {shared}, which all arms share; "
                "set them in section ranker (seed: comparison.seeds)"
            )
    return [_arm_config(config, arm) for arm in arms]


def _arm_config(config: RankerConfig, arm: ArmConfig) -> RankerConfig:
    try:
        return RankerConfig.model_validate(config.model_dump() | arm.overrides)
    except ValidationError as error:
        raise ConfigError(f"comparison.arms: arm {arm.name!r} is wrong: {error}") from error


@click.command(
    epilog="Example: torchrun --standalone --nproc-per-node 2 -m torchrec_models.comparison "
    "--config feature_repo/qarm.yaml --output comparison.json"
)
@config_option
@set_option
@click.option("--output", type=click.Path(dir_okay=False), help="Overrides comparison.output_path.")
@log_level_option
def main(
    config_path: str, assignments: tuple[str, ...], output: str | None, log_level: str | None
) -> None:
    """Train all arms with all seeds; the first rank writes the figures as JSON."""
    start_logging(config_path, log_level)
    config = load_ranker_config(config_path, assignments)
    comparison = load_section(config_path, "comparison", ComparisonConfig)
    inputs = load_train_inputs(config_path, config)
    with process_group() as ranks:
        runs = compare(config, comparison, inputs, is_first=ranks.is_first)
    if ranks.is_first:
        path = Path(output or comparison.output_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest = inputs.store.manifest
        write_atomically(
            path, json.dumps({"service": manifest.service, "build": manifest.build, "runs": runs})
        )
        click.echo(str(path))


if __name__ == "__main__":
    run_command_line(main)

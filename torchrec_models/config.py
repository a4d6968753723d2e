"""Section ``ranker`` of ``qarm.yaml``: what the ranker reads, how big it is, how it is trained.

May import: pydantic through :mod:`qarm_feast.config`; neither torch nor torchrec.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qarm_feast.config import ConfigPath, Section
from qarm_feast.errors import ConfigError

FeatureName = Literal[
    "user_id",
    "item_id",
    "user_columns",
    "history_item_id",
    "rq_code",
    "vq_code",
    "history_rq_code",
    "vector",
    "cross",
]
StoppingMetric = Literal["auc", "gauc", "uauc", "ne", "log_loss"]
LayerSizes = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]


class TaskConfig(Section):
    """One binary prediction target."""

    name: str = Field(description="Name in metrics and scores, for example `like`.")
    label_name: str = Field(description="Bool column of the interactions, for example `is_like`.")
    weight: float = Field(default=1.0, gt=0, description="Weight of this task's loss.")


class RankerConfig(Section):
    """The multi-task ranker."""

    name: str = Field(
        default="ranker",
        pattern=r"^[a-z][a-z0-9_]*$",
        description="Prefix of the feature service `<name>_<codebook_version>`.",
    )
    rows_uri: ConfigPath = Field(default="data/rows", description="Folder of training rows.")
    checkpoint_dir: ConfigPath = Field(
        default="data/checkpoints", description="Folder of checkpoints."
    )
    export_dir: ConfigPath = Field(
        default="data/exports", description="Folder of int8 exports, made by `qarm-rank export`."
    )
    codebook_version: str = Field(
        default="default",
        description="Codebook whose codes are read; `default` asks the codebook registry.",
    )
    features: tuple[FeatureName, ...] = Field(
        default=(
            "user_id",
            "item_id",
            "user_columns",
            "history_item_id",
            "rq_code",
            "vq_code",
            "history_rq_code",
        ),
        min_length=1,
        description="Feature groups that are switched on; `cross`: how the history's codes match "
        "the candidate's.",
    )
    tasks: Literal["auto"] | tuple[TaskConfig, ...] = Field(
        default="auto", description="Tasks; `auto` takes the bool columns in file order."
    )
    embedding_dim: int = Field(default=64, gt=0, multiple_of=4, description="Width of every table.")
    dense_arch_layer_sizes: LayerSizes = Field(
        default=(256, 128),
        description="Hidden layers over dense features (aligned vectors, cross features).",
    )
    expert_layer_sizes: LayerSizes = Field(
        default=(128,), description="Hidden layers of each MMoE expert."
    )
    over_arch_layer_sizes: LayerSizes = Field(
        default=(128, 1), description="Layers of each task's tower; the last one is the logit."
    )
    num_experts: int = Field(default=4, gt=0, description="MMoE experts shared by the tasks.")
    history_length: int = Field(default=50, gt=0, description="Latest history items that are used.")
    id_dropout: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Share of train rows whose user id, and whose item id, reads as unseen.",
    )
    enable_centroid_start: bool = Field(
        default=True, description="Start code tables from the codebook's projected centroids."
    )
    centroid_scale: float = Field(
        default=0.3, gt=0, description="Standard deviation of centroid-started table weights."
    )
    num_numeric_buckets: int = Field(
        default=10, gt=1, description="Quantile buckets of a numeric user column."
    )
    batch_size: int = Field(default=4096, gt=0, description="Rows per rank and step.")
    shuffle_window_rows: int = Field(
        default=65536, gt=0, description="Rows that a rank holds and shuffles at a time."
    )
    learning_rate: float = Field(default=1.0e-3, gt=0, description="Adam, dense parameters.")
    sparse_learning_rate: float = Field(
        default=0.05, gt=0, description="Row-wise Adagrad, embedding tables."
    )
    num_epochs: int = Field(
        default=3, ge=0, description="Passes over the train rows; 0: only evaluate and save."
    )
    eval_every_steps: int = Field(
        default=500,
        gt=0,
        description="Steps between evaluations on valid rows, beside the one after each epoch.",
    )
    early_stopping_patience: int = Field(
        default=0,
        ge=0,
        description="Evaluations without a better metric after which training stops; the best "
        "weights are kept, for which each rank holds a copy of its part. 0: never.",
    )
    early_stopping_metric: StoppingMetric = Field(
        default="auc", description="Metric on valid rows, averaged over the tasks."
    )
    seed: int = Field(default=0, ge=0, description="Seed of weights, shuffling and ID dropout.")

    @model_validator(mode="after")
    def _check_shapes(self) -> "RankerConfig":
        if self.over_arch_layer_sizes[-1] != 1:
            raise ValueError("over_arch_layer_sizes must end in 1, the logit of one task")
        if set(self.features) <= {"vector", "cross"}:
            raise ValueError("features need one that has a table, beside `vector` and `cross`")
        return self

    def has(self, feature: FeatureName) -> bool:
        """Say whether a feature group is switched on."""
        return feature in self.features

    def service_name(self, codebook_version: str) -> str:
        """Return the feature service that rows, checkpoints and scores of this ranker pin."""
        return f"{self.name}_{codebook_version}"


@dataclass(frozen=True)
class CodeSizes:
    """What the ranker needs to know of a codebook: its manifest's sizes."""

    level_sizes: tuple[int, ...]
    pool_size: int
    vector_dim: int


def resolve_tasks(config: RankerConfig, label_names: Sequence[str]) -> tuple[TaskConfig, ...]:
    """Return the tasks to train, checked against the labels that the rows carry.

    Args:
        config: The ranker section.
        label_names: Bool columns of the data, in file order.

    Returns:
        One task per column for ``auto``, else the configured ones.

    Raises:
        ConfigError: If a task names a label that the data does not have, or a name stands twice.
    """
    tasks = config.tasks
    if tasks == "auto":
        tasks = tuple(
            TaskConfig(name=label.removeprefix("is_"), label_name=label) for label in label_names
        )
    unknown = [task.label_name for task in tasks if task.label_name not in label_names]
    if unknown:
        raise ConfigError(
            f"ranker.tasks names the labels {unknown}, but the data has {list(label_names)}; "
            "set ranker.tasks to auto or mend the names"
        )
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"ranker.tasks uses a name twice: {names}; give each task its own")
    return tasks

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
    "aligned_cosine",
    "cross",
    "item_columns",
    "popularity",
    "item_cf",
    "code_cf",
    "prefix",
    "history_prefix",
    "attention",
    "shared_history",
    "long_history",
]
StoppingMetric = Literal["auc", "gauc", "uauc", "ne", "log_loss"]
DENSE_FEATURES: tuple[FeatureName, ...] = (
    "vector",
    "aligned_cosine",
    "cross",
    "popularity",
    "item_cf",
    "code_cf",
)
"""Groups without a table."""
UNPOOLED_FEATURES: tuple[FeatureName, ...] = (*DENSE_FEATURES, "attention")
"""Groups without a pooled table, of which a ranker needs one."""
LayerSizes = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]


class TaskConfig(Section):
    """One binary prediction target."""

    name: str = Field(description="Name in metrics and scores, for example `like`.")
    label_name: str = Field(description="Bool column of the interactions, for example `is_like`.")
    weight: float = Field(default=1.0, gt=0, description="Weight of this task's loss.")
    after: str | None = Field(
        default=None,
        description="Task without which this one cannot happen: `like` for `love`.",
    )


def parents_first(tasks: Sequence[TaskConfig]) -> list[int]:
    """Return the tasks' places in an order in which each stands behind the one it comes after.

    Args:
        tasks: Tasks, some with ``after``.

    Returns:
        Places in ``tasks``.

    Raises:
        ValueError: If ``after`` names no other task, or tasks come after each other in a circle.
    """
    names = [task.name for task in tasks]
    unknown = [task.after for task in tasks if task.after not in (None, *names)]
    if unknown:
        raise ValueError(f"tasks come after {unknown}, but the tasks are {names}")
    order: list[int] = []
    placed: set[str | None] = {None}
    while len(order) < len(tasks):
        ready = [
            place for place, task in enumerate(tasks) if place not in order and task.after in placed
        ]
        if not ready:
            circle = [name for place, name in enumerate(names) if place not in order]
            raise ValueError(f"tasks come after each other in a circle: {circle}")
        order += ready
        placed |= {names[place] for place in ready}
    return order


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
        description="Feature groups that are switched on; `vector`: vectors of the candidate and "
        "of the history's mean, and their cosines; `aligned_cosine`: cosines of the encoder's "
        "vectors alone, whatever `vector_source` says; `cross`: how the history's codes match the "
        "candidate's; `attention`, `shared_history`, `long_history`: target attention over the "
        "codes of the history, of its items that share c1 and (c1, c2) with the candidate, and of "
        "those that a search of a longer history finds; `item_columns`: typed columns of items; "
        "`popularity`: counts of train rows; `item_cf`, `code_cf`: how often items, and their "
        "first codes, are liked together (`qarm-rank rows` counts what is switched on); `prefix`, "
        "`history_prefix`: the first codes taken together, of the candidate and of the history.",
    )
    vector_source: Literal["aligned", "raw"] = Field(
        default="aligned",
        description="Vectors of the groups `vector` and `long_history`: the encoder's, or what its "
        "head reads (written by `qarm align export --raw`; not served).",
    )
    item_columns: Literal["auto"] | tuple[str, ...] = Field(
        default="auto",
        description="Columns of items.parquet in the group `item_columns`, read when rows are "
        "built; auto: brand and every further column of text, numbers or bools.",
    )
    max_prefix_length: int = Field(
        default=3, gt=0, description="Longest prefix of a code that is a token."
    )
    prefix_table_rows: int = Field(
        default=1_000_000,
        gt=0,
        description="Most rows of the prefix table; more distinct prefixes than that are hashed.",
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
        default=(128,), description="Layers of each expert, and of the shared bottom."
    )
    over_arch_layer_sizes: LayerSizes = Field(
        default=(128, 1), description="Layers of each task's tower; the last one is the logit."
    )
    head: Literal["shared_bottom", "mmoe", "ple", "home"] = Field(
        default="mmoe", description="What the tasks share."
    )
    num_experts: int = Field(default=4, gt=0, description="MMoE experts shared by the tasks.")
    experts_per_bank: int = Field(
        default=2,
        gt=0,
        description="PLE and HoME: experts of each bank (shared, of a task, of a group of tasks).",
    )
    num_levels: int = Field(default=2, gt=0, description="PLE: extraction levels.")
    task_groups: Literal["auto"] | tuple[tuple[str, ...], ...] = Field(
        default="auto",
        description="HoME: names of the tasks of each group; `auto` puts all in one.",
    )
    feature_gate_rank: int = Field(default=8, gt=0, description="HoME: rank of feature gates.")
    interaction: Literal["dot", "dcn", "fgcnn"] = Field(
        default="dot", description="How embeddings meet: DLRM's dot, DCN-v2, FGCNN with IPNN."
    )
    dcn_num_layers: int = Field(default=2, gt=0, description="DCN-v2: cross layers.")
    dcn_rank: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="DCN-v2: rank of cross weights; null for full ones."
    )
    fgcnn_num_maps: LayerSizes = Field(
        default=(4, 4), description="FGCNN: feature maps of each convolution."
    )
    fgcnn_num_new_maps: LayerSizes = Field(
        default=(1, 1), description="FGCNN: maps of new features of each recombination."
    )
    fgcnn_kernel_height: int = Field(
        default=3, gt=0, description="FGCNN: features that a convolution covers, odd."
    )
    fgcnn_pooling_height: int = Field(
        default=2, gt=1, description="FGCNN: features of which pooling keeps the largest."
    )
    enable_esmm: bool = Field(
        default=False,
        description="Tasks with `after` are learnt as products over all rows (ESMM); else their "
        "loss is over the rows where the other task happened.",
    )
    content_id_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the term that ties the embedding of the item's vector to that of "
        "its id (EM3: 1e-3); 0 is off.",
    )
    content_id_temperature: float = Field(
        default=0.1, gt=0, description="Temperature of that term."
    )
    content_id_num_negatives: int = Field(
        default=16, gt=0, description="Other rows of the batch that each row is set against."
    )
    history_length: int = Field(default=50, gt=0, description="Latest history items that are used.")
    long_history_length: int = Field(
        default=1000,
        gt=0,
        description="Latest history items that `long_history` searches; the rows hold no more "
        "than data.history_length.",
    )
    num_searched: int = Field(
        default=20, gt=0, description="History items most like the candidate that are kept."
    )
    id_dropout: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Share of train rows whose user id, and whose item id, reads as unseen.",
    )
    code_dropout: float = Field(
        default=0.4,
        ge=0,
        lt=1,
        description="Share of train rows whose candidate reads as an item without codes. Codes of "
        "an item that has train rows have learnt from these rows, those of a cold item have not: "
        "without dropout the ranker trusts cold items' codes too much.",
    )
    embedding_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the embeddings' numbers that read as 0 in training.",
    )
    enable_centroid_start: bool = Field(
        default=True, description="Start code tables from the codebook's projected centroids."
    )
    centroid_scale: float = Field(
        default=0.3, gt=0, description="Standard deviation of a code table's first weights."
    )
    code_table_training: Literal["trained", "frozen"] = Field(
        default="trained",
        description="Whether the code tables leave their first weights: centroids, or random ones.",
    )
    num_numeric_buckets: int = Field(
        default=10, gt=1, description="Quantile buckets of a numeric user or item column."
    )
    batch_size: int = Field(default=4096, gt=0, description="Rows per rank and step.")
    shuffle_window_rows: int = Field(
        default=65536, gt=0, description="Rows that a rank holds and shuffles at a time."
    )
    num_input_threads: int = Field(
        default=1,
        ge=0,
        description="Threads per rank that build batches ahead of training; 0: none ahead.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to train; `auto`: a GPU per rank if there is one."
    )
    enable_bf16: bool = Field(
        default=False,
        description="Train the dense part in bfloat16 by autocast; tables, weights, evaluation "
        "and serving stay in float32.",
    )
    max_gradient_norm: float | None = Field(
        default=None, gt=0, description="Longer gradients of dense parameters are clipped to it."
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps in which both learning rates grow to their value."
    )
    learning_rate: float = Field(default=1.0e-3, gt=0, description="Adam, dense parameters.")
    sparse_learning_rate: float = Field(
        default=0.05, gt=0, description="Row-wise Adagrad, embedding tables."
    )
    dense_average_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay per step of the moving average of the dense weights, which is what is "
        "evaluated, saved and served (.98 is about the last 50 steps; less in the first 450); "
        "0: the weights of the last step.",
    )
    num_epochs: int = Field(
        default=3, ge=0, description="Passes over the train rows; 0: only evaluate and save."
    )
    eval_every_steps: int = Field(
        default=500,
        gt=0,
        description="Steps of an epoch between evaluations on valid rows, beside the one after it.",
    )
    held_eval_rows: int = Field(
        default=0,
        ge=0,
        description="Most valid rows whose batches a rank keeps in memory from one evaluation to "
        "the next; more rows, or 0: batches are built each time.",
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
    checkpoint_every_steps: int = Field(
        default=0,
        ge=0,
        description="Steps between checkpoints to resume from; 0: only a signal makes one.",
    )
    keep_checkpoints: int = Field(
        default=3, gt=0, description="Newest finished checkpoints of a service that are kept."
    )
    seed: int = Field(default=0, ge=0, description="Seed of weights, shuffling and dropout.")

    @model_validator(mode="after")
    def _check_shapes(self) -> "RankerConfig":
        if self.over_arch_layer_sizes[-1] != 1:
            raise ValueError("over_arch_layer_sizes must end in 1, the logit of one task")
        if set(self.features) <= set(UNPOOLED_FEATURES):
            raise ValueError(
                f"features need one that has a pooled table, beside {UNPOOLED_FEATURES}"
            )
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> "RankerConfig":
        tasks = () if self.tasks == "auto" else self.tasks
        parents_first(tasks)
        if self.enable_esmm and not any(task.after for task in tasks):
            raise ValueError(
                "enable_esmm needs a task that comes after another: set tasks, for example to "
                "[{name: like, label_name: is_like}, {name: love, label_name: is_love, "
                "after: like}]"
            )
        if self.content_id_weight and not {"item_id", "vector"} <= set(self.features):
            raise ValueError("content_id_weight needs the features `item_id` and `vector`")
        if {"vector", "aligned_cosine"} <= set(self.features) and self.vector_source == "aligned":
            raise ValueError(
                "`aligned_cosine` is part of `vector` with vector_source `aligned`: take it out of "
                "features, or set vector_source to `raw`"
            )
        if self.fgcnn_kernel_height % 2 == 0:
            raise ValueError(
                f"fgcnn_kernel_height is {self.fgcnn_kernel_height}, but must be odd: it reaches "
                "equally far to both sides"
            )
        if len(self.fgcnn_num_maps) != len(self.fgcnn_num_new_maps):
            raise ValueError(
                f"fgcnn_num_maps has {len(self.fgcnn_num_maps)} layers, fgcnn_num_new_maps "
                f"{len(self.fgcnn_num_new_maps)}; give both one entry per layer"
            )
        return self

    def has(self, feature: FeatureName) -> bool:
        """Say whether a feature group is switched on."""
        return feature in self.features

    def read_history_length(self) -> int:
        """Return the number of latest history items that some feature needs."""
        searched = self.long_history_length if self.has("long_history") else 0
        return max(self.history_length, searched)

    def service_name(self, codebook_version: str) -> str:
        """Return the feature service that rows, checkpoints and scores of this ranker pin."""
        return f"{self.name}_{codebook_version}"


@dataclass(frozen=True)
class CodeSizes:
    """What the ranker needs to know of a codebook: its manifest's sizes."""

    level_sizes: tuple[int, ...]
    pool_size: int
    vector_dim: int
    raw_vector_dim: int = 0


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

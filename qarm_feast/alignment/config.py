"""Section ``alignment`` of ``qarm.yaml``."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qarm_feast.alignment.modalities import Modality
from qarm_feast.config import ConfigPath, Section

PairSource = Literal["swing", "item_cf", "u2i"]


class PairConfig(Section):
    """Item pairs from behaviour."""

    sources: tuple[PairSource, ...] = Field(
        default=("swing", "u2i"),
        min_length=1,
        description="Where pairs come from: swing and item_cf (I2I), u2i.",
    )
    max_items_per_user: int = Field(
        default=1000,
        gt=1,
        description="Latest items of a user that I2I and the behaviour space look at.",
    )
    num_neighbors: int = Field(
        default=10, gt=0, description="I2I: neighbours kept per item and source."
    )
    popularity_power: float = Field(
        default=0.0,
        ge=0,
        le=2,
        description="I2I: a neighbour's score is divided by its number of users to this power.",
    )
    swing_alpha: float = Field(
        default=1.0, gt=0, description="Swing: added to the number of items that two users share."
    )
    max_users_per_item: int = Field(
        default=1000, gt=1, description="Swing: latest users of an item that it looks at."
    )
    min_swing_score: float = Field(
        default=0.0, ge=0, description="Swing: least score, after the popularity correction."
    )
    min_shared_users: int = Field(
        default=2, gt=0, description="Item-CF: least users that both items share."
    )
    min_item_cf_score: float = Field(
        default=0.0, ge=0, description="Item-CF: least cosine, after the popularity correction."
    )
    history_length: int = Field(
        default=50, gt=0, description="U2I: latest positives searched for a trigger."
    )
    behaviour_dim: int = Field(
        default=64, gt=0, description="U2I: width of the behaviour space (truncated SVD)."
    )
    max_cooccurrences: int = Field(
        default=30_000_000,
        gt=0,
        description="U2I: entries of the matrix behind the behaviour space, 12 bytes each.",
    )
    min_similarity: float = Field(
        default=0.2, ge=-1, le=1, description="U2I: least cosine of trigger and target."
    )
    u2i_popularity_power: float = Field(
        default=0.0,
        ge=0,
        le=2,
        description="U2I: a trigger's cosine is divided by its number of users to this power, when "
        "it is chosen among those of min_similarity and as its score.",
    )
    max_pairs_per_item: int = Field(
        default=50, gt=0, description="U2I: best pairs kept per target item."
    )
    max_pairs_per_user: int = Field(
        default=200, gt=0, description="U2I: best pairs kept per user, before the cap per item."
    )
    judge: str | None = Field(
        default=None,
        pattern=r"^[\w.]+:\w+$",
        description="A function package.module:function that says of each pair whether to keep it.",
    )
    num_processes: int | None = Field(
        default=None, gt=0, description="Processes that build pairs; null = one per core."
    )
    memory_limit_mib: int = Field(
        default=2048, ge=256, description="Memory of sorting the events before it goes to disk."
    )


class EvaluationConfig(Section):
    """How `qarm align evaluate` measures."""

    num_draws: int = Field(
        default=1000, ge=100, description="Bootstrap draws of items and users, for intervals."
    )
    max_queries: int = Field(
        default=10_000, gt=0, description="Most items and most users that are looked at."
    )


class EncoderGateConfig(Section):
    """Limits that aligned vectors must keep against raw ones; null switches a gate off.

    A gate refuses when even the upper end of the 95 % interval of the paired difference lies
    below its limit: at 0, an encoder that is worse than raw vectors beyond noise.
    """

    min_neighbor_auc_gain: float | None = Field(
        default=0.0, ge=-1, le=1, description="Neighbour AUC, aligned less raw."
    )
    min_neighbor_auc_gain_warm: float | None = Field(
        default=0.0, ge=-1, le=1, description="The same for items with a train row."
    )
    min_neighbor_auc_gain_cold: float | None = Field(
        default=0.0, ge=-1, le=1, description="The same for items without a train row."
    )
    min_zero_shot_gain: float | None = Field(
        default=0.0, ge=-1, le=1, description="Zero-shot Recall@10, aligned less raw."
    )
    min_item_cf_gain: float | None = Field(
        default=0.0, ge=-1, le=1, description="Item-CF Recall@10, aligned less raw."
    )
    min_num_samples: int = Field(
        default=20, gt=0, description="Fewest items or users from which a gate is read."
    )
    allow_unmeasured: bool = Field(
        default=False,
        description="Whether an encoder passes of which no gate can be read (no validation rows).",
    )


class QFormerConfig(Section):
    """Sizes of the Fusion-Q-Former."""

    num_queries: int = Field(default=4, gt=0, description="Learned queries.")
    num_layers: int = Field(default=1, ge=1, le=4, description="Self-attention layers.")
    num_heads: int = Field(default=4, gt=0, description="Attention heads; they divide the width.")
    width: int = Field(default=128, ge=16, multiple_of=16, description="Width of a token inside.")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, which does not divide the width {self.width}"
            )
        return self


class AlignmentConfig(Section):
    """How the encoder is trained and where it and its vectors are stored."""

    backbone: ConfigPath = Field(
        default="minilm",
        description="Text: name of an installed backbone (minilm), or a folder with a model.",
    )
    image_backbone: ConfigPath = Field(
        default="efficientnet_lite0",
        description="Images: name of an installed backbone (efficientnet_lite0), or a folder.",
    )
    audio_backbone: ConfigPath = Field(
        default="speaker_lstm",
        description="Audio: name of an installed backbone (speaker_lstm), or a folder.",
    )
    modalities: Literal["auto"] | tuple[Modality, ...] = Field(
        default="auto",
        description="What is read of items (text, image, audio, embedding); auto = what they have, "
        "embedding only where they have nothing else.",
    )
    fusion: Literal["concat", "q_former"] = Field(
        default="concat",
        description="How modalities are fused: concatenation and a hidden layer, or queries that "
        "attend to the tokens of all (q_former).",
    )
    q_former: QFormerConfig = Field(
        default=QFormerConfig(), description="Sizes of the fusion q_former."
    )
    tuning: Literal["frozen", "lora", "full"] = Field(
        default="frozen",
        description="What is trained below the fusion: nothing, low-rank adapters on the queries "
        "and values of attention (merged before saving), or every weight.",
    )
    lora_rank: int = Field(default=8, gt=0, description="Rank of the adapters of tuning: lora.")
    encoder_version: str = Field(
        default="e1", pattern=r"^[a-z][a-z0-9_]{0,31}$", description="Name of the encoder artifact."
    )
    encoder_uri: ConfigPath = Field(
        default="data/encoders", description="Folder of encoder artifacts, one per version."
    )
    vectors_uri: ConfigPath = Field(
        default="data/vectors", description="Folder of exported vectors, one per version."
    )
    export_rows_per_part: int = Field(
        default=50_000, gt=0, description="Items per parquet file of an export."
    )
    pairs_uri: ConfigPath = Field(
        default="data/pairs", description="Folder of item pairs, one file per encoder version."
    )
    features_uri: ConfigPath = Field(
        default="data/features", description="Folder of cached backbone features."
    )
    embedding_dim: int = Field(
        default=128,
        ge=16,
        multiple_of=8,
        description="Width of aligned embeddings; never above the features'.",
    )
    hidden_dim: int = Field(
        default=256, ge=16, multiple_of=8, description="Width of the head's hidden layer."
    )
    max_tokens: int = Field(
        default=64, ge=8, le=512, description="Tokens of an item's text that the backbone reads."
    )
    max_image_pixels: int = Field(
        default=50_000_000, gt=0, description="A picture of more pixels counts as absent."
    )
    max_audio_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="Seconds of a sound that the backbone reads."
    )
    text_tokens: int = Field(
        default=1, gt=0, le=64, description="Feature tokens per text: means of as many parts of it."
    )
    image_grid: int = Field(
        default=1, gt=0, le=16, description="Feature tokens per picture: cells per side of a grid."
    )
    audio_tokens: int = Field(
        default=1,
        gt=0,
        le=64,
        description="Feature tokens per sound: means of as many parts of it.",
    )
    batch_size: int = Field(
        default=1024, gt=1, description="Pairs per training step, of all ranks."
    )
    chunk_size: int | None = Field(
        default=None,
        gt=0,
        description="Items embedded at a time, by gradient caching: less memory, twice the forward "
        "passes. null: a step's items at once with tuning: frozen, 128 with lora and full. A step "
        "has at most 2 * batch_size + 512 items; from there on a number means all at once.",
    )
    temperature: float = Field(default=0.07, gt=0, description="Divides cosines in the loss.")
    learn_temperature: bool = Field(
        default=False,
        description="Train the temperature, from the given one and between 0.01 and 1.",
    )
    logq_weight: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of log popularity taken off the logits, because negatives of a batch "
        "come by popularity; 0: items that are popular are pushed away from each other.",
    )
    center_content: bool = Field(
        default=False,
        description="Take the mean off the content before anything else, with what it says of all "
        "items alike.",
    )
    learning_rate: float = Field(default=3e-4, gt=0, description="Adam's step size, for the head.")
    backbone_learning_rate: float = Field(
        default=1e-4,
        gt=0,
        description="Adam's step size for the backbones of tuning: lora; for full 2e-5 is usual.",
    )
    geometry_weight: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default=10.0,
        description="Weight of the term that keeps content similarities; auto: the one whose head "
        "ranks the pairs of held-out items best, and the untrained head where none is better.",
    )
    parent_weight: float = Field(
        default=10.0,
        ge=0,
        description="Weight of 1 - cosine to the parent's vector, per item, where training goes on "
        "from a parent: more keeps more codes, less lets new behaviour say more.",
    )
    inter_content_epochs: int = Field(
        default=0,
        ge=0,
        description="Most passes of a first stage that ties the modalities of each item together; "
        "for items of two modalities or more.",
    )
    enable_bf16: bool = Field(default=False, description="Embed in bfloat16 where torch can.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where training runs; auto: a GPU if there is one."
    )
    num_epochs: int = Field(default=30, gt=0, description="Most passes over the pairs.")
    patience: int = Field(
        default=2, gt=0, description="Epochs without a better validation loss before stopping."
    )
    valid_item_share: float = Field(
        default=0.1, gt=0, lt=0.5, description="Share of train items held out to stop early."
    )
    seed: int = Field(default=0, ge=0, description="Seed of sampling, shuffling and the SVD.")
    pairs: PairConfig = Field(default=PairConfig(), description="Item pairs from behaviour.")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="How `qarm align evaluate` measures."
    )
    gates: EncoderGateConfig = Field(
        default=EncoderGateConfig(), description="What `qarm align export` asks of the figures."
    )

"""Section ``codebook`` of ``qarm.yaml``: where codebooks lie, how one is refreshed and published.

May import: pydantic-backed configuration.
"""

from typing import Literal

from pydantic import Field

from qarm_feast.config import ConfigUri, Section

LevelKind = Literal["kmeans", "fsq"]
"""How the centroids of a level were made: freely, or as a lattice of signs."""


class GateConfig(Section):
    """Limits that a codebook's quality figures must keep; null switches a gate off."""

    max_collision_rate: float | None = Field(
        default=None, ge=0, le=1, description="Most of 1 - distinct full codes / items."
    )
    min_codebook_coverage: float | None = Field(
        default=0.5, ge=0, le=1, description="Least share of codes in use, on every level."
    )
    min_hr10: float | None = Field(
        default=None, ge=0, le=1, description="Least share of neighbours kept among ten."
    )
    max_relative_residual_norm: float | None = Field(
        default=None, ge=0, description="Most of residual length / vector length, last level."
    )


class ContinuityConfig(Section):
    """How far a refreshed codebook goes to keep the codes of its parent."""

    hysteresis: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="An item keeps its old code while its squared distance is at most 1 + this "
        "times that of the nearest.",
    )
    list_hysteresis: float = Field(
        default=0.5,
        ge=0,
        description="A neighbour stays in an item's VQ list while its squared distance is at most "
        "1 + this times that of the last of the nearest. 0: no farther than that one.",
    )
    num_iterations: int = Field(
        default=3,
        gt=0,
        le=100,
        description="k-means iterations per level, at first, where none do not keep the budget.",
    )
    mse_budget: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Most of refresh MSE / naive refit's MSE - 1; above it, more iterations, then "
        "less hysteresis. Where even that is not enough, and there are n times too few items for "
        "the level's 39 per code, n times as much.",
    )


class CodebookConfig(Section):
    """The codebook registry."""

    uri: ConfigUri = Field(
        default="data/codebooks",
        description="Folder of codebook versions and their states, or s3://BUCKET/PREFIX.",
    )
    gates: GateConfig = Field(
        default=GateConfig(), description="What `qarm codebook publish` asks of the figures."
    )
    max_items_per_code: int | None = Field(
        default=None,
        gt=0,
        description="Most catalogue items that publish leaves on one full code; others move to "
        "the next nearest free code of the last level. null: no cap.",
    )
    purge_rows_per_second: float = Field(
        default=5000.0,
        gt=0,
        description="Most online rows that `qarm codebook purge` deletes per second.",
    )
    continuity: ContinuityConfig = Field(
        default=ContinuityConfig(), description="What `qarm codebook train --parent` does."
    )

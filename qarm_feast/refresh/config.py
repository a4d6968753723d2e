"""Section ``refresh`` of ``qarm.yaml``."""

from pydantic import Field

from qarm_feast.config import ConfigPath, Section


class RefreshConfig(Section):
    """Where `qarm refresh` notes how far it has come, and how much it may change."""

    state_uri: ConfigPath = Field(
        default="data/refresh", description="Folder of the refresh's state and reports."
    )
    max_level1_churn: float | None = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Gate: most of the items whose level-1 code changes against the parent.",
    )
    max_full_churn: float | None = Field(
        default=None, ge=0, le=1, description="Gate: the same for full codes."
    )
    keep_encoders: int | None = Field(
        default=None,
        ge=2,
        description="Newest encoders that refreshes have made and that stay when a run is over; "
        "older ones go, with their vectors, pairs and logs, unless a codebook of codebook.uri "
        "names them (codebooks of other places are not looked at); null: all stay.",
    )

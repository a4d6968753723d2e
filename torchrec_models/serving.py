"""Section ``serving`` of ``qarm.yaml``, and what a server answers with.

May import: pydantic, what scoring does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from pydantic import Field

from qarm_feast import view_tags
from qarm_feast.codebook_config import CodebookConfig
from qarm_feast.config import Section, load_section
from qarm_feast.errors import CodebookMismatchError, ConfigError
from qarm_feast.reader import CodeReader
from qarm_feast.registry import CodebookRegistry, VersionState
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.serving_log import open_serving_log
from torchrec_models.checkpoint import CheckpointManifest
from torchrec_models.config import RankerConfig
from torchrec_models.dependency import silence_tracing_notice
from torchrec_models.inputs import resolve_codebook_version
from torchrec_models.options import TrainedName
from torchrec_models.row_columns import Ints
from torchrec_models.score import READS_VECTORS, OnlineScorer, Ranking, open_trained

_SERVED_STATES = (VersionState.LIVE, VersionState.DEFAULT)


class ServingConfig(Section):
    """How `qarm-rank serve` listens, and what it takes."""

    host: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0: every network's."
    )
    port: int = Field(default=8008, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    max_candidates: int = Field(
        default=5000, gt=0, description="Most candidates of one request; more are refused."
    )
    num_workers: int = Field(
        default=2, gt=0, description="Requests that are scored side by side, one thread each."
    )
    max_waiting_requests: int = Field(
        default=64, gt=0, description="Requests that are scored or wait; more are refused (503)."
    )
    num_threads: int = Field(
        default=1, gt=0, description="Compute threads of torch within one request."
    )
    body_timeout_seconds: int = Field(
        default=5, gt=0, description="A request's body has this long to come; else it is refused."
    )
    shutdown_timeout_seconds: int = Field(
        default=10, gt=0, description="After SIGTERM requests in hand have this long to end."
    )

    @property
    def max_body_bytes(self) -> int:
        """Bound of a request's body: an int64 with a comma and a space takes 22 bytes at most."""
        return 22 * self.max_candidates + 4096


@dataclass(frozen=True)
class Agreement:
    """Looks whether what a ranker was trained on is what the repository serves."""

    manifest: CheckpointManifest
    reader: CodeReader
    registry: CodebookRegistry

    def check(self) -> None:
        """Return if :meth:`check_codebook` does and the store answers.

        Raises:
            QarmError: As :meth:`check_codebook`; ``ServiceUnavailableError`` for the store.
        """
        self.check_codebook()
        self.reader.check_reachable()

    def check_codebook(self) -> None:
        """Return if the version is one that workers write, and its views fit the model.

        Raises:
            ConfigError: If the version's state is another, or a view is missing.
            CodebookMismatchError: If a view holds codes of another version, or vectors of another
                width.
        """
        version = self.manifest.codebook_version
        states = [state.value for state in _SERVED_STATES]
        if version not in self.registry.versions(*_SERVED_STATES):
            raise ConfigError(
                f"codebook {version!r} of service {self.manifest.service!r} is none of the "
                f"registry's {' or '.join(states)} versions, so nobody writes its codes; serve a "
                "ranker of another version, or take the retirement back by `qarm rollout undo`"
            )
        tags = self.reader.code_view_tags()
        sizes = self.manifest.sizes
        num_levels = int(tags.get(view_tags.NUM_LEVELS, len(sizes.level_sizes)))
        found = tags.get(view_tags.CODEBOOK_VERSION, version)
        if found != version or num_levels != len(sizes.level_sizes):
            raise CodebookMismatchError(
                expected=f"{version} of {len(sizes.level_sizes)} levels",
                found=f"{found} of {num_levels} levels",
                where=f"the code view of service {self.manifest.service!r}",
                command="feast apply, or train a ranker on these codes",
            )
        self._check_vectors()

    def _check_vectors(self) -> None:
        if not any(self.manifest.config.has(name) for name in READS_VECTORS):
            return
        expected = self.manifest.sizes.vector_dim
        found = int(self.reader.vector_view_tags().get(view_tags.EMBEDDING_DIM, 0))
        if found != expected:
            raise CodebookMismatchError(
                expected=f"{self.manifest.codebook_version} with vectors of {expected} numbers",
                found=f"vectors of {found} numbers",
                where=f"the vector view of service {self.manifest.service!r}",
                command="feast apply, or train a ranker on these vectors",
            )


class Scorer(Protocol):
    """What answers; :class:`torchrec_models.score.OnlineScorer` is one."""

    def rank(self, user_id: int, item_ids_B: Ints, now: datetime) -> Ranking:
        """Return the scores of at least one candidate."""
        ...


@dataclass(frozen=True)
class Served:
    """What a server answers with.

    Attributes:
        scorer: Gives the scores.
        check_agreement: Raises a ``QarmError`` while model, codebook and store do not agree.
        manifest: Of the ranker, named by ``/health`` and in each answer.
        source: Where the ranker was loaded from.
    """

    scorer: Scorer
    check_agreement: Callable[[], None]
    manifest: CheckpointManifest
    source: str


@contextmanager
def open_served(
    config_path: str, config: RankerConfig, trained_name: TrainedName
) -> Iterator[Served]:
    """Load a ranker over the repository's online store.

    At the end of the block what section ``serving_log`` had sampled is written.

    Args:
        config_path: Path of ``qarm.yaml``, beside ``feature_store.yaml``.
        config: The ranker section.
        trained_name: Checkpoint or export.

    Yields:
        What a server answers with. The store may be away: ``check_agreement`` says so.

    Raises:
        QarmError: If the ranker cannot be loaded, or does not fit the repository's codebook.
    """
    silence_tracing_notice()
    version = resolve_codebook_version(config_path, config.codebook_version)
    trained = open_trained(config, config.service_name(version), trained_name)
    store = open_feature_store(Path(config_path).resolve().parent)
    codebooks = load_section(config_path, "codebook", CodebookConfig)
    with open_serving_log(config_path, store.config) as serving_log:
        reader = CodeReader(store, version, serving_log)
        agreement = Agreement(trained.manifest, reader, CodebookRegistry(codebooks.uri))
        agreement.check_codebook()
        yield Served(
            scorer=OnlineScorer(trained, reader),
            check_agreement=agreement.check,
            manifest=trained.manifest,
            source=str(trained.folder),
        )

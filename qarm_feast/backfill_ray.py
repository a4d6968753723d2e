"""Pieces of a backfill written by Ray Data: on this machine's cores, or on a cluster.

Where ``RAY_ADDRESS`` names a cluster, its nodes must see the same configuration, codebooks and
offline log under the same paths, and the online store must be one that many machines can reach.
Else Ray is started here, without a dashboard, and ended again. Ray's usage report is switched off.
May import: ray.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qarm_feast import errors
from qarm_feast.backfill_writer import BackfillJob, Piece, PieceResult, PieceWriter
from qarm_feast.errors import MissingDependencyError, QarmError

if TYPE_CHECKING:
    from types import ModuleType

_PIECE = "piece"
_RESULT = "result"
_FAULT = "fault"


class RayEngine:
    """Writes pieces by a pool of Ray actors, each with its own codebook and store connections.

    Args:
        job: What to write.

    Raises:
        MissingDependencyError: If Ray Data is not installed.
    """

    def __init__(self, job: BackfillJob) -> None:
        self._job = job
        self._ray = _import_ray()

    def run(self, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
        """Write every piece.

        Args:
            pieces: The pieces.

        Yields:
            Results as they come.

        Raises:
            QarmError: What a piece's writer raised.
        """
        data = self._ray.data
        with _running(self._ray):
            num_actors = min(len(pieces), max(1, int(self._ray.cluster_resources().get("CPU", 1))))
            # A block per piece, so that none waits for the others of its block.
            waiting = data.from_items(
                [{_PIECE: pickle.dumps(piece)} for piece in pieces],
                override_num_blocks=len(pieces),
            )
            written = waiting.map(
                _PieceActor,
                fn_constructor_args=(self._job,),
                compute=data.ActorPoolStrategy(size=num_actors),
            )
            for row in written.iter_rows():
                yield _result_of(row)


class _PieceActor:
    """Ray's callable: a piece as bytes to its result as bytes.

    Args:
        job: What to write.
    """

    def __init__(self, job: BackfillJob) -> None:
        self._job = job
        self._writer: PieceWriter | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            # Here, not above: Ray tries to start an actor again and again, whatever the reason.
            if self._writer is None:
                self._writer = PieceWriter(self._job)
            result = self._writer.write(pickle.loads(row[_PIECE]))
        except QarmError as error:
            # As words: Ray would wrap the error, and those with own arguments cannot be pickled.
            return {_RESULT: b"", _FAULT: f"{type(error).__name__}:{error}"}
        return {_RESULT: pickle.dumps(result), _FAULT: ""}


def _result_of(row: dict[str, Any]) -> PieceResult:
    if row[_FAULT]:
        kind, _, message = row[_FAULT].partition(":")
        error: type[QarmError] = getattr(errors, kind)
        # Not by its own arguments: the message is complete.
        raised = error.__new__(error)
        raised.args = (message,)
        raise raised
    result: PieceResult = pickle.loads(row[_RESULT])
    return result


@contextmanager
def _running(ray: "ModuleType") -> Iterator[None]:
    """Start Ray unless it runs already, and end what was started here."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False}
    # Without an address Ray would join what somebody else has started on this machine.
    ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **local)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
    finally:
        ray.shutdown()


def _import_ray() -> "ModuleType":
    # Read when Ray starts; a word of the user's own wins.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            package="ray",
            needed_for="a backfill with --engine ray",
            command='pip install "qarm-feast[ray]"',
        ) from error
    module: ModuleType = ray
    return module

"""Pieces of a backfill written by Ray Data: on this machine's cores, or on a cluster.

A cluster's nodes must see the same configuration, codebooks and offline log under the same paths,
and the online store must be one that many machines can reach; see ``ray_tasks``. May import: ray.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from qarm_feast.backfill_writer import BackfillJob, Piece, PieceResult, PieceWriter
from qarm_feast.ray_tasks import RayTasks


class RayEngine:
    """Writes pieces by a pool of Ray actors, each with its own codebook and store connections.

    Args:
        job: What to write.

    Raises:
        MissingDependencyError: If Ray Data is not installed.
    """

    def __init__(self, job: BackfillJob) -> None:
        make_writer = partial(_piece_writer, job)
        self._tasks = RayTasks[Piece, PieceResult](make_writer, "a backfill with --engine ray")

    def run(self, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
        """Write every piece.

        Args:
            pieces: The pieces.

        Yields:
            Results as they come.

        Raises:
            QarmError: What a piece's writer raised.
        """
        yield from self._tasks.run(pieces)


def _piece_writer(job: BackfillJob) -> Callable[[Piece], PieceResult]:
    return PieceWriter(job).write

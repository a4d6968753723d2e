"""Work spread by Ray Data: on this machine's cores, or on a cluster.

Where ``RAY_ADDRESS`` names a cluster, its nodes must see the same configuration and folders under
the same paths, and have this package. Else Ray is started here, without a dashboard, and ended
again. Ray's usage report and its own handling of `uv run` are switched off. May import: ray.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qarm_feast import errors
from qarm_feast.errors import MissingDependencyError, QarmError

if TYPE_CHECKING:
    from types import ModuleType

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

_TASK = "task"
_RESULT = "result"
_FAULT = "fault"


class RayTasks(Generic[TaskT, ResultT]):
    """Does tasks by a pool of Ray actors, each with a worker of its own.

    Args:
        make_worker: Makes what does one task after the other, once per actor; pickled.
        needed_for: What a user wants Ray for, told where Ray is not installed.

    Raises:
        MissingDependencyError: If Ray Data is not installed.
    """

    def __init__(
        self, make_worker: Callable[[], Callable[[TaskT], ResultT]], needed_for: str
    ) -> None:
        self._make_worker = make_worker
        self._ray = _import_ray(needed_for)

    def run(self, tasks: Sequence[TaskT]) -> Iterator[ResultT]:
        """Do every task.

        Args:
            tasks: What the workers take; pickled.

        Yields:
            Results as they come.

        Raises:
            QarmError: What a worker raised.
        """
        data = self._ray.data
        with _running(self._ray):
            num_actors = min(len(tasks), max(1, int(self._ray.cluster_resources().get("CPU", 1))))
            # A block per task, so that none waits for the others of its block.
            waiting = data.from_items(
                [{_TASK: pickle.dumps(task)} for task in tasks],
                override_num_blocks=len(tasks),
            )
            done = waiting.map(
                _Actor,
                fn_constructor_args=(self._make_worker,),
                compute=data.ActorPoolStrategy(size=num_actors),
            )
            for row in done.iter_rows():
                yield _result_of(row)


class _Actor:
    """Ray's callable: a task as bytes to its result as bytes.

    Args:
        make_worker: Makes what does the tasks.
    """

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        self._make_worker = make_worker
        self._worker: Callable[[Any], Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            # Here, not above: Ray tries to start an actor again and again, whatever the reason.
            if self._worker is None:
                self._worker = self._make_worker()
            result = self._worker(pickle.loads(row[_TASK]))
        except QarmError as error:
            # As words: Ray would wrap the error, and those with own arguments cannot be pickled.
            return {_RESULT: b"", _FAULT: f"{type(error).__name__}:{error}"}
        return {_RESULT: pickle.dumps(result), _FAULT: ""}


def _result_of(row: dict[str, Any]) -> Any:
    if row[_FAULT]:
        kind, _, message = row[_FAULT].partition(":")
        error: type[QarmError] = getattr(errors, kind)
        # Not by its own arguments: the message is complete.
        raised = error.__new__(error)
        raised.args = (message,)
        raise raised
    return pickle.loads(row[_RESULT])


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


def _import_ray(needed_for: str) -> "ModuleType":
    # Read when Ray starts or is imported; a word of the user's own wins.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of a command under `uv run` Ray would pack the folder without what git ignores, and have uv
    # make the environment anew for the workers, which waits for ever where uv lies in that folder.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            package="ray",
            needed_for=needed_for,
            command='pip install "qarm-feast[ray]"',
        ) from error
    module: ModuleType = ray
    return module

"""One compaction in a process of its own, so that what merges hold is not a worker's memory.

``background`` starts it with a request as its only argument. Merges go on until standard input
ends: so a worker that drains, or is killed, lets the merge in hand end and no other begin. Prints
an answer to standard output; the exit status is that of the error tree.
May import: the offline log, prometheus_client.
"""

import logging
import select
import signal
import sys

from prometheus_client import REGISTRY
from pydantic import BaseModel

from qarm_feast.code_log import CodeLog
from qarm_feast.compaction import CompactionConfig, Compactor, CompactorAtWorkError
from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.observability import ObservabilityConfig, configure_logging

logger = logging.getLogger(__name__)


class CompactionRequest(BaseModel):
    """What a worker asks for."""

    root: str
    """Folder of the logs."""
    compaction: CompactionConfig
    observability: ObservabilityConfig


class CompactionAnswer(BaseModel):
    """What was done."""

    summary: str
    """``name=value`` pairs; empty if nothing was to be done."""
    num_merged_parts: int
    num_damaged_parts: int


def compact(request: CompactionRequest) -> CompactionAnswer:
    """Compact once, until standard input ends.

    Args:
        request: Where, and how.

    Returns:
        What was done.

    Raises:
        CompactorAtWorkError: If another process is at it.
        ServiceUnavailableError: If the object store does not answer.
        OSError: If the system cannot read or write a file.
    """
    compactor = Compactor(CodeLog(request.root), request.compaction.rules, _is_input_over)
    counts = compactor.compact(
        is_full=False, erasure_interval_seconds=request.compaction.erasure_interval_seconds
    )
    damaged = REGISTRY.get_sample_value("qarm_offline_damaged_parts_total")
    return CompactionAnswer(
        summary=str(counts) if counts.num_new_parts or counts.num_deleted_parts else "",
        num_merged_parts=counts.num_merged_parts,
        num_damaged_parts=int(damaged or 0),
    )


def _is_input_over() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def main() -> None:
    """Entry point of the process."""
    # A service manager, or Ctrl-C, reaches the whole group; the worker says when to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    request = CompactionRequest.model_validate_json(sys.argv[1])
    configure_logging(request.observability)
    try:
        answer = compact(request)
    except CompactorAtWorkError as error:
        logger.debug("offline_compaction_left_to_another_process")
        sys.exit(error.exit_code)
    except ServiceUnavailableError as error:
        # An object store that is away: the next round tries again.
        logger.error("offline_compaction_failed error=%s", error)
        sys.exit(1)
    except Exception:
        # A full disk, or a bug: the worker goes on, and the next round tries again.
        logger.exception("offline_compaction_failed")
        sys.exit(1)
    sys.stdout.write(answer.model_dump_json())


if __name__ == "__main__":
    main()

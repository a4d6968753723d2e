"""Compaction of the offline logs beside a running worker. May import: feast."""

import logging
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qarm_feast.compaction import CompactionConfig, CompactorAtWorkError
from qarm_feast.config import load_section
from qarm_feast.observability import (
    OFFLINE_COMPACTION_FAILED,
    OFFLINE_DAMAGED_PARTS,
    OFFLINE_MERGED_PARTS,
    ObservabilityConfig,
)
from qarm_feast.offline_store import open_code_log
from qarm_feast.repo_paths import open_feature_store
from streaming.compaction_process import CompactionAnswer, CompactionRequest

logger = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "streaming.compaction_process")
_POLL_SECONDS = 0.2


@contextmanager
def background_compaction(config_path: str, is_draining: Callable[[], bool]) -> Iterator[None]:
    """Compact while the block runs, if ``compaction.enable_compaction`` is on.

    Args:
        config_path: Path of ``qarm.yaml``.
        is_draining: True lets a compaction end after the merge in hand.

    Yields:
        Nothing. The block ends when the merge in hand has ended.
    """
    config = load_section(config_path, "compaction", CompactionConfig)
    if not config.enable_compaction:
        yield
        return
    log = open_code_log(open_feature_store(Path(config_path).resolve().parent).config)
    request = CompactionRequest(
        root=str(log.root.absolute()),
        compaction=config,
        observability=load_section(config_path, "observability", ObservabilityConfig),
    )
    with compaction_thread(request, is_draining):
        yield


@contextmanager
def compaction_thread(
    request: CompactionRequest, is_draining: Callable[[], bool]
) -> Iterator[threading.Thread]:
    """Start compactions at intervals, from a thread that ends with the block.

    Args:
        request: What is compacted, and how.
        is_draining: As in :func:`background_compaction`.

    Yields:
        The thread.
    """
    is_over = threading.Event()
    thread = threading.Thread(
        target=_compact_at_intervals, args=(request, is_over, is_draining), name="compaction"
    )
    thread.start()
    try:
        yield thread
    finally:
        is_over.set()
        thread.join()


def _compact_at_intervals(
    request: CompactionRequest, is_over: threading.Event, is_draining: Callable[[], bool]
) -> None:
    interval = request.compaction.interval_seconds
    # Workers that were started together shall not all ask for the lock together.
    while not is_over.wait(interval * random.uniform(0.75, 1.25)) and not is_draining():
        try:
            answer = _compact_once(request, is_over, is_draining)
        except OSError:
            # No memory or no process left: as with a compaction that failed, the next round tries.
            logger.exception("offline_compaction_not_started")
            OFFLINE_COMPACTION_FAILED.set(1)
            continue
        if answer is not None and answer.summary:
            logger.info("offline_compacted %s", answer.summary)


def _compact_once(
    request: CompactionRequest, is_over: threading.Event, is_draining: Callable[[], bool]
) -> CompactionAnswer | None:
    """Run the process; return its answer, or None if it failed or left the work to another."""
    command = [*_COMMAND, request.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            if is_over.wait(_POLL_SECONDS) or is_draining():
                break
        # The end of its input lets it end after the merge in hand.
        output, _ = process.communicate()
    if process.returncode == CompactorAtWorkError.exit_code:
        return None
    OFFLINE_COMPACTION_FAILED.set(process.returncode != 0)
    if process.returncode != 0:
        logger.error("offline_compaction_ended status=%d", process.returncode)
        return None
    answer = CompactionAnswer.model_validate_json(output)
    OFFLINE_MERGED_PARTS.inc(answer.num_merged_parts)
    OFFLINE_DAMAGED_PARTS.inc(answer.num_damaged_parts)
    return answer

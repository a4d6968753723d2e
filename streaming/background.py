"""Compaction of the offline logs beside a running worker. May import: feast."""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qarm_feast.code_log import CodeLog
from qarm_feast.compaction import CompactionConfig, Compactor
from qarm_feast.config import load_section
from qarm_feast.errors import ServiceUnavailableError
from qarm_feast.observability import OFFLINE_COMPACTION_FAILED
from qarm_feast.offline_store import open_code_log
from qarm_feast.repo_paths import open_feature_store

logger = logging.getLogger(__name__)


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
    with compaction_thread(log, config, is_draining):
        yield


@contextmanager
def compaction_thread(
    log: CodeLog, config: CompactionConfig, is_draining: Callable[[], bool]
) -> Iterator[threading.Thread]:
    """Compact ``log`` at intervals in a thread that ends with the block.

    Args:
        log: The logs.
        config: Section ``compaction``.
        is_draining: As in :func:`background_compaction`.

    Yields:
        The thread.
    """
    is_over = threading.Event()
    compactor = Compactor(log, config.rules, lambda: is_over.is_set() or is_draining())
    thread = threading.Thread(
        target=_compact_at_intervals, args=(compactor, config, is_over), name="compaction"
    )
    thread.start()
    try:
        yield thread
    finally:
        is_over.set()
        thread.join()


def _compact_at_intervals(
    compactor: Compactor, config: CompactionConfig, is_over: threading.Event
) -> None:
    # Workers that were started together shall not all ask for the lock together.
    while not is_over.wait(config.interval_seconds * random.uniform(0.75, 1.25)):
        try:
            counts = compactor.compact(
                is_full=False, erasure_interval_seconds=config.erasure_interval_seconds
            )
        except ServiceUnavailableError:
            logger.debug("offline_compaction_left_to_another_process")
        except Exception:
            # A full disk, or a bug: the worker goes on, and the next round tries again.
            logger.exception("offline_compaction_failed")
            OFFLINE_COMPACTION_FAILED.set(1)
        else:
            OFFLINE_COMPACTION_FAILED.set(0)
            if counts.num_new_parts or counts.num_deleted_parts:
                logger.info("offline_compacted %s", counts)

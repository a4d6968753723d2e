"""How long an event takes until a reader of the online store sees what it does.

Shape letters in this file: N events.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from benchmarks.stream_bench import CODEBOOK_VERSION, Bench
from qarm_feast.online_stores import code_online_store
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import RECENT_ITEMS_VIEW, code_view_name
from streaming.clients import connect_producer
from streaming.messages import Message

_TICK_SECONDS = 0.01
_UNSEEN_SECONDS = 30.0

IsPresent = Callable[[np.ndarray], np.ndarray]


@dataclass
class Probe:
    """Events of one kind that are sent steadily, and when the effect of each was read.

    Attributes:
        name: Stem of the figures.
        topic: Where the events go.
        ids_N: The item or the user of each.
        rate: Events per second.
        make: From an id and an event time (microseconds) to a message.
        is_done: Of ids, whether the effect of their events is there.
    """

    name: str
    topic: str
    ids_N: np.ndarray
    rate: float
    make: Callable[[int, int], Message]
    is_done: IsPresent
    sent_N: np.ndarray = field(init=False)
    seen_N: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.sent_N = np.full(len(self.ids_N), np.inf)
        self.seen_N = np.full(len(self.ids_N), np.nan)

    @property
    def is_complete(self) -> bool:
        """Whether the effect of every event was read."""
        return not np.isnan(self.seen_N).any()

    def look(self) -> None:
        """Read what was sent and not seen yet."""
        waiting = np.flatnonzero(np.isnan(self.seen_N) & (self.sent_N <= time.monotonic()))
        done = waiting[self.is_done(self.ids_N[waiting])]
        self.seen_N[done] = time.monotonic()

    def figures(self) -> dict[str, float]:
        """Return median, 99th percentile and worst, in seconds."""
        # What was never seen counts as seen now: the figure then misses its target.
        waits_N = np.where(np.isnan(self.seen_N), time.monotonic(), self.seen_N) - self.sent_N
        return {
            f"{self.name}_p50_seconds": float(np.quantile(waits_N, 0.5)),
            f"{self.name}_p99_seconds": float(np.quantile(waits_N, 0.99)),
            f"{self.name}_max_seconds": float(waits_N.max()),
        }


def run_probes(bench: Bench, probes: Sequence[Probe]) -> dict[str, float]:
    """Send the events of all probes side by side, and read until their effects are there.

    Args:
        bench: Services, a worker among them.
        probes: What to send.

    Returns:
        The figures of every probe.
    """
    senders = [threading.Thread(target=_send_steadily, args=(bench, each)) for each in probes]
    for sender in senders:
        sender.start()
    seconds = max(len(each.ids_N) / each.rate for each in probes)
    deadline = time.monotonic() + seconds + _UNSEEN_SECONDS
    while not all(each.is_complete for each in probes) and time.monotonic() < deadline:
        for each in probes:
            each.look()
        time.sleep(_TICK_SECONDS)
    for sender in senders:
        sender.join()
    return {name: value for each in probes for name, value in each.figures().items()}


def online_presence(bench: Bench) -> tuple[IsPresent, IsPresent]:
    """Return what tells of items, and of users, whether a reader finds them online.

    Args:
        bench: Services.

    Returns:
        Two functions from ids to flags.
    """
    store = open_feature_store(bench.repo.directory)
    online = code_online_store(store)

    def reader_of(view_name: str, feature: str) -> IsPresent:
        view = store.get_feature_view(view_name)
        return lambda ids_N: online.read_columns(store.config, view, ids_N, [feature]).present_N

    return (
        reader_of(code_view_name(CODEBOOK_VERSION), "rq_code"),
        reader_of(RECENT_ITEMS_VIEW, "item_ids"),
    )


def _send_steadily(bench: Bench, probe: Probe) -> None:
    start = time.monotonic()
    with closing(connect_producer(bench.repo.stream_config)) as producer:
        for place, identity in enumerate(probe.ids_N.tolist()):
            time.sleep(max(0.0, start + place / probe.rate - time.monotonic()))
            message = probe.make(identity, round(time.time() * 1e6))
            probe.sent_N[place] = time.monotonic()
            producer.send(
                probe.topic, key=message.key, value=message.value, headers=message.headers
            )
        producer.flush()

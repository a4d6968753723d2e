"""How often the reader waits for a real redis server, counted on the wire and by the server."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from feast import FeatureStore, RepoConfig
from online_store_cases import (
    ITEM,
    REDIS_TYPE,
    USER,
    close,
    code_rows,
    code_view,
    make_settings,
    profile_view,
    recent_rows,
    recent_view,
)

from qarm_feast.online_stores import code_online_store
from qarm_feast.reader import CodeReader

NUM_CANDIDATES, HISTORY_LENGTH = 1000, 50
CANDIDATES = np.arange(NUM_CANDIDATES)
HISTORY = np.arange(NUM_CANDIDATES - 10, NUM_CANDIDATES - 10 + HISTORY_LENGTH)
"""Forty of the items are no candidates."""


class TurnCountingWire:
    """Stands between a client and a server, and passes on what is said only when it is said whole.

    Whoever is silent for ``_SILENCE_SECONDS`` is taken to wait for the other side: a turn of the
    client's that the server then answers is one round trip.
    """

    _SILENCE_SECONDS = 0.2

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.num_turns = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            while said := self._listen(client):
                self.num_turns += 1
                server.sendall(said)
                client.sendall(self._listen(server))

    def _listen(self, speaker: socket.socket) -> bytes:
        speaker.settimeout(None)
        said = part = speaker.recv(1 << 20)
        speaker.settimeout(self._SILENCE_SECONDS)
        while part:
            try:
                part = speaker.recv(1 << 20)
            except TimeoutError:
                break
            said += part
        return said


@pytest.fixture
def wire(redis_port: int) -> Iterator[TurnCountingWire]:
    counting = TurnCountingWire(redis_port)
    yield counting
    counting.close()


@pytest.fixture
def server(redis_port: int) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_port) as client:
        yield client
        client.flushdb()


@pytest.fixture
def reader(tmp_path: Path, wire: TurnCountingWire, server: redis.Redis) -> Iterator[CodeReader]:
    """A reader on a wire, warm: connected, and its views looked up."""
    place = {"connection_string": f"127.0.0.1:{wire.port}"}
    store = FeatureStore(config=RepoConfig(**make_settings(tmp_path, REDIS_TYPE, place)))
    store.apply([ITEM, USER, code_view(), recent_view(HISTORY_LENGTH), profile_view()])
    online = code_online_store(store)
    items = np.union1d(CANDIDATES, HISTORY).tolist()
    rows = code_rows([(item, 1, "a", [item, 7]) for item in items])
    online.write_table(store.config, code_view(), rows)
    liked = [(HISTORY_LENGTH - place, item) for place, item in enumerate(HISTORY.tolist())]
    online.write_table(store.config, recent_view(HISTORY_LENGTH), recent_rows([(1, liked)]))
    made = CodeReader(store, "v1")
    made.read_scoring_inputs(1, CANDIDATES, HISTORY_LENGTH)
    yield made
    close(online)


def counted(
    wire: TurnCountingWire, server: redis.Redis, read: Callable[[], Any]
) -> tuple[int, dict[str, int], Any]:
    """Return the turns on the wire, the commands that the server ran, and what was read."""
    server.config_resetstat()
    before = wire.num_turns
    result = read()
    stats = server.info("commandstats")
    commands = {name.removeprefix("cmdstat_"): found["calls"] for name, found in stats.items()}
    ours = {name: calls for name, calls in commands.items() if name not in _OF_THE_COUNT}
    return wire.num_turns - before, ours, result


_OF_THE_COUNT = ("config|resetstat", "config", "info")


def test_a_thousand_candidates_are_one_round_trip(
    wire: TurnCountingWire, server: redis.Redis, reader: CodeReader
) -> None:
    turns, commands, (codes, present_N) = counted(
        wire, server, lambda: reader.read_codes(CANDIDATES)
    )

    assert (turns, commands) == (1, {"hmget": NUM_CANDIDATES})
    assert present_N.all()
    assert codes.rq_NL[:, 0].tolist() == CANDIDATES.tolist()


def test_one_users_recent_items_are_one_round_trip(
    wire: TurnCountingWire, server: redis.Redis, reader: CodeReader
) -> None:
    turns, commands, (item_ids_NH, _, _) = counted(
        wire, server, lambda: reader.read_recent_items(np.array([1]), HISTORY_LENGTH)
    )

    assert (turns, commands) == (1, {"hmget": 1})
    assert item_ids_NH[0].tolist() == HISTORY.tolist()


def test_the_codes_of_those_items_are_one_round_trip(
    wire: TurnCountingWire, server: redis.Redis, reader: CodeReader
) -> None:
    turns, commands, (codes, _) = counted(wire, server, lambda: reader.read_codes(HISTORY))

    assert (turns, commands) == (1, {"hmget": HISTORY_LENGTH})
    assert codes.rq_NL[:, 0].tolist() == HISTORY.tolist()


def _sync(reader: CodeReader) -> Any:
    return reader.read_scoring_inputs(1, CANDIDATES, HISTORY_LENGTH)


def _async(reader: CodeReader) -> Any:
    read: Coroutine[Any, Any, Any] = reader.read_scoring_inputs_async(1, CANDIDATES, HISTORY_LENGTH)
    return asyncio.run(read)


@pytest.mark.parametrize("read", [_sync, _async])
def test_all_that_scoring_reads_of_codes_is_two_round_trips(
    wire: TurnCountingWire,
    server: redis.Redis,
    reader: CodeReader,
    read: Callable[[CodeReader], Any],
) -> None:
    turns, commands, inputs = counted(wire, server, lambda: read(reader))

    num_distinct = len(np.union1d(CANDIDATES, HISTORY))
    assert (turns, commands) == (2, {"hmget": 1 + num_distinct})
    assert inputs.candidates.rq_NL[:, 0].tolist() == CANDIDATES.tolist()
    assert inputs.history.rq_NL[:, 0].tolist() == HISTORY.tolist()


def test_the_wire_counts_one_turn_per_command_that_waits(
    wire: TurnCountingWire, server: redis.Redis
) -> None:
    with redis.Redis(port=wire.port) as client:
        client.ping()

        turns, commands, _ = counted(wire, server, lambda: [client.get("a"), client.get("b")])

    assert (turns, commands) == (2, {"get": 2})

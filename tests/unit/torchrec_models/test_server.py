import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY

from qarm_feast.errors import CodebookMismatchError, ConfigError, DataError, ServiceUnavailableError
from torchrec_models.config import FeatureName, RankerConfig
from torchrec_models.row_columns import Ints
from torchrec_models.score import Ranking
from torchrec_models.server import RankServer
from torchrec_models.serving import Agreement, Served, ServingConfig

Receive = Callable[[], Awaitable[dict[str, Any]]]
MANIFEST: Any = SimpleNamespace(service="ranker_v1", codebook_version="v1", step=7)


@dataclass
class FakeScorer:
    """An item's score is its id by 100; odd items have no codes."""

    fault: Exception | None = None
    wait_for: threading.Event | None = None
    started: threading.Event = field(default_factory=threading.Event)

    def rank(self, user_id: int, item_ids_B: Ints, now: datetime) -> Ranking:
        self.started.set()
        if self.wait_for is not None:
            assert self.wait_for.wait(10)
        if self.fault is not None:
            raise self.fault
        scores_B = (item_ids_B / 100).astype(np.float32)
        return Ranking({"like": scores_B, "love": scores_B / 2}, item_ids_B % 2 == 0, user_id)


def make_app(
    scorer: FakeScorer | None = None,
    check: Callable[[], None] = lambda: None,
    config: ServingConfig | None = None,
) -> FastAPI:
    served = Served(scorer or FakeScorer(), check, MANIFEST, "exports/step-7")
    return RankServer(served, config or ServingConfig()).app()


async def ask(
    app: FastAPI, path: str, body: bytes | None = None, receive: Receive | None = None
) -> tuple[int, bytes]:
    """Send one request to the application and return status and body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": "GET" if body is None else "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
    }
    sent: list[dict[str, Any]] = []

    async def receive_whole() -> dict[str, Any]:
        return {"type": "http.request", "body": body or b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive or receive_whole, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def rank(app: FastAPI, request: Any) -> tuple[int, dict[str, Any]]:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    status, answer = asyncio.run(ask(app, "/rank", body))
    return status, json.loads(answer)


def _count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_scores_come_per_task_in_the_order_asked_for_and_missing_items_are_counted() -> None:
    missing = _count("qarm_rank_missing_items_total")
    empty = _count("qarm_rank_empty_histories_total")

    status, answer = rank(make_app(), {"user_id": 0, "item_ids": [30, 10, 25]})

    assert status == 200
    assert answer["scores"]["like"] == pytest.approx([0.3, 0.1, 0.25])
    assert answer["scores"]["love"] == pytest.approx([0.15, 0.05, 0.125])
    assert (answer["service"], answer["num_missing_items"]) == ("ranker_v1", 1)
    assert _count("qarm_rank_missing_items_total") == missing + 1
    assert _count("qarm_rank_empty_histories_total") == empty + 1


@pytest.mark.parametrize(
    ("request_", "detail"),
    [
        ({"user_id": 1, "item_ids": []}, "item_ids: List should have at least 1 item"),
        ({"user_id": 1, "item_ids": ["7"]}, "item_ids.0: Input should be a valid integer"),
        ({"user_id": 1, "item_ids": [7, 1.5, True]}, "item_ids.1: .*and 1 more"),
        ({"user_id": 1, "item_ids": [2**63]}, "item_ids.0: .*less than or equal to 9223372036"),
        ({"user_id": None, "item_ids": [7]}, "user_id: Input should be a valid integer"),
        ({"user_id": 1}, "item_ids: Field required"),
        ({"user_id": 1, "item_ids": [7], "k": 3}, "k: Extra inputs are not permitted"),
        (b"{", "the body: Invalid JSON"),
        (b"", "the body: Invalid JSON"),
    ],
)
def test_a_request_that_breaks_the_contract_is_refused_with_its_first_fault(
    request_: Any, detail: str
) -> None:
    before = _count("qarm_rank_errors_total", kind="invalid_request")

    status, answer = rank(make_app(), request_)

    assert (status, answer["error"]) == (422, "invalid_request")
    assert _matches(detail, answer["detail"])
    assert _count("qarm_rank_errors_total", kind="invalid_request") == before + 1


def _matches(pattern: str, text: str) -> bool:
    parts = pattern.split(".*")
    return text.startswith(parts[0]) and all(part in text for part in parts[1:])


def test_candidates_and_bytes_beyond_the_bounds_are_refused() -> None:
    app = make_app(config=ServingConfig(max_candidates=3))

    assert rank(app, {"user_id": 1, "item_ids": [1, 2, 3]})[0] == 200
    status, answer = rank(app, {"user_id": 1, "item_ids": [1, 2, 3, 4]})
    assert (status, answer["error"]) == (422, "too_many_candidates")
    assert "4 candidates, serving.max_candidates is 3" in answer["detail"]
    status, answer = rank(app, b" " * 5000)
    assert (status, answer["error"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("fault", "status", "kind", "detail"),
    [
        (ServiceUnavailableError("redis is away"), 503, "store_unavailable", "redis is away"),
        (DataError("a row of 5 codes"), 503, "not_servable", "a row of 5 codes"),
        (ZeroDivisionError("secret"), 500, "internal", "ZeroDivisionError"),
    ],
)
def test_a_fault_while_scoring_is_answered_with_its_kind_and_the_server_goes_on(
    fault: Exception, status: int, kind: str, detail: str, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = FakeScorer(fault=fault)
    app = make_app(scorer)

    with caplog.at_level(logging.ERROR):
        answer = rank(app, {"user_id": 1, "item_ids": [7]})
    scorer.fault = None

    assert answer == (status, {"error": kind, "detail": detail})
    assert ("Traceback" in caplog.text) == (kind == "internal")
    assert rank(app, {"user_id": 1, "item_ids": [7]})[0] == 200


def test_more_requests_than_may_wait_are_refused_and_health_answers_meanwhile() -> None:
    scorer = FakeScorer(wait_for=threading.Event())
    config = ServingConfig(max_waiting_requests=1, num_workers=1)
    app = make_app(scorer, config=config)
    body = b'{"user_id": 1, "item_ids": [2]}'

    async def scene() -> list[tuple[int, bytes]]:
        first = asyncio.create_task(ask(app, "/rank", body))
        while not scorer.started.is_set():
            await asyncio.sleep(0.001)
        refused, health = await ask(app, "/rank", body), await ask(app, "/health")
        assert scorer.wait_for is not None
        scorer.wait_for.set()
        return [refused, health, await first]

    refused, health, first = asyncio.run(scene())

    assert (refused[0], json.loads(refused[1])["error"]) == (503, "overloaded")
    assert (health[0], first[0]) == (200, 200)


@pytest.mark.parametrize(
    ("is_gone", "status", "kind"), [(False, 408, "slow_body"), (True, 400, "client_gone")]
)
def test_a_client_that_stops_in_the_middle_of_its_body_is_refused_and_counted(
    is_gone: bool, status: int, kind: str
) -> None:
    app = make_app(config=ServingConfig(body_timeout_seconds=1))
    before = _count("qarm_rank_errors_total", kind=kind)
    part = {"type": "http.request", "body": b'{"user_id": 1', "more_body": True}
    messages = [part, {"type": "http.disconnect"}] if is_gone else [part]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.sleep(10)
        return messages.pop(0)

    found, answer = asyncio.run(ask(app, "/rank", b"", receive))

    assert (found, json.loads(answer)["error"]) == (status, kind)
    assert _count("qarm_rank_errors_total", kind=kind) == before + 1


def test_health_looks_once_for_all_who_ask_while_a_store_hangs() -> None:
    looks: list[int] = []
    come_back = threading.Event()

    def hang() -> None:
        looks.append(1)
        assert come_back.wait(10)
        raise OSError("the registry's disk is away")

    app = make_app(check=hang)

    async def scene() -> list[tuple[int, bytes]]:
        asked = [asyncio.create_task(ask(app, "/health")) for _ in range(5)]
        while not looks:
            await asyncio.sleep(0.001)
        come_back.set()
        return await asyncio.gather(*asked)

    answers = asyncio.run(scene())

    assert len(looks) == 1
    assert [status for status, _ in answers] == [503] * 5
    assert "disk is away" in json.loads(answers[0][1])["reason"]


def test_health_says_what_is_served_or_why_it_is_not() -> None:
    faults: list[Exception] = [ServiceUnavailableError("redis is away")]

    def check() -> None:
        if faults:
            raise faults[0]

    app = make_app(check=check)
    status, answer = asyncio.run(ask(app, "/health"))
    assert status == 503
    assert json.loads(answer)["reason"] == "redis is away"
    assert _count("qarm_rank_ready") == 0

    faults.clear()
    status, answer = asyncio.run(ask(app, "/health"))
    assert (status, _count("qarm_rank_ready")) == (200, 1)
    assert json.loads(answer) == {
        "status": "ready",
        "service": "ranker_v1",
        "codebook_version": "v1",
        "step": 7,
        "source": "exports/step-7",
    }


def test_metrics_are_prometheus_text() -> None:
    status, text = asyncio.run(ask(make_app(), "/metrics"))

    assert status == 200
    assert b"# TYPE qarm_rank_request_seconds histogram" in text


def _manifest(features: tuple[FeatureName, ...] = ("item_id",)) -> Any:
    return SimpleNamespace(
        service="ranker_v1",
        codebook_version="v1",
        sizes=SimpleNamespace(level_sizes=(8, 8), vector_dim=16),
        config=RankerConfig(features=features),
    )


@pytest.mark.parametrize("group", ["vector", "long_history", "aligned_cosine"])
def test_a_ranker_of_vectors_is_not_ready_without_their_view_or_with_one_of_another_width(
    group: FeatureName,
) -> None:
    def missing() -> dict[str, str]:
        raise ConfigError("no view 'item_vectors_e1'")

    reader: Any = SimpleNamespace(code_view_tags=dict, vector_view_tags=missing)
    registry: Any = SimpleNamespace(versions=lambda *_: ["v1"])
    agreement = Agreement(_manifest(("item_id", group)), reader, registry)

    with pytest.raises(ConfigError, match="no view"):
        agreement.check_codebook()
    reader.vector_view_tags = lambda: {"qarm.embedding_dim": "12"}
    with pytest.raises(CodebookMismatchError, match=r"vectors of 12 .*vectors of 16 numbers"):
        agreement.check_codebook()
    reader.vector_view_tags = lambda: {"qarm.embedding_dim": "16"}
    agreement.check_codebook()


@pytest.mark.parametrize(
    ("states", "tags", "message"),
    [
        (["v2"], {}, "codebook 'v1' of service 'ranker_v1' is none of the"),
        (["v1"], {"qarm.num_levels": "3"}, "belongs to version 'v1 of 3 levels'"),
        (["v1"], {"qarm.codebook_version": "v9"}, "belongs to version 'v9 of 2 levels'"),
    ],
)
def test_a_ranker_that_does_not_fit_the_served_codes_is_not_ready(
    states: list[str], tags: dict[str, str], message: str
) -> None:
    manifest = _manifest()
    reader: Any = SimpleNamespace(code_view_tags=lambda: tags, check_reachable=lambda: None)
    registry: Any = SimpleNamespace(versions=lambda *_: states)

    with pytest.raises((ConfigError, CodebookMismatchError), match=message):
        Agreement(manifest, reader, registry).check()


def test_a_ranker_whose_codes_are_served_is_ready_unless_the_store_is_away() -> None:
    def away() -> None:
        raise ServiceUnavailableError("redis is away")

    manifest = _manifest()
    registry: Any = SimpleNamespace(versions=lambda *_: ["v1"])
    tags = {"qarm.num_levels": "2", "qarm.codebook_version": "v1"}
    reader: Any = SimpleNamespace(code_view_tags=lambda: tags, check_reachable=away)
    agreement = Agreement(manifest, reader, registry)

    agreement.check_codebook()
    with pytest.raises(ServiceUnavailableError):
        agreement.check()

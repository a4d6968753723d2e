"""``qarm-rank serve``: scores over HTTP, with health and metrics.

    POST /rank     {"user_id": 3, "item_ids": [7, 8]} -> {"service", "scores": {task: [...]}, ...}
    GET  /health   200 while model, codebook and store agree, else 503 with the reason
    GET  /metrics  Prometheus

Scoring runs in threads of its own, so that health and metrics answer while requests are scored;
torch and the store's client leave Python's lock meanwhile. A fault is answered with
``{"error": KIND, "detail": TEXT}``: 422, 413 and 408 for the request's content, size and pace, 503
for the store's and for too many requests at a time, 500 for ours. Another export is served by
another process: models are not exchanged within one.
May import: fastapi, uvicorn, prometheus_client, and what scoring does.
"""

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from qarm_feast.errors import ConfigError, QarmError, ServiceUnavailableError
from qarm_feast.observability import (
    RANK_CANDIDATES,
    RANK_EMPTY_HISTORIES,
    RANK_ERRORS,
    RANK_MISSING_ITEMS,
    RANK_READY,
    RANK_SECONDS,
)
from torchrec_models.score import Ranking
from torchrec_models.serving import Served, ServingConfig

logger = logging.getLogger(__name__)

_JSON = "application/json"
_LARGEST_INT64 = 2**63 - 1
_Id = Annotated[int, Field(strict=True, ge=-_LARGEST_INT64 - 1, le=_LARGEST_INT64)]


class RankRequest(BaseModel):
    """Body of ``POST /rank``; ids are int64, numbers and no strings."""

    model_config = ConfigDict(extra="forbid")

    user_id: _Id
    item_ids: list[_Id] = Field(min_length=1)


class RequestRefusedError(Exception):
    """A request that is not scored: its kind, HTTP status and reason."""

    def __init__(self, kind: str, status: int, detail: str) -> None:
        self.kind, self.status, self.detail = kind, status, detail
        super().__init__(detail)


class RankServer:
    """Answers the three paths.

    Args:
        served: Ranker and checks.
        config: Section ``serving``.
    """

    def __init__(self, served: Served, config: ServingConfig) -> None:
        self._served = served
        self._config = config
        self._workers = ThreadPoolExecutor(config.num_workers, thread_name_prefix="rank")
        # Its own thread: health must answer while every worker waits for a store that hangs.
        self._prober = ThreadPoolExecutor(1, thread_name_prefix="health")
        self._probe: asyncio.Future[None] | None = None
        self._num_in_hand = 0

    def app(self) -> FastAPI:
        """Return the application."""
        app = FastAPI(title="qarm-rank", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/rank", self.rank, methods=["POST"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.metrics, methods=["GET"])
        return app

    async def rank(self, request: Request) -> Response:
        """Score the candidates of one request, or say why not."""
        started = time.perf_counter()
        outcome, status = "ok", 200
        try:
            answer: Any = await self._score(request)
        except RequestRefusedError as error:
            outcome, status = error.kind, error.status
            answer = {"error": error.kind, "detail": error.detail}
            RANK_ERRORS.labels(error.kind).inc()
        RANK_SECONDS.labels(outcome).observe(time.perf_counter() - started)
        return _answer(answer, status)

    async def health(self) -> Response:
        """Tell whether requests would be scored now."""
        manifest = self._served.manifest
        answer = {
            "status": "ready",
            "service": manifest.service,
            "codebook_version": manifest.codebook_version,
            "step": manifest.step,
            "source": self._served.source,
        }
        reason = await self._fault()
        RANK_READY.set(not reason)
        if reason:
            return _answer({**answer, "status": "not_ready", "reason": reason}, 503)
        return _answer(answer, 200)

    async def metrics(self) -> Response:
        """Return Prometheus' text."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def _fault(self) -> str:
        """Return why requests would not be scored; empty if they would.

        One look serves all who ask meanwhile: behind a store that hangs no queue grows.
        """
        if self._probe is None or self._probe.done():
            loop = asyncio.get_running_loop()
            self._probe = loop.run_in_executor(self._prober, self._served.check_agreement)
        try:
            await asyncio.shield(self._probe)
        except QarmError as error:
            return str(error)
        except Exception as error:  # A registry's disk that is away makes not ready, too.
            logger.exception("health_failed")
            return repr(error)
        return ""

    async def _score(self, request: Request) -> dict[str, Any]:
        asked = self._parse(await self._receive(request))
        if self._num_in_hand >= self._config.max_waiting_requests:
            raise RequestRefusedError(
                "overloaded", 503, f"{self._num_in_hand} requests are in hand; try again later"
            )
        self._num_in_hand += 1
        try:
            loop = asyncio.get_running_loop()
            ranking = await loop.run_in_executor(self._workers, self._rank, asked)
        finally:
            self._num_in_hand -= 1
        num_missing = int((~ranking.has_codes_B).sum())
        RANK_CANDIDATES.observe(len(asked.item_ids))
        RANK_MISSING_ITEMS.inc(num_missing)
        RANK_EMPTY_HISTORIES.inc(ranking.history_length == 0)
        return {
            "service": self._served.manifest.service,
            "scores": {name: scores_B.tolist() for name, scores_B in ranking.scores.items()},
            "num_missing_items": num_missing,
            "history_length": ranking.history_length,
        }

    def _rank(self, asked: RankRequest) -> Ranking:
        item_ids_B = np.array(asked.item_ids, dtype=np.int64)
        try:
            return self._served.scorer.rank(asked.user_id, item_ids_B, datetime.now(UTC))
        except ServiceUnavailableError as error:
            raise RequestRefusedError("store_unavailable", 503, str(error)) from error
        except QarmError as error:
            logger.error("request_not_scored reason=%r", str(error))
            raise RequestRefusedError("not_servable", 503, str(error)) from error
        except Exception as error:  # One request must not end the server.
            logger.exception("request_failed candidates=%d", len(item_ids_B))
            raise RequestRefusedError("internal", 500, type(error).__name__) from error

    async def _receive(self, request: Request) -> bytes:
        seconds = self._config.body_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._read_body(request)
        except TimeoutError as error:
            raise RequestRefusedError(
                "slow_body", 408, f"the body did not come within {seconds} seconds"
            ) from error
        except ClientDisconnect as error:
            # Nobody reads the answer; it is counted.
            raise RequestRefusedError("client_gone", 400, "the connection was closed") from error

    async def _read_body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._config.max_body_bytes:
                raise RequestRefusedError(
                    "too_large",
                    413,
                    f"the body has more than {self._config.max_body_bytes} bytes, the bound that "
                    f"follows from serving.max_candidates={self._config.max_candidates}",
                )
        return bytes(body)

    def _parse(self, body: bytes) -> RankRequest:
        try:
            asked = RankRequest.model_validate_json(body)
        except ValidationError as error:
            raise RequestRefusedError("invalid_request", 422, _first_fault(error)) from error
        if len(asked.item_ids) > self._config.max_candidates:
            raise RequestRefusedError(
                "too_many_candidates",
                422,
                f"{len(asked.item_ids)} candidates, serving.max_candidates is "
                f"{self._config.max_candidates}; send several requests",
            )
        return asked


def serve(served: Served, config: ServingConfig, announce: Callable[[str, int], None]) -> None:
    """Answer requests until SIGTERM or SIGINT; those in hand are finished first.

    Args:
        served: Ranker and checks, loaded.
        config: Section ``serving``.
        announce: Called with host and port once the port is taken.

    Raises:
        ConfigError: If the address cannot be listened on.
    """
    torch.set_num_threads(config.num_threads)
    listener = _listen(config)
    app = RankServer(served, config).app()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=config.shutdown_timeout_seconds,
        )
    )
    # uvicorn drains, then raises the signal again for whoever handled it before: nobody.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # What is loaded stays: a full collection would walk over all of it, in the midst of a request.
    gc.collect()
    gc.freeze()
    try:
        with listener:
            announce(config.host, int(listener.getsockname()[1]))
            server.run(sockets=[listener])
    finally:
        # Else libraries that look for leaks at the end of the process find all of it.
        gc.unfreeze()


def _listen(config: ServingConfig) -> socket.socket:
    try:
        return socket.create_server((config.host, config.port), backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"qarm-rank cannot listen on {config.host}:{config.port} ({error.strerror}); set "
            "serving.port to a free one, or to 0"
        ) from error


def _answer(content: Any, status: int) -> Response:
    return Response(to_json(content), status_code=status, media_type=_JSON)


def _first_fault(error: ValidationError) -> str:
    """Say of a request's first fault where it is and how many more there are."""
    faults: Sequence[Any] = error.errors(include_url=False, include_input=False)
    place = ".".join(str(part) for part in faults[0]["loc"]) or "the body"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{place}: {faults[0]['msg']}{more}"

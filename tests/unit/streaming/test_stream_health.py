from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from qarm_feast.errors import ConfigError
from streaming.health import HealthServer, WorkerHealth


def _get(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_readiness_follows_the_worker() -> None:
    health = WorkerHealth()
    with HealthServer("127.0.0.1", 0, health) as server:
        starting = _get(server.port, "/readyz")
        health.set_ready()
        ready = _get(server.port, "/readyz")
        health.set_not_ready("online is away")
        away = _get(server.port, "/readyz")
        alive = _get(server.port, "/healthz")
        unknown = _get(server.port, "/")

    assert starting == (503, "starting\n")
    assert ready == (200, "ok\n")
    assert away == (503, "online is away\n")
    assert alive == (200, "ok\n")
    assert unknown[0] == 404


def test_a_worker_without_steps_is_reported_as_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    health = WorkerHealth()
    monkeypatch.setattr("streaming.health.STALL_SECONDS", 0.0)
    with HealthServer("127.0.0.1", 0, health) as server:
        assert _get(server.port, "/healthz") == (503, "stalled\n")


def test_metrics_have_the_names_of_the_style_guide() -> None:
    with HealthServer("127.0.0.1", 0, WorkerHealth()) as server:
        status, text = _get(server.port, "/metrics")

    assert status == 200
    for name in (
        "qarm_stream_events_total",
        "qarm_stream_encode_seconds",
        "qarm_stream_write_seconds",
        "qarm_stream_batch_items",
        "qarm_stream_consumer_lag_messages",
        "qarm_item_freshness_seconds",
        "qarm_codebook_info",
    ):
        assert f"# HELP {name} " in text


def test_a_taken_port_is_named_with_the_way_out() -> None:
    with (
        HealthServer("127.0.0.1", 0, WorkerHealth()) as server,
        pytest.raises(ConfigError, match="--metrics-port"),
    ):
        HealthServer("127.0.0.1", server.port, WorkerHealth())

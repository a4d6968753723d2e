import socket
import sys
from contextlib import closing
from pathlib import Path

import click
import pytest
from kafka import KafkaAdminClient

from qarm_feast.config import load_section
from qarm_feast.errors import ConfigError
from streaming import clients
from streaming.cli import check, dlq, main, qarm_stream, run
from streaming.clients import connect_admin
from streaming.config import StreamConfig
from streaming.limits import EventLimits


def test_defaults_are_those_of_the_style_guide() -> None:
    config = StreamConfig()

    assert config.topics == ("item-events", "interaction-events")
    assert config.dead_letter_topic == "qarm-dead-letters"
    assert config.consumer_group == "qarm-quantizer"
    assert (config.max_batch_size, config.max_batch_wait_seconds) == (2048, 0.1)
    assert config.num_threads >= 1


def test_unknown_key_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text("stream: {batch_size: 5}\n")

    with pytest.raises(ConfigError, match=r"stream\.batch_size"):
        load_section(path, "stream", StreamConfig)


def test_an_empty_list_of_task_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text("stream: {task_names: []}\n")

    with pytest.raises(ConfigError, match=r"stream\.task_names"):
        load_section(path, "stream", StreamConfig)


def test_limits_of_events_are_settings() -> None:
    changed = {
        "max_future_seconds": 1.0,
        "max_record_bytes": 2,
        "max_decoded_bytes": 3,
        "max_image_pixels": 4,
        "allowed_uri_prefixes": ("s3://bucket/",),
    }

    assert StreamConfig().limits == EventLimits()
    assert StreamConfig.model_validate(changed).limits == EventLimits(**changed)


@pytest.mark.parametrize(
    "prefix", ["/srv/images/", "file:///srv/", "s3://bucket/a/", "https://a.b/"]
)
def test_a_prefix_of_uris_is_a_folder(prefix: str) -> None:
    assert StreamConfig(allowed_uri_prefixes=(prefix,)).limits.allowed_uri_prefixes == (prefix,)


@pytest.mark.parametrize("prefix", ["", "/", "/srv/images", "s3://", "s3://bucket", "https:///"])
def test_a_prefix_that_is_no_folder_is_refused(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text(f"stream: {{allowed_uri_prefixes: ['{prefix}']}}\n")

    with pytest.raises(ConfigError, match=r"stream\.allowed_uri_prefixes"):
        load_section(path, "stream", StreamConfig)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sesion_timeout_ms": 1}, "sesion_timeout_ms"),
        ({"enable_auto_commit": True}, "enable_auto_commit"),
    ],
)
def test_kafka_options_that_cannot_work_are_refused(
    options: dict[str, object], message: str
) -> None:
    config = StreamConfig(bootstrap_servers="127.0.0.1:1", kafka_options=options)

    with pytest.raises(ConfigError, match=message):
        connect_admin(config)


def test_a_password_comes_by_the_environment_beside_the_options_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text("stream: {kafka_options: {sasl_mechanism: PLAIN}}\n")
    monkeypatch.setenv("QARM_STREAM__KAFKA_OPTIONS__SASL_PLAIN_PASSWORD", "pass: #1")

    config = load_section(path, "stream", StreamConfig)

    assert config.kafka_options == {"sasl_mechanism": "PLAIN", "sasl_plain_password": "pass: #1"}


def test_a_password_of_digits_is_refused_without_its_value_and_taken_in_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text('stream: {bootstrap_servers: "127.0.0.1:1"}\n')
    variable = "QARM_STREAM__KAFKA_OPTIONS__SASL_PLAIN_PASSWORD"
    monkeypatch.setenv(variable, "73519")

    with pytest.raises(ConfigError, match="sasl_plain_password as a number") as refused:
        connect_admin(load_section(path, "stream", StreamConfig))
    monkeypatch.setenv(variable, '"73519"')
    quoted = load_section(path, "stream", StreamConfig)

    assert "73519" not in str(refused.value)
    assert quoted.kafka_options == {"sasl_plain_password": "73519"}


@pytest.mark.parametrize(
    ("text", "variable", "value"),
    [
        ("stream: {kafka_options: [{sasl_plain_password: s3cret}]}", "", ""),
        ("stream: [{kafka_options: {sasl_plain_password: s3cret}}]", "", ""),
        ("{}", "QARM_STREAM__KAFKA_OPTIONS", "s3cret"),
        ("{}", "QARM_STREAM", '{"kafka_options": {"sasl_plain_password": "s3cret"'),
    ],
)
def test_options_of_the_wrong_form_are_refused_without_the_password_in_them(
    text: str, variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text(text)
    if variable:
        monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigError, match=variable or "stream") as refused:
        load_section(path, "stream", StreamConfig)

    assert "s3cret" not in str(refused.value)


def test_a_section_that_is_shown_shows_no_password() -> None:
    config = StreamConfig(kafka_options={"sasl_plain_password": "s3cret"})

    assert "s3cret" not in repr(config)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 1_000), ({"reconnect_backoff_max_ms": 7}, 7)]
)
def test_a_client_looks_for_a_broker_that_is_gone_every_second_unless_told_otherwise(
    options: dict[str, object], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RecordingClient:
        DEFAULT_CONFIG = KafkaAdminClient.DEFAULT_CONFIG

        def __init__(self, **options: object) -> None:
            self.options = options

    monkeypatch.setattr(clients, "KafkaAdminClient", RecordingClient)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        config = StreamConfig(bootstrap_servers=address, kafka_options=options)

        client = connect_admin(config)

    assert client.options["reconnect_backoff_max_ms"] == expected


def test_command_line_has_these_verbs_and_options() -> None:
    options = {
        command.name: sorted(
            option
            for parameter in command.params
            if isinstance(parameter, click.Option)
            for option in parameter.opts
        )
        for command in (run, check, *dlq.commands.values())
    }

    assert sorted(qarm_stream.commands) == ["check", "dlq", "run"]
    assert options == {
        "run": ["--config", "--log-level", "--metrics-port"],
        "check": ["--config", "--log-level"],
        "list": ["--config", "--json", "--limit", "--log-level", "--reason", "--since"],
        "replay": ["--config", "--dry-run", "--log-level", "--offsets", "--reason"],
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay"],
        ["replay", "--reason", "undecodable", "--offsets", "0:1"],
        ["replay", "--reason", "no_such_reason"],
        ["replay", "--offsets", "0:5-x"],
        ["list", "--since", "yesterday"],
        ["list", "--since", "2026-01-31T12:00:00"],
    ],
)
def test_dead_letters_that_nobody_could_mean_are_a_usage_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "qarm.yaml"
    path.write_text("{}")
    config = ["--config", str(path)]
    monkeypatch.setattr(sys, "argv", ["qarm-stream", "dlq", *arguments, *config])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2

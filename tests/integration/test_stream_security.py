"""A broker that asks for TLS and a password, and the settings that are passed through to it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from examples.quickstart.broker import KafkaBroker
from examples.quickstart.kafka_admin import create_topics, wait_until_drained
from qarm_feast.online_stores import code_online_store
from qarm_feast.repo_paths import open_feature_store
from streaming.clients import connect_producer
from streaming.messages import ItemEvent, encode_item_event
from tests.stream_repo import EMBEDDING_DIM, ENCODER_VERSION, START, StreamRepo

pytestmark = pytest.mark.integration

StartWorker = Callable[[str], "subprocess.Popen[bytes]"]
STORE_PASSWORD = "keystore-of-the-test"
USER, PASSWORD = "worker", "pass-of-the-test"


@pytest.fixture(scope="module")
def secured_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A broker with SASL_SSL as its only listener, and a certificate of its own."""
    directory = tmp_path_factory.mktemp("secured")
    _make_keystore(directory)
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    store = {"location": str(directory / "keystore.p12"), "password": STORE_PASSWORD}
    properties = {
        **{f"ssl.keystore.{name}": value for name, value in store.items()},
        **{f"ssl.truststore.{name}": value for name, value in store.items()},
        "ssl.keystore.type": "PKCS12",
        "ssl.truststore.type": "PKCS12",
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": (
            f'{login} username="{USER}" password="{PASSWORD}" user_{USER}="{PASSWORD}";'
        ),
    }
    with KafkaBroker(directory, properties=properties, protocol="SASL_SSL") as broker:
        yield broker


@pytest.fixture
def secured_repo(
    stream_repo: StreamRepo, secured_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> StreamRepo:
    """A repository that points at the secured broker; the password comes by the environment."""
    sections = yaml.safe_load(stream_repo.config_path.read_text())
    sections["stream"]["bootstrap_servers"] = secured_broker.bootstrap_servers
    sections["stream"]["kafka_options"] |= {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": str(secured_broker.directory / "ca.pem"),
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": USER,
    }
    stream_repo.config_path.write_text(yaml.safe_dump(sections))
    monkeypatch.setenv("QARM_STREAM__KAFKA_OPTIONS__SASL_PLAIN_PASSWORD", PASSWORD)
    create_topics(stream_repo.stream_config)
    return stream_repo


def test_events_go_through_a_broker_with_tls_and_a_password(
    secured_repo: StreamRepo, start_worker: StartWorker
) -> None:
    config = secured_repo.stream_config
    x_D = np.ones(EMBEDDING_DIM, dtype=np.float32)
    message = encode_item_event(ItemEvent(7, START, {}, x_D, ENCODER_VERSION))
    # The producer of dead letters gets the same options.
    producer = connect_producer(config)
    producer.send(config.item_topic, message.value, message.key, message.headers).get(10)
    producer.close()

    worker = start_worker("worker")
    wait_until_drained(config, 60)
    worker.terminate()

    assert worker.wait(40) == 0
    store = open_feature_store(secured_repo.directory)
    view = store.get_feature_view("item_codes_v1")
    batch = code_online_store(store).read_columns(store.config, view, np.array([7]), ["rq_code"])
    expected = secured_repo.codebook.encode(np.array([7]), [""], x_D[None]).rq_NL[0]
    assert batch.columns["rq_code"].values.tolist() == expected.tolist()
    assert PASSWORD not in (secured_repo.directory / "worker.log").read_text()


def test_check_says_why_a_secured_broker_refuses(
    secured_repo: StreamRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_check() -> tuple[int, str]:
        # In a process of its own: the client leaves sockets behind when it is refused.
        command = [sys.executable, "-m", "streaming.cli", "check"]
        done = subprocess.run(
            [*command, "--config", str(secured_repo.config_path)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr

    good = run_check()
    monkeypatch.setenv("QARM_STREAM__KAFKA_OPTIONS__SASL_PLAIN_PASSWORD", "wrong-one")
    wrong_password = run_check()
    monkeypatch.setenv("QARM_STREAM__KAFKA_OPTIONS__SASL_PLAIN_PASSWORD", PASSWORD)
    monkeypatch.setenv("QARM_STREAM__KAFKA_OPTIONS__SSL_CAFILE", os.devnull)
    no_trust = run_check()

    assert good[0] == 0, good[1]
    assert wrong_password[0] == 6
    # The client does not always get to read what the broker says before it closes.
    assert re.search("Invalid username or password|refuses a user name", wrong_password[1])
    assert "wrong-one" not in wrong_password[1]
    assert no_trust[0] == 6
    assert "no certificate" in no_trust[1]
    assert PASSWORD not in good[1] + no_trust[1]


def _make_keystore(directory: Path) -> None:
    """A key with a certificate that it signed itself, for the broker; the latter, for clients."""
    keytool = shutil.which("keytool")
    if keytool is None:
        pytest.skip("needs keytool, which comes with Java")
    common = ["-alias", "broker", "-keystore", str(directory / "keystore.p12")]
    common += ["-storetype", "PKCS12", "-storepass", STORE_PASSWORD]
    key = ["-keyalg", "EC", "-dname", "CN=broker", "-ext", "SAN=ip:127.0.0.1", "-validity", "2"]
    key += ["-ext", "bc:c"]
    for command in (
        [keytool, "-genkeypair", *key, *common],
        [keytool, "-exportcert", "-rfc", "-file", str(directory / "ca.pem"), *common],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=60)

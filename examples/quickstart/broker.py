"""A real Apache Kafka on this machine: one KRaft node from its published jars, for one run.

The jars are fetched by Maven (``kafka-pom.xml``, ``make setup``). Everything the broker writes
lies under one folder; both of its ports are free loopback ports. May import: the standard
library, qarm_feast.errors and examples.quickstart.processes.
"""

import atexit
import shutil
import signal
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from examples.quickstart.processes import reap_group, signal_group
from qarm_feast.errors import ConfigError, ServiceUnavailableError

JARS_DIR = Path(__file__).resolve().parents[2] / ".cache" / "kafka"
_START_TIMEOUT_SECONDS = 60.0
_STOP_TIMEOUT_SECONDS = 15.0
_HEAP = ("-Xms96m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_LISTENER = "127.0.0.1"

_LOG4J = """\
status = error
shutdownHook = disable
appender.file.type = File
appender.file.name = file
appender.file.fileName = {log_path}
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{ISO8601}} %p %c %m%n
rootLogger.level = warn
rootLogger.appenderRef.file.ref = file
logger.server.name = kafka.server.KafkaRaftServer
logger.server.level = info
"""

_PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    # One node holds the only replica of everything.
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    # A worker that joins or dies should not cost seconds here.
    "group.initial.rebalance.delay.ms": "100",
    "group.min.session.timeout.ms": "1000",
    # After a crash the node is let in again when its old session has run out.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "auto.create.topics.enable": "false",
    "log.cleaner.dedupe.buffer.size": "16777216",
    "num.network.threads": "2",
    "num.io.threads": "2",
    "num.recovery.threads.per.data.dir": "2",
}


class KafkaBroker:
    """One local Kafka node that lives as long as its ``with`` block.

    Args:
        directory: Everything that the node writes.
        jars_dir: Kafka's jars.
        properties: Further broker settings; they win over ours.
        protocol: What clients speak: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL. The last three
            need their settings in ``properties``.

    Example:
        >>> with KafkaBroker(Path("runs/broker")) as broker:
        ...     print(broker.bootstrap_servers)
    """

    def __init__(
        self,
        directory: Path,
        jars_dir: Path = JARS_DIR,
        properties: dict[str, str] | None = None,
        protocol: str = "PLAINTEXT",
    ) -> None:
        self.directory = directory.resolve()
        self._protocol = protocol
        self._jars_dir = jars_dir
        self._extra_properties = dict(properties or {})
        self._port, self._controller_port = _free_ports(2)
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """Address for clients, also while the broker is down."""
        return f"{_LISTENER}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id (also the process group's), or None while the broker is down."""
        return None if self._server is None else self._server.pid

    @property
    def log_path(self) -> Path:
        """The broker's own log."""
        return self.directory / "kafka.log"

    def start(self) -> Self:
        """Start the node and return once it answers; a folder that has data is used as it is.

        Raises:
            ConfigError: If Java or the jars are missing.
            ServiceUnavailableError: If the node dies or does not answer within a minute.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        java = self._java_command()
        properties_path = self._write_settings()
        if not (self.directory / "data" / "meta.properties").is_file():
            self._format_storage(java, properties_path)
        with (self.directory / "stdout.log").open("ab") as output:
            self._server = subprocess.Popen(
                [*java, *_HEAP, "kafka.Kafka", str(properties_path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group of its own: Ctrl-C reaches us first, and we stop it in order.
                start_new_session=True,
            )
        atexit.register(self.stop)
        self._wait_until_ready()
        return self

    def stop(self) -> None:
        """Stop the node: SIGTERM, then SIGKILL to its process group. Safe to call twice."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the node at once, as a crash would; :meth:`start` brings it back with its data."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _java_command(self) -> list[str]:
        java = shutil.which("java")
        if java is None:
            raise ConfigError("the local broker needs Java 17; install a JRE (java on the PATH)")
        if not any(self._jars_dir.glob("kafka_*.jar")):
            raise ConfigError(f"no Kafka jars in {self._jars_dir}; run `make setup` first")
        return [
            java,
            f"-Dlog4j2.configurationFile={self.directory / 'log4j2.properties'}",
            "-cp",
            str(self._jars_dir / "*"),
        ]

    def _write_settings(self) -> Path:
        (self.directory / "log4j2.properties").write_text(
            _LOG4J.format(log_path=self.log_path), encoding="utf-8"
        )
        controller = f"{_LISTENER}:{self._controller_port}"
        properties = _PROPERTIES | {
            "listeners": f"{self._protocol}://{self.bootstrap_servers},CONTROLLER://{controller}",
            "advertised.listeners": f"{self._protocol}://{self.bootstrap_servers}",
            "listener.security.protocol.map": (
                f"{self._protocol}:{self._protocol},CONTROLLER:PLAINTEXT"
            ),
            "inter.broker.listener.name": self._protocol,
            "controller.quorum.bootstrap.servers": controller,
            "log.dirs": str(self.directory / "data"),
        }
        properties |= self._extra_properties
        path = self.directory / "server.properties"
        lines = [f"{name}={value}\n" for name, value in properties.items()]
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def _format_storage(self, java: Sequence[str], properties_path: Path) -> None:
        cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # Kafka's parser takes a leading dash for an option.
        cluster_id = cluster_id.replace("-", "q", 1) if cluster_id[0] == "-" else cluster_id
        tool = ["kafka.tools.StorageTool", "format", "--standalone", "-t", cluster_id]
        done = subprocess.run(
            [*java, *_HEAP, *tool, "-c", str(properties_path)],
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode:
            raise ServiceUnavailableError(
                f"formatting {self.directory / 'data'} failed:\n{done.stdout}{done.stderr}"
            )

    def _wait_until_ready(self) -> None:
        assert self._server is not None
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                break
            if _answers(self._port):
                return
            time.sleep(0.1)
        self.stop()
        raise ServiceUnavailableError(
            f"Kafka at {self.bootstrap_servers} did not start; read {self.log_path} "
            f"and {self.directory / 'stdout.log'}"
        )

    def _end(self, first_signal: signal.Signals) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        atexit.unregister(self.stop)
        signal_group(server, first_signal)
        reap_group(server, _STOP_TIMEOUT_SECONDS)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((_LISTENER, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _answers(port: int) -> bool:
    # A client that connects before the start-up is through waits in the accept queue.
    with closing(socket.socket()) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((_LISTENER, port)) == 0

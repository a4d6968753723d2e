"""A real S3 server on this machine: s3proxy over a local folder, for one run.

The jars are fetched by Maven (``tests/s3proxy-pom.xml``, ``make test``). The port is a free
loopback port, which a server that is started again keeps.
"""

import shutil
import signal
import socket
import subprocess
import time
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from examples.quickstart.processes import reap_group, signal_group
from qarm_feast.errors import ConfigError, ServiceUnavailableError

JARS_DIR = Path(__file__).resolve().parents[1] / ".cache" / "s3proxy"
_START_TIMEOUT_SECONDS = 60.0
_STOP_TIMEOUT_SECONDS = 15.0
_HEAP = ("-Xms32m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_HOST = "127.0.0.1"
_KEY, _SECRET = "tests", "tests-secret"
_LOGBACK = """\
<configuration>
  <appender name="out" class="ch.qos.logback.core.ConsoleAppender">
    <encoder><pattern>%d %p %c %m%n</pattern></encoder>
  </appender>
  <root level="WARN"><appender-ref ref="out"/></root>
</configuration>
"""


class ObjectStoreServer:
    """One S3 server that lives as long as its ``with`` block.

    Args:
        directory: Everything that the server writes; buckets are folders below ``data``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        with closing(socket.socket()) as probe:
            probe.bind((_HOST, 0))
            self._port = probe.getsockname()[1]
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which clients find the server and are let in."""
        return {
            "AWS_ENDPOINT_URL": f"http://{_HOST}:{self._port}",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def add_bucket(self, name: str) -> str:
        """Make a bucket and return its URI."""
        (self.directory / "data" / name).mkdir(parents=True, exist_ok=True)
        return f"s3://{name}"

    def start(self) -> Self:
        """Start the server and return once it answers; what it stored before is there again."""
        java = shutil.which("java")
        if java is None:
            raise ConfigError("the tests' S3 server needs Java 17; install a JRE")
        if not any(JARS_DIR.glob("s3proxy-*.jar")):
            raise ConfigError(f"no jars in {JARS_DIR}; run `make .cache/s3proxy/.complete` first")
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        settings = self._write_settings()
        with (self.directory / "stdout.log").open("ab") as output:
            self._server = subprocess.Popen(
                [
                    *(java, *_HEAP, "-cp", str(JARS_DIR / "*")),
                    f"-Dlogback.configurationFile={self.directory / 'logback.xml'}",
                    *("org.gaul.s3proxy.Main", "--properties", str(settings)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_ready()
        return self

    def stop(self) -> None:
        """Kill the server, as a crash would; safe to call twice."""
        server, self._server = self._server, None
        if server is not None:
            signal_group(server, signal.SIGKILL)
            reap_group(server, _STOP_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _write_settings(self) -> Path:
        (self.directory / "logback.xml").write_text(_LOGBACK, encoding="utf-8")
        properties = {
            "s3proxy.endpoint": f"http://{_HOST}:{self._port}",
            "s3proxy.authorization": "aws-v2-or-v4",
            "s3proxy.identity": _KEY,
            "s3proxy.credential": _SECRET,
            "jclouds.provider": "filesystem",
            "jclouds.filesystem.basedir": str(self.directory / "data"),
        }
        path = self.directory / "s3proxy.conf"
        path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        return path

    def _wait_until_ready(self) -> None:
        assert self._server is not None
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while time.monotonic() < deadline and self._server.poll() is None:
            with closing(socket.socket()) as probe:
                if probe.connect_ex((_HOST, self._port)) == 0:
                    return
            time.sleep(0.1)
        self.stop()
        raise ServiceUnavailableError(
            f"the S3 server did not start; read {self.directory / 'stdout.log'}"
        )

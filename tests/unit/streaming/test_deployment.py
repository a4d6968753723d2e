"""The files under ``streaming/deploy`` against the code that they are for."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

from qarm_feast import observability
from streaming.cli import qarm_stream
from streaming.config import StreamConfig
from streaming.daemon import LAST_BATCH_GRACE_SECONDS

DEPLOY = Path(__file__).resolve().parents[3] / "streaming" / "deploy"
REPO = DEPLOY.parents[1]
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
UNIT = (DEPLOY / "qarm-stream@.service").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def _queries() -> list[str]:
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = DASHBOARD["templating"]["list"]
    return queries + [str(variable["query"]) for variable in variables]


def _samples() -> dict[str, set[str]]:
    """Every series that the worker can expose, with its label names."""
    found: dict[str, set[str]] = {}
    for metric in vars(observability).values():
        if not isinstance(metric, MetricWrapperBase):
            continue
        labels = set(metric._labelnames)
        name, kind = metric._name, metric._type
        names = {
            "counter": [f"{name}_total"],
            "histogram": [f"{name}_bucket", f"{name}_sum", f"{name}_count"],
        }.get(kind, [name])
        for each in names:
            found[each] = labels | ({"le"} if each.endswith("_bucket") else set())
    return found


def _families(names: set[str]) -> set[str]:
    return {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in names}


def test_every_metric_of_the_dashboard_exists_in_the_code() -> None:
    named = {name for query in _queries() for name in re.findall(r"\bqarm_\w+", query)}

    assert named - set(_samples()) == set()
    assert len(named) >= 15


def test_every_stream_and_codebook_metric_of_the_code_is_on_the_dashboard() -> None:
    shown = {name for query in _queries() for name in re.findall(r"\bqarm_\w+", query)}

    assert _families(set(_samples())) - _families(shown) == set()


def test_the_dashboard_groups_by_labels_that_the_metrics_have() -> None:
    samples = _samples()

    for query in _queries():
        names = re.findall(r"\bqarm_\w+", query)
        wanted = {
            label.strip()
            for group in re.findall(r"by \(([^)]*)\)", query)
            for label in group.split(",")
        }
        assert all(wanted <= samples[name] for name in names if wanted), query


def test_the_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def _setting(name: str) -> str:
    found = re.search(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    assert found is not None, name
    return found[1]


def test_the_unit_starts_a_command_that_exists_and_outwaits_the_drain() -> None:
    command = _setting("ExecStart").split()
    options = {
        option for parameter in qarm_stream.commands["run"].params for option in parameter.opts
    }
    longest = StreamConfig().shutdown_timeout_seconds + LAST_BATCH_GRACE_SECONDS

    assert Path(command[0]).name == "qarm-stream"
    assert command[1] in qarm_stream.commands
    assert {part for part in command if part.startswith("--")} <= options
    assert float(_setting("TimeoutStopSec")) > longest


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "qarm-stream@.service"
    # What it starts must be there to be verified.
    unit.write_text(UNIT.replace("/opt/qarm/venv/bin/qarm-stream", sys.executable))

    done = subprocess.run(
        [verifier, "verify", str(unit)], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_copies_what_is_there_and_starts_a_command_that_exists() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    sources = [name for line in copied for name in line.split()]
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[0])
    arguments = json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[0])
    port = observability.ObservabilityConfig().metrics_port

    assert [name for name in sources if not (REPO / name).exists()] == []
    assert entry == ["qarm-stream"]
    assert arguments[0] in qarm_stream.commands
    assert f"EXPOSE {port}" in DOCKERFILE
    assert f"http://127.0.0.1:{port}/healthz" in DOCKERFILE


def test_environment_variables_of_both_files_are_settings() -> None:
    sections = {"STREAM": StreamConfig, "OBSERVABILITY": observability.ObservabilityConfig}

    named = re.findall(r"\bQARM_([A-Z]+)__([A-Z_]+?)(?:__[A-Z_]+)?=", UNIT + DOCKERFILE)

    assert len(named) >= 4
    assert [
        f"{section}.{key}"
        for section, key in named
        if key.lower() not in sections[section].model_fields
    ] == []


def test_hadolint_accepts_the_dockerfile() -> None:
    verifier = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [verifier, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stdout

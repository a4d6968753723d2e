import io
import json
import logging
import sys

import pytest

from qarm_feast.observability import ObservabilityConfig, configure_logging


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging(ObservabilityConfig(log_format="json"))
    return stream


def test_a_json_line_holds_the_event_and_its_values_with_their_types(log: io.StringIO) -> None:
    logging.getLogger("streaming.worker").info(
        "batch_stored records=%d store=%s seconds=%.3f", 5, "online", 0.25
    )

    entry = json.loads(log.getvalue())

    assert entry["event"] == "batch_stored"
    assert entry["fields"] == {"records": 5, "store": "online", "seconds": 0.25}
    assert entry["message"] == "batch_stored records=5 store=online seconds=0.250"


def test_a_value_without_a_name_stands_in_the_message_only(log: io.StringIO) -> None:
    logging.getLogger("streaming.worker").warning("batch_revoked %s", ValueError("gone"))

    entry = json.loads(log.getvalue())

    assert (entry["event"], entry["fields"]) == ("batch_revoked", {})
    assert entry["message"] == "batch_revoked gone"


def test_an_exception_as_a_value_is_written_as_text(log: io.StringIO) -> None:
    logging.getLogger("streaming.sink").error("write_failed error=%s", OSError("disk full"))

    assert json.loads(log.getvalue())["fields"] == {"error": "disk full"}


def test_a_line_without_values_is_a_message(log: io.StringIO) -> None:
    logging.getLogger("qarm_feast.codebook").info("100 %")

    assert json.loads(log.getvalue())["message"] == "100 %"

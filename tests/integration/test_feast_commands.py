"""Each of Feast's commands, as a process, on a repository that `qarm init` wrote.

The repository holds a small published codebook, and the codes that it gives to three items.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import redis
import yaml
from command_line import FEAST, QARM, CommandLine, get_text, post_json

from qarm_feast import schema
from qarm_feast.code_log import CodeLog
from qarm_feast.codebook import Codebook, ItemCodes
from qarm_feast.new_repo import write_repository
from qarm_feast.purge import mark_path
from qarm_feast.reader import CodeReader
from qarm_feast.registry import CodebookRegistry, VersionState
from qarm_feast.repo_paths import open_feature_store
from tests.contract.online_store_cases import running_redis
from tests.stream_repo import EMBEDDING_DIM, publish_codebook

# Feast 0.67 makes times without a zone when it materializes.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

START = datetime(2026, 1, 1, tzinfo=UTC)
ITEMS = np.array([1001, 1002, 1003])


def at(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat()


@dataclass(frozen=True)
class Shop:
    """A repository of that name below the folder that commands run in."""

    command_line: CommandLine
    codes: ItemCodes

    @property
    def repo_dir(self) -> Path:
        return self.command_line.folder / "shop"

    def feast(self, *arguments: str) -> str:
        return self.command_line.run(FEAST, "-c", "shop", *arguments)

    def materialize(self) -> None:
        """Bring all rows without a process of its own, where the command is not what is tested."""
        open_feature_store(self.repo_dir).materialize(START, START + timedelta(seconds=60))

    def copy_to(self, folder: Path) -> "Shop":
        shutil.copytree(self.repo_dir, folder / "shop")
        return Shop(CommandLine(folder), self.codes)

    def read(self, version: str = "v1") -> list[list[int] | None]:
        reader = CodeReader(open_feature_store(self.repo_dir), version)
        codes, present_N = reader.read_codes(ITEMS)
        rows = zip(codes.rq_NL.tolist(), present_N, strict=True)
        return [row if here else None for row, here in rows]

    def expected(self, *places: int) -> list[list[int] | None]:
        return [
            row if place in places else None for place, row in enumerate(self.codes.rq_NL.tolist())
        ]


def make_shop(folder: Path) -> Shop:
    """Items 1001, 1002 and 1003 came at 10, 20 and 30 seconds."""
    write_repository(folder / "shop")
    codebook = publish_codebook(folder / "shop", "v1")
    codes = _encode(codebook)
    _append(folder / "shop", "v1", codes)
    return Shop(CommandLine(folder), codes)


def _encode(codebook: Codebook) -> ItemCodes:
    vectors_ND = np.random.default_rng(7).standard_normal((len(ITEMS), EMBEDDING_DIM))
    return codebook.encode(ITEMS, ["a", "b", "c"], vectors_ND.astype(np.float32))


def _append(repo_dir: Path, version: str, codes: ItemCodes) -> None:
    times = [START + timedelta(seconds=10 * place) for place in (1, 2, 3)]
    rows = {
        "item_id": codes.item_ids_N.tolist(),
        "rq_code": codes.rq_NL.tolist(),
        "vq_code": codes.vq_NV.tolist(),
        "encoder_version": ["e1"] * len(times),
        "content_hash": ["a", "b", "c"],
        "is_deleted": [False] * len(times),
        "event_timestamp": times,
        "created": times,
    }
    log = CodeLog(repo_dir / "data" / "offline")
    log.append(schema.code_view_name(version), pa.table(rows, schema=schema.CODE_ROWS))


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = make_shop(tmp_path_factory.mktemp("commands"))
    assert "Created feature view item_codes_v1" in shop.feast("plan")
    shop.feast("apply")
    return shop


@pytest.fixture(scope="module")
def materialized(applied: Shop, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = applied.copy_to(tmp_path_factory.mktemp("materialized"))
    shop.feast("materialize", at(0), at(25))
    return shop


def test_plan_after_apply_names_no_view_that_changes(applied: Shop) -> None:
    planned = applied.feast("plan")

    # Feast's plan of sqlite tables does not look at what is there; that of objects does.
    assert "feature view" not in planned
    assert "feature service" not in planned


def test_materialize_brings_its_range_and_incremental_what_came_after(
    materialized: Shop, tmp_path: Path
) -> None:
    shop = materialized.copy_to(tmp_path)
    first = shop.read()
    shop.feast("materialize-incremental", at(60))

    assert first == shop.expected(0, 1)
    assert shop.read() == shop.expected(0, 1, 2)


def test_the_feature_server_answers_for_codes_over_http(materialized: Shop) -> None:
    rows = materialized.expected(0, 1)
    by_feature = {
        "features": ["item_codes_v1:rq_code", "item_codes_v1:content_hash"],
        "entities": {"item_id": [1001, 1002, 99]},
    }
    by_service = {
        "feature_service": "ranker_v1",
        "entities": {"item_id": [1002, 99], "user_id": [7, 8]},
    }
    with materialized.command_line.serving("/health", "-c", "shop", "serve") as address:
        answers = [
            post_json(f"{address}/get-online-features", body) for body in (by_feature, by_service)
        ]
        unknown = post_json(
            f"{address}/get-online-features",
            {"features": ["item_codes_v9:rq_code"], "entities": {"item_id": [1001]}},
        )

    assert [status for status, _ in answers] == [200, 200]
    found = _columns(answers[0][1])
    assert found["rq_code"] == ([*rows[:2], None], ["PRESENT", "PRESENT", "NOT_FOUND"])
    assert found["content_hash"][0] == ["a", "b", None]
    assert _columns(answers[1][1])["rq_code"][0] == [rows[1], None]
    assert unknown[0] in (404, 422)
    assert "item_codes_v9" in str(unknown[1])


def _columns(answer: dict[str, dict[str, object]]) -> dict[str, tuple[object, object]]:
    names: list[str] = answer["metadata"]["feature_names"]  # type: ignore[assignment]
    return {
        name: (column["values"], column["statuses"])
        for name, column in zip(names, answer["results"], strict=True)
    }


def test_the_web_page_of_the_repository_opens(applied: Shop) -> None:
    with applied.command_line.serving("/", "-c", "shop", "ui") as address:
        projects = get_text(f"{address}/projects-list.json")
        page = get_text(f"{address}/")
        views = get_text(f"{address}/api/v1/feature_views?project=shop")

    assert '"shop"' in projects
    assert "<html" in page
    assert "item_codes_v1" in views


def test_teardown_removes_what_apply_and_materialize_made(
    materialized: Shop, tmp_path: Path
) -> None:
    shop = materialized.copy_to(tmp_path)

    shop.feast("teardown")

    assert open_feature_store(shop.repo_dir).list_feature_views() == []
    assert not (shop.repo_dir / "data" / "online.db").exists()
    # Log and codebooks are no infrastructure of Feast's, and all comes back out of them.
    assert CodebookRegistry(str(shop.repo_dir / "data/codebooks")).default_version() == "v1"
    # Feast 0.67 empties its SQL registry but for the views' history, over which apply stumbles.
    (shop.repo_dir / "data" / "registry.db").unlink()
    shop.feast("apply")
    shop.materialize()
    assert shop.read() == shop.expected(0, 1, 2)
    # The copy's teardown reached nothing of the repository that it was copied from.
    assert materialized.read() == materialized.expected(0, 1)


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    with running_redis(tmp_path) as port:
        yield port


def test_an_apply_during_materialize_loses_no_view_and_no_interval(
    applied: Shop, tmp_path: Path, redis_port: int
) -> None:
    shop = applied.copy_to(tmp_path)
    _set_redis(shop.repo_dir, redis_port)
    published = publish_codebook(shop.repo_dir, "v2", seed=1)

    with redis.Redis(port=redis_port) as server, _materializing(shop, server) as materialize:
        shop.feast("apply")
        assert materialize.poll() is None
        server.execute_command("CLIENT", "UNPAUSE")
        printed = materialize.communicate(timeout=240)[0].decode()

    assert materialize.returncode == 0, printed
    store = open_feature_store(shop.repo_dir)
    views = {view.name: view for view in store.list_feature_views()}
    assert {"item_codes_v1", "item_codes_v2", "user_recent_items", "user_train_items"} <= set(views)
    (interval,) = views["item_codes_v1"].materialization_intervals
    assert interval[0] == START
    assert shop.read() == shop.expected(0, 1, 2)
    _append(shop.repo_dir, "v2", _encode(published))
    shop.materialize()
    assert None not in shop.read("v2")


@contextmanager
def _materializing(shop: Shop, server: "redis.Redis") -> Iterator["subprocess.Popen[bytes]"]:
    """Start a materialize that has read its rows and waits in redis to write them."""
    server.execute_command("CLIENT", "PAUSE", 120_000, "WRITE")
    arguments = ("-c", "shop", "materialize", at(0), at(60))
    with shop.command_line.start(FEAST, *arguments) as process:
        _wait_for(process, lambda: server.info("clients")["blocked_clients"] > 0)
        yield process


def test_a_purge_that_was_killed_goes_on_and_tells_all_it_removed(
    applied: Shop, tmp_path: Path
) -> None:
    shop = applied.copy_to(tmp_path)
    shop.materialize()
    publish_codebook(shop.repo_dir, "v2", seed=1)
    uri = shop.repo_dir / "data" / "codebooks"
    CodebookRegistry(str(uri)).set_state("v2", VersionState.DEFAULT)
    CodebookRegistry(str(uri)).set_state("v1", VersionState.RETIRED)
    purge = (QARM, "codebook", "purge", "--config", "shop/qarm.yaml", "--yes")
    purge += ("--codebook-version", "v1")
    _set_codebook(shop.repo_dir, purge_rows_per_second=0.001)

    with shop.command_line.start(*purge) as process:
        _wait_for(process, mark_path(str(uri), "v1").is_file)
    left = shop.read()
    _set_codebook(shop.repo_dir, purge_rows_per_second=1000)
    printed = shop.command_line.run(*purge)

    assert left == shop.expected(1, 2)
    assert "online rows: 3 removed, of 3 items in the offline log" in printed
    assert shop.read() == [None, None, None]


def _set_codebook(repo_dir: Path, **keys: float) -> None:
    path = repo_dir / "qarm.yaml"
    sections = yaml.safe_load(path.read_text())
    sections["codebook"] |= keys
    path.write_text(yaml.safe_dump(sections))


def _set_redis(repo_dir: Path, port: int) -> None:
    path = repo_dir / "feature_store.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["online_store"] = {
        "type": "qarm_feast.online_stores.redis.CodeRedisOnlineStore",
        "connection_string": f"127.0.0.1:{port},socket_timeout=120",
    }
    path.write_text(yaml.safe_dump(settings))


def _wait_for(process: "subprocess.Popen[bytes]", is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)

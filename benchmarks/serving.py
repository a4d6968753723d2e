"""How long one user's 1000 candidates take to score, from the online store to the scores.

    uv run --frozen --extra cpu python benchmarks/serving.py [--quick] [--store redis|sqlite]

It makes its own catalogue, users and ranker (random weights; time does not depend on them), and
writes codes, vectors and histories into a real redis-server and a sqlite file. One process, one
compute thread, every request another user and other candidates, what is loaded frozen for the
collector. Arms: ``codes`` (ids, codes, history, cross features) and ``vectors`` (the same and the
aligned vectors of ``item_vectors_<encoder_version>``).

- ``<store>_<arm>_p50_ms`` and ``_p99_ms``: the int8 export scored in process;
  ``<store>_<arm>_http_p50_ms`` and ``_http_p99_ms``: through ``POST /rank`` of a server process.
- ``..._cpu_ms``: this process's own time of an in-process request, the mean.
- ``..._read_ms``, ``..._build_ms``, ``..._forward_ms``: medians of the parts of an in-process
  request; ``..._over_forward`` is their sum by the forward alone, the floor.
- ``<store>_codes_float32_p50_ms``: the checkpoint's tables in place of the export's.

Progress goes to stderr, the last line of stdout is one JSON object. There is no target.
"""

import argparse
import http.client
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from feast import FeatureStore
from feast.repo_config import RepoConfig
from torch import nn

from benchmarks.stream_bench import REDIS_TYPE
from benchmarks.stream_write import SQLITE_TYPE, frozen
from qarm_feast.feature_views import (
    CodebookFacts,
    HistorySettings,
    item_code_view,
    item_entity,
    item_vector_view,
    recent_items_view,
    user_entity,
)
from qarm_feast.item_vectors import encode_vectors
from qarm_feast.online_stores import code_online_store
from qarm_feast.reader import CodeReader
from qarm_feast.schema import (
    CODE_ROWS,
    RECENT_ITEM_ROWS,
    RECENT_ITEMS_VIEW,
    VECTOR_ROWS,
    code_view_name,
    vector_view_name,
)
from tests.fault.services import RedisServer
from torchrec_models.checkpoint import CheckpointManifest, build_trained_ranker
from torchrec_models.config import CodeSizes, FeatureName, RankerConfig, TaskConfig
from torchrec_models.program import load_program, save_program
from torchrec_models.quantized import quantize_tables
from torchrec_models.ranker import ranker_logits
from torchrec_models.score import OnlineScorer
from torchrec_models.server import serve
from torchrec_models.serving import Served, ServingConfig
from torchrec_models.tables import dense_width, ranker_tables, sparse_feature_names
from torchrec_models.vocabulary import IdVocabulary, Vocabularies

CODES: tuple[FeatureName, ...] = (
    "user_id",
    "item_id",
    "history_item_id",
    "rq_code",
    "vq_code",
    "history_rq_code",
    "cross",
)
ARMS: dict[str, tuple[FeatureName, ...]] = {"codes": CODES, "vectors": (*CODES, "vector")}
SIZES = CodeSizes(level_sizes=(256,) * 6, pool_size=50_000, vector_dim=128)
NUM_NEIGHBORS = 25
TASKS = ("like", "love")
MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
_WARM_REQUESTS = 10


@dataclass(frozen=True)
class Scale:
    """How much is stored and asked for."""

    num_items: int = 100_000
    num_users: int = 1_000
    history_length: int = 50
    num_candidates: int = 1_000
    num_requests: int = 500


QUICK = Scale(num_items=10_000, num_users=100, num_requests=100)


@dataclass(frozen=True)
class MadeRanker:
    """A ranker with random weights, in the form of a checkpoint or of an export."""

    scale: Scale
    features: tuple[FeatureName, ...]
    is_int8: bool
    folder: Path = Path("made")

    @property
    def manifest(self) -> CheckpointManifest:
        """What a checkpoint would say."""
        return CheckpointManifest(
            service="ranker_v1",
            codebook_version="v1",
            rows_build="made",
            step=0,
            world_size=1,
            config=RankerConfig(features=self.features, history_length=self.scale.history_length),
            tasks=tuple(
                TaskConfig(name=name, label_name=f"is_{name}") for name in ("like", "love")
            ),
            sizes=SIZES,
            metrics={},
        )

    def vocabularies(self) -> Vocabularies:
        """All users and items are known."""
        return Vocabularies(
            user_ids=IdVocabulary(np.arange(self.scale.num_users)),
            item_ids=IdVocabulary(np.arange(self.scale.num_items)),
        )

    def side_tables(self) -> None:
        """Return none: no feature here reads one."""

    def load_ranker(self) -> nn.Module:
        """Return it, ready to score."""
        torch.manual_seed(0)
        manifest, vocabularies = self.manifest, self.vocabularies()
        ranker = build_trained_ranker(manifest, vocabularies, torch.device("cpu")).eval()
        if not self.is_int8:
            return ranker
        quantize_tables(ranker)
        names = sparse_feature_names(ranker_tables(SIZES, vocabularies, manifest.config))
        width = dense_width(SIZES, manifest.config, len(TASKS))
        return load_program(save_program(ranker, names, width, len(SIZES.level_sizes)))


def open_repository(folder: Path, online: dict[str, str]) -> FeatureStore:
    """Return an applied repository; on a second call, of another process, the same one."""
    repository = FeatureStore(
        config=RepoConfig(
            project="serving",
            provider="local",
            registry=str(folder / "registry.db"),
            online_store=online,
            offline_store={"type": "qarm_feast.offline_store.CodeLogOfflineStore"},
            entity_key_serialization_version=3,
            repo_path=folder,
        )
    )
    if not (folder / "registry.db").exists():
        item, user, uri = item_entity(), user_entity(), str(folder / "offline")
        facts = CodebookFacts("e1", len(SIZES.level_sizes), NUM_NEIGHBORS, SIZES.vector_dim)
        code_view = item_code_view("v1", facts, uri, item)
        vector_view = item_vector_view("e1", SIZES.vector_dim, uri, item)
        recent_view = recent_items_view(HistorySettings(), uri, user)
        repository.apply([item, user, code_view, vector_view, recent_view])
    return repository


def fill(repository: FeatureStore, scale: Scale) -> None:
    """Write codes, vectors and histories of all items and users."""
    rng = np.random.default_rng(0)
    tables = {
        code_view_name("v1"): _codes(rng, scale.num_items),
        vector_view_name("e1"): _vectors(rng, scale.num_items),
        RECENT_ITEMS_VIEW: _histories(rng, scale),
    }
    for name, table in tables.items():
        view = repository.get_feature_view(name)
        code_online_store(repository).write_table(repository.config, view, table)


def _codes(rng: np.random.Generator, num_items: int) -> pa.Table:
    level_sizes = np.array(SIZES.level_sizes)
    rq_NL = rng.integers(0, level_sizes, (num_items, len(level_sizes)))
    vq_NV = rng.integers(0, SIZES.pool_size, (num_items, NUM_NEIGHBORS))
    columns = [np.arange(num_items), list(rq_NL), list(vq_NV), ["e1"] * num_items]
    columns += [["hash"] * num_items, [False] * num_items, [MOMENT] * num_items]
    return pa.table([*columns, [MOMENT] * num_items], schema=CODE_ROWS)


def _vectors(rng: np.random.Generator, num_items: int) -> pa.Table:
    x_ND = rng.standard_normal((num_items, SIZES.vector_dim), dtype=np.float32)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    columns = [np.arange(num_items), encode_vectors(x_ND), ["hash"] * num_items]
    columns += [[False] * num_items, [MOMENT] * num_items, [MOMENT] * num_items]
    return pa.table(columns, schema=VECTOR_ROWS)


def _histories(rng: np.random.Generator, scale: Scale) -> pa.Table:
    shape = (scale.num_users, scale.history_length)
    items = rng.integers(0, scale.num_items, shape)
    # Microseconds before the moment, newest first.
    times = int(MOMENT.timestamp() * 1_000_000) - np.arange(scale.history_length)
    columns = [np.arange(scale.num_users), list(items), [times] * scale.num_users]
    moments = [MOMENT] * scale.num_users
    return pa.table([*columns, moments, moments], schema=RECENT_ITEM_ROWS)


@dataclass(frozen=True)
class Requests:
    """Users and candidates, drawn alike for every arm."""

    scale: Scale

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        rng = np.random.default_rng(1)
        for _ in range(self.scale.num_requests + _WARM_REQUESTS):
            candidates = rng.integers(0, self.scale.num_items, self.scale.num_candidates)
            yield int(rng.integers(0, self.scale.num_users)), candidates


def latencies(requests: Requests, ask: Callable[[int, np.ndarray], object]) -> np.ndarray:
    """Return the milliseconds of each request, the first few left out."""
    found = []
    with frozen():
        for user_id, candidates in requests:
            started = time.perf_counter()
            ask(user_id, candidates)
            found.append(1000 * (time.perf_counter() - started))
    return np.array(found[_WARM_REQUESTS:])


def in_process(scorer: OnlineScorer, requests: Requests, name: str) -> dict[str, float]:
    """Return the figures of one arm in this process, with the medians of its parts."""
    now = datetime.now(UTC)
    before = time.process_time()
    whole = latencies(requests, lambda user, items: scorer.rank(user, items, now))
    cpu_ms = 1000 * (time.process_time() - before) / (len(whole) + _WARM_REQUESTS)
    parts: dict[str, list[float]] = {"read": [], "build": [], "forward": []}

    def in_parts(user_id: int, candidates: np.ndarray) -> None:
        marks = [time.perf_counter()]
        inputs = scorer._read(user_id, candidates)
        marks.append(time.perf_counter())
        batch = scorer._build(user_id, inputs, now)
        marks.append(time.perf_counter())
        with torch.inference_mode():
            ranker_logits(scorer._ranker, batch)
        marks.append(time.perf_counter())
        for part, seconds in zip(parts, np.diff(marks), strict=True):
            parts[part].append(1000 * seconds)

    latencies(requests, in_parts)
    sums = np.sum(list(parts.values()), axis=0)
    medians = {f"{name}_{part}_ms": float(np.median(found)) for part, found in parts.items()}
    return {
        **_percentiles(name, whole),
        f"{name}_cpu_ms": cpu_ms,
        **medians,
        f"{name}_over_forward": float(np.median(sums) / np.median(parts["forward"])),
    }


def _percentiles(name: str, found: np.ndarray) -> dict[str, float]:
    return {f"{name}_p{q}_ms": float(np.percentile(found, q)) for q in (50, 99)}


def over_http(folder: Path, online: dict[str, str], arm: str, scale: Scale) -> dict[str, float]:
    """Return the figures of one arm through a server process, over one kept connection."""
    settings = {"folder": str(folder), "online": online, "arm": arm, "scale": asdict(scale)}
    with _server(settings) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port)

        def ask(user_id: int, candidates: np.ndarray) -> None:
            body = json.dumps({"user_id": user_id, "item_ids": candidates.tolist()})
            connection.request("POST", "/rank", body)
            response = connection.getresponse()
            scores = json.loads(response.read())
            assert response.status == 200, scores

        return _percentiles(f"{arm}_http", latencies(Requests(scale), ask))


@contextmanager
def _server(settings: dict[str, object]) -> Iterator[int]:
    command = [sys.executable, "-W", "ignore", __file__, "--server", json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def run_server(settings: dict[str, object]) -> None:
    """Serve one arm until SIGTERM; what the benchmark starts beside itself."""
    scale = Scale(**settings["scale"])
    trained = MadeRanker(scale, ARMS[settings["arm"]], is_int8=True)
    repository = open_repository(Path(settings["folder"]), settings["online"])
    scorer = OnlineScorer(trained, CodeReader(repository, "v1"))
    served = Served(scorer, lambda: None, trained.manifest, "made")
    serve(served, ServingConfig(port=0), lambda _, port: print(port, flush=True))


def figures_of_store(name: str, folder: Path, scale: Scale) -> dict[str, float]:
    """Return the figures of one store, its name in front of each."""
    is_redis = name == "redis"
    with RedisServer(folder / "redis", is_durable=False) if is_redis else nullcontext() as server:
        online = (
            {"type": REDIS_TYPE, "connection_string": f"localhost:{server.port}"}
            if is_redis
            else {"type": SQLITE_TYPE, "path": str(folder / "online.db")}
        )
        repository = open_repository(folder, online)
        fill(repository, scale)
        found: dict[str, float] = {}
        for arm, features in ARMS.items():
            print(f"{name} {arm}", file=sys.stderr, flush=True)
            reader = CodeReader(repository, "v1")
            scorer = OnlineScorer(MadeRanker(scale, features, is_int8=True), reader)
            found |= in_process(scorer, Requests(scale), arm)
            found |= over_http(folder, online, arm, scale)
        scorer = OnlineScorer(MadeRanker(scale, CODES, is_int8=False), reader)
        found |= _percentiles(
            "codes_float32",
            latencies(Requests(scale), lambda user, items: scorer.rank(user, items, MOMENT)),
        )
    return {f"{name}_{figure}": value for figure, value in found.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fewer items and requests.")
    parser.add_argument("--store", action="append", choices=STORES, help="Only this store.")
    parser.add_argument("--server", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.server:
        run_server(json.loads(arguments.server))
        return
    scale = QUICK if arguments.quick else Scale()
    found: dict[str, float] = {}
    for name in arguments.store or STORES:
        with tempfile.TemporaryDirectory() as folder:
            found |= figures_of_store(name, Path(folder), scale)
    print(
        json.dumps(
            {
                "benchmark": "serving",
                "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
                "figures": {name: round(value, 3) for name, value in found.items()},
                "targets": {},
                "settings": {"load_average": os.getloadavg()[0], **asdict(scale)},
            }
        )
    )


STORES = ("redis", "sqlite")

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()

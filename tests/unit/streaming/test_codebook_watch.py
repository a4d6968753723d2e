import gc
import threading
import weakref
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY
from stream_fakes import SignCodebook, TitleEncoder

from qarm_feast.codebook import Codebook, EncoderFacts, QuantizerConfig
from qarm_feast.errors import (
    CodebookError,
    ConfigError,
    CorruptArtifactError,
    ServiceUnavailableError,
)
from qarm_feast.item_vectors import Encoder
from qarm_feast.quantizers import RqConfig, VqConfig
from qarm_feast.registry import CodebookRegistry, VersionState
from streaming.codebook_watch import CodebookWatch, EncoderCache, VersionParts

DEFAULT, LIVE, STAGED, RETIRED = (
    VersionState.DEFAULT,
    VersionState.LIVE,
    VersionState.STAGED,
    VersionState.RETIRED,
)
DAMAGED = CorruptArtifactError(path="rq", expected="1", found="2", remedy="put back a copy of it")


class FakeRegistry:
    """States, views and codebooks; a fault is raised in place of the codebook."""

    def __init__(self, **states: VersionState) -> None:
        self.by_version = dict(states)
        self.views = set(states)
        self.faults: dict[str, Exception] = {}
        self.states_fault: Exception | None = None
        self.loads: list[str] = []
        self.encoder_of: dict[str, str] = {}
        self.encoder_loads: list[str] = []

    def states(self) -> dict[str, VersionState]:
        if self.states_fault is not None:
            raise self.states_fault
        return dict(self.by_version)

    def load(self, version: str) -> SignCodebook:
        self.loads.append(version)
        if version in self.faults:
            raise self.faults[version]
        return SignCodebook(self.encoder_of.get(version, "e1"))

    def load_encoder(self, version: str) -> TitleEncoder:
        self.encoder_loads.append(version)
        return TitleEncoder()

    def add(self, version: str, state: VersionState, *, has_view: bool = True) -> None:
        self.by_version[version] = state
        if has_view:
            self.views.add(version)


def _watch(registry: FakeRegistry, poll_seconds: float = 3600) -> CodebookWatch:
    parts = VersionParts(registry, lambda version: version in registry.views, registry.load)
    return CodebookWatch(parts, EncoderCache(registry.load_encoder), poll_seconds)


def _versions(watch: CodebookWatch) -> list[str]:
    return list(watch.current().codebooks)


def _alert() -> float | None:
    return REGISTRY.get_sample_value("qarm_codebook_refresh_failed")


def _is_told(version: str) -> float | None:
    return REGISTRY.get_sample_value("qarm_codebook_info", {"version": version})


def test_a_version_that_becomes_live_is_taken_up_and_a_staged_one_is_not() -> None:
    registry = FakeRegistry(v1=DEFAULT, v2=STAGED)
    watch = _watch(registry)
    watch.load_first()
    before = _versions(watch)
    registry.add("v2", LIVE)

    watch.poll()

    assert before == ["v1"]
    assert _versions(watch) == ["v1", "v2"]
    assert registry.loads == ["v1", "v2"]
    assert _is_told("v2") == 1


def test_the_default_version_comes_first() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.by_version |= {"v1": LIVE, "v2": DEFAULT}
    registry.views.add("v2")

    watch.poll()

    assert _versions(watch) == ["v2", "v1"]


def test_a_live_version_waits_for_its_view_without_an_alert() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.add("v2", LIVE, has_view=False)

    watch.poll()
    waiting, alert = _versions(watch), _alert()
    registry.views.add("v2")
    watch.poll()

    assert (waiting, alert) == (["v1"], 0)
    assert _versions(watch) == ["v1", "v2"]


def test_a_retired_version_leaves_the_set_its_metric_and_the_memory() -> None:
    registry = FakeRegistry(v1=LIVE, v2=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    retired = weakref.ref(watch.current().codebooks["v1"])
    registry.by_version["v1"] = RETIRED

    watch.poll()

    assert _versions(watch) == ["v2"]
    assert _is_told("v1") == 0
    assert retired() is None


def test_a_real_codebook_is_freed_without_a_collection(tmp_path: Path) -> None:
    uri = str(tmp_path)
    x_ND = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    for version in ("v1", "v2"):
        Codebook.train(
            version,
            np.arange(400),
            x_ND,
            config=QuantizerConfig(
                rq=RqConfig(num_levels=2, codebook_size=8), vq=VqConfig(num_neighbors=4)
            ),
            encoder=EncoderFacts("e1", "0" * 64, None),
            created=datetime(2024, 1, 1, tzinfo=UTC),
        ).save(uri)
        CodebookRegistry(uri).publish(version)
    CodebookRegistry(uri).set_state("v2", DEFAULT)
    parts = VersionParts(
        CodebookRegistry(uri), lambda version: True, lambda version: Codebook.load(uri, version)
    )
    watch = CodebookWatch(parts, EncoderCache(lambda version: TitleEncoder()), 3600)
    watch.load_first()
    retired = watch.current().codebooks["v1"]
    arrays = [weakref.ref(retired.rq), weakref.ref(retired.vq.pool_vectors_PD)]
    del retired
    CodebookRegistry(uri).set_state("v1", RETIRED)
    gc.collect()
    gc.disable()
    try:
        watch.poll()
        assert [array() for array in arrays] == [None, None]
    finally:
        gc.enable()


def test_a_corrupt_version_keeps_the_old_set_and_raises_the_alert_until_it_is_mended() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.add("v2", LIVE)
    registry.faults["v2"] = DAMAGED

    watch.poll()
    kept, raised = _versions(watch), _alert()
    registry.faults.clear()
    watch.poll()

    assert (kept, raised) == (["v1"], 1)
    assert _versions(watch) == ["v1", "v2"]
    assert _alert() == 0


@pytest.mark.parametrize("fault", [CodebookError("damaged"), OSError("no such device")])
def test_an_unreadable_registry_keeps_the_old_set_and_raises_the_alert(fault: Exception) -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.states_fault = fault

    watch.poll()
    raised = _alert()
    registry.states_fault = None
    watch.poll()

    assert _versions(watch) == ["v1"]
    assert (raised, _alert()) == (1, 0)


def test_views_that_nobody_tells_of_keep_the_old_set_and_raise_the_alert() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.add("v2", LIVE)

    def has_view(version: str) -> bool:
        raise ServiceUnavailableError("Feast's registry does not answer")

    watch._parts = VersionParts(registry, has_view, registry.load)

    watch.poll()

    assert _versions(watch) == ["v1"]
    assert _alert() == 1


def test_a_registry_that_is_suddenly_empty_retires_nothing() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.by_version.clear()

    watch.poll()

    assert _versions(watch) == ["v1"]
    assert watch.stopped(["v1"]) == set()
    assert _alert() == 1


def test_two_changes_between_two_looks_end_in_the_last_one() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.add("v2", LIVE)
    registry.add("v3", DEFAULT)
    registry.by_version |= {"v1": RETIRED, "v2": RETIRED}

    watch.poll()

    assert _versions(watch) == ["v3"]
    assert registry.loads == ["v1", "v3"]


def test_stopped_looks_at_the_registry_and_not_at_the_set() -> None:
    registry = FakeRegistry(v1=LIVE, v2=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.by_version["v1"] = RETIRED

    assert watch.stopped(["v1", "v2"]) == {"v1"}
    assert _versions(watch) == ["v2", "v1"]


def test_an_acknowledged_version_lags_until_it_is_loaded_or_retired() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry)
    watch.load_first()
    registry.add("v2", LIVE)
    registry.add("v3", RETIRED)

    first = watch.lagging(["v1", "v2", "v3", "v9"])
    watch.poll()

    assert first == ["v2"]
    assert watch.lagging(["v1", "v2", "v3", "v9"]) == []


def test_a_worker_starts_with_the_versions_that_load_and_not_without_any() -> None:
    half, none, viewless = (FakeRegistry(v1=DEFAULT, v2=LIVE) for _ in range(3))
    half.faults["v2"] = DAMAGED
    none.faults = {version: CodebookError(version) for version in ("v1", "v2")}
    viewless.views.clear()
    watch = _watch(half)

    watch.load_first()

    assert _versions(watch) == ["v1"]
    with pytest.raises(CodebookError, match="v1"):
        _watch(none).load_first()
    with pytest.raises(ConfigError, match="v1, v2 have no view yet"):
        _watch(viewless).load_first()
    with pytest.raises(CodebookError, match="publish"):
        _watch(FakeRegistry()).load_first()


def test_codebooks_of_one_encoder_have_one_width() -> None:
    class WideCodebook(SignCodebook):
        version = "v2"
        embedding_dim = 3

    registry = FakeRegistry(v1=DEFAULT)
    parts = VersionParts(
        registry,
        lambda version: True,
        lambda version: SignCodebook() if version == "v1" else WideCodebook(),
    )
    watch = CodebookWatch(parts, EncoderCache(registry.load_encoder), 3600)
    watch.load_first()
    registry.add("v2", LIVE)

    watch.poll()

    assert _versions(watch) == ["v1"]
    assert _alert() == 1


def test_a_new_encoder_is_loaded_beside_the_stream_once_content_has_come() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    registry.encoder_of = {"v2": "e2", "v3": "e3"}
    watch = _watch(registry)
    watch.load_first()
    registry.add("v2", LIVE)
    watch.poll()
    ready_only = list(registry.encoder_loads)

    watch.current().load_encoder("e1")
    registry.add("v3", LIVE)
    watch.poll()
    with_content = list(registry.encoder_loads)
    registry.by_version |= {"v1": RETIRED, "v2": RETIRED, "v3": DEFAULT}
    watch.poll()
    watch.current().load_encoder("e3")

    assert ready_only == []
    assert with_content == ["e1", "e3"]
    assert registry.encoder_loads == ["e1", "e3"]


def test_the_thread_loads_while_the_old_set_is_in_use() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry, poll_seconds=0.001)
    watch.load_first()
    is_loading, may_end = threading.Event(), threading.Event()
    original = registry.load

    def slow_load(version: str) -> SignCodebook:
        is_loading.set()
        assert may_end.wait(10)
        return original(version)

    watch._parts = VersionParts(registry, lambda version: True, slow_load)
    registry.add("v2", LIVE)

    with watch:
        assert is_loading.wait(10)
        during = _versions(watch)
        may_end.set()

    assert during == ["v1"]
    assert _versions(watch) == ["v1", "v2"]


def test_the_thread_survives_what_nobody_thought_of() -> None:
    registry = FakeRegistry(v1=DEFAULT)
    watch = _watch(registry, poll_seconds=0.001)
    watch.load_first()
    seen = threading.Event()
    faults: list[Exception] = [ZeroDivisionError(), ZeroDivisionError()]

    def load(version: str) -> SignCodebook:
        if faults:
            raise faults.pop()
        seen.set()
        return SignCodebook()

    watch._parts = VersionParts(registry, lambda version: True, load)
    registry.add("v2", LIVE)

    with watch:
        assert seen.wait(10)

    assert _versions(watch) == ["v1", "v2"]
    assert _alert() == 0


def test_an_acknowledged_version_is_waited_for_while_the_registry_cannot_be_read() -> None:
    registry = FakeRegistry(v1=DEFAULT, v2=STAGED, v3=RETIRED)
    watch = _watch(registry)
    watch.load_first()
    registry.add("v2", LIVE)
    registry.states_fault = OSError("not mounted")

    during = watch.lagging(["v1", "v2", "v3", "v4"])
    registry.states_fault = None
    after = watch.lagging(["v1", "v2", "v3", "v4"])

    # Nobody can know of v2 and v4 whether they are live; v4 turns out to be in no registry.
    assert during == ["v2", "v4"]
    assert after == ["v2"]


class ForgottenAtOnce(dict[str, Encoder]):
    """What the cache's dict is when the other thread takes out each entry as soon as it is in."""

    def __setitem__(self, version: str, encoder: Encoder) -> None:
        pass


def test_an_encoder_that_the_other_thread_forgets_meanwhile_is_given_all_the_same() -> None:
    encoder = TitleEncoder()
    cache = EncoderCache(lambda version: encoder)
    cache._loaded = ForgottenAtOnce()

    assert cache.get("e1") is encoder

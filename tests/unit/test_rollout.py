"""A rollout in a world of two partitions, where each event is written, filled up, or missing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qarm_feast import shared_state
from qarm_feast.errors import (
    CodebookError,
    CodebookMismatchError,
    CodebookNotFoundError,
    ConfigError,
    DataError,
    ServiceUnavailableError,
)
from qarm_feast.registry import CodebookRegistry, VersionState
from qarm_feast.rollout import Patience, Rollout
from qarm_feast.rollout_status import Phase, RolloutParts, RolloutStatus, StepState

PLACES = (("items", 0), ("items", 1))


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Verdict:
    """What a comparison found: events that the new view lacks."""

    num_missing: int

    def faults(self) -> list[str]:
        return [f"{self.num_missing} of 9 items, limit 0"] if self.num_missing else []

    def __str__(self) -> str:
        return f"{self.num_missing} missing"


@dataclass
class World:
    """Workers that write one event per partition whenever somebody waits, views, and the rows.

    A worker acknowledges as the real one does: the first offset is kept while a version stays in
    the set, and withdrawn with the first batch that is stored without it.
    """

    uri: str
    views: set[str] = field(default_factory=lambda: {"v1", "v2"})
    encoders: set[str] = field(default_factory=set)
    workers_run: bool = True
    is_broker_down: bool = False
    is_store_down: bool = False
    num_events: int = 5
    told: dict[str, int] = field(default_factory=dict)
    rows: dict[str, set[int]] = field(default_factory=dict)
    backfills: list[tuple[str, Mapping[tuple[str, int], int]]] = field(default_factory=list)
    lost_rows: int = 0

    @property
    def registry(self) -> CodebookRegistry:
        return CodebookRegistry(self.uri)

    def work(self, seconds: float = 0.0) -> None:
        """Store one event on each partition in all versions that are to be written."""
        if not self.workers_run:
            return
        written = self.registry.versions(VersionState.LIVE, VersionState.DEFAULT)
        versions = [version for version in written if version in self.views]
        self.told = {version: self.told.get(version, self.num_events) for version in versions}
        for version in versions:
            self.rows.setdefault(version, set()).add(self.num_events)
        self.num_events += 1

    def has_view(self, version: str) -> bool:
        if self.is_store_down:
            raise ServiceUnavailableError("no store answers")
        return version in self.views

    def first_offsets(self, version: str) -> dict[tuple[str, int], int | None]:
        if self.is_broker_down:
            raise ServiceUnavailableError("no broker answers")
        return dict.fromkeys(PLACES, self.told.get(version))

    def backfill(self, version: str, up_to: Mapping[tuple[str, int], int]) -> str:
        self.backfills.append((version, up_to))
        self.rows.setdefault(version, set()).update(range(up_to["items", 0]))
        return f"{len(up_to)} partitions"

    def verify(self, version: str, previous: str) -> Verdict:
        return Verdict(len(set(range(self.num_events)) - self.rows[version]) + self.lost_rows)

    def rollout(self, wait_seconds: float = 5.0) -> Rollout:
        parts = RolloutParts(
            has_view=self.has_view,
            first_offsets=self.first_offsets,
            has_encoder=lambda version: version in self.encoders,
            backfill=self.backfill,
            verify=self.verify,
            service_name=lambda version: f"home_{version}",
        )
        clock = iter(range(1000))
        return Rollout(self.registry, parts, Patience(wait_seconds, lambda: next(clock), self.work))

    def states(self) -> dict[str, str]:
        return {version: state.value for version, state in self.registry.states().items()}


def _plant(uri: Path, version: str, encoder: str = "e1", encoder_hash: str = "00" * 32) -> None:
    """Store a manifest without arrays, which no step of a rollout reads."""
    manifest = {
        "version": version,
        "encoder_version": encoder,
        "encoder_hash": encoder_hash,
        "behaviour_cutoff": None,
        "embedding_dim": 8,
        "level_sizes": [4, 4],
        "num_neighbors": 5,
        "pool_size": 10,
        "seed": 0,
        "num_training_items": 10,
        "files": {},
        "created": datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
    }
    (uri / version).mkdir(parents=True)
    (uri / version / "manifest.json").write_text(json.dumps(manifest))
    CodebookRegistry(str(uri)).publish(version)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """v1 is the default, v2 is staged, both have views, and workers wrote v1 from the start."""
    for version in ("v1", "v2"):
        _plant(tmp_path / "codebooks", version)
    return World(
        str(tmp_path / "codebooks"), told={"v1": 0}, rows={"v1": set(range(5))}, num_events=5
    )


def _step_states(status: RolloutStatus) -> dict[str, str]:
    return {step.name: step.state.value for step in status.steps}


def _detail(status: RolloutStatus, name: str) -> str:
    return next(step.detail for step in status.steps if step.name == name)


def test_a_started_version_is_written_filled_up_to_its_first_offsets_and_the_default(
    world: World,
) -> None:
    status = world.rollout().start("v2")

    assert world.states() == {"v1": "live", "v2": "default"}
    assert world.backfills == [("v2", {("items", 0): 5, ("items", 1): 5})]
    assert world.rows["v2"] == set(range(world.num_events))
    assert _detail(status, "compare") == "0 missing"
    states = _step_states(status)
    assert {name for name, state in states.items() if state == "done"} == {
        *("stage", "declare", "live", "acknowledge", "backfill", "compare", "default")
    }
    assert {name for name, state in states.items() if state == "yours"} == {
        *("train ranker", "switch service", "drain")
    }
    assert "switch services to home_v2" in status.next_step
    assert "`qarm rollout finish`" in status.next_step


def test_a_finished_rollout_retires_the_old_version_and_waits_until_no_worker_writes_it(
    world: World,
) -> None:
    world.rollout().start("v2")

    status = world.rollout().finish()

    assert world.states() == {"v1": "retired", "v2": "default"}
    assert "v1" not in world.told
    assert status.record is not None
    assert status.record.phase is Phase.FINISHED
    assert status.next_step == "`feast apply`, which drops item_codes_v1"
    world.views.remove("v1")
    assert world.rollout().status().next_step == "nothing is left to do"
    assert {step.state for step in world.rollout().status().steps} == {
        StepState.DONE,
        StepState.YOURS,
    }


def test_each_command_may_be_run_again_and_changes_nothing_then(world: World) -> None:
    for _ in range(2):
        world.rollout().start("v2")
    for _ in range(2):
        world.rollout().finish()

    assert len(world.backfills) == 1
    assert world.states() == {"v1": "retired", "v2": "default"}


def test_a_plan_names_every_step_and_changes_nothing(world: World) -> None:
    before = {path: path.read_bytes() for path in Path(world.uri).rglob("*") if path.is_file()}

    status = world.rollout().plan("v2")

    assert _step_states(status)["declare"] == "done"
    assert _step_states(status)["live"] == "open"
    assert status.next_step == "`qarm rollout start --codebook-version v2`"
    after = {path: path.read_bytes() for path in Path(world.uri).rglob("*") if path.is_file()}
    assert after == before


def test_without_a_rollout_the_status_names_the_default_and_an_undo_does_nothing(
    world: World,
) -> None:
    for status in (world.rollout().status(), world.rollout().undo()):
        assert status.record is None
        assert "the default is v1" in status.next_step
    assert world.states() == {"v1": "default", "v2": "staged"}


class _Kill:
    """Ends the process at the n-th change of the world, before or after it is made."""

    def __init__(self, at: int, is_after: bool) -> None:
        self.at = at
        self.is_after = is_after
        self.num_seen = 0

    def around(self, change: Callable[..., object]) -> Callable[..., object]:
        def changed(*arguments: object) -> object:
            number, self.num_seen = self.num_seen, self.num_seen + 1
            if number == self.at and not self.is_after:
                raise Killed
            result = change(*arguments)
            if number == self.at:
                raise Killed
            return result

        return changed


def _walk(world: World) -> None:
    world.rollout().start("v2")
    world.rollout().finish()


def _count_changes(world: World, walk: Callable[[World], None], patch: pytest.MonkeyPatch) -> int:
    kill = _Kill(-1, is_after=False)
    _watch(world, kill, patch)
    walk(world)
    return kill.num_seen


def _watch(world: World, kill: _Kill, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_state, "replace_file", kill.around(shared_state.replace_file))
    patch.setattr(world, "backfill", kill.around(world.backfill))
    patch.setattr(world, "verify", kill.around(world.verify))


NUM_CHANGES = 10


def test_a_walk_makes_as_many_changes_as_the_tests_below_kill_it_at(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _count_changes(world, _walk, monkeypatch) == NUM_CHANGES


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("at", range(NUM_CHANGES))
def test_a_walk_that_is_killed_anywhere_is_shown_and_goes_on_to_the_same_end(
    world: World, monkeypatch: pytest.MonkeyPatch, at: int, is_after: bool
) -> None:
    with monkeypatch.context() as patch:
        _watch(world, _Kill(at, is_after), patch)
        with pytest.raises(Killed):
            _walk(world)
    world.work()
    halfway = world.rollout().status()

    _walk_on(world)

    assert world.states() == {"v1": "retired", "v2": "default"}
    assert world.rows["v2"] == set(range(world.num_events))
    assert world.rollout().status().next_step == "`feast apply`, which drops item_codes_v1"
    assert "`qarm rollout" in halfway.next_step or "`feast apply`" in halfway.next_step


def _walk_on(world: World) -> None:
    """Follow what status says, as a person would."""
    for _ in range(4):
        status = world.rollout().status()
        if status.record is None or "`qarm rollout start" in status.next_step:
            world.rollout().start("v2")
        elif "`qarm rollout finish`" in status.next_step:
            world.rollout().finish()


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("at", range(8))
def test_a_start_that_is_killed_anywhere_can_be_undone(
    world: World, monkeypatch: pytest.MonkeyPatch, at: int, is_after: bool
) -> None:
    with monkeypatch.context() as patch:
        _watch(world, _Kill(at, is_after), patch)
        with pytest.raises(Killed):
            world.rollout().start("v2")
    world.work()

    for _ in range(2):
        world.rollout().undo()
    world.work()

    assert world.states() == {"v1": "default", "v2": "staged"}
    done = {
        name for name, state in _step_states(world.rollout().status()).items() if state == "done"
    }
    assert done <= {"stage", "declare"}
    assert "v2" not in world.told
    assert world.rows["v1"] == set(range(world.num_events))


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("at", range(4))
def test_an_undo_that_is_killed_anywhere_goes_on_and_nothing_else_does(
    world: World, monkeypatch: pytest.MonkeyPatch, at: int, is_after: bool
) -> None:
    world.rollout().start("v2")
    with monkeypatch.context() as patch:
        _watch(world, _Kill(at, is_after), patch)
        with pytest.raises(Killed):
            world.rollout().undo()
    record = world.rollout().record()
    assert record is not None
    if record.phase is Phase.UNDOING:
        assert world.rollout().status().next_step == "`qarm rollout undo`"
        for command in (lambda: world.rollout().start("v2"), world.rollout().finish):
            with pytest.raises(CodebookError, match="run `qarm rollout undo`"):
                command()

    world.rollout().undo()

    assert world.states() == {"v1": "default", "v2": "staged"}
    assert "begins anew" in world.rollout().status().next_step


def test_a_killed_undo_whose_old_version_somebody_retired_leaves_the_way_to_another_version(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant(Path(world.uri), "v3")
    world.views.add("v3")
    world.rollout().start("v2")
    with monkeypatch.context() as patch:
        _watch(world, _Kill(0, is_after=True), patch)
        with pytest.raises(Killed):
            world.rollout().undo()
    world.registry.set_state("v1", VersionState.RETIRED)

    halfway = world.rollout().status()
    with pytest.raises(CodebookError, match="cannot be undone any more"):
        world.rollout().undo()
    world.rollout().start("v3")

    assert halfway.next_step == "`qarm rollout start --codebook-version VERSION` with another one"
    assert world.states() == {"v1": "retired", "v2": "live", "v3": "default"}


def test_after_an_undo_the_rows_that_were_not_written_meanwhile_are_filled_up(
    world: World,
) -> None:
    world.rollout().start("v2")
    world.rollout().undo()
    for _ in range(3):
        world.work()

    world.rollout().start("v2")

    assert world.states() == {"v1": "live", "v2": "default"}
    assert len(world.backfills) == 2
    assert world.rows["v2"] == set(range(world.num_events))


def test_an_acknowledgement_from_before_an_undo_is_not_taken_for_a_new_one(world: World) -> None:
    world.rollout().start("v2")
    world.rollout().undo()
    before = world.told["v2"]
    # The batch that the owner stores without v2 is not committed yet.
    world.num_events += 1
    world.rows["v1"].add(world.num_events - 1)
    assert world.told["v2"] == before

    world.rollout().start("v2")

    assert world.backfills[-1][1]["items", 0] > before
    assert world.rows["v2"] == set(range(world.num_events))


def test_an_undo_leaves_a_version_live_that_was_live_before(world: World) -> None:
    world.registry.set_state("v2", VersionState.LIVE)
    world.work()
    world.rollout().start("v2")

    world.rollout().undo()

    assert world.states() == {"v1": "default", "v2": "live"}


def test_there_is_no_way_back_once_the_old_version_is_retired(world: World) -> None:
    _walk(world)

    with pytest.raises(CodebookError, match=r"'v1' is retired.*'v2' cannot be undone.*--parent v2"):
        world.rollout().undo()

    assert world.states() == {"v1": "retired", "v2": "default"}


def test_a_half_done_finish_has_no_way_back_either(world: World) -> None:
    world.rollout().start("v2")
    world.workers_run = False
    with pytest.raises(ServiceUnavailableError):
        world.rollout().finish()

    assert world.rollout().status().next_step == "`qarm rollout finish`"
    with pytest.raises(CodebookError, match="cannot be undone any more"):
        world.rollout().undo()


def test_a_second_command_at_the_same_time_is_refused_and_status_still_answers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = []

    def backfill(version: str, up_to: Mapping[tuple[str, int], int]) -> str:
        for command in (lambda: world.rollout().start("v2"), world.rollout().undo):
            with pytest.raises(CodebookError, match="another `qarm rollout` is at work") as refused:
                command()
            refusals.append(refused)
        assert _step_states(world.rollout().status())["backfill"] == "open"
        return World.backfill(world, version, up_to)

    monkeypatch.setattr(world, "backfill", backfill)

    world.rollout().start("v2")

    assert len(refusals) == 2
    assert world.states() == {"v1": "live", "v2": "default"}


def test_a_process_that_is_killed_in_the_backfill_gives_the_lock_back(
    world: World, tmp_path: Path
) -> None:
    program = (
        "import os, signal, sys\n"
        "from test_rollout import World\n"
        "world = World(sys.argv[1], told={'v1': 0}, rows={'v1': set(range(5))})\n"
        "world.backfill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "world.rollout().start('v2')\n"
    )
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    killed = subprocess.run(
        [sys.executable, "-c", program, world.uri],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert world.states() == {"v1": "default", "v2": "live"}
    halfway = world.rollout().status()
    assert (_step_states(halfway)["acknowledge"], _step_states(halfway)["backfill"]) == (
        *("done", "open"),
    )

    world.rollout().start("v2")

    assert world.states() == {"v1": "live", "v2": "default"}


def test_a_version_that_nobody_published_is_refused(world: World) -> None:
    with pytest.raises(CodebookNotFoundError, match=r"'v9' \(it holds: v1, v2"):
        world.rollout().start("v9")
    assert world.rollout().record() is None


def test_the_default_and_a_retired_version_are_refused(world: World) -> None:
    world.registry.set_state("v2", VersionState.RETIRED)

    with pytest.raises(CodebookError, match=r"'v1' is the default of .* already"):
        world.rollout().start("v1")
    with pytest.raises(CodebookError, match=r"'v2' is retired.*--codebook-version v3 --parent v2"):
        world.rollout().plan("v2")


def test_another_version_has_to_wait_for_a_rollout_that_is_half_done(world: World) -> None:
    _plant(Path(world.uri), "v3")
    world.views -= {"v2"}
    with pytest.raises(ConfigError):
        world.rollout().start("v2")

    for command in (world.rollout().start, world.rollout().plan):
        with pytest.raises(CodebookError, match=r"'v2' in place of 'v1' is half done, 'v3' has to"):
            command("v3")


def test_a_version_without_a_view_is_not_made_live_and_the_status_names_feast_apply(
    world: World,
) -> None:
    world.views = {"v1"}

    with pytest.raises(ConfigError, match=r"no view 'item_codes_v2'; run `feast apply`, then"):
        world.rollout().start("v2")

    assert world.states() == {"v1": "default", "v2": "staged"}
    expected = "`feast apply`, then `qarm rollout start --codebook-version v2`"
    assert world.rollout().status().next_step == expected


def test_a_version_of_another_encoder_needs_that_encoder_where_workers_load_it(
    world: World,
) -> None:
    _plant(Path(world.uri), "v3", encoder="e2")
    world.views.add("v3")

    with pytest.raises(ConfigError, match=r"encoder 'e2', the default 'v1' of 'e1'.*qarm align"):
        world.rollout().start("v3")
    world.encoders.add("e2")
    world.rollout().start("v3")

    assert world.registry.default_version() == "v3"


def test_a_version_of_another_encoder_under_the_same_name_is_refused(world: World) -> None:
    _plant(Path(world.uri), "v3", encoder_hash="ff" * 32)

    with pytest.raises(CodebookMismatchError, match=r"e1 \(ffffffffffff\).*e1 \(000000000000\)"):
        world.rollout().start("v3")


def test_owners_that_do_not_acknowledge_are_named_and_the_next_start_goes_on(world: World) -> None:
    world.workers_run = False

    with pytest.raises(
        ServiceUnavailableError, match=r"after 5 s the owners of items 0, items 1 do not ack"
    ):
        world.rollout().start("v2")

    assert world.states() == {"v1": "default", "v2": "live"}
    assert world.backfills == []
    assert _detail(world.rollout().status(), "acknowledge") == "0 of 2 partitions"
    world.workers_run = True
    world.rollout().start("v2")
    assert world.states() == {"v1": "live", "v2": "default"}


def test_rows_that_are_missing_keep_the_old_default_and_are_filled_up_by_the_next_start(
    world: World,
) -> None:
    world.lost_rows = 2

    with pytest.raises(
        DataError, match=r"(?s)does not hold what.*2 of 9 items, limit 0.*rollout s"
    ):
        world.rollout().start("v2")

    assert world.states() == {"v1": "default", "v2": "live"}
    world.lost_rows = 0
    world.rollout().start("v2")
    assert len(world.backfills) == 2
    assert world.states() == {"v1": "live", "v2": "default"}


def test_the_old_version_is_not_retired_before_the_new_one_is_the_default(world: World) -> None:
    with pytest.raises(CodebookError, match="no rollout is under way"):
        world.rollout().finish()
    world.workers_run = False
    with pytest.raises(ServiceUnavailableError):
        world.rollout().start("v2")

    with pytest.raises(CodebookError, match="'v2' is live, and its rows are not compared yet"):
        world.rollout().finish()


def test_a_default_that_was_set_by_hand_is_still_filled_up_and_compared(world: World) -> None:
    world.workers_run = False
    with pytest.raises(ServiceUnavailableError):
        world.rollout().start("v2")
    world.registry.set_state("v2", VersionState.DEFAULT)
    with pytest.raises(CodebookError, match="not compared yet"):
        world.rollout().finish()

    world.workers_run = True
    world.rollout().start("v2")

    assert world.rows["v2"] == set(range(world.num_events))


def _by_hand(world: World) -> Iterator[tuple[str, Callable[[], None], dict[str, str]]]:
    """What somebody may do to a started rollout, and the states after an undo."""
    registry = world.registry

    def make_v3_default() -> None:
        _plant(Path(world.uri), "v3")
        registry.set_state("v3", VersionState.DEFAULT)

    def retire_v2() -> None:
        registry.set_state("v1", VersionState.DEFAULT)
        registry.set_state("v2", VersionState.RETIRED)

    yield "default is 'v3'", make_v3_default, {"v1": "live", "v2": "staged", "v3": "default"}
    yield "is retired", retire_v2, {"v1": "default", "v2": "retired"}


@pytest.mark.parametrize("number", [0, 1])
def test_states_that_somebody_else_changed_are_told_and_can_be_undone(
    world: World, number: int
) -> None:
    world.rollout().start("v2")
    told, change, after_undo = list(_by_hand(world))[number]
    change()

    status = world.rollout().status()
    for command in (lambda: world.rollout().start("v2"), world.rollout().finish):
        with pytest.raises(CodebookError, match=told):
            command()

    assert status.fault is not None
    assert told in status.fault
    assert status.next_step == "`qarm rollout undo`"
    world.rollout().undo()
    assert world.states() == after_undo


def test_a_default_that_somebody_made_during_the_backfill_is_not_overruled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backfill(version: str, up_to: Mapping[tuple[str, int], int]) -> str:
        _plant(Path(world.uri), "v3")
        world.registry.set_state("v3", VersionState.DEFAULT)
        return World.backfill(world, version, up_to)

    monkeypatch.setattr(world, "backfill", backfill)

    with pytest.raises(CodebookError, match="the default is 'v3' by now; run `qarm rollout undo`"):
        world.rollout().start("v2")

    assert world.registry.default_version() == "v3"


def test_the_status_answers_while_the_broker_does_not(world: World) -> None:
    world.workers_run = False
    with pytest.raises(ServiceUnavailableError):
        world.rollout().start("v2")
    world.is_broker_down = True

    status = world.rollout().status()

    assert _step_states(status)["acknowledge"] == "unknown"
    assert _detail(status, "acknowledge") == "no broker answers"
    assert status.next_step == "`qarm rollout start --codebook-version v2`"


@pytest.mark.parametrize(
    ("is_finished", "next_step"),
    [
        (False, "`qarm rollout start --codebook-version v2`"),
        (True, "`feast apply`, which drops item_codes_v1"),
    ],
)
def test_the_status_answers_while_the_online_store_does_not(
    world: World, is_finished: bool, next_step: str
) -> None:
    if is_finished:
        _walk(world)
        world.views.discard("v1")
    else:
        world.workers_run = False
        with pytest.raises(ServiceUnavailableError):
            world.rollout().start("v2")
    world.is_store_down = True

    status = world.rollout().status()

    assert _step_states(status)["declare"] == "unknown"
    assert "no store answers" in _detail(status, "declare")
    assert status.next_step == next_step


def test_a_partition_that_is_added_during_the_backfill_is_acknowledged_and_filled_up_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_offsets, added = world.first_offsets, ("items", 2)

    def told(version: str) -> dict[tuple[str, int], int | None]:
        offsets = first_offsets(version)
        return offsets | {added: offsets["items", 1]} if world.backfills else offsets

    monkeypatch.setattr(world, "first_offsets", told)

    status = world.rollout().start("v2")

    assert [added in up_to for _, up_to in world.backfills] == [False, True]
    assert "items 2 from" in _detail(status, "acknowledge")
    assert _detail(status, "backfill") == "3 partitions"


def test_a_damaged_record_is_told_with_what_to_do(world: World) -> None:
    (Path(world.uri) / "rollout.json").write_text("{")

    with pytest.raises(CodebookError, match=r"(?s)rollout\.json is no rollout.*put back a copy"):
        world.rollout().status()

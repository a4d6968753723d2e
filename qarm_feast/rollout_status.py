"""The rollout of a codebook version as it is: its record, and each step by a look at the world.

Nothing here changes anything; :mod:`qarm_feast.rollout` does. A step is told by what it leaves
behind: states in the registry, an applied view, what the owners of partitions acknowledge; the
record only where nothing else tells. May import: pydantic, the registry.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict

from qarm_feast.errors import QarmError
from qarm_feast.registry import CodebookRegistry, VersionState
from qarm_feast.schema import code_view_name

Partition = tuple[str, int]
"""Topic and number."""

GONE = (VersionState.RETIRED, VersionState.PURGED)
WRITTEN = (VersionState.LIVE, VersionState.DEFAULT)
_NUM_NAMED = 8


class Phase(StrEnum):
    """Where a rollout is going: on, back, or nowhere any more; one that is planned has no file."""

    PLANNED = "planned"
    UNDER_WAY = "under way"
    UNDOING = "undoing"
    UNDONE = "undone"
    FINISHED = "finished"


class FirstOffset(NamedTuple):
    """The first record of a partition that an owner wrote in the new version."""

    topic: str
    partition: int
    offset: int


class RolloutRecord(BaseModel):
    """What ``rollout.json`` holds; ``found_as`` is the state that an undo gives back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    version: str
    previous: str
    found_as: VersionState
    phase: Phase
    started: AwareDatetime
    first_offsets: tuple[FirstOffset, ...] = ()
    backfill: str | None = None
    verification: str | None = None


class Verdict(Protocol):
    """What a comparison of two versions' rows gave; ``rollout_sample.Comparison``."""

    def faults(self) -> list[str]:
        """Return what is wrong, each with its figure and its limit; none: all is right."""
        ...


@dataclass(frozen=True)
class RolloutParts:
    """The world around the registry.

    Attributes:
        has_view: Whether ``feast apply`` has made a version's view.
        first_offsets: Of each partition of the item topic the first offset that its owner has
            acknowledged for a version; None where the owner does not write it.
        has_encoder: Whether an encoder version is stored where workers load it.
        backfill: Fills a version's view with what lies before the offsets; returns its counts.
        verify: Compares the rows of a new version (first) with those of an old one.
        service_name: Name of the feature service of a version.
    """

    has_view: Callable[[str], bool]
    first_offsets: Callable[[str], Mapping[Partition, int | None]]
    has_encoder: Callable[[str], bool]
    backfill: Callable[[str, Mapping[Partition, int]], object]
    verify: Callable[[str, str], Verdict]
    service_name: Callable[[str], str]


class StepState(StrEnum):
    """What is known of a step; ``YOURS`` leaves no trace that could be looked at."""

    DONE = "done"
    OPEN = "open"
    YOURS = "yours"
    UNKNOWN = "unknown"


class Step(NamedTuple):
    """One line of a plan or a status."""

    name: str
    state: StepState
    detail: str


@dataclass(frozen=True)
class RolloutStatus:
    """The rollout under way or the last one, its steps as they are now, and what comes next."""

    record: RolloutRecord | None
    steps: tuple[Step, ...]
    next_step: str
    fault: str | None = None


class RolloutView:
    """Looks at a rollout from outside; each call looks afresh.

    Args:
        registry: States of the versions.
        parts: The world around it.
    """

    def __init__(self, registry: CodebookRegistry, parts: RolloutParts) -> None:
        self._registry = registry
        self._parts = parts

    def status_of(self, record: RolloutRecord) -> RolloutStatus:
        """Return a rollout's steps as they are, what somebody else changed, and what comes next."""
        fault = self.outside_change(record)
        next_step = "`qarm rollout undo`" if fault else self.next_command(record)
        return RolloutStatus(record, tuple(self._steps(record)), next_step, fault)

    def next_command(self, record: RolloutRecord) -> str:
        """Return what the user does next: a command, or what lies before it."""
        version, previous = record.version, record.previous
        if record.phase is Phase.UNDOING:
            other = "`qarm rollout start --codebook-version VERSION` with another one"
            return other if self.is_past_return(record) else "`qarm rollout undo`"
        if record.phase is Phase.UNDONE:
            return f"`qarm rollout start --codebook-version {version}` begins anew"
        if record.phase is Phase.FINISHED:
            is_gone = self._looked_for(previous) is StepState.OPEN
            drop = f"`feast apply`, which drops {code_view_name(previous)}"
            return "nothing is left to do" if is_gone else drop
        states = self._registry.states()
        if self._looked_for(version) is StepState.OPEN:
            return f"`feast apply`, then `qarm rollout start --codebook-version {version}`"
        if states.get(version) is not VersionState.DEFAULT or record.verification is None:
            return f"`qarm rollout start --codebook-version {version}`"
        if states.get(previous) in GONE:
            return "`qarm rollout finish`"
        return (
            f"train a ranker on {version} (`qarm-rank rows`, `torchrun -m torchrec_models.train`), "
            f"switch services to {self._parts.service_name(version)}, let those of {previous} "
            "drain; then `qarm rollout finish`, or back with `qarm rollout undo`"
        )

    def is_past_return(self, record: RolloutRecord) -> bool:
        """Return whether the old version is gone and the new one the default: nothing to undo."""
        states = self._registry.states()
        is_default = states.get(record.version) is VersionState.DEFAULT
        return is_default and states.get(record.previous) in GONE

    def outside_change(self, record: RolloutRecord) -> str | None:
        """Return what somebody did to the states that no step of this rollout does."""
        if record.phase is not Phase.UNDER_WAY:
            return None
        states = self._registry.states()
        state = states.get(record.version)
        if state is None or state in GONE:
            is_now = "missing" if state is None else state.value
            return f"{record.version!r}, whose rollout is half done, is {is_now} by now"
        default = self._registry.default_version()
        if default not in (record.version, record.previous):
            return (
                f"the rollout of {record.version!r} began with the default {record.previous!r}, "
                f"but the default is {default!r} by now"
            )
        return None

    def _steps(self, record: RolloutRecord) -> Iterator[Step]:
        version, previous = record.version, record.previous
        states = self._registry.states()
        state, old_state = states.get(version), states.get(previous)
        named = "missing" if state is None else state.value
        yield Step("stage", _done(state is not None), f"{version} is {named}")
        yield self._view_step("declare", version, is_wanted=True)
        yield Step("live", _done(state in WRITTEN), f"workers write {version} beside {previous}")
        yield self._acknowledgement_step(record)
        yield Step(
            "backfill", _done(record.backfill is not None), record.backfill or _to_fill(record)
        )
        yield Step(
            "compare",
            _done(record.verification is not None),
            record.verification or f"a sample of {previous}'s items is looked for in {version}",
        )
        is_default = state is VersionState.DEFAULT
        yield Step("default", _done(is_default), f"new services are made from {version}")
        service = self._parts.service_name
        yield Step("train ranker", StepState.YOURS, f"on {service(version)}")
        yield Step("switch service", StepState.YOURS, f"{service(previous)} to {service(version)}")
        yield Step("drain", StepState.YOURS, f"nothing reads {service(previous)} any more")
        yield Step("retire", _done(old_state in GONE), f"nothing writes {previous} any more")
        yield self._withdrawal_step(previous, is_due=old_state in GONE)
        if record.phase is Phase.FINISHED:
            yield self._view_step("drop", previous, is_wanted=False)

    def _view_step(self, name: str, version: str, *, is_wanted: bool) -> Step:
        text = f"`feast apply` {'declares' if is_wanted else 'drops'} {code_view_name(version)}"
        try:
            return Step(name, _done(self._parts.has_view(version) is is_wanted), text)
        except QarmError as error:
            return Step(name, StepState.UNKNOWN, f"{text}: {error}")

    def _looked_for(self, version: str) -> StepState:
        """Return whether a version's view is declared; unknown while the store is away."""
        return self._view_step("declare", version, is_wanted=True).state

    def _acknowledgement_step(self, record: RolloutRecord) -> Step:
        name, version = "acknowledge", record.version
        if record.first_offsets:
            offsets_told = [f"{topic} {n} from {at}" for topic, n, at in record.first_offsets]
            return Step(name, StepState.DONE, shortened(offsets_told))
        if self._registry.states().get(version) not in WRITTEN:
            return Step(name, StepState.OPEN, "the owner of each partition, once it is live")
        try:
            offsets = self._parts.first_offsets(version)
        except QarmError as error:
            return Step(name, StepState.UNKNOWN, str(error))
        num_told = sum(offset is not None for offset in offsets.values())
        return Step(name, StepState.OPEN, f"{num_told} of {len(offsets)} partitions")

    def _withdrawal_step(self, version: str, *, is_due: bool) -> Step:
        name = "withdraw"
        if not is_due:
            return Step(name, StepState.OPEN, f"the owners tell that they write {version} no more")
        try:
            offsets = self._parts.first_offsets(version)
        except QarmError as error:
            return Step(name, StepState.UNKNOWN, str(error))
        num_told = sum(offset is not None for offset in offsets.values())
        text = f"{num_told} of {len(offsets)} partitions acknowledge {version}"
        return Step(name, _done(num_told == 0), text)


def shortened(names: Sequence[str]) -> str:
    """Return names in one line; of many the first ones and how many there are."""
    rest = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + rest


def _done(is_done: bool) -> StepState:
    return StepState.DONE if is_done else StepState.OPEN


def _to_fill(record: RolloutRecord) -> str:
    return f"what came before the acknowledged offsets gets its {record.version} rows"

"""The job behind `qarm refresh`.

1. The lock is taken, and the plan made: data, settings and parent against those of the last run.
2. The state of a new run is written, with the names that it has chosen.
3. Each step is done, then noted; a run that was killed goes on with the first that is not noted.
4. Old encoders are removed, if that is wanted.
5. The report is written, then the state says that the run is over.

Nothing is published before the gates of the encoder and of the codebook are kept, and what is
published is staged: no reader uses it before `qarm rollout start`. Into a registry without any
version the first one goes as its default, as `qarm codebook publish` does it.
May import: the steps.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qarm_feast.alignment.export_job import EngineName
from qarm_feast.artifact import replace_file
from qarm_feast.errors import GateRefusedError
from qarm_feast.refresh.old_encoders import remove_old_encoders
from qarm_feast.refresh.plan import (
    RefreshPlan,
    RefreshRequest,
    Sections,
    check_settings,
    plan_refresh,
)
from qarm_feast.refresh.state import (
    Outcome,
    RefreshState,
    StepRecord,
    refresh_lock,
    report_path,
)
from qarm_feast.refresh.steps import STEPS, RefreshSteps, StepResult
from qarm_feast.shared_state import CheckHeld

logger = logging.getLogger(__name__)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class RefreshOptions:
    """How a refresh works, whatever it makes."""

    engine: EngineName = "local"
    include_raw: bool = False


def refresh(
    config_path: str, request: RefreshRequest, options: RefreshOptions, tell: Tell
) -> dict[str, Any]:
    """Bring encoder and codebook up to the data, or find that they are.

    Args:
        config_path: Path of ``qarm.yaml``.
        request: Wishes of the operator.
        options: Where and what to export.
        tell: Called with each line that people read.

    Returns:
        The report of the run: of this one, or of the last where nothing was to be done.

    Raises:
        AlreadyRunningError: If another refresh is at work.
        GateRefusedError: If a gate is missed; nothing is published then.
        DataError: If the data cannot be used, or changes meanwhile.
        ConfigError: If settings contradict each other, or change meanwhile.
        CodebookError: If the parent is not published, or the data is too small for a codebook.
        ServiceUnavailableError: If an object store does not answer.
    """
    sections = Sections.load(str(Path(config_path).resolve()))
    with refresh_lock(sections.codebook.uri, sections.state_folder) as check_held:
        plan = plan_refresh(sections, request, datetime.now(UTC))
        for line in plan_lines(plan):
            tell(line)
        if plan.decision != "nothing":
            _Run(sections, plan, options, tell, check_held).to_the_end()
        path = report_path(sections.state_folder, plan.state.codebook_version)
        made_now = plan.decision != "nothing"
        return {**report_of(plan.state), "report": str(path), "was_made_now": made_now}


def planned(config_path: str, request: RefreshRequest) -> list[str]:
    """Return in words what :func:`refresh` would do; nothing is written.

    Args:
        config_path: Path of ``qarm.yaml``.
        request: Wishes of the operator.

    Returns:
        Lines.

    Raises:
        DataError: If the data cannot be read.
        ConfigError: If settings contradict each other.
        CodebookError: If the parent is not published.
    """
    sections = Sections.load(str(Path(config_path).resolve()))
    plan = plan_refresh(sections, request, datetime.now(UTC))
    done = plan.state.steps
    steps = [f"  {name:<9}{'done' if name in done else 'to do'}" for name in STEPS]
    return [*plan_lines(plan), *(steps if plan.decision != "nothing" else [])]


def plan_lines(plan: RefreshPlan) -> list[str]:
    """Return in words what a plan is."""
    state = plan.state
    parent = "no parent" if state.parent is None else f"parent {state.parent.codebook_version}"
    origin = "" if state.parent is None else f" of encoder {state.parent.encoder_version}"
    lines = [f"{plan.decision}: {plan.reason}"]
    if plan.decision != "nothing":
        lines.append(
            f"{parent}{origin} -> encoder {state.encoder_version}, codebook "
            f"{state.codebook_version}"
        )
    lines += [
        f"note: {version} is staged and was never rolled out; `qarm rollout start "
        f"--codebook-version {version}`, or `qarm codebook retire --codebook-version {version}`"
        for version in plan.waiting
    ]
    return lines


class _Run:
    """One run, from where it stands to its end."""

    def __init__(
        self,
        sections: Sections,
        plan: RefreshPlan,
        options: RefreshOptions,
        tell: Tell,
        check_held: CheckHeld,
    ) -> None:
        self._sections = sections
        self._folder = sections.state_folder
        self._plan = plan
        self._state = plan.state
        self._tell = tell
        self._steps = RefreshSteps(
            sections, plan.state, engine=options.engine, include_raw=options.include_raw
        ).by_name()
        self._check_held = check_held

    def to_the_end(self) -> None:
        """Do the steps that are not noted, and write the report."""
        self._state.outcome, self._state.refusal = "running", ""
        self._state.write(self._folder)
        try:
            for name, step in self._steps.items():
                self._tell(self._line(name, self._record(name, step)))
        except GateRefusedError as error:
            self._state.refusal = str(error)
            self._finish("refused")
            raise
        self._finish("published")

    def _record(self, name: str, step: Callable[[], StepResult]) -> StepRecord:
        """Return what is noted of a step, after doing it if nothing is."""
        if name not in self._state.steps:
            self._plan.files.check_unchanged()
            # Each step reads the file anew.
            check_settings(self._sections, self._state.inputs)
            self._check_held()
            logger.info("refresh_step name=%s state=begins", name)
            started = time.monotonic()
            result = step()
            seconds = round(time.monotonic() - started, 1)
            self._state.steps[name] = StepRecord(
                seconds=seconds, summary=result.summary, figures=result.figures
            )
            self._state.write(self._folder)
        return self._state.steps[name]

    def _line(self, name: str, record: StepRecord) -> str:
        return f"  {name:<9}{record.seconds:>8.1f} s  {record.summary}"

    def _finish(self, outcome: Outcome) -> None:
        self._check_held()
        remove_old_encoders(self._sections, self._state)
        if removed := self._state.removed_encoders:
            self._tell(f"removed {len(removed)} old encoder(s): {', '.join(removed)}")
        self._state.outcome, self._state.finished = outcome, datetime.now(UTC)
        path = report_path(self._folder, self._state.codebook_version)
        report = json.dumps(report_of(self._state), indent=2, allow_nan=False)
        replace_file(path, f"{report}\n".encode())
        # Last: killed before this line, the run goes on and writes its report again.
        self._state.write(self._folder)


def report_of(state: RefreshState) -> dict[str, Any]:
    """Return the report of a run that is over.

    Args:
        state: The run.

    Returns:
        Names, outcome, what each step took and found, and the next commands.
    """
    version = state.codebook_version
    is_staged = "publish" in state.steps and state.steps["publish"].figures["state"] == "staged"
    return {
        "outcome": state.outcome,
        "refusal": state.refusal or None,
        "codebook_version": version,
        "encoder_version": state.encoder_version,
        "removed_encoders": state.removed_encoders,
        "num_removed_encoders": len(state.removed_encoders),
        "parent": None if state.parent is None else state.parent.model_dump(),
        "inputs": state.inputs.model_dump(),
        "started": state.started.isoformat(),
        "finished": None if state.finished is None else state.finished.isoformat(),
        "seconds": round(sum(step.seconds for step in state.steps.values()), 1),
        "steps": {name: step.model_dump() for name, step in state.steps.items()},
        "pages": [step.figures["page"] for step in state.steps.values() if "page" in step.figures],
        "next": next_commands(version) if is_staged else [],
    }


def next_commands(version: str) -> list[str]:
    """Return the commands that take a staged version to its readers."""
    return [
        "feast -c feature_repo apply",
        f"qarm rollout start --codebook-version {version}",
        "qarm rollout finish",
    ]

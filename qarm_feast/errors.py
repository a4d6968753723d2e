"""The exceptions that users of this package can meet, one tree, with exit statuses.

QarmError (1)
├── ConfigError (2)              a key in qarm.yaml, an option, a missing optional package
│   └── MissingDependencyError (2)
├── CodebookError (3)            an artifact, a registry state, a quantizer's input
│   ├── CodebookNotFoundError (3)
│   ├── CodebookMismatchError (3)
│   └── CorruptArtifactError (3)
├── DataError (4)                input data, vectors, events, training rows
│   ├── ContractError (4)        a directory that breaks the input contract
│   ├── EventError (4)           one Kafka record that becomes a dead letter
│   └── LeakError (4)            a training row that has seen the future
├── GateRefusedError (5)         a quality gate said no
├── ServiceUnavailableError (6)  a broker or a store that does not answer
│   └── GpuLostError (6)         a GPU that fails while a process uses it
└── AlreadyRunningError (7)      another process is at this very work, and holds its lock

2 or 3: what options, ``qarm.yaml`` and the environment alone decide is 2 (a version name that is
illegal, sizes that contradict each other); what takes a look at the vectors, an artifact or the
registry is 3 (a version that is not there, more centroids than distinct vectors). A message holds
both values, the place, and the next command.
"""

from collections.abc import Sequence


class QarmError(Exception):
    """A fault that the user can mend; ``exit_code`` is the command line's exit status."""

    exit_code = 1


class ConfigError(QarmError):
    """The configuration or the installation does not allow what was asked."""

    exit_code = 2


class MissingDependencyError(ConfigError):
    """An optional package is needed and absent."""

    def __init__(self, *, package: str, needed_for: str, command: str) -> None:
        super().__init__(f"{needed_for} needs the package {package!r}; install it with `{command}`")


class CodebookError(QarmError):
    """A codebook cannot be trained, stored, loaded or applied."""

    exit_code = 3


class CodebookNotFoundError(CodebookError):
    """The registry holds no such version, or only as a draft (``is_trained``)."""

    def __init__(
        self,
        *,
        version: str,
        uri: str,
        known: Sequence[str],
        drafts: Sequence[str] = (),
        is_trained: bool = False,
    ) -> None:
        listed = ", ".join(known) if known else "none"
        if drafts:
            listed += f"; drafts: {', '.join(drafts)}"
        if is_trained:
            remedy = f"run `qarm codebook publish --codebook-version {version}` first"
        elif known or drafts:
            remedy = "name one of these; `qarm codebook list` tells more of them"
        else:
            remedy = f"run `qarm codebook train --codebook-version {version}` first"
        kind = "published " if is_trained else ""
        super().__init__(
            f"{uri} holds no {kind}codebook version {version!r} (it holds: {listed}); {remedy}"
        )


class CodebookMismatchError(CodebookError):
    """Codes or vectors of one version meet a process that loaded another."""

    def __init__(self, *, expected: str, found: str, where: str, command: str) -> None:
        super().__init__(
            f"{where} belongs to version {found!r}, but this process loaded {expected!r}; "
            f"run `{command}`"
        )


class CorruptArtifactError(CodebookError):
    """A file of an artifact is missing (``found`` None), or has another hash than its manifest."""

    def __init__(self, *, path: str, expected: str, found: str | None, remedy: str) -> None:
        state = (
            f"is missing, its manifest names it with SHA-256 {expected}"
            if found is None
            else f"has SHA-256 {found}, its manifest says {expected}"
        )
        super().__init__(f"{path} {state}; {remedy}")


class DataError(QarmError):
    """Input data cannot be used as it is."""

    exit_code = 4


class ContractError(DataError):
    """A data directory breaks the input contract; lists every problem found."""

    def __init__(self, directory: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(
            f"{directory} breaks the input contract in {len(problems)} place(s):\n{lines}\n"
            "mend the files (README, 'Your own data') and run the same command again"
        )


class EventError(DataError):
    """One record cannot become rows; ``reason`` is the dead letter's header."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class LeakError(DataError):
    """Training rows hold something that was not known at their label's time."""


class GateRefusedError(QarmError):
    """A quality gate of ``qarm.yaml`` refused an artifact; nothing was published."""

    exit_code = 5


class ServiceUnavailableError(QarmError):
    """A broker or a store did not answer in time."""

    exit_code = 6


class GpuLostError(ServiceUnavailableError):
    """A search on a GPU failed, and the processor may not take over."""


class AlreadyRunningError(QarmError):
    """Another process does the same work at this moment; a scheduler need only wait."""

    exit_code = 7

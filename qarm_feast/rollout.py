"""A codebook version from staged to default, and the version before it to retired: step by step.

:meth:`Rollout.start` takes these steps, and :meth:`Rollout.finish` the last two:

1. The record of the rollout is written: which version, in place of which.
2. `feast apply` has declared the version's view; this is asked for, not done.
3. The version becomes live: workers write it beside the others. One that is still acknowledged
   from an earlier rollout is not made live before the owners have withdrawn it: their first
   offsets would hide what was stored without it in between.
4. The owner of each partition acknowledges the version, with the first offset written in it. These
   offsets are kept: what lies before them is the backfill's, and any later owner writes on.
5. The backfill fills up what lies before them; partitions that the topic got meanwhile have to be
   acknowledged and filled up, too.
6. A sample of the old view is held against the new one.
7. The version becomes the default, the old one live.
8. The old version is retired: from here on there is no way back to it.
9. The owners withdraw the old version; then nothing writes its view, and `feast apply` drops it.

Each step looks at the world first and does what is left, so a process that is killed anywhere is
followed by another one with the same command. Only what no look can tell is kept, in
``rollout.json`` beside the registry: the two versions, the offsets, and that backfill and
comparison came to their end.

Training a ranker on the new version, switching services to it and letting the old ones drain lies
between 7 and 8 and is the user's. Nothing here reads Kafka or Feast: :class:`RolloutParts` does.
May import: pydantic, filelock, the registry.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from qarm_feast.errors import (
    CodebookError,
    CodebookMismatchError,
    ConfigError,
    DataError,
    ServiceUnavailableError,
)
from qarm_feast.object_store import place
from qarm_feast.registry import CodebookRegistry, VersionState, read_manifest
from qarm_feast.rollout_status import (
    GONE,
    WRITTEN,
    FirstOffset,
    Partition,
    Phase,
    RolloutParts,
    RolloutRecord,
    RolloutStatus,
    RolloutView,
    shortened,
)
from qarm_feast.schema import code_view_name
from qarm_feast.shared_state import CheckHeld, LockTakenError, SharedDocument, Snapshot, exclusive

logger = logging.getLogger(__name__)

RECORD_NAME = "rollout.json"
_LOCK_NAME = ".rollout.lock"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Patience:
    """How long to wait for the owners of partitions."""

    seconds: float = 60.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Rollout:
    """Walks one version at a time; every change is made under a lock.

    Args:
        registry: States of the versions.
        parts: The world around it.
        patience: How long to wait for the owners of partitions.
    """

    def __init__(
        self, registry: CodebookRegistry, parts: RolloutParts, patience: Patience | None = None
    ) -> None:
        self._registry = registry
        self._parts = parts
        self._view = RolloutView(registry, parts)
        self._patience = patience or Patience()
        self._document = SharedDocument(place(registry.uri) / RECORD_NAME)
        self._read = Snapshot(None)
        self._check_held: CheckHeld = lambda: None

    def plan(self, version: str) -> RolloutStatus:
        """Return what :meth:`start` would do and what is done already; changes nothing.

        Args:
            version: The version to roll out.

        Returns:
            The steps.

        Raises:
            CodebookNotFoundError: If the version is not published.
            CodebookError: If it cannot be rolled out, or another rollout is half done.
            CodebookMismatchError: If workers cannot encode for it.
        """
        return self._view.status_of(self._continued(version) or self._anew(version))

    def status(self) -> RolloutStatus:
        """Return the rollout under way or the last one; changes nothing."""
        record = self.record()
        if record is None:
            default = self._registry.default_version()
            text = f"`qarm rollout plan --codebook-version VERSION`; the default is {default}"
            return RolloutStatus(None, (), text)
        return self._view.status_of(record)

    def start(self, version: str) -> RolloutStatus:
        """Take a staged version up to the default; called again, it goes on where it was.

        Args:
            version: The version to roll out.

        Returns:
            The steps as they are afterwards.

        Raises:
            CodebookError: If the version cannot be rolled out, another rollout is half done or
                runs now, or somebody changed the states in between.
            ConfigError: If ``feast apply`` has not declared the view.
            DataError: If the new view does not hold what the old one holds.
            ServiceUnavailableError: If owners do not acknowledge the version in time, or the
                broker or a store does not answer.
        """
        with self._lock():
            record = self._continued(version)
            if record is None:
                update = {"phase": Phase.UNDER_WAY}
                record = self._store(self._anew(version).model_copy(update=update))
            self._check_unchanged(record)
            self._check_view(version)
            self._make_live(record)
            record = self._fill_up(record)
            record = self._compare(record)
            # A backfill may take hours in which somebody made another version the default.
            self._check_unchanged(record)
            if self._registry.states()[version] is not VersionState.DEFAULT:
                self._set_state(version, VersionState.DEFAULT)
                logger.info("rollout_default version=%s previous=%s", version, record.previous)
            return self._view.status_of(record)

    def finish(self) -> RolloutStatus:
        """Retire the old version once nobody reads it; called again, it changes nothing.

        Returns:
            The steps as they are afterwards.

        Raises:
            CodebookError: If no rollout is there, the new version is not the default yet, or
                another process is at it.
            ServiceUnavailableError: If workers do not stop writing the old version in time.
        """
        with self._lock():
            record = self.check_finishable()
            if record.phase is Phase.FINISHED:
                return self._view.status_of(record)
            previous = record.previous
            if self._registry.states()[previous] not in GONE:
                self._set_state(previous, VersionState.RETIRED)
                logger.info("rollout_retired version=%s", previous)
            self._await_withdrawal(previous, "finish")
            return self._view.status_of(
                self._store(record.model_copy(update={"phase": Phase.FINISHED}))
            )

    def check_finishable(self) -> RolloutRecord:
        """Return the rollout that :meth:`finish` would end, or has ended.

        Returns:
            Its record.

        Raises:
            CodebookError: If no rollout is there, or its version is not the default yet.
        """
        record = self.record()
        if record is None or record.phase is Phase.UNDONE:
            raise CodebookError(
                f"no rollout is under way in {self._registry.uri}; run "
                "`qarm rollout start --codebook-version VERSION` first"
            )
        if record.phase is Phase.FINISHED:
            return record
        self._check_not_undoing(record)
        self._check_unchanged(record)
        state = self._registry.states()[record.version]
        if state is not VersionState.DEFAULT or record.verification is None:
            raise CodebookError(
                f"the rollout of {record.version!r} is not far enough to retire "
                f"{record.previous!r}: {record.version!r} is {state.value}, and its rows are "
                f"{'compared' if record.verification else 'not compared yet'}; run "
                f"`qarm rollout start --codebook-version {record.version}` first"
            )
        return record

    def undo(self) -> RolloutStatus:
        """Give the default back to the old version, the new one its state before.

        1. The record says that this is on its way back, so that nothing goes on from here.
        2. If the new version is the default, the old one becomes it.
        3. The new version gets its state before the rollout; staged, so workers stop writing it.

        Views and rows of the new version stay; nothing reads them. Called again, and where there
        is no rollout, it changes nothing.

        Returns:
            The steps as they are afterwards.

        Raises:
            CodebookError: If the old version is retired, so that nothing has written it since; or
                another process is at it.
        """
        with self._lock():
            record = self.record()
            if record is None or record.phase is Phase.UNDONE:
                return self.status()
            self._check_way_back(record)
            # What was filled up and compared has holes from the moment workers stop.
            forgotten = {"first_offsets": (), "backfill": None, "verification": None}
            update = forgotten | {"phase": Phase.UNDOING}
            record = self._store(record.model_copy(update=update))
            if self._registry.states().get(record.version) is VersionState.DEFAULT:
                self._set_state(record.previous, VersionState.DEFAULT)
            if self._registry.states().get(record.version) is VersionState.LIVE:
                self._set_state(record.version, record.found_as)
            logger.info("rollout_undone version=%s default=%s", record.version, record.previous)
            return self._view.status_of(
                self._store(record.model_copy(update={"phase": Phase.UNDONE}))
            )

    def record(self) -> RolloutRecord | None:
        """Return the rollout under way or the last one; None: there was none.

        Returns:
            What is stored.

        Raises:
            CodebookError: If the file is damaged.
        """
        self._read = self._document.read()
        if self._read.payload is None:
            return None
        try:
            return RolloutRecord.model_validate_json(self._read.payload)
        except ValidationError as error:
            raise CodebookError(
                f"{self._document.file(self._read)} is no rollout that this version of qarm-feast "
                f"reads: {error}; put back a copy of it, or look at the states with `qarm codebook "
                f"list`, remove {self._document.path} (in an object store all that lies below it) "
                "and run `qarm rollout start --codebook-version VERSION` again"
            ) from error

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the lock, which a process that is killed gives back; nobody waits for it."""
        try:
            lock = place(self._registry.uri) / _LOCK_NAME
            with exclusive(lock, wait_seconds=0) as self._check_held:
                yield
        except LockTakenError as error:
            raise CodebookError(
                f"another `qarm rollout` is at work on {self._registry.uri}; let it finish, look "
                f"with `qarm rollout status`, or {error}"
            ) from error

    def _set_state(self, version: str, state: VersionState) -> None:
        # A process that slept through its lease may have been undone meanwhile.
        self._check_held()
        self._registry.set_state(version, state)

    def _store(self, record: RolloutRecord) -> RolloutRecord:
        payload = (record.model_dump_json(indent=2) + "\n").encode()
        stored = self._document.replace(self._read, payload)
        if stored is None:
            raise CodebookError(
                f"another process changed {self._document.path} at the same time; look with `qarm "
                "rollout status`, then run the same command again"
            )
        self._read = stored
        return record

    def _continued(self, version: str) -> RolloutRecord | None:
        """Return the record to go on with, None if there is none; refuse another version."""
        record = self.record()
        if record is None or record.phase in (Phase.UNDONE, Phase.FINISHED):
            return None
        if record.phase is Phase.UNDOING and self._view.is_past_return(record):
            # Somebody retired the old version half way back: this one is over, too.
            return None
        self._check_not_undoing(record)
        if record.version != version:
            raise CodebookError(
                f"the rollout of {record.version!r} in place of {record.previous!r} is half done, "
                f"{version!r} has to wait: run {self._view.next_command(record)}, or "
                "`qarm rollout undo`"
            )
        return record

    def _anew(self, version: str) -> RolloutRecord:
        self._registry.check_published(version)
        state, previous = self._registry.states()[version], self._registry.default_version()
        if state is VersionState.DEFAULT:
            raise CodebookError(
                f"codebook version {version!r} is the default of {self._registry.uri} already; "
                "publish another one, then `qarm rollout plan --codebook-version OTHER`"
            )
        if state is VersionState.RETIRED:
            raise CodebookError(
                f"codebook version {version!r} is retired: nothing has written its rows since; "
                "publish a new version with `qarm codebook train --codebook-version "
                f"{self._registry.next_name(version)} --parent {version}`"
            )
        self._check_encoder(version, previous)
        return RolloutRecord(
            version=version,
            previous=previous,
            found_as=state,
            phase=Phase.PLANNED,
            started=datetime.now(UTC),
        )

    def _check_encoder(self, version: str, previous: str) -> None:
        uri = self._registry.uri
        new, old = (read_manifest(uri, name) for name in (version, previous))
        if new.encoder_version == old.encoder_version:
            if new.encoder_hash != old.encoder_hash:
                raise CodebookMismatchError(
                    expected=f"{old.encoder_version} ({old.encoder_hash[:12]}), that of {previous}",
                    found=f"{new.encoder_version} ({new.encoder_hash[:12]})",
                    where=f"codebook {version!r} (encoder)",
                    command=f"qarm codebook train --codebook-version "
                    f"{self._registry.next_name(version)}",
                )
        elif not self._parts.has_encoder(new.encoder_version):
            raise ConfigError(
                f"codebook {version!r} takes vectors of encoder {new.encoder_version!r}, the "
                f"default {previous!r} of {old.encoder_version!r}, and no encoder "
                f"{new.encoder_version!r} is stored in alignment.encoder_uri: no worker could "
                "encode an item for it; put the encoder there, or run `qarm align train` with "
                f"alignment.encoder_version={new.encoder_version}"
            )

    def _check_not_undoing(self, record: RolloutRecord) -> None:
        if record.phase is Phase.UNDOING:
            raise CodebookError(
                f"the rollout of {record.version!r} was being undone and is half way back; run "
                "`qarm rollout undo` to the end first"
            )

    def _check_unchanged(self, record: RolloutRecord) -> None:
        fault = self._view.outside_change(record)
        if fault:
            raise CodebookError(f"{fault}; run `qarm rollout undo`")

    def _check_way_back(self, record: RolloutRecord) -> None:
        if self._view.is_past_return(record) or record.phase is Phase.FINISHED:
            old = self._registry.states()[record.previous]
            raise CodebookError(
                f"{record.previous!r} is {old.value}, nothing has written its rows since, so "
                f"{record.version!r} cannot be undone any more; run `qarm codebook train "
                f"--codebook-version {self._registry.next_name(record.version)} --parent "
                f"{record.version}` for another version, and roll that out"
            )

    def _check_view(self, version: str) -> None:
        if not self._parts.has_view(version):
            raise ConfigError(
                f"the feature repository has no view {code_view_name(version)!r}; run `feast "
                f"apply`, then `qarm rollout start --codebook-version {version}` again"
            )

    def _make_live(self, record: RolloutRecord) -> None:
        if self._registry.states()[record.version] in WRITTEN:
            return
        self._await_withdrawal(record.version, f"start --codebook-version {record.version}")
        self._set_state(record.version, VersionState.LIVE)
        logger.info("rollout_live version=%s", record.version)

    def _await_withdrawal(self, version: str, command: str) -> None:
        def still_told() -> list[Partition]:
            offsets = self._parts.first_offsets(version)
            return sorted(place for place, offset in offsets.items() if offset is not None)

        self._wait_until_none(still_told, f"acknowledge {version!r} still", command)

    def _await_owners(self, record: RolloutRecord) -> RolloutRecord:
        if record.first_offsets:
            return record
        found: dict[Partition, int | None] = {}

        def missing() -> list[Partition]:
            found.update(self._parts.first_offsets(record.version))
            return sorted(place for place, offset in found.items() if offset is None)

        self._wait_until_none(
            missing,
            f"do not acknowledge {record.version!r} yet",
            f"start --codebook-version {record.version}",
        )
        offsets = tuple(
            FirstOffset(*place, offset)
            for place, offset in sorted(found.items())
            if offset is not None
        )
        logger.info("rollout_acknowledged version=%s partitions=%d", record.version, len(offsets))
        return self._store(record.model_copy(update={"first_offsets": offsets}))

    def _wait_until_none(
        self, look: Callable[[], list[Partition]], what: str, command: str
    ) -> None:
        deadline = self._patience.clock() + self._patience.seconds
        while places := look():
            if self._patience.clock() >= deadline:
                raise ServiceUnavailableError(
                    f"after {self._patience.seconds:g} s the owners of {_names(places)} {what}; "
                    "see that workers run (`qarm-stream run`) and what they log, then "
                    f"`qarm rollout {command}` goes on from here"
                )
            self._patience.sleep(_POLL_SECONDS)

    def _fill_up(self, record: RolloutRecord) -> RolloutRecord:
        """Fill up to where the owners began, again if the topic has got more partitions by then."""
        while record.backfill is None:
            record = self._await_owners(record)
            up_to = {(topic, number): offset for topic, number, offset in record.first_offsets}
            counts = self._parts.backfill(record.version, up_to)
            logger.info("rollout_backfilled version=%s counts=%s", record.version, counts)
            is_all = self._parts.first_offsets(record.version).keys() <= up_to.keys()
            update = {"backfill": str(counts)} if is_all else {"first_offsets": ()}
            record = self._store(record.model_copy(update=update))
        return record

    def _compare(self, record: RolloutRecord) -> RolloutRecord:
        if record.verification is not None:
            return record
        verdict = self._parts.verify(record.version, record.previous)
        faults = verdict.faults()
        if faults:
            # What was taken for filled up is not: the next start asks and fills anew.
            self._store(record.model_copy(update={"first_offsets": (), "backfill": None}))
            raise DataError(
                f"{code_view_name(record.version)} does not hold what "
                f"{code_view_name(record.previous)} holds ({verdict}):\n"
                + "\n".join(f"  - {fault}" for fault in faults)
                + f"\n{record.previous!r} stays the default; items that the backfill refused stand "
                "in its log, rows that the online store has lost come back with `feast "
                f"materialize`; then run `qarm rollout start --codebook-version {record.version}`, "
                "which asks the owners and fills up again, or `qarm rollout undo`"
            )
        logger.info("rollout_compared version=%s result=%s", record.version, verdict)
        return self._store(record.model_copy(update={"verification": str(verdict)}))


def _names(places: list[Partition]) -> str:
    return shortened([f"{topic} {partition}" for topic, partition in places])

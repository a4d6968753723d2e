"""The audit over a real repository: served through the reader, joined by Feast."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from click.testing import CliRunner
from feast import FeatureStore

from qarm_feast.audit import Answer, AuditReport, _Write, audit, audit_command, explain
from qarm_feast.code_log import CodeLog
from qarm_feast.compaction import Compactor
from qarm_feast.errors import DataError
from qarm_feast.feature_views import CodebookFacts, item_code_view
from qarm_feast.offline_store import open_code_log
from qarm_feast.online_stores import code_online_store
from qarm_feast.reader import CodeReader
from qarm_feast.repo_paths import open_feature_store
from qarm_feast.schema import CODE_ROWS
from qarm_feast.serving_log import NO_CODES, ServingLog, ServingLogConfig, codes_hash

START = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
LAG = timedelta(seconds=10)
NEVER: dict[str, int] = dict.fromkeys(
    ("equal", "taken_down", "unknown", "written_after", "differing", "unchecked"), 0
)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@dataclass
class Repository:
    """A repository with a code view, whose clock the test sets."""

    directory: Path
    store: FeatureStore

    @property
    def log(self) -> CodeLog:
        return open_code_log(self.store.config)

    def write(
        self,
        rows: Sequence[tuple[int, list[int]]],
        event: float,
        created: float,
        places: str = "offline online",
    ) -> None:
        """Write rows of (item, RQ codes), [-1, -1] for a takedown, into the places named."""
        table = pa.table(
            {
                "item_id": [item for item, _ in rows],
                "rq_code": [codes for _, codes in rows],
                "vq_code": [[codes[0]] for _, codes in rows],
                "encoder_version": ["e1"] * len(rows),
                "content_hash": [f"h{event}"] * len(rows),
                "is_deleted": [codes[0] == -1 for _, codes in rows],
                "event_timestamp": [at(event)] * len(rows),
                "created": [at(created)] * len(rows),
            },
            schema=CODE_ROWS,
        )
        if "offline" in places:
            self.log.append("item_codes_v1", table)
        if "online" in places:
            view = self.store.get_feature_view("item_codes_v1")
            code_online_store(self.store).write_table(self.store.config, view, table)

    def serve(self, item_ids: list[int], moment: float) -> None:
        config = ServingLogConfig(sample_rate=1.0)
        serving_log = ServingLog(self.log, config, clock=lambda: at(moment))
        CodeReader(self.store, "v1", serving_log).read_codes(np.array(item_ids))
        serving_log.close()

    def audit(self) -> AuditReport:
        return audit(self.store, self.log, START, at(3600), LAG)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "feature_store.yaml").write_text(
        "project: test\n"
        "provider: local\n"
        "registry: {registry_type: sql, path: 'sqlite:///data/registry.db'}\n"
        "online_store:\n"
        "  {type: qarm_feast.online_stores.sqlite.CodeSqliteOnlineStore, path: data/online.db}\n"
        "offline_store: {type: qarm_feast.offline_store.CodeLogOfflineStore}\n"
        "entity_key_serialization_version: 3\n"
    )
    (tmp_path / "qarm.yaml").write_text("{}")
    store = open_feature_store(tmp_path)
    store.apply([item_code_view("v1", CodebookFacts("e1", 2, 1))])
    return Repository(tmp_path, store)


def test_what_both_stores_hold_is_equal_taken_down_or_unknown(repository: Repository) -> None:
    repository.write([(1, [3, 4]), (2, [5, 6])], event=0, created=0)
    repository.write([(2, [-1, -1])], event=20, created=20)

    repository.serve([1, 2, 9, 1], moment=100)

    report = repository.audit()
    assert report.counts == NEVER | {"equal": 2, "taken_down": 1, "unknown": 1}
    assert report.differences == ()


def test_a_planted_difference_is_reported_with_both_hashes(repository: Repository) -> None:
    repository.write([(1, [3, 4]), (2, [5, 6]), (3, [7, 8])], event=0, created=0)
    repository.write([(1, [3, 5])], event=1, created=1, places="online")
    repository.write([(4, [1, 1])], event=1, created=1, places="offline")
    repository.write([(3, [-1, -1])], event=1, created=1, places="offline")

    repository.serve([1, 2, 3, 4], moment=100)

    report = repository.audit()
    assert report.counts == NEVER | {"equal": 1, "differing": 3}
    assert [(d.item_id, d.reason, d.served_hash, d.offline_hash) for d in report.differences] == [
        (1, "not_offline", codes_hash([3, 5], [3]), codes_hash([3, 4], [3])),
        (3, "other_row", codes_hash([7, 8], [7]), NO_CODES),
        (4, "not_served", NO_CODES, codes_hash([1, 1], [1])),
    ]
    assert {(d.codebook_version, d.served_at) for d in report.differences} == {
        ("v1", at(100).isoformat())
    }


def test_rows_that_changed_after_the_answer_are_no_difference(repository: Repository) -> None:
    repository.write([(1, [3, 4]), (2, [5, 6])], event=0, created=0)
    repository.serve([1, 2, 7], moment=100)

    # A late worker: the events are older than the answer, their rows are not.
    repository.write([(1, [3, 9]), (7, [1, 1])], event=50, created=200)
    repository.write([(2, [-1, -1])], event=60, created=200)
    # And an edit that happened after the answer, which the join does not see.
    repository.write([(1, [8, 8])], event=300, created=301)

    assert repository.audit().counts == NEVER | {"written_after": 3}


def test_a_row_may_take_the_lag_until_it_is_online_and_no_longer(repository: Repository) -> None:
    repository.write([(1, [3, 4])], event=0, created=0)
    repository.write([(1, [3, 5])], event=90, created=95, places="offline")

    repository.serve([1], moment=100)
    repository.serve([1], moment=106)

    report = repository.audit()
    assert report.counts == NEVER | {"written_after": 1, "differing": 1}
    assert [(d.served_at, d.reason) for d in report.differences] == [
        (at(106).isoformat(), "other_row")
    ]


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_explained_as_a_store_that_is_watched_second_by_second(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes = set()
    for _ in range(300):
        writes = [
            _Write(at(event), f"h{code}", at(created), code)
            for event, created, code in zip(
                rng.integers(0, 12, 3).tolist(),
                rng.integers(0, 12, 3).tolist(),
                rng.choice(["a", "b", ""], 3).tolist(),
                strict=True,
            )
        ]
        served, offline = rng.permutation(["a", "b", ""])[:2].tolist()
        moment = int(rng.integers(2, 12))

        answer = Answer(1, "v1", at(moment), served)
        reason = explain(answer, offline, writes, timedelta(seconds=2))

        assert reason == _watched(writes, served, offline, moment, 2)
        outcomes.add(reason)
    assert outcomes == {
        "written_after",
        "event_time_ahead",
        "not_joined",
        "not_served",
        "other_row",
        "not_offline",
    }


def _watched(writes: list[_Write], served: str, offline: str, moment: int, lag: int) -> str:
    was_held = False
    for second in range(moment - lag, moment + 1):
        held, ahead, newest, is_joined_later = "", False, (at(-1), ""), False
        for write in writes:
            key, is_seen = (write.event_time, write.content_hash), write.event_time <= at(moment)
            was_there = write.created <= at(second)
            is_joined_later |= not was_there and is_seen and write.codes_hash == offline
            was_there |= is_seen and write.codes_hash == served
            if was_there and key > newest:
                held, ahead, newest = write.codes_hash, not is_seen, key
        if held == served and ahead:
            return "event_time_ahead"
        if held == served and is_joined_later:
            return "written_after"
        was_held |= held == served
    if was_held:
        return "not_joined"
    if served == "":
        return "not_served"
    return "other_row" if served in [write.codes_hash for write in writes] else "not_offline"


def test_a_row_of_a_later_event_time_is_a_difference(repository: Repository) -> None:
    repository.write([(1, [3, 4])], event=0, created=0)
    repository.write([(1, [3, 5])], event=150, created=50)

    repository.serve([1], moment=100)

    assert [d.reason for d in repository.audit().differences] == ["event_time_ahead"]


def test_a_join_that_reads_another_log_is_a_difference(repository: Repository) -> None:
    repository.write([(1, [3, 4])], event=0, created=0)
    repository.write([(1, [3, 5])], event=50, created=50)
    repository.serve([1], moment=100)
    # offline_store.uri was changed without `feast apply`: joins go on with an old copy.
    stale = repository.directory / "stale"
    rows = repository.log.read("item_codes_v1", where=pc.field("content_hash") == "h0")
    CodeLog(stale).append("item_codes_v1", rows)
    repository.store.apply([item_code_view("v1", CodebookFacts("e1", 2, 1), str(stale))])

    report = repository.audit()

    assert report.counts == NEVER | {"differing": 1}
    assert [(d.reason, d.served_hash, d.offline_hash) for d in report.differences] == [
        ("not_joined", codes_hash([3, 5], [3]), codes_hash([3, 4], [3]))
    ]


def test_a_replay_whose_first_copy_was_compacted_away_is_no_difference(
    repository: Repository,
) -> None:
    repository.write([(1, [3, 4])], event=0, created=0)
    repository.write([(1, [3, 5])], event=50, created=50)
    repository.serve([1], moment=100)
    # The worker was killed before it committed: it begins with the row above, and is late with
    # what came meanwhile.
    repository.write([(1, [3, 5])], event=50, created=200)
    repository.write([(1, [3, 6])], event=80, created=200)
    Compactor(repository.log).compact(is_full=True)

    assert repository.audit().counts == NEVER | {"written_after": 1}


def test_a_replayed_row_and_answers_of_another_time_change_nothing(repository: Repository) -> None:
    repository.write([(1, [3, 4])], event=0, created=0)
    repository.serve([1], moment=100)
    repository.write([(1, [3, 4])], event=0, created=200)
    repository.serve([1], moment=-5)

    assert repository.audit().counts == NEVER | {"equal": 1}


def test_answers_of_a_version_without_a_view_are_counted_apart(repository: Repository) -> None:
    repository.write([(1, [3, 4])], event=0, created=0)
    repository.serve([1], moment=100)
    repository.store.delete_feature_view("item_codes_v1")

    assert repository.audit().counts == NEVER | {"unchecked": 1}


def test_the_command_prints_differences_and_counts_as_json_and_fails(
    repository: Repository,
) -> None:
    repository.write([(1, [3, 4]), (2, [5, 6])], event=0, created=0)
    repository.write([(1, [3, 5])], event=1, created=1, places="online")
    repository.serve([1, 2], moment=100)

    ran = CliRunner().invoke(audit_command, ["--config", str(repository.directory / "qarm.yaml")])

    difference, counts = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (difference["item_id"], difference["reason"]) == (1, "not_offline")
    assert counts == NEVER | {"equal": 1, "differing": 1}
    assert isinstance(ran.exception, DataError)
    assert ran.exception.exit_code == 4
    assert "1 of 2 served answers differ" in str(ran.exception)


def test_without_differences_the_command_succeeds(repository: Repository) -> None:
    repository.write([(1, [3, 4])], event=0, created=0)
    repository.serve([1], moment=100)

    ran = CliRunner().invoke(audit_command, ["--config", str(repository.directory / "qarm.yaml")])

    assert ran.exit_code == 0
    assert json.loads(ran.stdout) == NEVER | {"equal": 1}


@pytest.mark.parametrize("option", ["--hours", "--lag-seconds"])
def test_a_time_that_no_date_can_hold_is_refused_as_a_usage_error(
    repository: Repository, option: str
) -> None:
    config_path = str(repository.directory / "qarm.yaml")

    ran = CliRunner().invoke(audit_command, ["--config", config_path, option, "1e15"])

    assert ran.exit_code == 2
    assert option in ran.stderr


def test_without_a_serving_log_the_audit_says_how_to_get_one(repository: Repository) -> None:
    with pytest.raises(DataError, match=r"set serving_log\.sample_rate"):
        repository.audit()

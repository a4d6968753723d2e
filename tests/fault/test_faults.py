"""The short form of the fault run: every fault, fewer times; and the checker checked."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest

from examples.quickstart.broker import KafkaBroker
from streaming.messages import UserErasure
from tests.fault.harness import Bench
from tests.fault.scenarios import SCENARIOS, SHORT, SHORT_SCENARIOS
from tests.fault.traffic import NUM_ITEMS
from tests.fault.truth import check_stores, make_truth

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    # kafka-python leaves the sockets of refused connections open while a broker is down.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SEED = 1


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("fault")
    with KafkaBroker(directory / "broker") as broker:
        yield Bench(directory, broker, SEED)


@pytest.fixture(autouse=True)
def _own_garbage() -> Iterator[None]:
    """Close those sockets here, where the warning is expected."""
    yield
    gc.collect()


@pytest.mark.parametrize("name", SHORT_SCENARIOS)
def test_nothing_is_lost_stale_or_wrong_after(name: str, bench: Bench) -> None:
    outcome = SCENARIOS[name](bench, SHORT)

    verdict = outcome.verdict
    counts = (verdict.lost, verdict.stale, verdict.wrong, verdict.duplicated)
    assert counts == (0, 0, 0, 0), verdict.examples
    assert outcome.problems == []
    assert outcome.num_faults > 0
    assert verdict.rows_expected > 0


def test_the_checker_tells_lost_stale_and_wrong_rows_apart(bench: Bench) -> None:
    with bench.scenario("checker") as run:
        run.start_workers(1)
        # However soon the worker is there: some of every kind of event have been sent.
        run.sleep(4.0)
        parcels = run.drain()
        items = [item for parcel in parcels for item in parcel.items]
        interactions = [event for parcel in parcels for event in parcel.interactions]
        truth = make_truth(run.repo, items, interactions)
        newest = next(key for key in truth.newest().values() if truth.codes[key] is not None)
        later = newest._replace(event_timestamp=newest.event_timestamp + 1)
        unknown = newest._replace(item_id=NUM_ITEMS)
        without_newest = {key: codes for key, codes in truth.codes.items() if key != newest}

        right = check_stores(run.repo, truth)
        more = {**truth.codes, later: None, unknown: None}
        behind = check_stores(run.repo, replace(truth, codes=more))
        ahead = check_stores(run.repo, replace(truth, codes=without_newest))
        recoded = check_stores(run.repo, replace(truth, codes={**truth.codes, newest: ((), ())}))
        click = max(row for row in truth.interactions if row.labels[0])
        unheard = UserErasure(click.user_id, click.event_timestamp + 1_000_000_000)
        not_erased = check_stores(run.repo, replace(truth, erasures=truth.erasures | {unheard}))

    assert right.is_good
    assert truth.erasures
    # The list in both stores, and the erasure in its log.
    assert (not_erased.lost, not_erased.stale, not_erased.wrong) == (1, 2, 0)
    # The new item online, and both events in the code log and in the content log.
    assert (behind.lost, behind.stale, behind.wrong) == (5, 1, 0)
    assert (ahead.lost, ahead.stale) == (0, 0)
    assert ahead.wrong > 0
    # Online and offline.
    assert (recoded.lost, recoded.stale, recoded.wrong) == (0, 0, 2)

"""The faults, one function each; every one returns its line of the table."""

import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from streaming.clients import connect_admin
from streaming.config import StreamConfig
from tests.fault.harness import Bench, Outcome, ScenarioRun
from tests.fault.judge import judge
from tests.fault.mutations import make_mutants
from tests.fault.services import SmallDisk, Worker, limit_files, unlimit_files
from tests.fault.traffic import send_all
from tests.fault.truth import check_stores, make_truth

_REDIS_TRIES_SECONDS = 20.0
"""Longer than redis-py itself tries to connect to a server that is gone (14 s)."""


@dataclass(frozen=True)
class Sizes:
    """How often and how long things fail."""

    worker_kills: int = 50
    broker_kills: int = 10
    rebalances: int = 20
    outage_seconds: float = 60.0
    hang_seconds: float = 60.0
    """Longer than redis-py's own tries at a server that hangs (34 s)."""
    zombies: int = 5
    full_disk_seconds: float = 20.0
    mutated_messages: int = 10_000


SHORT = Sizes(
    worker_kills=2,
    broker_kills=1,
    rebalances=2,
    outage_seconds=5.0,
    zombies=1,
    full_disk_seconds=3.0,
    mutated_messages=400,
)


def kill_workers(bench: Bench, sizes: Sizes) -> Outcome:
    """SIGKILL the worker that has just stored a batch, some moments later; start another one.

    After every second kill the group may recover, which is timed; the next one hits it before.
    """
    options = {"session_timeout_ms": 2000, "heartbeat_interval_ms": 400}
    with bench.scenario("worker-kill", on_redis=True, kafka_options=options) as run:
        run.start_workers(3)
        for number in range(sizes.worker_kills):
            victim = run.busy_worker()
            run.pause(0.4)
            run.kill_worker(victim)
            is_timed = number % 2 == 1
            run.fault_ended(is_timed)
            run.start_worker()
            if is_timed:
                run.wait_until_recovered()
        return run.finish()


def kill_broker(bench: Bench, sizes: Sizes) -> Outcome:
    """SIGKILL the broker under load, and start it again on its data and port."""
    with bench.scenario("broker-kill") as run:
        run.start_workers(2)
        for _ in range(sizes.broker_kills):
            run.busy_worker()
            run.pause(0.5)
            bench.broker.kill()
            bench.broker.start()
            run.fault_ended()
            run.wait_until_recovered()
        return run.finish()


def force_rebalances(bench: Bench, sizes: Sizes) -> Outcome:
    """Let workers join and leave, two to four of them."""
    with bench.scenario("rebalance") as run:
        run.start_workers(2)
        num_joined = 0
        for _ in range(sizes.rebalances):
            run.busy_worker()
            run.pause(0.5)
            count = len(run.workers)
            if count == 2 or (count < 4 and run.rng.random() < 0.5):
                num_joined += 1
                run.fault_ended()
                joined = run.start_worker()
                run.wait_for(lambda: joined.num_batches() > 0, "the new worker's first batch")  # noqa: B023  -- called before the next turn
            else:
                run.fault_ended()
                run.stop_worker(run.workers[int(run.rng.integers(count))])
            run.wait_until_recovered()
        run.note = f"{num_joined} joins, {run.num_faults - num_joined} leaves"
        return run.finish()


def lose_online_store(bench: Bench, sizes: Sizes) -> Outcome:
    """Kill redis under load; a while later it comes back with its append-only file."""
    return _hurt_online_store(
        bench,
        "redis-gone",
        (sizes.outage_seconds, _REDIS_TRIES_SECONDS),
        lambda run: run.redis_server.kill(),
        lambda run: run.redis_server.start(),
    )


def hang_online_store(bench: Bench, sizes: Sizes) -> Outcome:
    """Stop redis so that it takes connections and answers nothing."""
    return _hurt_online_store(
        bench,
        "redis-hung",
        (sizes.hang_seconds, sizes.hang_seconds * 2 / 3),
        lambda run: run.redis_server.signal(signal.SIGSTOP),
        lambda run: run.redis_server.signal(signal.SIGCONT),
    )


def wake_zombies(bench: Bench, sizes: Sizes) -> Outcome:
    """Let a worker sleep with old rows in hand while its successor writes newer ones.

    The rows in hand are certain: redis is gone when the worker is stopped, so it sleeps between
    two tries. Redis comes back, the group gives its partitions away, newer events of the same
    items are written; then it wakes and writes what it had.
    """
    with bench.scenario("zombie", on_redis=True) as run:
        run.start_workers(2)
        num_late_writes = 0
        for _ in range(sizes.zombies):
            zombie = run.busy_worker()
            run.redis_server.kill()
            text = "write_failed store=online "
            num_failed = zombie.log().count(text)
            run.wait_for(lambda: zombie.log().count(text) > num_failed, "a write that fails")  # noqa: B023  -- called before the next turn
            zombie.signal(signal.SIGSTOP)
            run.redis_server.start()
            _wait_for_successor(run, zombie)
            num_batches, asleep_at = zombie.num_batches(), len(zombie.log())
            zombie.signal(signal.SIGCONT)
            run.fault_ended()
            run.wait_for(lambda: zombie.num_batches() > num_batches, "the zombie's late write")  # noqa: B023  -- called before the next turn
            # It stored the batch that it slept on if the group then refused the commit.
            num_late_writes += "commit_failed" in zombie.log()[asleep_at:].split("batch_stored")[0]
            run.wait_until_recovered()
        run.note = f"{num_late_writes} late writes under the guard"
        if not num_late_writes:
            run.problems.append("no zombie wrote anything late, so nothing was shown")
        return run.finish()


def fill_disk(bench: Bench, sizes: Sizes) -> Outcome:
    """Fill the disk below the offline store, and free it a while later."""
    with SmallDisk(bench.directory / "small-disk") as disk:
        uri = {"type": "qarm_feast.offline_store.CodeLogOfflineStore", "uri": str(disk.directory)}
        with bench.scenario("disk-full", stores={"offline_store": uri}) as run:
            run.start_workers(2)
            run.busy_worker()
            if disk.is_mounted:
                disk.fill()
            else:
                limit_files(run.workers)
            run.wait_for(lambda: _num_retries(run, "offline") > 0, "a refused write")
            run.sleep(sizes.full_disk_seconds)
            num_retries = _num_retries(run, "offline")
            if disk.is_mounted:
                disk.free()
            else:
                unlimit_files(run.workers)
            run.fault_ended()
            run.wait_until_recovered()
            means = "ENOSPC of a full tmpfs" if disk.is_mounted else "EFBIG by RLIMIT_FSIZE"
            run.note = f"{means} for {sizes.full_disk_seconds:.0f} s, {num_retries} writes refused"
            outcome = run.finish()
            leftovers = [path.name for path in disk.directory.rglob(".*.tmp")]
            if leftovers:
                outcome.problems.append(f"{len(leftovers)} unfinished parts were left behind")
            return outcome


def feed_mutants(bench: Bench, sizes: Sizes) -> Outcome:
    """Send damaged records with valid ones between them; each is stored or a dead letter."""
    with bench.scenario("mutations", rate=0.0) as run:
        config = run.repo.stream_config
        mutants = make_mutants(run.rng, sizes.mutated_messages)
        for _ in range(2):
            run.start_worker()
        send_all(config, [mutant.parcel for mutant in mutants])
        run.num_faults = sum(1 for mutant in mutants if mutant.mutation)
        run.progress.mark()
        run.drain()
        judged = judge(config, mutants)
        run.problems += judged.problems
        run.note = judged.note
        truth = make_truth(run.repo, judged.items, judged.interactions)
        num_events = sum(mutant.parcel.num_events for mutant in mutants)
        return run.outcome(num_events, check_stores(run.repo, truth))


SCENARIOS: dict[str, Callable[[Bench, Sizes], Outcome]] = {
    "worker-kill": kill_workers,
    "broker-kill": kill_broker,
    "rebalance": force_rebalances,
    "redis-gone": lose_online_store,
    "redis-hung": hang_online_store,
    "zombie": wake_zombies,
    "disk-full": fill_disk,
    "mutations": feed_mutants,
}


def _hurt_online_store(
    bench: Bench,
    name: str,
    times: tuple[float, float],
    hurt: Callable[[ScenarioRun], None],
    heal: Callable[[ScenarioRun], None],
) -> Outcome:
    """Run an outage of so many seconds under so long a ``max_poll_interval_ms``."""
    seconds, poll_interval_seconds = times
    options = {
        "session_timeout_ms": 3000,
        "heartbeat_interval_ms": 500,
        "max_poll_interval_ms": round(poll_interval_seconds * 1000),
    }
    retry = min(5.0, seconds / 12)
    with bench.scenario(
        name, on_redis=True, kafka_options=options, max_retry_wait_seconds=retry
    ) as run:
        config = run.repo.stream_config
        run.start_workers(2)
        run.wait_for(lambda: len(_group_members(config)) == 2, "two members")
        run.wait_for(lambda: all(worker.num_batches() > 0 for worker in run.workers), "both")
        before = _group_members(config)
        run.busy_worker()
        hurt(run)
        members = set(before)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            run.sleep(0.5)
            members &= _group_members(config)
        heal(run)
        run.fault_ended()
        run.wait_until_recovered()
        members &= _group_members(config)
        run.note = f"away for {seconds:.0f} s, {len(members)} of {len(before)} members stayed"
        if members != before:
            run.problems.append(f"{len(before - members)} workers left the group")
        return run.finish()


SHORT_SCENARIOS = [name for name in SCENARIOS if name != "redis-hung"]
"""A hang must outlast redis-py's tries to tell anything, which is too long for the short form."""


def _num_retries(run: ScenarioRun, store: str) -> int:
    return sum(worker.num_retries(store) for worker in run.workers)


def _group_members(config: StreamConfig) -> set[str]:
    with closing(connect_admin(config)) as admin:
        described = admin.describe_groups([config.consumer_group])[config.consumer_group]
    return {member["member_id"] for member in described["members"]}


def _wait_for_successor(run: ScenarioRun, zombie: Worker) -> None:
    """Wait until another worker has stored what came while the zombie slept."""
    others = [worker for worker in run.workers if worker is not zombie]
    run.progress.mark()
    run.wait_for(lambda: run.progress.num_open == 0, "the zombie's partitions to be taken over")
    before = sum(worker.num_batches() for worker in others)
    run.wait_for(lambda: sum(w.num_batches() for w in others) > before + 10, "newer events")

"""``python -m tests.fault``: run the faults, print one table, end with 1 if anything is not right.

python -m tests.fault --short --only worker-kill --seed 7
"""

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import click

from examples.quickstart.broker import KafkaBroker
from qarm_feast.errors import QarmError
from tests.fault.harness import HEADINGS, Bench, Outcome
from tests.fault.scenarios import SCENARIOS, SHORT, SHORT_SCENARIOS, Sizes


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Of events and moments.")
@click.option("--only", multiple=True, type=click.Choice(list(SCENARIOS)), help="Run only these.")
@click.option("--short", is_flag=True, help="Fewer and shorter faults, under two minutes.")
@click.option("--keep", is_flag=True, help="Leave logs and data where they are.")
def main(seed: int, only: tuple[str, ...], short: bool, keep: bool) -> None:
    """Kill things and check that no item is lost, stale or wrong."""
    signal.signal(signal.SIGTERM, _end)
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="qarm-fault-"))
    click.echo(f"seed {seed}, logs in {directory}", err=True)
    names = only or (SHORT_SCENARIOS if short else SCENARIOS)
    outcomes, failures = run_all(directory, seed, names, SHORT if short else Sizes())
    click.echo(table(outcomes))
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    click.echo(
        f"seed {seed}, {time.monotonic() - started:.0f} s on {os.cpu_count()} cores, "
        f"load average {load} over 1, 5, 15 minutes"
    )
    for failure in failures:
        click.echo(failure, err=True)
    if not failures and not keep:
        shutil.rmtree(directory)
    sys.exit(1 if failures else 0)


def run_all(
    directory: Path, seed: int, names: Iterable[str], sizes: Sizes
) -> tuple[list[Outcome], list[str]]:
    """Run scenarios on one broker; return the table's lines and everything that is not right."""
    outcomes: list[Outcome] = []
    failures: list[str] = []
    with KafkaBroker(directory / "broker") as broker:
        for name in names:
            try:
                outcome = SCENARIOS[name](Bench(directory, broker, seed), sizes)
            except QarmError as error:
                failures.append(str(error))
            except Exception:  # noqa: BLE001  -- the other scenarios' lines are still wanted
                failures.append(f"{name}: {traceback.format_exc()}")
            else:
                outcomes.append(outcome)
                failures += [f"{name}: {text}" for text in outcome.failures()]
    return outcomes, failures


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as lines of aligned columns."""
    rows = [HEADINGS, *[outcome.cells() for outcome in outcomes]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    words = (0, 1, len(HEADINGS) - 1)
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(cells)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

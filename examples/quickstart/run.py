"""The main job: the whole pipeline on real data, from a directory to a table of measures.

    make quickstart                # ML-100K
    make quickstart DATA=<dir>     # any directory in the input contract
    make clean-run [DATA=<dir>]    # forget what the run has made

Finished stages are reused. Every process that the run starts ends with it, also after Ctrl-C.
"""

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from examples.quickstart import stages
from examples.quickstart.layout import (
    RunLayout,
    StageRecord,
    choose_layout,
    fingerprint,
    prepare_repo,
)
from examples.quickstart.processes import ENDING_SIGNALS, Processes
from examples.quickstart.report import print_report
from qarm_feast.errors import ConfigError, QarmError


def main() -> None:
    """Run all stages that have not finished, then print the table."""
    arguments = _parse_arguments()
    # All take the same way out as Ctrl-C, through the clean-up of every `with` block.
    for number in ENDING_SIGNALS:
        # nohup ignores SIGHUP.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        _run(arguments)
    except QarmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; finished stages are kept, the same command goes on", file=sys.stderr)
        sys.exit(130)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make quickstart", description=__doc__)
    parser.add_argument("--data", default=None, help="A directory in the input contract.")
    parser.add_argument("--clean", action="store_true", help="Remove what the run has made.")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> None:
    layout = choose_layout(arguments.data)
    with _sole_run(layout):
        if arguments.clean:
            _clean(layout)
        else:
            _run_stages(layout)


@contextmanager
def _sole_run(layout: RunLayout) -> Iterator[None]:
    """Hold the run's lock, which lies beside its state so that cleaning leaves it alone.

    Raises:
        ConfigError: If another process holds it.
    """
    layout.repo_dir.mkdir(parents=True, exist_ok=True)
    path = layout.repo_dir / ".run.lock"
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(
            f"another run works in {layout.repo_dir} (it holds {path}); wait for its end"
        ) from error


def _clean(layout: RunLayout) -> None:
    if layout.data_dir.exists():
        shutil.rmtree(layout.data_dir)
    print(f"removed {layout.data_dir}")


def _run_stages(layout: RunLayout) -> None:
    prepare_repo(layout)
    record = StageRecord(layout.data_dir / "run.json", fingerprint(layout))
    with Processes(layout.log_dir, stages.child_environment()) as processes:
        context = stages.Context(layout=layout, processes=processes, record=record)
        for number, stage in enumerate(stages.STAGES, start=1):
            _run_stage(context, stage, f"[{number}/{len(stages.STAGES)}]")
    print_report(layout, record)


def _run_stage(context: stages.Context, stage: stages.Stage, number: str) -> None:
    if context.record.result(stage.name) is not None:
        print(f"{number} {stage.title}: reused", flush=True)
        return
    print(f"{number} {stage.title}", flush=True)
    start = time.monotonic()
    result: dict[str, Any] = stage.run(context)
    seconds = time.monotonic() - start
    context.record.finish(stage.name, seconds, result)
    print(f"{number} {stage.title}: done in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()

"""Stopping on a signal: SIGTERM or SIGINT asks, all ranks agree on the step, the run saves itself.

torchrun sends the signal to every worker, but not at the same step; a rank that stopped alone
would leave the others waiting in an exchange. torchrun kills what has not ended 30 seconds after
the signal: where eight steps, an evaluation or a checkpoint take longer, set
``ranker.checkpoint_every_steps``.
May import: torch.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from qarm_feast.errors import QarmError

AGREE_EVERY_STEPS = 8
"""Steps between two looks at what the other ranks were asked: one small exchange each."""


class TrainingInterruptedError(QarmError):
    """Training was asked to stop, and did after saving what it takes to go on."""

    def __init__(self, signal_number: int, checkpoint: Path | None, step: int) -> None:
        # As a shell says it of a process that a signal ended: 143 for SIGTERM, 130 for SIGINT.
        self.exit_code = 128 + signal_number
        saved = f"saved {checkpoint}; go on with --resume" if checkpoint else "nothing was saved"
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}: {saved}"
        )


class StopRequest:
    """Whether this rank, or any rank, was asked to stop."""

    def __init__(self) -> None:
        self._own_signal = 0

    def ask(self, signal_number: int) -> None:
        """Ask for a stop; safe to call from a signal handler."""
        self._own_signal = signal_number

    def agreed_signal(self) -> int:
        """Return the largest signal number of all ranks, 0 if no rank was asked.

        Every rank must call it at the same step.
        """
        number = torch.tensor([self._own_signal])
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request, as long as the context lasts.

    A signal that comes again changes nothing: torchrun forwards the Ctrl-C that its workers got
    from the terminal already.
    """
    request = StopRequest()

    def ask(number: int, _: FrameType | None) -> None:
        request.ask(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

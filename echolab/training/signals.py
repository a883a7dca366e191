"""Record signals that request a stop; the stop itself happens between two steps, on all ranks.

After SIGTERM the supervisor notes the signal and forwards it to its ranks, where `StopSignals` only
records it.  After the step (or between batches of a validation) `StepSync` sums the votes of all
ranks; if one was signaled, all save a checkpoint and exit with code 75, or with 76 if the
remaining seconds of `grace` do not suffice for a save.  The supervisor writes cause and exit code
to its record in RUN/attempts; slurm/train.sbatch reads them by `echolab why` and requeues the job.
"""

import os
import signal
import stat
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FOREVER = float("inf")


def caught() -> list[signal.Signals]:
    """Return the signals that request a stop of this process: all, but not SIGHUP under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]


def leave_terminal() -> None:
    """Replace a closed terminal by /dev/null as output, since writing to it would fail."""
    # Replace only terminals, not files and pipes.
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(null, stream)
    os.close(null)


class StopSignals:
    """Records the first stop signal; the handler does nothing else.

    `grace` has the seconds from a signal to the kill of the process, by signal number; a signal
    without an entry has no limit.  Previous handlers are restored on exit.  A second Ctrl-C raises
    KeyboardInterrupt.  Outside of the main thread, where Python allows no signal handlers, none are
    installed.  A signal that an outer `StopSignals` received before is taken over.
    """

    def __init__(self, grace: Mapping[int, float] | None = None) -> None:
        self.grace = dict(grace or {})
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # On a second Ctrl-C, the user does not want to wait for the save.
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_terminal()
        if not self.received:
            self.received, self._at = number, time.monotonic()

    @property
    def seconds_left(self) -> float:
        """Seconds until the process is killed because of the signal; infinite without a signal."""
        if not self.received:
            return FOREVER
        return self.grace.get(self.received, FOREVER) - (time.monotonic() - self._at)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in caught()}
            for number in self._before:
                signal.signal(number, self._remember)
            # Take over a signal that arrived during imports, with its time.
            outer = getattr(self._before[signal.SIGTERM], "__self__", None)
            if isinstance(outer, StopSignals) and outer.received:
                self.received, self._at = outer.received, outer._at
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # None means that the previous handler was not installed from Python.
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ignore_signals(worker: int = 0) -> None:
    """Ignore all stop signals in a loader worker, since only its parent decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_of_job() -> float:
    """Return when Slurm ends the job, in seconds since 1970; infinity without Slurm."""
    try:
        return float(os.environ["SLURM_JOB_END_TIME"])
    except (KeyError, ValueError):
        return FOREVER


def grace_from(config: Mapping[str, Any]) -> dict[int, float]:
    """Return the seconds from a signal to the kill, by signal number; empty without Slurm."""
    # Without Slurm, the process is not killed after a signal.
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {signal.Signals[f"SIG{name}"].value: float(s) for name, s in config.items()}

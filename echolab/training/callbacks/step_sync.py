"""One all-reduce after each step, by which all ranks agree to continue, save, pause or stop.

All decisions that depend on the state of a single rank are made here, so no rank waits in a
collective that another rank does not enter.

Control files change a running training; anyone with write access to the run folder can create them
there:

STOP   save and end; the same command resumes             SAVE   save at this step
PAUSE  save and wait until the file is removed            PRUNE  end: a sweep discards this run

Rank 0 checks for control files about once a second and removes them after acting on them, except
PAUSE.  A file that cannot be checked counts as absent.  A file that cannot be removed, such as a
non-empty folder, is acted on once.
"""

import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from echolab.atomic_io import describe_error
from echolab.heartbeat import Heartbeat
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState, Vote
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.config import TrainConfig
from echolab.training.engine.engine_report import ClippedNorm
from echolab.training.guards.host_memory import HostMemory
from echolab.training.signals import StopSignals

REQUESTS = ("STOP", "SAVE", "PAUSE", "PRUNE")
POLL_SECONDS = 1.0  # time between two checks: a shared file system responds slowly


class ControlFiles:
    """The control files of one run folder."""

    def __init__(self, folder: Path, fenced: Callable[[], bool] | None = None) -> None:
        """Watch `folder`; `fenced` returns whether another process has taken over the run."""
        self.folder, self._fenced = folder, fenced or (lambda: False)
        self._checked = float("-inf")
        self._pending: set[str] = set()
        self._handled: dict[str, float] = {}  # ctime of handled files that cannot be removed

    def pending(self) -> set[str]:
        """Return the REQUESTS whose files exist, and FENCED if another process took over."""
        if time.monotonic() - self._checked >= POLL_SECONDS:
            self._checked = time.monotonic()
            changed_at = {name: self._change_time(name) for name in REQUESTS}
            self._pending = {n for n, at in changed_at.items() if at and self._handled.get(n) != at}
            with suppress(OSError):  # the next check may succeed
                self._pending |= {"FENCED"} if self._fenced() else set()
        return self._pending

    def _change_time(self, name: str) -> float:
        """Return the ctime of a file in seconds since 1970; 0 if it does not exist."""
        try:
            return (self.folder / name).lstat().st_ctime
        except OSError:
            return 0.0

    def clear(self, *names: str) -> None:
        """Remove the files of these requests on rank 0, after they were acted on."""
        if distributed.rank() > 0:
            return
        for name in names:
            path, changed_at = self.folder / name, self._change_time(name)
            self._pending.discard(name)
            try:
                if path.is_dir() and not path.is_symlink():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                if self._handled.get(name) != changed_at:
                    words = f"was acted upon, but cannot be removed ({describe_error(error)})"
                    print(f"echolab: {path}: {words}; remove it", file=sys.stderr, flush=True)
                self._handled[name] = changed_at


PAUSE_SECONDS = 1.0  # time between two checks whether the file PAUSE still exists
MARGIN_SECONDS = 60.0  # time reserved before the end of a job for a step and the exit


class EvaluationInterrupted(Exception):
    """Raised on every rank if a vote during validation or the export check ends the run."""

    def __init__(self, vote: Vote) -> None:
        super().__init__(vote.reason)
        self.vote = vote


def sum_votes(own: Mapping[str, float | torch.Tensor]) -> Vote:
    """Sum the votes of the ranks; collective."""
    # Read all values from the device in one transfer, since each transfer waits for the GPU.
    on_device = [name for name, value in own.items() if isinstance(value, torch.Tensor)]
    votes = {name: float(value) for name, value in own.items() if name not in on_device}
    if on_device:
        scalars = [torch.as_tensor(own[name]).double().reshape(()) for name in on_device]
        # The gradients of an offloaded optimizer are on the host, the loss is on the GPU.
        device = max((scalar.device for scalar in scalars), key=lambda place: place.type != "cpu")
        values = torch.stack([scalar.to(device) for scalar in scalars])
        votes |= dict(zip(on_device, values.tolist(), strict=True))
    return Vote(*distributed.sums(list(Vote(**votes))))


def step_vote(loss: torch.Tensor, norm: torch.Tensor, clipped: torch.Tensor) -> dict[str, Any]:
    """Return this rank's measurements of a step as a vote, on the device.

    The arguments are scalars []: the loss, the gradient norm before clipping, and the sum of
    squares of the clipped gradient.
    """
    return {
        "loss": loss,
        "norm": norm,
        "norm_squared": norm.double().square(),
        "not_finite": ~(torch.isfinite(loss) & torch.isfinite(norm).to(loss.device)),
        "clipped": clipped,
    }


def wait(requests: Callable[[], Mapping[str, float]]) -> Vote:
    """Wait until no rank requests a pause, or a rank requests an end; collective."""
    while True:
        time.sleep(PAUSE_SECONDS)
        vote = sum_votes(requests())
        if vote.fenced or vote.reason or not vote.pause:
            return vote


class StepSync(Callback):
    """Sums the measurements and requests of all ranks, and decides whether the run ends."""

    def __init__(
        self,
        config: TrainConfig,
        accumulation: int,
        *,
        signals: StopSignals,
        files: ControlFiles,
        memory: HostMemory,
        heartbeat: Heartbeat,
        checkpoints: Checkpoints,
        clipped: ClippedNorm,
    ) -> None:
        self.config, self.accumulation = config, accumulation
        self.signals, self.files, self.memory = signals, files, memory
        self.heartbeat, self.checkpoints, self.clipped = heartbeat, checkpoints, clipped

    def after_step(self, state: RunState) -> None:
        """Vote; raise FencedError on every rank if another process has taken over the run."""
        # The measurements of this rank remain on the device until they are summed.
        module = state.module
        loss, norm = module.take_loss() / self.accumulation, module.take_norm()
        own = step_vote(loss, norm, self.clipped.take()) | module.take_margin()
        # Sum all measurements and requests in one all-reduce.
        written = {"written": float(self.checkpoints.writer.written())}
        state.vote = sum_votes(own | self.requests(state) | written)
        state.loss, state.gradient_norm = float(loss), float(norm)
        if state.vote.fenced:
            raise self.config.taken()
        # The summed vote is equal on all ranks, so they all decide the same.
        last = state.step in (state.schedule.steps, self.config.stop_after_step)
        state.ends = last or bool(state.vote.reason)

    def requests(self, state: RunState) -> dict[str, float]:
        """Return this rank's requests to end, save or pause.

        Only rank 0 checks the clock and the control files.
        """
        # Each rank checks its own signals and host memory.
        needed = self.checkpoints.seconds_needed
        requests = {
            "late": float(needed > self.signals.seconds_left),
            "memory": float(self.memory.over()),
            "unlogged": float(state.log_error is not None),
            "stop": float(state.stop_requested),
        }
        if self.signals.received:
            requests[signal.Signals(self.signals.received).name.lower()] = 1.0
        # Rank 0 alone checks the time limit and the control files.
        if distributed.rank() == 0:
            requests["time"] = float(
                time.time() + needed + MARGIN_SECONDS > self.config.job_end_time
            )
            requests |= {name.lower(): 1.0 for name in self.files.pending()}
        return requests

    def poll(self, state: RunState) -> None:
        """Raise EvaluationInterrupted on every rank if any rank requests an end; collective.

        Call between batches.  The memory limit is ignored here: if it interrupted the check at the
        end of a run, every restart would be interrupted again.
        """
        # Vote as after a step, but without measurements.
        vote = sum_votes(self.requests(state) | {"memory": 0.0})
        if vote.fenced or vote.reason:
            raise EvaluationInterrupted(vote)
        self.heartbeat.enter("eval")

    def accept_interruption(
        self, state: RunState, interruption: EvaluationInterrupted, what: str, result: str
    ) -> None:
        """End the run after an interruption; print that `what` was interrupted, and the `result`.

        Raise FencedError on every rank if another process has taken over the run.
        """
        state.vote, state.ends = interruption.vote, True
        if state.vote.fenced:
            raise self.config.taken()
        if distributed.rank() == 0:
            print(
                f"echolab: {state.run_dir}: {what} at step {state.step} was cut short "
                f"({state.vote.reason}); {result}",
                file=sys.stderr,
                flush=True,
            )

    def on_end(self, state: RunState) -> None:
        """Remove the files that requested this end."""
        self.files.clear("STOP", "PRUNE")


class Pause(Callback):
    """Waits while the file PAUSE exists, after all other work of the step."""

    def __init__(self, sync: StepSync) -> None:
        self.sync = sync

    def after_step(self, state: RunState) -> None:
        """Wait if a pause is requested; remove the file SAVE, since the save has begun."""
        # All ranks wait together, until their summed votes end the pause.
        if state.vote.pause and not state.ends:
            self.sync.heartbeat.enter("pause")
            state.vote = wait(lambda: self.sync.requests(state))
            if state.vote.fenced:
                raise self.sync.config.taken()
            state.ends = bool(state.vote.reason)
        if state.vote.save:
            self.sync.files.clear("SAVE")

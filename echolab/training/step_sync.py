"""The vote: one all-reduce after each step, in which any rank can end or change what all do.

No other decision of a run depends on what one rank alone sees, so no rank ever waits in a
collective that another does not come to.
"""

import time
from collections.abc import Callable, Mapping
from signal import Signals
from typing import Any, NamedTuple

import torch

from echolab.training import distributed

PAUSE_SECONDS = 1.0  # between two looks whether PAUSE is still there


class Vote(NamedTuple):
    """What one rank says, and, summed over the ranks, what is decided."""

    fenced: float = 0  # another process has taken the run
    sigint: float = 0  # this rank was told to stop by a signal
    sigterm: float = 0
    sighup: float = 0
    sigusr1: float = 0
    sigusr2: float = 0
    late: float = 0  # a save would take longer than what is left of the signal's grace
    time: float = 0  # the job's time is nearly up
    memory: float = 0  # host memory is over its limit
    stop: float = 0  # asked for by a file in the run folder
    save: float = 0
    pause: float = 0
    prune: float = 0
    unlogged: float = 0  # metrics could not be written
    written: float = 0  # this rank's part of the pending checkpoint is on disk, or failed
    not_finite: float = 0  # this rank's loss, or the norm of its gradient
    loss: float = 0  # sum of this rank's micro-batches' means
    norm: float = 0  # of the whole gradient before clipping, as this rank has it
    norm_squared: float = 0
    margin: float = 0  # of preferences: sum of micro-batches' means, each times its share
    margin_share: float = 0  # sum of these shares
    clipped: float = 0  # this rank's sum of squares of what the optimizer was given

    @property
    def reason(self) -> str:
        """Why the run ends after this step: signal, time, memory, prune or stop; empty: it does
        not."""
        reasons = {
            "signal": self.signal,
            "time": self.time,
            "memory": self.memory,
            "prune": self.prune,
            "stop": self.stop,
        }
        return next((name for name, holds in reasons.items() if holds), "")

    @property
    def signal(self) -> int:
        """The number of a signal that was received; 0 where none was."""
        names = ("sigint", "sigterm", "sighup", "sigusr1", "sigusr2")
        return next((Signals[name.upper()].value for name in names if getattr(self, name)), 0)


class CutShort(Exception):
    """Raised on every rank alike, amid a validation or a check, by a vote to end the run."""

    def __init__(self, vote: Vote) -> None:
        super().__init__(vote.reason)
        self.vote = vote


def count(own: Mapping[str, float | torch.Tensor]) -> Vote:
    """Sum the ranks' votes; collective.  Tensors are read from their device once, all together."""
    on_device = [name for name, value in own.items() if isinstance(value, torch.Tensor)]
    told = {name: float(value) for name, value in own.items() if name not in on_device}
    if on_device:
        given = [torch.as_tensor(own[name]).double().reshape(()) for name in on_device]
        # Gradients of an offloaded optimizer are on the host, the loss is not.
        device = max((value.device for value in given), key=lambda device: device.type != "cpu")
        values = torch.stack([value.to(device) for value in given])
        told |= dict(zip(on_device, values.tolist(), strict=True))
    return Vote(*distributed.sums(list(Vote(**told))))


def of_step(loss: torch.Tensor, norm: torch.Tensor, clipped: torch.Tensor) -> dict[str, Any]:
    """This rank's part about a step: its loss [], and its gradient's norm [] before clipping."""
    return {
        "loss": loss,
        "norm": norm,
        "norm_squared": norm.double().square(),
        "not_finite": ~(torch.isfinite(loss) & torch.isfinite(norm).to(loss.device)),
        "clipped": clipped,
    }


def wait(asked: Callable[[], Mapping[str, float]]) -> Vote:
    """Until nobody asks for a pause any more, or something ends the run; collective."""
    while True:
        time.sleep(PAUSE_SECONDS)
        vote = count(asked())
        if vote.fenced or vote.reason or not vote.pause:
            return vote

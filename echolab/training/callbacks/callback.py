"""The interface of a callback, one idea of the training loop, and the state that callbacks share.

`training/loop.py` holds the ordered list.  A user adds callbacks by the setting `callbacks`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.guards.events import History
from echolab.training.module import DiffusionModule
from echolab.training.schedule import Schedule

STOP_SIGNALS = ("sigint", "sigterm", "sighup", "sigusr1", "sigusr2")


class Vote(NamedTuple):
    """The part of one rank in the all-reduce after a step; summed over the ranks, the decision."""

    fenced: float = 0  # another process has taken the run
    sigint: float = 0  # this rank received a signal to stop
    sigterm: float = 0
    sighup: float = 0
    sigusr1: float = 0
    sigusr2: float = 0
    late: float = 0  # a save would take longer than what is left of the signal's grace
    time: float = 0  # the job's time is nearly up
    memory: float = 0  # host memory is over its limit
    stop: float = 0  # requested by a file in the run folder, or by a callback
    save: float = 0
    pause: float = 0
    prune: float = 0
    unlogged: float = 0  # metrics could not be written
    written: float = 0  # this rank's part of the pending checkpoint is on disk, or failed
    not_finite: float = 0  # this rank's loss, or the norm of its gradient
    loss: float = 0  # sum of the means of this rank's micro-batches
    norm: float = 0  # of all gradients before clipping, as this rank has it
    norm_squared: float = 0
    margin: float = 0  # of preferences: sum of the means of micro-batches, each times its share
    margin_share: float = 0  # sum of these shares
    clipped: float = 0  # this rank's sum of squares of the gradients given to the optimizer

    @property
    def reason(self) -> str:
        """Why the run ends: signal, time, memory, prune or stop; empty if it does not."""
        # In order of urgency: the first that holds is given.
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
        """The number of a received signal; 0 if there is none."""
        return next((Signals[n.upper()].value for n in STOP_SIGNALS if getattr(self, n)), 0)


@dataclass
class RunState:
    """The state of one attempt.  Every field is the same on all ranks unless it says otherwise."""

    run_dir: Path
    module: DiffusionModule  # `module.net` is the network
    schedule: Schedule
    events: History
    identity: dict[str, Any]  # what a checkpoint must agree on to continue this run
    resumed: Checkpoint | None = None  # the checkpoint that this attempt started from
    checkpoint: Path | None = None  # the newest complete one
    step: int = 0  # optimizer steps done, over all attempts

    # The last step.
    kind: str = ""  # of its batch: sft, ndpo or dpo
    vote: Vote = field(default_factory=Vote)
    loss: float = 0.0  # of this rank: mean over the micro-batches
    gradient_norm: float = 0.0  # before clipping
    metrics: dict[str, float] = field(default_factory=dict)  # logged at this step, by name
    rollback: Checkpoint | None = None  # set by a callback: undo the step, continue from there
    ends: bool = False  # the run ends after this step

    # Requests and faults of this rank, for the next vote.
    stop_requested: bool = False  # set by a callback: end the run, with a checkpoint
    log_error: Exception | None = None  # why rank 0 could not log

    # The end.
    reason: str = ""  # done, until, or `Vote.reason`; empty while the run continues
    signal: int = 0  # number of the signal, if that is the reason
    unsaved: bool = False  # ended with steps that no checkpoint has
    unverified: bool = False  # ended before its export was compared


class Callback:
    """Hooks around each optimizer step, called on every rank in the order of the list.

    All hooks are optional.  A hook runs the same collectives on every rank, and raises on every
    rank or on none, so that no rank waits for another.
    """

    state_key = ""  # where the checkpoint keeps `state_dict`; empty: it keeps nothing

    def on_start(self, state: RunState) -> None:
        """Prepare for the first step of this attempt; the weights are in place."""

    def before_step(self, state: RunState) -> None:
        """Prepare for step `state.step`, before its first micro-batch."""

    def after_step(self, state: RunState) -> None:
        """Follow the optimizer step just done; `state.step` counts it."""

    def metrics(self, state: RunState) -> Mapping[str, float]:
        """Return further values to log; called at every step that logs."""
        return {}

    def on_rollback(self, state: RunState) -> None:
        """Forget the steps that were undone; weights and `state` are the checkpoint's again."""

    def on_end(self, state: RunState) -> None:
        """Finish; called in reverse order of the list, after the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps of this callback, as JSON."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""

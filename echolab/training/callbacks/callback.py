"""The interface of callbacks, each one concern of the training loop, and their shared state.

`training/loop.py` defines the order of the callbacks.  Users add callbacks with the setting
`callbacks`.
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
    """One rank's contribution to the all-reduce after a step; all ranks decide by the sum."""

    fenced: float = 0  # another process has taken over the run
    sigint: float = 0  # this rank received a signal to stop
    sigterm: float = 0
    sighup: float = 0
    sigusr1: float = 0
    sigusr2: float = 0
    late: float = 0  # a save would take longer than the remaining grace time of the signal
    time: float = 0  # the time limit of the job is close
    memory: float = 0  # host memory exceeds its limit
    stop: float = 0  # requested by a file in the run folder, or by a callback
    save: float = 0
    pause: float = 0
    prune: float = 0
    unlogged: float = 0  # metrics could not be written
    written: float = 0  # this rank's files of the pending checkpoint are on disk, or failed
    not_finite: float = 0  # this rank's loss or gradient norm is not finite
    loss: float = 0  # this rank's loss: mean over its micro-batches
    norm: float = 0  # total gradient norm before clipping, as this rank computed it
    norm_squared: float = 0
    margin: float = 0  # sum over micro-batches of mean preference margin times weight
    margin_share: float = 0  # sum of these weights
    clipped: float = 0  # this rank's sum of squared gradients after clipping

    @property
    def reason(self) -> str:
        """The reason of the end: signal, time, memory, prune or stop; empty if it continues."""
        # In order of urgency: the first true reason is returned.
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
        """Number of a received signal; 0 if no signal was received."""
        return next((Signals[n.upper()].value for n in STOP_SIGNALS if getattr(self, n)), 0)


@dataclass
class RunState:
    """The state of one attempt.  Fields are equal on all ranks unless noted otherwise."""

    run_dir: Path
    module: DiffusionModule  # `module.net` is the network
    schedule: Schedule
    events: History
    identity: dict[str, Any]  # properties in which a checkpoint must equal this run
    resumed: Checkpoint | None = None  # the checkpoint from which this attempt resumed
    checkpoint: Path | None = None  # the newest complete checkpoint
    step: int = 0  # optimizer steps done, over all attempts

    # Results of the last step.
    kind: str = ""  # kind of its batch: sft, ndpo or dpo
    vote: Vote = field(default_factory=Vote)
    loss: float = 0.0  # this rank's mean over the micro-batches
    gradient_norm: float = 0.0  # before clipping
    metrics: dict[str, float] = field(default_factory=dict)  # logged at this step, by name
    rollback: Checkpoint | None = None  # set by a callback: undo the step, resume from here
    ends: bool = False  # the run ends after this step

    # Requests and faults of this rank, for the next vote.
    stop_requested: bool = False  # set by a callback: save a checkpoint and end the run
    log_error: Exception | None = None  # the error that prevented rank 0 from logging

    # How the run ended.
    reason: str = ""  # done, until, or `Vote.reason`; empty while the run continues
    signal: int = 0  # signal number, if `reason` is signal
    unsaved: bool = False  # the run ended with steps that are in no checkpoint
    unverified: bool = False  # the run ended before the export check


class Callback:
    """Hooks around each optimizer step, called on every rank in the order of the list.

    All hooks are optional.  A hook must run the same collectives on every rank, and raise on all
    ranks or on none, so that no rank waits forever for another.
    """

    state_key = ""  # key of `state_dict` in the checkpoint's state; empty: not saved

    def on_start(self, state: RunState) -> None:
        """Prepare for the first step of this attempt; the weights are already loaded."""

    def before_step(self, state: RunState) -> None:
        """Prepare for step `state.step`, before its first micro-batch."""

    def after_step(self, state: RunState) -> None:
        """Follow an optimizer step, which `state.step` already counts."""

    def metrics(self, state: RunState) -> Mapping[str, float]:
        """Return additional values to log; called at every step that logs."""
        return {}

    def on_rollback(self, state: RunState) -> None:
        """Discard the steps that were undone; weights and `state` are already restored."""

    def on_end(self, state: RunState) -> None:
        """Finish after the last step; called in reverse order of the list."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this callback to save in the checkpoint, as JSON."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state from a `state_dict`."""

"""When a checkpoint is saved: written while training continues, and published some steps later."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from echolab.heartbeat import Heartbeat
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.replicas import ReplicaCheck
from echolab.training.checkpoints.checkpoint import folder_of
from echolab.training.checkpoints.writer import CheckpointWriter
from echolab.training.intervals import Intervals

SAVE_TIMES = 1.5  # a save may take so many times as long as the longest so far


class Checkpoints(Callback):
    """Saves at intervals, at the end of epochs, on request, and when the run ends."""

    def __init__(
        self,
        writer: CheckpointWriter,
        intervals: Intervals,
        *,
        heartbeat: Heartbeat,
        replica_check: ReplicaCheck,
        collect_state: Callable[[], dict[str, Any]],
    ) -> None:
        """`collect_state` returns everything but the tensors, as JSON."""
        self.writer, self.intervals, self.heartbeat = writer, intervals, heartbeat
        self.replica_check, self.collect_state = replica_check, collect_state

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.writer.folder

    @property
    def seconds_needed(self) -> float:
        """Seconds to allow for a save.  Not collective."""
        return SAVE_TIMES * self.writer.seconds

    def after_step(self, state: RunState) -> None:
        """Save if it is time.  If rank 0 could not log the step before: save, then raise that."""
        # The steps are saved before the error ends the run.
        if state.vote.unlogged:
            self.save(state)
            raise_log_error(state)
        self.save_if_due(state)

    def save_if_due(self, state: RunState) -> None:
        """Begin a save while training continues; wait for it if the run ends or needs it."""
        vote, schedule, step = state.vote, state.schedule, state.step
        # All ranks have written the pending checkpoint: publishing it takes no time now.
        if self.writer.pending and vote.written == distributed.world():
            self.publish(state)
        # An end of the run waits for the save; other saves are written while training continues.
        saved = state.checkpoint and state.checkpoint.name == folder_of(Path(), step).name
        pruned = vote.prune and not schedule.keeps(step)
        if saved:
            pass
        elif vote.late or pruned:
            state.unsaved = True
            self.publish(state)  # the pending checkpoint can still be completed
        elif state.ends or vote.pause or schedule.needs_reference(step):
            self.save(state)
        elif (
            self.intervals.due(self.intervals.save_every, step) or schedule.keeps(step) or vote.save
        ):
            self.begin()
        self.heartbeat.enter("vote")

    def begin(self) -> None:
        """Copy weights and state, and write them while training continues; collective."""
        # A frozen network that has changed must not be saved as if it were right.
        self.heartbeat.enter("save")
        self.replica_check.check_frozen()
        self.writer.begin(self.collect_state())

    def publish(self, state: RunState) -> None:
        """Wait for the pending checkpoint, if there is one; collective."""
        self.heartbeat.enter("save")
        state.checkpoint = self.writer.finish() or state.checkpoint

    def save(self, state: RunState) -> None:
        """Write a checkpoint, and wait until it is complete; collective."""
        self.begin()
        self.publish(state)

    def on_end(self, state: RunState) -> None:
        """Wait until old checkpoints are removed."""
        self.writer.close()


def raise_log_error(state: RunState) -> None:
    """Raise on rank 0 what kept it from logging; the supervisor then ends the other ranks."""
    if state.log_error:
        raise state.log_error

"""Save checkpoints: written in the background during training, published some steps later."""

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

SAVE_TIMES = 1.5  # a save may take this many times as long as the longest save so far


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
        """Folder of the checkpoints."""
        return self.writer.folder

    @property
    def seconds_needed(self) -> float:
        """Seconds to allow for a save.  Not collective."""
        return SAVE_TIMES * self.writer.seconds

    def after_step(self, state: RunState) -> None:
        """Save if due; if rank 0 could not log the last step, save and raise its error."""
        # Save before the error ends the run, so that no step is lost.
        if state.vote.unlogged:
            self.save(state)
            raise_log_error(state)
        self.save_if_due(state)

    def save_if_due(self, state: RunState) -> None:
        """Begin a save if one is due; wait for it if the run ends, pauses or needs a reference."""
        vote, schedule, step = state.vote, state.schedule, state.step
        # Publish the pending checkpoint once all ranks have written it, so that nothing waits.
        if self.writer.pending and vote.written == distributed.world():
            self.publish(state)
        # Wait for the save at the end of the run; other saves are written while training continues.
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
        """Copy weights and state, and write them in the background; collective."""
        # Do not save if a frozen network has changed.
        self.heartbeat.enter("save")
        self.replica_check.check_frozen()
        self.writer.begin(self.collect_state())

    def publish(self, state: RunState) -> None:
        """Wait for the pending checkpoint, if any, and publish it; collective."""
        self.heartbeat.enter("save")
        state.checkpoint = self.writer.finish() or state.checkpoint

    def save(self, state: RunState) -> None:
        """Write a checkpoint and wait until it is complete; collective."""
        self.begin()
        self.publish(state)

    def on_end(self, state: RunState) -> None:
        """Wait until old checkpoints have been removed."""
        self.writer.close()


def raise_log_error(state: RunState) -> None:
    """Raise the logging error on rank 0, if any; the supervisor then ends the other ranks."""
    if state.log_error:
        raise state.log_error

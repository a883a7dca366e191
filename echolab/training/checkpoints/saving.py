"""Saves of a running training: at once, or begun now and published some steps later."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from echolab.heartbeat import Heartbeat
from echolab.training.checkpoints.checkpoint import folder_of
from echolab.training.checkpoints.writer import CheckpointWriter

SAVE_TIMES = 1.5  # a save may take so many times as long as the longest so far


class Saving:
    """Writes what `state` says, once `check` has found nothing wrong.  All is collective."""

    def __init__(
        self,
        writer: CheckpointWriter,
        heartbeat: Heartbeat,
        state: Callable[[], dict[str, Any]],
        check: Callable[[], None],
        saved: Path | None,
    ) -> None:
        self.writer, self.heartbeat, self.state, self.check = writer, heartbeat, state, check
        self.saved = saved  # the newest whole one

    @property
    def needed(self) -> float:
        """Seconds to allow for a save.  Not collective."""
        return SAVE_TIMES * self.writer.seconds

    def has_saved(self, step: int) -> bool:
        """Return whether the checkpoint of a step was published.  Not collective."""
        return self.saved is not None and self.saved.name == folder_of(Path(), step).name

    def begin(self) -> None:
        """Training goes on while it is written."""
        self.heartbeat.enter("save")
        self.check()
        self.writer.begin(self.state())

    def publish(self) -> None:
        """Wait for what was begun, if anything was."""
        self.heartbeat.enter("save")
        self.saved = self.writer.finish() or self.saved

    def now(self) -> None:
        """Write a checkpoint, and wait until it is whole."""
        self.begin()
        self.publish()

"""The interface of a callback: one idea of the training loop, readable by itself.

`training/loop.py` holds the ordered list.  A user adds callbacks by the setting `callbacks`.
"""

from collections.abc import Mapping
from typing import Any

from echolab.training.run_state import RunState


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

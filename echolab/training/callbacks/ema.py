"""The averages of the weights follow each step."""

from typing import Any

from echolab.training.callbacks.callback import Callback
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters
from echolab.training.run_state import RunState


class EmaUpdate(Callback):
    """Updates the averages.  `checkpoint.restore` reads them and their count of updates again."""

    state_key = "ema"

    def __init__(self, ema: Ema, masters: Masters) -> None:
        self.ema, self.masters = ema, masters

    def after_step(self, state: RunState) -> None:
        """Update all averages by the weights of this step."""
        self.ema.update(self.masters)

    def state_dict(self) -> dict[str, Any]:
        """Return the decays and the number of updates."""
        return self.ema.state_dict()

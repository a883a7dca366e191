"""The learning rate, a pure function of the step."""

from torch.optim import Optimizer

from echolab.training.callbacks.callback import Callback
from echolab.training.run_state import RunState


class LearningRate(Callback):
    """Sets the schedule's rate before each step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def before_step(self, state: RunState) -> None:
        """Set the rate of this step in all parameter groups."""
        rate = state.schedule.lr(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

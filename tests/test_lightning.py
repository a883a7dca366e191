"""The two private functions of Lightning that `fit` replaces; a change of Lightning fails here."""

import inspect
import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from torch.utils.data import DataLoader

from echolab.training.fit import Machine, _trainer, quiet


class Watch(pl.Callback):
    """Records the handler of SIGTERM during a step, and ends after it."""

    def __init__(self) -> None:
        self.handlers: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        trainer.should_stop = True


class Line(pl.LightningModule):
    """A module of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def own_handler(number: int, frame: FrameType | None) -> None:
    """Stand for the handler of `StopSignals`."""


def handler_during(trainer: pl.Trainer, watch: Watch) -> Any:
    """Return the handler of SIGTERM while a trainer trains, with `own_handler` set before."""
    before = signal.signal(signal.SIGTERM, own_handler)
    try:
        with quiet():
            trainer.fit(Line(), DataLoader([torch.ones(1)] * 2, batch_size=None))
    finally:
        signal.signal(signal.SIGTERM, before)
    return watch.handlers[0]


def test_lightning_replaces_the_handler_and_fit_keeps_it() -> None:
    plain, ours = Watch(), Watch()
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[plain], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
    )  # fmt: skip
    # If this fails, a public Lightning leaves handlers alone: remove the replacement in fit.py.
    assert handler_during(trainer, plain) is not own_handler
    assert handler_during(_trainer(Machine(), 1, 1.0, ours), ours) is own_handler


def test_both_functions_have_their_names_and_are_called() -> None:
    assert "_signal_connector.register_signal_handlers()" in inspect.getsource(pl.Trainer._run)
    assert inspect.isfunction(_SignalConnector.register_signal_handlers)
    # Called before every micro-batch of several ranks; `fit` votes after each step instead.
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    trainer = _trainer(Machine(), 1, 1.0, Watch())
    replaced = trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor
    assert isinstance(trainer.fit_loop.epoch_loop, _TrainingEpochLoop)
    assert replaced() is None and not inspect.ismethod(replaced)

"""Preference epochs: the frozen reference network, and the running state of the objectives."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from echolab.errors import ConfigError
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.callbacks.replicas import ReplicaCheck
from echolab.training.checkpoints.checkpoint import folder_of, open_on_all_ranks
from echolab.training.config import TrainConfig
from echolab.training.engine.ema import EMA, REFERENCE, Ema
from echolab.training.engine.master_weights import Masters
from echolab.training.schedule import group_of


class ReferenceModel(Callback):
    """Loads the averaged weights into the frozen reference at the start of a preference epoch.

    The weights are read from the checkpoint saved at that step, so that a resumed run uses the same
    reference; with `config.ref_model`, all epochs use that checkpoint instead.  The state of an
    objective is reset in each epoch, since margins depend on the reference.

    With `config.ref_model_sync_steps` the trained weights are mixed into the reference within the
    epoch, as in trl's SyncRefModelCallback.  The reference is then part of every checkpoint.
    """

    state_key = "objectives"

    def __init__(
        self,
        config: TrainConfig,
        masters: Masters,
        ema: Ema,
        checkpoints: Checkpoints,
        replica_check: ReplicaCheck,
    ) -> None:
        self.reference, self.fixed = config.reference, config.ref_model
        self.mixes = config.mixes_reference
        self.sync_steps, self.alpha = config.ref_model_sync_steps, config.ref_model_mixup_alpha
        self.masters, self.ema = masters, ema
        self.checkpoints, self.replica_check = checkpoints, replica_check
        # Objectives that keep a running margin.
        self.stateful: dict[str, Any] = {
            kind: objective
            for kind, objective in config.objectives.items()
            if hasattr(objective, "load_state_dict")
        }
        self._initial = copy.deepcopy(self.state_dict())
        self._loaded: Path | None = None  # the checkpoint at the start of the current epoch

    def on_start(self, state: RunState) -> None:
        """Save the reference checkpoint if the run begins with a preference epoch."""
        if not state.resumed and state.schedule.needs_reference(0):
            self.checkpoints.save(state)

    def before_step(self, state: RunState) -> None:
        """Load the reference of a preference epoch unless it is already loaded; collective."""
        # Only preference epochs have a reference, which is loaded once at their start.
        position = state.schedule.locate(state.step)
        if group_of(position.epoch.kind) != "preference":
            return
        boundary = folder_of(self.checkpoints.folder, state.step - position.within)
        if self._loaded == boundary:
            return
        if self.reference is None:
            raise ConfigError("schedule: preference epochs need a reference; give ref_model=")
        # Within an epoch a mixed reference equals no checkpoint's average; `restore` has read it.
        if self.mixes and position.within:
            self.reference.load(self._mixed())
        else:
            weights = open_on_all_ranks(self.fixed or boundary).tensors(EMA)
            self.reference.load(weights)
            if self.mixes:
                self.masters.fill(self.ema.flats[REFERENCE], weights)
        self.reference.to(state.module.device)
        # A new epoch has a new reference: reset the running margins.
        if position.within == 0:
            self.load_state_dict(self._initial)
        self._loaded = boundary
        self.replica_check.watch_reference()

    def after_step(self, state: RunState) -> None:
        """Pass the mean margin of the step to the objective; mix the reference if due."""
        # Use the mean over all ranks, so that beta is equal on all of them.
        if state.vote.margin_share:
            mean = state.vote.margin / state.vote.margin_share
            self.stateful[state.kind].update(mean)
        if (
            self.mixes
            and group_of(state.kind) == "preference"
            and state.step % self.sync_steps == 0
        ):
            self._mix()

    def _mix(self) -> None:
        """Mix the trained weights into the reference; collective."""
        assert self.reference
        self.replica_check.check_frozen()
        self.ema.mix_reference(self.masters, self.alpha)
        self.reference.load(self._mixed())
        self.replica_check.watch_reference()

    def _mixed(self) -> dict[str, Tensor]:
        """Return a copy of the mixed reference, as full tensors by parameter name; collective."""
        flats = self.ema.flats[REFERENCE]
        return {
            name: self.masters.full_tensor(name, flats).clone() for name in self.masters.parameters
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every stateful objective, by kind of epoch."""
        return {kind: dict(objective.state_dict()) for kind, objective in self.stateful.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict()`, and load the reference again at the next step.

        After a rollback, the run may reach the same epoch start with different weights.
        """
        self._loaded = None
        for kind, objective in self.stateful.items():
            if kind in saved:
                objective.load_state_dict(saved[kind])

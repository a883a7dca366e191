"""From which checkpoint a run goes on, and whether it may.  Rank 0 decides, the others follow."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echolab.errors import EcholabError
from echolab.training import ranks
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.agreed import newest
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.parity import REPORT, passed_before
from echolab.training.parts import Training
from echolab.training.schedule import Schedule


def check_alike(agreed: str, identity: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
    """Raise EcholabError where ranks were given different settings; collective."""
    if not ranks.agree(json.dumps([agreed, identity, schedule])):
        raise EcholabError("the ranks were given different settings; start them all alike")


def proven(folder: Path, training: Training) -> Checkpoint | None:
    """The newest, or one before it where it ends the schedule and its export was not let pass.

    Killed before the gate or refused by it, a run has no training model to sample from: its last
    steps are done again.  Collective.
    """
    found, run = newest(folder), training.folder
    if found is None or not training.parity or found.step < training.schedule.steps:
        return found
    passed = ranks.from_first(int(passed_before(run, found.path) is True))
    if not passed and ranks.rank() == 0:
        print(
            f"echolab: {found.path}: samples of its export were not let pass yet ({run / REPORT}); "
            "its last steps are done again, from the checkpoint before",
            file=sys.stderr,
        )
    return found if passed else newest(folder, found.step - 1)


def check_continues(found: Checkpoint, identity: Mapping[str, Any], schedule: Schedule) -> None:
    """Raise EcholabError, naming what differs, where the checkpoint is of another run."""
    checkpoints.check_architecture(found, identity["architecture"])
    checkpoints.check_adapters(found, identity.get("adapters"))
    schedule.check_continues(found.state["schedule"], found.step)
    for key in ("clips", "seed", "batch_size", "order"):
        if (was := found.state.get(key)) != identity[key]:
            raise EcholabError(
                f"{found.path}: {key} was {was}, now {identity[key]}; "
                "give the old value, or a new run folder"
            )

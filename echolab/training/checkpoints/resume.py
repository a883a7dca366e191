"""From which checkpoint a run goes on, and whether it may.  Rank 0 decides, the others follow."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from echolab.errors import EcholabError
from echolab.training import ranks
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.parity import REPORT, passed_before
from echolab.training.parts import Training
from echolab.training.schedule import Schedule


def check_alike(agreed: str, identity: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
    """Raise EcholabError where ranks were given different settings; collective."""
    if not ranks.agree(json.dumps([agreed, identity, schedule])):
        raise EcholabError("the ranks were given different settings; start them all alike")


def awaits_check(found: Checkpoint, training: Training) -> bool:
    """Return whether the schedule ends at a checkpoint whose export was not let pass yet.

    A process that is killed between the last save and the end of the check leaves such a
    checkpoint, and so does a check that fails.  No step is repeated, only the check.  Collective.
    """
    if not training.parity or found.step < training.schedule.steps:
        return False
    run = training.folder
    passed = ranks.from_first(int(passed_before(run, found.path) is True))
    if not passed and ranks.rank() == 0:
        print(
            f"echolab: {found.path}: all steps are done, but samples of its export were not let "
            f"pass yet ({run / REPORT}); they are compared again",
            file=sys.stderr,
        )
    return not passed


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

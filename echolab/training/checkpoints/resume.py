"""From which checkpoint a run goes on, and whether it may.  Rank 0 decides, the others follow."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from echolab.data.provenance import check_same_encoders
from echolab.errors import EcholabError
from echolab.training import distributed, lineage
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import Checkpoint
from echolab.training.config import Training
from echolab.training.datamodule import Feed
from echolab.training.export_check import REPORT, passed_before
from echolab.training.schedule import Schedule


def check_alike(agreed: str, identity: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
    """Raise EcholabError where ranks were given different settings; collective."""
    if not distributed.agree(json.dumps([agreed, identity, schedule])):
        raise EcholabError("the ranks were given different settings; start them all alike")


def awaits_check(found: Checkpoint, training: Training) -> bool:
    """Return whether the schedule ends at a checkpoint whose export was not let pass yet.

    A process that is killed between the last save and the end of the check leaves such a
    checkpoint, and so does a check that fails.  No step is repeated, only the check.  Collective.
    """
    if not training.parity or found.step < training.schedule.steps:
        return False
    run = training.folder
    passed = distributed.from_first(int(passed_before(run, found.path) is True))
    if not passed and distributed.rank() == 0:
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
    encoders = found.state.get("encoders") or {}
    check_same_encoders(found.path, encoders, "data.clips", identity["encoders"])
    if "origins" in found.state:
        lineage.check_origins(found.state["origins"], identity["origins"], str(found.path))
    for key in ("seed", "batch_size", "order"):
        was, now = found.state.get(key), identity[key]
        if was and key == "order":  # its datasets are compared by `going_on_with`
            was, now = {**was, "datasets": []}, {**now, "datasets": []}
        if was != now:
            raise EcholabError(
                f"{found.path}: {key} was {was}, now {now}; give the old value, or a new run folder"
            )


def going_on_with(found: Checkpoint, training: Training, feed: Feed, schedule: Schedule) -> Feed:
    """Return the batches of a run that goes on: those that were planned, or of accepted data.

    Raises EcholabError where the datasets are not those that were trained on, and nobody accepted
    that.
    """
    was, now = lineage.saved_data(found.state)[-1], lineage.data_of(feed)
    changed = [
        key
        for key in lineage.changed_data(was, now)
        if schedule.begun(lineage.GROUPS[key], found.step)  # else nothing of it was trained on
    ]
    if changed and not training.accepts_changed_data:
        key = changed[0]
        names = ", ".join(str(dataset.folder) for dataset in getattr(training, key)) or "nothing"
        told = [[row[0][:12] for row in each[key]] for each in (was, now)]
        raise EcholabError(
            f"data.{key}: {names} is not what the run was trained on up to step {found.step} "
            f"(fingerprints {told[0]} then, {told[1]} now); put that back, or give "
            "data.changed=accept to go on with this, which events.jsonl then records"
        )
    names_of = lineage.order_names(was, now)
    kept = all([row[2] for row in now[key]] == names_of[key] for key in lineage.GROUPS)
    feed = feed if kept else training.feed(names_of)
    if not changed and (old := found.state.get("order")) != (new := feed.clips.plan.state()):
        raise EcholabError(
            f"{found.path}: order was {old}, now {new}; give the old value, or a new run folder"
        )
    return feed

"""`echolab data audit RUN`: did a run train on every sample exactly once an epoch?"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from echolab.arguments import parse
from echolab.data.audit import audit
from echolab.training.guards import events


@dataclass(frozen=True)
class AuditArguments:
    """Weigh a run's ledger against its datasets; one line a fault, exit code 1 if any.

    The run must have been trained with data.log_samples=true.  Steps that an attempt trained and a
    later one, going on from a checkpoint, trained again count once.  Batches that events of the run
    say were skipped may be missing.
    """

    run: Path = field(metadata={"help": "the run's folder"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    """Say which keys are missing or doubled."""
    arguments = parse(AuditArguments, argv, command="echolab data audit", positional=("run",))
    found = audit(arguments.run, events.skips(arguments.run))
    if arguments.format == "json":
        told = {"run": str(arguments.run), "exact": found.exact, **found._asdict()}
        for name in ("missing", "doubled", "strange"):
            told[name] = [finding._asdict() for finding in told[name]]
        print(json.dumps(told))
    elif found.exact:
        print(
            f"{arguments.run}: {found.steps} steps in {found.attempts} attempts, {found.samples} "
            "samples: each exactly once an epoch"
            + (f", but for {found.quarantined} bad ones" if found.quarantined else "")
            + (f"; {found.skipped} of skipped batches left out" if found.skipped else "")
        )
    else:
        print("\n".join(found.lines()))
    return 0 if found.exact else 1

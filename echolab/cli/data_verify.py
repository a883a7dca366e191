"""`echolab data verify FOLDER`: is a dataset whole?"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from echolab.arguments import parse
from echolab.data.verify import find_faults
from echolab.progress import progress


@dataclass(frozen=True)
class VerifyArguments:
    """Check every shard of a dataset against dataset.json; one line a fault, exit code 1 if any."""

    folder: Path = field(metadata={"help": "the dataset's folder"})
    deep: bool = field(
        default=False,
        metadata={"help": "also decode videos, sounds and pictures, and check shapes and values"},
    )
    workers: int | None = field(default=None, metadata={"help": "processes; none is one a core"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    """Say every fault."""
    command = "echolab data verify"
    arguments = parse(VerifyArguments, argv, command=command, positional=("folder",))
    folder = arguments.folder
    shards = sum(1 for _ in folder.glob("*.tar"))
    with progress("checking shards", shards) as advance:
        faults = find_faults(
            folder, workers=arguments.workers, deep=arguments.deep, advance=advance
        )
    lines = [fault.line(folder) for fault in faults]
    if arguments.format == "json":
        details = [fault._asdict() for fault in faults]
        print(json.dumps({"folder": str(folder), "faults": lines, "details": details}))
    else:
        print("\n".join(lines) if lines else f"{folder}: whole")
    return 1 if faults else 0

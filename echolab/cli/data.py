"""`echolab data verify FOLDER`: is a dataset whole?"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from echolab.arguments import parse
from echolab.data.verify import verify


@dataclass(frozen=True)
class DataArguments:
    """Check every shard of a dataset against dataset.json; one line a fault, exit code 1 if any."""

    step: Literal["verify"] = field(metadata={"help": "what to do"})
    folder: Path = field(metadata={"help": "the dataset's folder"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the answer"})


def main(argv: list[str]) -> int:
    arguments = parse(DataArguments, argv, command="echolab data", positional=("step", "folder"))
    faults = verify(arguments.folder)
    if arguments.format == "json":
        print(json.dumps({"folder": str(arguments.folder), "faults": faults}))
    else:
        print("\n".join(faults) if faults else f"{arguments.folder}: whole")
    return 1 if faults else 0

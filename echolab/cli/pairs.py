"""`echolab pairs ACTION`: the steps of a preference round: sample candidates, score them, pack."""

import json

from echolab.arguments import parse
from echolab.atomic_io import check_writable
from echolab.inference.options import PairsArguments

NOUNS = {"sample": "prompts", "score": "verdicts", "pack": "pairs"}


def main(argv: list[str]) -> int:
    """Parse the arguments, then import torch, run one action and print a summary."""
    arguments = parse(PairsArguments, argv, command="echolab pairs",
                      positional=("action", "folder"))  # fmt: skip
    check_writable(arguments.folder, folder=True)
    from echolab.inference import pairs

    actions = {"sample": pairs.sample, "score": pairs.score, "pack": pairs.pack}
    made = actions[arguments.action](arguments)
    figures = {"folder": str(arguments.folder), "action": arguments.action, "made": made}
    written = arguments.out if arguments.action == "pack" else arguments.folder
    plain = f"{written}: {made} {NOUNS[arguments.action]}"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0

"""`echolab evaluate RUN`: sample held-out clips from a checkpoint and score them: one table row."""

from echolab.arguments import parse
from echolab.atomic_io import check_writable
from echolab.inference.options import EvaluateArguments


def main(argv: list[str]) -> int:
    """Parse and check the arguments, then import torch, sample and score."""
    arguments = parse(
        EvaluateArguments, argv, command="echolab evaluate", positional=("checkpoint",)
    )
    arguments.check()
    for folder in (arguments.samples, arguments.task_samples):
        if folder:
            check_writable(folder, folder=True)
    from echolab.inference.evaluate import evaluate

    evaluate(arguments)
    return 0

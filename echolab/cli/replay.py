"""`echolab replay RUN step=N`: train the steps up to N again and compare them with the run's.

One process trains the steps in a separate folder, from the newest checkpoint before N and with the
settings of each step, which attempts may have changed.  It compares with the records of the run:
keys and noise of each step (ledger), losses (metrics.jsonl), and the checkpoint of step N if it
exists.  A run of one rank on the CPU in fp32 is repeated bit for bit; for other runs the losses
are compared with a tolerance, and the checkpoint is not compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echolab.arguments import argument, parse
from echolab.launch.run_dir import config_of


@dataclass(frozen=True)
class ReplayArguments:
    """Train steps of a run again and compare; print one line per difference, exit code 1 if any.

    If the settings of the run have relative paths, start in the folder where the run was started.
    """

    run: Path = argument("run folder; it is only read", aka=("run_dir",))
    step: int = argument("last step to train, counted from 1", ge=1)
    out: Path | None = argument(
        "new folder for the replay", None, default_text="a temporary folder"
    )
    clips: tuple[str, ...] = argument(
        "data.clips, if their addresses hold secrets that ${oc.env:NAME} did not give", ()
    )
    pairs: tuple[str, ...] = argument("data.pairs, for the same reason", ())
    env: tuple[str, ...] = argument("environment variables that the run's settings may read", ())
    format: Literal["text", "json"] = argument("output format", "text")


def main(argv: list[str]) -> int:
    """Parse the arguments, then import torch and replay."""
    arguments = parse(ReplayArguments, argv, command="echolab replay", positional=("run", "step"))
    config_of(arguments.run)
    from echolab.cli.replay_steps import replay_and_compare

    return replay_and_compare(arguments)

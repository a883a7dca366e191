"""A rank of `echolab train` that test_signals.py forks, and the signals that it gets."""

import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forked import ForkServer, Ranks

from echolab.heartbeat import LOCAL_DIR, heartbeat_path, read_heartbeat
from echolab.launch.exit_codes import DONE, STOPPED_SAVED, STOPPED_UNSAVED
from echolab.training.signals import StopSignals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def rank(config: dict[str, Any]) -> int:
    """Run a rank of `echolab train`, handlers first; return its exit code."""
    with StopSignals():
        folder, number = Path(os.environ[LOCAL_DIR]), os.environ["RANK"]
        (folder / f"{number}.ready").touch()
        from echolab.cli.train_rank import train

        result = train(config)
    if result.done:
        return DONE
    return STOPPED_UNSAVED if result.unsaved else STOPPED_SAVED


def start(server: ForkServer, config: Mapping[str, Any], world: int, folder: Path) -> Ranks:
    """Start the ranks of one attempt, and wait until all handlers are in place."""
    folder.mkdir()
    ranks = server.start(
        "rank_signals:rank",
        world=world,
        arguments={"config": config},
        environment={LOCAL_DIR: str(folder)},
    )
    deadline = time.monotonic() + 600
    while len(list(folder.glob("*.ready"))) < world:
        assert time.monotonic() < deadline, ranks.outputs()
        time.sleep(0.005)
    return ranks


def signal_one(ranks: Ranks, folder: Path, world: int, chance: random.Random) -> str:
    """Signal one rank once it is in a randomly drawn section, or later; return what was done, in
    words.
    """
    victim, number = chance.randrange(world), chance.choice(SIGNALS)
    wanted = chance.choice(
        ("now", "init", "data_wait", "forward", "backward", "optimizer", "vote", "eval", "save")
    )
    entries = chance.randrange(1, 40)  # of sections, before the watch begins
    deadline = time.monotonic() + 600
    while wanted != "now" and time.monotonic() < deadline and ranks.codes()[victim] is None:
        beat = read_heartbeat(heartbeat_path(folder, victim))
        if beat and beat.section == wanted and (wanted == "init" or beat.switches >= entries):
            break
    time.sleep(chance.random() * 0.02)
    ranks.signal(number, victim)
    return f"{signal.Signals(number).name} to rank {victim} in {wanted} after {entries}"

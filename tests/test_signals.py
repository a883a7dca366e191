"""One of four ranks gets signals at random moments: nothing hangs and nothing is lost."""

import json
import os
import random
from pathlib import Path
from typing import Any

import encoded
import pytest
import rank_signals
import runs
from forked import ForkServer

from echolab.config.compose import compose
from echolab.launch.exit_codes import DONE, STOPPED_SAVED
from echolab.training.checkpoints.checkpoint import latest_valid, saved_steps

pytestmark = pytest.mark.slow

WORLD = 4
STEPS = 24
# How many signals; a longer trial by hand: ECHOLAB_SIGNALS=200
COUNT = int(os.environ.get("ECHOLAB_SIGNALS", "12"))
SEED = int(os.environ.get("ECHOLAB_SEED", "0"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("signals")
    clips, pairs = encoded.write(folder)
    return compose(
        [
            *encoded.SETTINGS, f"data.clips={clips}", f"data.pairs={pairs}",
            f"data.val_clips={clips}", "data.val_overlaps=accept",
            "data.val_num_clips=4", "data.num_workers=1",
            encoded.plan(("sft", STEPS // 2), ("ndpo", 4), ("sft", STEPS // 2 - 4)),
            "trainer=zero1", f"trainer.devices={WORLD}", "trainer.accelerator=cpu",
            "trainer.precision=32-true", "trainer.activation_checkpointing=none", "batch_size=4",
            "save_every=3", "val_every=5", "log_every=1",
        ]
    )  # fmt: skip


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    checkpoint, rejected = latest_valid(run / "checkpoints")
    assert checkpoint and checkpoint.step == STEPS and not rejected
    return runs.tensors_of(checkpoint.path)


def test_signals_at_any_moment_lose_nothing(
    fork_server: ForkServer, settings: dict[str, Any], tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    unbroken = tmp_path / "unbroken"
    undisturbed = rank_signals.start(
        fork_server, {**settings, "run_dir": str(unbroken)}, WORLD, tmp_path / "heartbeat"
    )
    assert undisturbed.wait() == [DONE] * WORLD, undisturbed.outputs()
    expected = checkpoint_bytes(unbroken)
    done, number, event = 0, 0, "nothing"
    while done < COUNT:
        run, step, identity = tmp_path / f"run-{number}", 0, ""
        codes = [STOPPED_SAVED] * WORLD
        while codes != [DONE] * WORLD:
            number += 1
            heartbeat = tmp_path / f"heartbeat-{number}"
            ranks = rank_signals.start(
                fork_server, {**settings, "run_dir": str(run)}, WORLD, heartbeat
            )
            if done < COUNT:
                event = rank_signals.signal_one(ranks, heartbeat, WORLD, chance)
                done += 1
            codes = ranks.wait(120)
            print(f"{done}: {event}: {codes[0]}, step {step}", flush=True)
            assert codes in ([DONE] * WORLD, [STOPPED_SAVED] * WORLD), event + ranks.outputs()
            saved = saved_steps(run / "checkpoints")
            # stopped in its last checks, a run has no step left to do
            assert saved and saved[0] >= min(step + (codes[0] == STOPPED_SAVED), STEPS), event
            step = saved[0]
            identity = identity or json.loads((run / "run.json").read_text())["id"]
            assert json.loads((run / "run.json").read_text())["id"] == identity
        assert checkpoint_bytes(run) == expected, event

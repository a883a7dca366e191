"""One attempt of a run at one topology, in a rank of test_topologies.py."""

import os
import time
from pathlib import Path
from typing import Any

import rank_training
import runs

from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.config import Intervals
from echolab.training.engine.ema import EMA, Ema
from echolab.training.engine.master_weights import Masters
from echolab.training.fit import Machine

BATCH, STEPS = 12, 28  # 12 divides by worlds of 1, 2 and 4 and by 3 micro-batches
OPTIM = runs.Optim(max_grad_norm=0.5, eps=1e-4)  # eps: rounding alone must not become a full step


def lose(part: str) -> None:
    """Make a resume load everything but the moments, or everything but the average."""
    restore = checkpoints.restore

    def and_lose(checkpoint: Any, masters: Masters, ema: Ema) -> None:
        restore(checkpoint, masters, ema)
        if part == EMA:
            ema.start(masters)
        else:
            for flat in masters.flats(part):
                flat.zero_()

    checkpoints.restore = and_lose


def attempt(
    root: str,
    out: str,
    strategy: str,
    world: int,
    accumulation: int,
    until: int,
    kill_at: int = 0,
    again: str = "",
    forget: str = "",
) -> None:
    """Train to step `until`; write `out`/reached at step `kill_at`, and wait two steps later.

    The loaded state is saved again below `again`; `forget` names the part of it that is lost.
    """
    reached = Path(out) / "reached"

    def on_step(step: int, steps: int) -> None:
        if kill_at and step == kill_at:
            reached.touch()
        if kill_at and step == kill_at + 2:
            time.sleep(600)

    if again:
        rank_training.save_what_was_loaded(Path(again))
    if forget:
        lose(forget)
    os.environ["WORLD_SIZE"] = str(world)
    settings: dict[str, Any] = {"stop_after_step": until} if until < STEPS else {}
    runs.train(
        Path(root),
        runs.schedule(("sft", STEPS), lr=1e-3),
        run_dir=Path(out),
        batch_size=BATCH,
        micro_batch_size=BATCH // world // accumulation,
        optim=OPTIM,
        machine=Machine(strategy, devices=world, zero3_shard_small=True),
        intervals=Intervals(log_every=0, save_every=2),
        on_step=on_step,
        **settings,
    )

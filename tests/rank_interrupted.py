"""A rank of test_interrupted.py: a short run that gets a signal during a validation or a check."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs

from echolab.training import distributed
from echolab.training.callbacks import export_check, validation
from echolab.training.checkpoints.checkpoint import saved_steps
from echolab.training.config import Intervals
from echolab.training.datamodule import ValData
from echolab.training.fit import FitResult, Machine

STEPS, HELD = 4, 5
PLACES: dict[str, tuple[Any, str]] = {  # what is called often amid a validation, and amid a check
    "validation": (validation, "held_out_errors"),
    "sampling": (export_check, "generate"),
    "export": (export_check, "exported_net"),
}


def act_at(place: str, count: int, act: Callable[[], object]) -> None:
    """Call `act` at the `count`th call of a function."""
    module, name = PLACES[place]
    function, calls = getattr(module, name), [0]

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            act()
        return function(*given, **named)

    setattr(module, name, counted)


def train(root: Path, **changes: Any) -> tuple[FitResult, list[dict[str, Any]]]:
    """Train with a save and a validation at the same steps, and an export check at the end."""
    settings: dict[str, Any] = {
        "intervals": Intervals(log_every=1, save_every=2, val_every=2),
        "val_data": ValData(runs.write_clips(root / "held", HELD, 50), HELD, 2),
        "phases": runs.PHASES,
        "verify_export": True,
    }
    return runs.train(root, runs.schedule(("sft", STEPS)), **settings | changes)


def main(
    root: str, run: str, strategy: str, devices: int, place: str, count: int, victim: int,
    together: int = 1,
) -> int:  # fmt: skip
    """Train, and signal rank `victim` at the `count`th call in `place`; rank 0 writes
    `run`.json.
    """
    folder = Path(root) / run
    saved: list[int] = []
    own = int(os.environ["RANK"])

    def stop() -> None:
        saved.extend(saved_steps(folder / "checkpoints"))
        os.kill(os.getpid(), signal.SIGTERM)

    if place and own == victim:
        act_at(place, count, stop)
    machine = Machine(
        strategy, devices=devices, zero3_shard_small=True, sequence_parallel=together,
        activation_checkpointing="none",
    )  # fmt: skip
    result, rows = train(Path(root), run_dir=folder, machine=machine)
    record = {
        "result": [result.step, result.reason, result.stopped_by, result.done, result.unsaved],
        "val": [row["step"] for row in rows if "val/loss" in row],
        "trained": [row["step"] for row in rows if "train/loss" in row],
        "parity": [row["step"] for row in rows if "parity/difference" in row],
    }
    texts = distributed.gather_text(json.dumps([record["result"], saved]))
    assert len({str(json.loads(text)[0]) for text in texts}) == 1, texts  # the ranks agree
    record["saved"] = json.loads(texts[victim])[1] if place else []
    if own == 0:
        Path(f"{folder}.json").write_text(json.dumps(record))
    return 0


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back the functions that `act_at` replaced."""
    for module, name in PLACES.values():
        monkeypatch.setattr(module, name, getattr(module, name))

"""One rank that trains a step and writes the bytes it holds:

`FOLDER STRATEGY RANKS PRECISION LORA`.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lora_settings
import runs

from echolab.training.config import Intervals
from echolab.training.engine.master_weights import Masters
from echolab.training.fit import Machine
from echolab.training.loop import TrainLoop


def held(tensors: Iterable[Any]) -> int:
    """Return the bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in storages.items() if pointer)


def count(self: TrainLoop) -> dict[str, int]:
    """Count the bytes that are alive after the first step."""
    net, masters = self.module.net, self.masters
    pieces = [p.ds_tensor.data for p in net.parameters() if hasattr(p, "ds_tensor")]
    moments = [t for key in masters.keys for t in masters.optimizer.state[key].values()]
    own = [] if type(masters) is Masters else masters.local  # else the weights are the masters
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = getattr(masters.zero, "grad_partitions_flat_buffer", None)
    return {
        "weights": held([*(p.data for p in net.parameters()), *pieces]),
        "optimizer": held([*moments, *own]),
        "ema": held(self.ema.flats["ema"]),
        "gradients": held(gradients if flat is None else [flat]),
    }


def main() -> None:
    """Train one step."""
    folder, strategy, ranks, precision, lora = sys.argv[1:]
    sizes: dict[str, int] = {}

    original = TrainLoop.on_train_batch_end

    def after(self: TrainLoop, *arguments: Any) -> None:
        sizes.update(count(self))
        original(self, *arguments)

    TrainLoop.on_train_batch_end = after  # type: ignore[assignment,method-assign]
    runs.train(
        Path(folder),
        runs.schedule(("sft", 1)),
        run_dir=Path(folder) / f"{strategy}-{precision}-{lora}",
        intervals=Intervals(0, 0, 0),
        machine=Machine(strategy, devices=int(ranks), precision=precision),
        **(lora_settings.settings("base") if lora == "lora" else {}),
    )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        name = f"{strategy}-{precision}-{lora}.json"
        (Path(folder) / name).write_text(json.dumps(sizes))


main()
os._exit(0)  # all is written; threads of gloo may abort Python's shutdown

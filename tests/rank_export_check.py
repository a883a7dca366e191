"""A rank of the tests of validation and of the export check: a short run, then both."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lora_settings
import numpy as np
import pytest
import pytorch_lightning as pl
import runs
import torch

from echolab.data.bad_samples import TolerantReader
from echolab.errors import ParityError
from echolab.training import distributed
from echolab.training.callbacks import export_check
from echolab.training.callbacks.export_check import Sampling, check_parity, parity_clips
from echolab.training.callbacks.validation import read_share, validate
from echolab.training.checkpoints.checkpoint import latest_valid
from echolab.training.datamodule import ValData
from echolab.training.engine.ema import Ema
from echolab.training.fit import Machine
from echolab.training.loop import TrainLoop

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
HELD, SIGMAS, TASKS = 5, (0.2, 0.8), ("i2v", "lip_sync")
SWAPPED = ("blocks.0.self_attn.q.weight", "blocks.0.self_attn.k.weight")
PERTURBED = "blocks.1.ffn.0.weight"
Tensors = dict[str, torch.Tensor]


def perturbed(tensors: Tensors) -> Tensors:
    """Scale one tensor of the export by 1.05."""
    return {**tensors, PERTURBED: tensors[PERTURBED] * 1.05}


def swapped(tensors: Tensors) -> Tensors:
    """Swap two names of the export."""
    a, b = SWAPPED
    return {**tensors, a: tensors[b], b: tensors[a]}


@contextmanager
def broken(how: str) -> Iterator[None]:
    """Build in a fault."""
    with pytest.MonkeyPatch.context() as patch:
        if how == "swap of averages":
            patch.setattr(Ema, "applied", lambda *given: nullcontext())
        elif how != "nothing":
            change: Callable[[Tensors], Tensors] = {
                "perturbed": perturbed, "names": swapped
            }[how]  # fmt: skip
            write = export_check.write_original
            patch.setattr(
                export_check,
                "write_original",
                lambda out, net, tensors, **given: write(out, net, change(tensors), **given),
            )
        yield


def held_bits(loop: TrainLoop) -> bytes:
    """Return the bytes of all that this rank holds, and its random states."""
    tensors = [
        *loop.masters.local,
        *(t for part in ("exp_avg", "exp_avg_sq") for t in loop.masters.flats(part)),
        *(t for flats in loop.ema.flats.values() for t in flats),
        *(getattr(p, "ds_tensor", p).data for p in loop.module.net.parameters()),
    ]
    values = b"".join(t.detach().cpu().reshape(-1).view(torch.uint8).numpy() for t in tensors)
    modes = str([module.training for module in loop.module.net.modules()]).encode()
    numbers = np.random.get_state()[1].tobytes()  # type: ignore[union-attr,index]
    return values + torch.get_rng_state().numpy().tobytes() + numbers + modes


def gate(loop: TrainLoop, out: Path, held: ValData, dtype: torch.dtype) -> dict[str, Any]:
    """Return the outcome of the export check under each fault, and the held-out errors, as JSON."""
    subject = (loop.module.net, loop.ema, loop.masters)
    device = torch.device("cpu")
    before = held_bits(loop)
    share = read_share(held, distributed.rank(), distributed.world())
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    values = validate(*subject, share, runs.PHASES, SIGMAS, seed=1, **where)
    results: dict[str, Any] = {"values": dict(values)}
    saved, _ = latest_valid(loop.config.run_dir / "checkpoints")
    assert saved and saved.step == 4
    for how in ("nothing", "swap of averages", "perturbed", "names"):
        with broken(how):
            try:
                check = check_parity(
                    *subject,
                    checkpoint=saved.path,
                    folder=out,
                    clips=parity_clips(TolerantReader(held.clips), TASKS),
                    how=Sampling(seed=1, shift=5.0, steps=3),
                    **where,
                )
                results[how] = check._asdict()
            except ParityError as error:
                results[how] = str(error)
        if distributed.rank() == 0:
            results[f"{how}/report"] = json.loads((out / "parity.json").read_text())
    results["unchanged"] = held_bits(loop) == before
    return results


def main(
    folder: str,
    strategy: str,
    devices: int,
    out: str,
    precision: str = "32-true",
    lora: bool = False,
) -> None:
    """Train four steps; each rank writes its results to `out`/rank-N.json."""
    held = ValData(runs.write_clips(Path(folder) / "held", HELD, 50), batch_size=2, tasks=TASKS)
    end = TrainLoop.on_train_end

    def and_gate(self: TrainLoop, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        end(self, trainer, module)
        results = gate(self, Path(out), held, DTYPES[precision])
        (Path(out) / f"rank-{distributed.rank()}.json").write_text(json.dumps(results))

    TrainLoop.on_train_end = and_gate  # type: ignore[method-assign]
    settings: dict[str, Any] = {}
    if lora:
        settings = lora_settings.settings("base")
        origin = {"weights": f"{folder}/base.safetensors", "checkpoint": None, "seed": 0}
        settings["adapters"]["origin"] = origin
    machine = Machine(strategy, devices=devices, precision=precision, zero3_shard_small=True)
    plan = runs.schedule(("sft", 4), lr=1e-2)
    optim = runs.Optim(ema_decay=0.9)
    runs.train(Path(folder), plan, run_dir=Path(out), machine=machine, optim=optim, **settings)

"""Real runs that combine many settings, one after another in the same ranks."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lora_settings
import runs
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from echolab.training import distributed
from echolab.training import fit as fitting
from echolab.training.checkpoints.checkpoint import open_checkpoint
from echolab.training.engine import activation_checkpointing
from echolab.training.fit import Machine
from echolab.types import Batch, Draws, Loss

PARTS = ("master", "exp_avg", "exp_avg_sq", "ema")
BATCH = 12
EPOCHS = {"sft": (("sft", 3),), "dpo": (("sft", 1), ("dpo", 2), ("ndpo", 1))}
LORA = lora_settings.LORA._replace(targets=("blocks",))
# eps: a gradient of 1e-9 that is rounding alone must not become a full step.
OPTIM = runs.Optim(max_grad_norm=0.5, eps=1e-4)


def name_of(case: dict[str, Any]) -> str:
    """Return the name of a case's file."""
    return "-".join(map(str, case.values()))


def in_full(net: Any, batch: Batch, draws: Draws) -> Loss:
    """Return whether latents, noise, noise levels and loss are fp32, for any dtype of the
    network.
    """
    loss = runs.Supervised(runs.PHASES)(net, batch, draws)
    for tensor in (batch.latents, draws.noise, draws.sigmas, loss.value, *loss.parts.values()):
        assert tensor.dtype == torch.float32, tensor.dtype
    return loss


def parts_of(case: dict[str, Any]) -> dict[str, Any]:
    """Build the network, its reference and the objectives."""
    if case["adapters"] == "none":
        return {"objectives": {"sft": in_full}} if case["epochs"] == "sft" else {}
    made = lora_settings.settings(case["epochs"].removeprefix("dpo-").replace("sft", "base"), LORA)
    made["objectives"]["sft"] = in_full
    return made


def trained(case: dict[str, Any]) -> dict[str, Tensor]:
    """Return the initial values of the trained parameters."""
    net = parts_of(case).get("net") or tiny.net(trained=True)
    return {k: p.detach().clone() for k, p in net.named_parameters() if p.requires_grad}


def one(root: Path, case: dict[str, Any], world: int) -> dict[str, Tensor]:
    """Train one case, and read its last checkpoint."""
    settings = {key: value for key, value in case.items() if key in Machine._fields}
    machine = Machine(**settings, devices=world)
    groups = world // machine.sequence_parallel
    # Inductor is tried in test_memory; here it is what Dynamo makes of hooks and collectives.
    quick = partial(activation_checkpointing.compile_blocks, backend="aot_eager")
    os.environ["WORLD_SIZE"] = str(world)  # Lightning forgets it after a run
    with mock.patch.object(activation_checkpointing, "compile_blocks", quick):
        result, _ = runs.train(
            root,
            runs.schedule(*EPOCHS[case["epochs"].split("-")[0]]),
            run_dir=root / name_of(case),
            batch_size=BATCH,
            micro_batch_size=BATCH // groups // case["accumulation"],
            optim=OPTIM,
            machine=machine,
            print_lines=lambda lines: (root / f"{name_of(case)}.txt").write_text("\n".join(lines)),
            **parts_of(case),
        )
    assert isinstance(result, fitting.FitResult) and result.checkpoint
    checkpoint = open_checkpoint(result.checkpoint)
    return {f"{part}/{k}": t for part in PARTS for k, t in checkpoint.tensors(part).items()}


def train(cases: list[dict[str, Any]], world: int, root: str) -> None:
    """Train all cases, in a rank."""
    folder = Path(root)
    for case in cases:
        print(time.strftime("%X"), case, flush=True)
        torch._dynamo.reset()
        tensors = one(folder, case, world)
        if distributed.rank() == 0:
            save_file(tensors, folder / f"{name_of(case)}.safetensors")
    if distributed.rank() == 0:
        for case in {case["adapters"]: case for case in cases}.values():
            start = trained(case)
            both = {
                f"{part}/{k}": t.clone() for part in ("master", "ema") for k, t in start.items()
            }
            save_file(both, folder / f"start-{case['adapters']}.safetensors")

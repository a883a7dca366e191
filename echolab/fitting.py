"""Fit a small network on one machine: AdamW, warmup and cosine decay, with resume.

It serves the demo's networks (video autoencoder, SyncNet, feature networks); `echolab.training`
trains the transformer.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from echolab.atomic_io import write_atomic
from echolab.errors import CheckpointError, WeightsError

SAVE_SECONDS = 15.0
WARMUP_STEPS = 30

Report = Callable[[int, int, float], None]  # step, steps, loss


Net = TypeVar("Net", bound=nn.Module)


def work_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bf16 if the device supports it in hardware, else fp32, since emulation is slow."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def seeded(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step, so that a resumed fit draws the same random numbers."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def fit(
    net: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Path,
    report: Report,
) -> None:
    """Minimize `loss_of` for `steps` steps.

    `progress` is the path of the saved state; the caller removes it once the net is saved.
    """
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    identity = {"steps": str(steps), "seed": str(seed)}
    start = _load(progress, net, optimizer, identity) if progress.exists() else 0
    saved = time.monotonic()
    net.train()
    for step in range(start, steps):
        # Linear warmup, then cosine decay to 2 % of the learning rate.
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        cosine = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm * cosine
        # The generator depends only on seed and step, so that a resume does not change the draws.
        loss = loss_of(seeded(seed, step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            report(step + 1, steps, float(loss.detach()))
        if time.monotonic() - saved > SAVE_SECONDS:
            _save(progress, net, optimizer, {**identity, "step": str(step + 1)})
            saved = time.monotonic()
    net.eval()


def _save(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, str]
) -> None:
    """Write the network and the optimizer moments."""
    # Use one file for both, so that they are always consistent.
    tensors = {f"net.{name}": value.contiguous() for name, value in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].contiguous()
    write_atomic(path, save(tensors, metadata))


def _load(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, str]
) -> int:
    """Load a saved state; return the number of steps done."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            step = int(metadata["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        for name, parameter in net.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a state of this fit ({line}); remove it") from error
    # Refuse a state with other settings, which would change the result.
    for name, value in identity.items():
        if metadata.get(name, value) != value:
            raise CheckpointError(
                f"{path}: is of a fit with {name}={metadata[name]}, this one has {value}; remove it"
            )
    return step


def save_net(path: Path, net: nn.Module, config: dict[str, Any]) -> None:
    """Write a fitted network atomically; `config` holds its constructor's arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
    metadata = {"network": type(net).__name__, "config": json.dumps(config)}
    write_atomic(path, save(tensors, metadata))


def load_net(path: Path, network: type[Net]) -> Net:
    """Load a network written by `save_net` and freeze it; raise WeightsError for another file."""
    if not path.is_file():
        raise WeightsError(f"{path}: not there; fit it with `echolab fit`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged ({error}); fit or copy it again") from error
    # Weights of another class may have the same shapes, so compare the class first.
    if metadata.get("network") != network.__name__:
        name = metadata.get("network", "no network of echolab's")
        raise WeightsError(f"{path}: holds {name}, need {network.__name__}; give another file")
    # Compare config and tensors on the meta device before allocating memory.
    try:
        config = json.loads(metadata["config"])
        with torch.device("meta"):  # an untrusted config may state any size
            shapes = {k: v.shape for k, v in network(**config).state_dict().items()}
        if shapes != {k: v.shape for k, v in tensors.items()}:
            raise ValueError("its tensors are not those of its config")
        net = network(**config)
        net.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        line = str(error).splitlines()[0]
        raise WeightsError(f"{path}: of another version ({line}); fit it again") from error
    return net.eval().requires_grad_(False)

"""A network with every kind of parameter, its optimizer by any strategy, and saves of it, for
tests.
"""

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from echolab.training import distributed
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import newest, restore
from echolab.training.checkpoints.manifest import serialize
from echolab.training.checkpoints.writer import CheckpointWriter
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import MASTER, MOMENTS, Masters, masters_of

MORE = (0.5,)
# -0.0, the smallest denormal, the largest number and the smallest normal one
PATTERNS = torch.tensor([-(2**31), 1, 0x7F7FFFFF, 0x00800000], dtype=torch.int32)


class Net(nn.Module):
    """A network of sizes that no number of ranks divides; one weight is tied, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 7)
        self.gain = nn.Parameter(torch.ones(1))  # DeepSpeed takes none without dimensions
        self.base = nn.Parameter(torch.ones(5, 3), requires_grad=False)
        self.again = nn.Linear(13, 7, bias=False)
        self.again.weight = self.first.weight
        self.wide = nn.Linear(7, 301)

    def forward(self, x: Tensor) -> Tensor:
        """Return a loss [] for inputs [B, 13]."""
        hidden = self.first(x) + self.again(x) * self.gain + self.base.sum()
        return self.wide(hidden).square().mean()


def net() -> Net:
    """Return the same network each time."""
    torch.manual_seed(0)
    return Net()


def adam(made: nn.Module) -> torch.optim.AdamW:
    """Return AdamW in two groups, as training has them."""
    trained = [p for p in made.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2]}]
    groups += [{"params": [p for p in trained if p.ndim < 2]}]
    return torch.optim.AdamW(groups, lr=1e-2)


def state(step: int, ema: Ema, **more: Any) -> dict[str, Any]:
    """Return what a run saves besides the tensors, as far as readers need it."""
    report = {"step": step, "optimizer_updates": step, "ema": ema.state_dict()}
    origin = {"world": distributed.world(), "masters": "test"}
    schedule = {"epochs": [["sft", 10**6, 1e-3]]}
    curriculum = {"step": step, "probabilities": {"i2v": 1.0}}
    kept = {"curriculum": curriculum, "objectives": {}, "spikes": {}, "architecture": {}}
    return {**report, "origin": origin, "schedule": schedule, **kept, **more}


def keep_all(step: int) -> bool:
    """Keep every checkpoint."""
    return step >= 0


class Saver:
    """A net on one process that can be saved."""

    def __init__(
        self,
        folder: Path,
        *,
        more: tuple[float, ...] = MORE,
        widths: tuple[float, ...] = (),
        **settings: Any,
    ) -> None:
        self.net = net()
        self.masters = masters_of(self.net, adam(self.net))
        self.masters.prepare()
        self.ema = Ema(0.9, more, widths)
        self.ema.start(self.masters)
        kept = {"keep": keep_all, **settings}
        self.writer = CheckpointWriter(folder, self.masters, self.ema, **kept)

    @torch.no_grad()
    def become(self, step: int) -> None:
        """Set every value to a function of the step."""
        flats = [self.masters.flats(part) for part in (MASTER, *MOMENTS)]
        for number, tensors in enumerate([*flats, *self.ema.flats.values()]):
            for tensor in tensors:
                tensor.fill_(step + number / 8)
        self.masters.updates = self.ema.updates = step

    def save(self, step: int) -> Path:
        """Begin and finish, and wait until old checkpoints are removed."""
        self.become(step)
        self.writer.begin(state(step, self.ema))
        path = self.writer.finish()
        self.writer.close()
        assert path
        return path


def check(checkpoint: checkpoints.Checkpoint) -> None:
    """Assert that all of a checkpoint is of its step, and nothing of another's."""
    for number, part in enumerate([MASTER, *MOMENTS, *Ema(0.9, MORE).parts]):
        for tensor in checkpoint.tensors(part).values():
            assert (tensor == checkpoint.step + number / 8).all()
    assert checkpoint.state["step"] == checkpoint.state["ema"]["updates"] == checkpoint.step


def odd_checkpoint(folder: Path) -> Path:
    """Write a checkpoint whose tensors hold every pattern of bits."""
    saver = Saver(folder, shard_bytes=4096)
    generator = torch.Generator().manual_seed(5)
    flats = [saver.masters.flats(part) for part in (MASTER, *MOMENTS)]
    for number, tensors in enumerate([*flats, *saver.ema.flats.values()]):
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            if number == 2:  # the mean of squares
                tensor.abs_()
            if tensor.numel() > 4:
                tensor.view(-1)[:4].view(torch.int32).copy_(PATTERNS)
    saver.masters.updates = saver.ema.updates = 7
    saver.writer.begin(state(7, saver.ema))
    path = saver.writer.finish()
    assert path
    return path


# -- ranks ------------------------------------------------------------------------------------


def masters_by(strategy: str) -> tuple[nn.Module, Masters]:
    """Give a fresh network to a strategy: single, ddp, or zero1 to zero3."""
    made = net()
    if not strategy.startswith("zero"):
        return made, masters_of(made, adam(made))
    import deepspeed

    zero: dict[str, Any] = {"stage": int(strategy[4])}
    if strategy[4] == "3":  # keep small ones complete, or partition all
        zero["stage3_param_persistence_threshold"] = 10**5 if strategy.endswith("full") else 0
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True}
    if "bf16" in strategy:
        config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=made, optimizer=adam(made), config=config)
    return made, masters_of(made, engine.optimizer)


def weights(made: nn.Module) -> list[Tensor]:
    """Return the network's own trained weights as full tensors; collective."""
    import deepspeed

    result = []
    for parameter in made.parameters():
        if parameter.requires_grad:
            cut = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], enabled=cut):
                result.append(parameter.detach().clone())
    return result


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """Compare bits: NaN equals NaN, and -0.0 differs from 0.0."""
    pairs = list(zip(one, other, strict=True))
    bits = ([tensor.reshape(-1).view(torch.uint8) for tensor in pair] for pair in pairs)
    return all(torch.equal(*pair) for pair in bits)


def load_and_save(strategies: list[str], source: str, out: str) -> None:
    """Let each strategy load a checkpoint and write it again; apply and undo the average."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for strategy in strategies:
        made, masters = masters_by(strategy)
        checkpoint = newest(Path(source))
        assert checkpoint
        ema = Ema(0.9, MORE)
        restore(checkpoint, masters, ema)
        average = [checkpoint.tensors("ema")[name] for name in masters.parameters]
        own = [checkpoint.tensors(MASTER)[name] for name in masters.parameters]
        dtype = next(made.parameters()).dtype
        before = weights(made)
        assert same_bits(before, [tensor.to(dtype) for tensor in own])
        with ema.applied(masters):
            assert same_bits(weights(made), [tensor.to(dtype) for tensor in average])
        assert same_bits(weights(made), before) and masters.updates == 7
        folder = Path(out) / f"{strategy}-{distributed.world()}"
        writer = CheckpointWriter(folder, masters, ema, keep=keep_all, shard_bytes=4096)
        writers = {file.writer for file in writer.files}
        assert writers == set(range(distributed.world())), writers
        writer.check_start()
        writer.begin(state(7, ema))
        writer.finish()


def save_with_fault(out: str, at: str) -> None:
    """Let rank 1 fail at `at`; every rank gets the error, and later saves succeed."""
    from echolab.errors import CheckpointError
    from echolab.training.checkpoints import writer as writing

    dist.init_process_group("gloo")
    if distributed.rank() == 1:
        time.time = lambda: 0.0  # a clock that is off by decades
        time.time_ns = lambda: 0
    saver = Saver(Path(out), shard_bytes=4096)
    saver.save(1)
    if at == "write":
        if distributed.rank() == 1:
            real, writing.write_file = writing.write_file, refuse
    elif at == "memory" and distributed.rank() == 1:
        saver.writer._buffers.clear()
        real, writing.host_buffer = writing.host_buffer, refuse
    report = ""
    try:
        saver.save(2)
    except CheckpointError as error:
        report = str(error)
    (Path(out) / f"report-{distributed.rank()}").write_text(report)
    if at == "write" and distributed.rank() == 1:
        writing.write_file = real
    elif at == "memory" and distributed.rank() == 1:
        writing.host_buffer = real
    saver.save(3)
    _see_another(Path(out))


def _see_another(out: Path) -> None:
    """Give rank 1's disk another checkpoint of the same name; both ranks get the error."""
    from echolab.errors import CheckpointError

    elsewhere = Path(f"{out}-elsewhere")
    if distributed.rank() == 1:
        content = json.loads((out / "step-000003/manifest.json").read_bytes())
        content.pop("sha256")
        shutil.copytree(out, elsewhere)
        other = serialize({**content, "tied": {}})
        (elsewhere / "step-000003/manifest.json").write_bytes(other)
    report = ""
    try:
        newest(elsewhere if distributed.rank() == 1 else out)
    except CheckpointError as error:
        report = str(error)
    (out / f"saw-{distributed.rank()}").write_text(report)


def refuse(*given: Any, **named: Any) -> Any:
    """Fail in place of another function."""
    raise RuntimeError("this rank cannot")


def save_for_ever(folder: str, steps_file: str, seed: int) -> None:
    """Resume from the newest, save without end, and write each published step to a file."""
    torch.set_num_threads(1)
    saver = Saver(Path(folder), keep=lambda step: False)
    checkpoint = newest(Path(folder))
    step = 0
    if checkpoint:
        restore(checkpoint, saver.masters, saver.ema)
        step = checkpoint.step
    chance = random.Random(seed)
    out = os.open(steps_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(out, b"0\n")
    while True:
        step += 1
        saver.become(step)
        saver.writer.begin(state(step, saver.ema))
        time.sleep(chance.random() * 0.002)
        saver.writer.finish()
        os.write(out, f"{step}\n".encode())


def last_published(file: Path) -> int:
    """Return the last published step whose line is complete."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return max((int(line) for line in lines if line.endswith("\n")), default=0)

"""Rows of `echolab bench step` for the engine: what training costs beside a bare step.

The bare step is what a short script would do with the same network, batches and optimizer: draw,
forward, backward, clip, AdamW, average.  The engine is `training.fit` as `echolab train` calls it.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn

from echolab.bench.models import Inputs, draw_inputs, ours_net
from echolab.bench.rows import Cost, Row, cost_of, measure, say
from echolab.data.shard_reader import ShardWriter, open_dataset
from echolab.data.train_dataset import MicroBatch
from echolab.diffusion.objectives import Supervised
from echolab.diffusion.phases import FLAT, KeepModalities
from echolab.heartbeat import Beats
from echolab.models.attention import attention_from, use_attention
from echolab.tasks.curriculum import Curriculum, hard_to_easy
from echolab.tasks.table import DEFAULT_TASK
from echolab.training.config import Intervals, Machine, Training
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine.activation_checkpointing import KEPT, checkpoint_blocks
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters, masters_of
from echolab.training.fit import fit
from echolab.training.module import draws_of
from echolab.training.schedule import Epoch, Schedule
from echolab.training.validation import on_device

BARE, STEP = "bare loop", "training step"
CLIPS, TASK, RATE, CLIP, DECAY = 4, DEFAULT_TASK, 1e-6, 1.0, 0.999
WARM = 3  # steps before the first that counts
SMALLEST: dict[str, Any] = {  # its step is short, so that what surrounds it is seen
    "dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 1, "in_channels": 36,
    "out_channels": 16, "text_dim": 32, "image_dim": 32, "audio_dim": None, "freq_dim": 32,
}  # fmt: skip
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


class Subject(NamedTuple):
    """What is trained."""

    architecture: Mapping[str, Any]
    folder: Path  # for clips, runs and checkpoints
    device: str
    precision: str  # fp32, bf16
    checkpointing: str
    attention: str
    seed: int

    def machine(self, strategy: str = "single", devices: int = 1) -> Machine:
        """For `fit`."""
        return Machine(
            strategy,
            devices=devices,
            accelerator="gpu" if self.device == "cuda" else "cpu",
            precision=PRECISIONS[self.precision],
            attention=self.attention,
            checkpointing=self.checkpointing,
        )


def write_clips(subject: Subject, inputs: Inputs) -> None:
    """An encoded dataset of clips of the size of `inputs`."""
    told = {name: part[0].cpu() for name, part in inputs.told._asdict().items()}
    tensors = {name: told[name] for name in ("text", "image", "audio", "face")}
    tensors |= {f"known.{TASK}": told["known"], f"known_latents.{TASK}": told["known_latents"]}
    latents = inputs.latents[0].cpu()
    tensors["weight"] = torch.ones(1, *latents.shape[1:])
    with ShardWriter(subject.folder / "clips", kind="encoded") as writer:
        for number in range(CLIPS):
            sample = save({**tensors, "latents": latents.roll(number, -1).contiguous()})
            writer.write(f"clip-{number}", {"safetensors": sample, "json": b"{}"})


def training_of(
    subject: Subject, net: nn.Module, run: str, steps: int, machine: Machine, **changes: Any
) -> Training:
    """A supervised run over the clips."""
    return Training(
        net,
        subject.architecture,
        subject.folder / run,
        [open_dataset(subject.folder / "clips")],
        Schedule([Epoch("sft", steps, RATE)]),
        Curriculum(hard_to_easy(1, [TASK]), momentum=0.0, floor=0.0),
        {"sft": Supervised(KeepModalities(FLAT))},
        batch_size=machine.devices,
        seed=subject.seed,
        machine=machine,
        every=Intervals(save=0),
        **changes,
    )


class Bare:
    """The network with all that a step changes, and the step in plain PyTorch."""

    def __init__(self, subject: Subject, net: nn.Module) -> None:
        self.subject, self.net = subject, net
        self.device = torch.device(subject.device)
        self.objective = Supervised(KeepModalities(FLAT))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in net.parameters() if p.ndim >= 2]},
            {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01, fused=True)
        self.masters: Masters = masters_of(net, self.optimizer)
        self.masters.prepare()
        self.ema = Ema(DECAY)
        self.ema.start(self.masters)

    def step(self, item: MicroBatch) -> None:
        """One optimizer step."""
        batch = on_device(item.batch, self.device)  # type: ignore[arg-type]
        draws = draws_of(item._replace(batch=batch), seed=self.subject.seed, shift=5.0)
        rounded = self.subject.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=rounded):
            loss = self.objective(self.net, batch, draws)
        self.optimizer.zero_grad(set_to_none=True)  # where Lightning does: memory is used again
        loss.value.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP, foreach=True)
        self.optimizer.step()

    def average(self) -> None:
        """One update of the average."""
        self.ema.update(self.masters)


def net_of(subject: Subject) -> nn.Module:
    """On the CPU, with its attention and checkpointing."""
    net = ours_net(subject.architecture, subject.seed, "cpu")
    use_attention(net, attention_from(subject.attention, subject.device))
    return net


def bare_of(subject: Subject, net: nn.Module) -> Bare:
    """A copy of a network, where it is to run, and its plain step."""
    own = copy.deepcopy(net).to(subject.device)
    if subject.checkpointing != "none":
        checkpoint_blocks(own, KEPT[subject.checkpointing])
    return Bare(subject, own)


def batches_of(training: Training) -> Iterator[MicroBatch]:
    """What `fit` would train on, by the same loader."""
    schedule, feed = training.schedule, training.feed()
    data = ShardDataModule(feed, schedule.place, schedule.steps, training.curriculum, Beats(None))
    return iter(data.train_dataloader())


# -- the average ---------------------------------------------------------------------------


def average_rows(subject: Subject, net: nn.Module, pairs: int) -> Iterator[Row]:
    """An update of the average beside a step: the ratio is its share."""
    say("measuring engine/ema")
    bare = bare_of(subject, net)
    item = next(batches_of(training_of(subject, net, "bare", 1, subject.machine())))
    pair = measure(bare.average, lambda: bare.step(item), pairs, subject.device)
    yield from pair.rows("engine/ema", STEP, subject.device)


# -- Lightning, our module and callbacks ----------------------------------------------------


class Turns:
    """Takes a bare step after every step of the engine, and measures both."""

    def __init__(self, bare: Bare, items: Iterator[MicroBatch]) -> None:
        self.bare, self.items = bare, items
        self.engine: list[Cost] = []
        self.plain: list[Cost] = []
        self.since = (0.0, 0.0)

    def _now(self) -> tuple[float, float]:
        if self.bare.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _bare_step(self) -> None:
        self.bare.step(next(self.items))
        self.bare.average()

    def __call__(self, step: int, steps: int) -> None:
        """The engine ended a step."""
        del steps
        now = self._now()
        if step > 1:
            self.engine.append(Cost(now[0] - self.since[0], now[1] - self.since[1]))
        self.plain.append(cost_of(self._bare_step, self.bare.device.type))
        self.since = self._now()


def medians(costs: list[Cost]) -> Cost:
    """Of time and processor time, without the first few."""
    counted = costs[WARM:]
    return Cost(
        statistics.median(cost.seconds for cost in counted),
        statistics.median(cost.processor_seconds for cost in counted),
    )


def in_turns(subject: Subject, net: nn.Module, steps: int, run: str) -> tuple[Cost, Cost]:
    """Medians of a step of the engine and of a bare one; the engine's last step saves, and is not
    counted."""
    steps += WARM + 2
    bare = bare_of(subject, net)
    turns = Turns(bare, batches_of(training_of(subject, net, run, steps, subject.machine())))
    fit(training_of(subject, net, run, steps, subject.machine(), on_step=turns))
    return medians(turns.engine[:-1]), medians(turns.plain[1:-1])


def module_rows(subject: Subject, net: nn.Module, pairs: int) -> Iterator[Row]:
    """`fit` beside a bare loop, and what it adds to a step by itself, measured on a short one."""
    say("measuring engine/module")
    engine, plain = in_turns(subject, net, 3 * pairs, "module")
    yield Row("engine/module/time", engine.seconds, "s", BARE, plain.seconds)
    if subject.device == "cpu":
        taken = engine.processor_seconds, plain.processor_seconds
        yield Row("engine/module/processor_time", taken[0], "s", BARE, taken[1])
    short = subject._replace(architecture=SMALLEST, folder=subject.folder / "short")
    write_clips(short, draw_inputs(SMALLEST, (5, 32, 32), subject.seed, "cpu"))
    own, other = in_turns(short, net_of(short), 20 * pairs, "module")
    yield Row("engine/module/short_step", own.seconds, "s", BARE, other.seconds)
    added = own.seconds - other.seconds
    yield Row("engine/module/added", added, "s", STEP, plain.seconds)

"""Rows of `echolab bench step` for the engine: the cost of training compared with a bare step.

The bare step is the step of a short script with the same network, batches and optimizer: draw,
forward, backward, clip, AdamW, average.  The engine is a run of `echolab train`, built from
the same settings by the same builder.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn

from echolab.bench.measure import Cost, Row, cost_of, measure, say
from echolab.bench.models import Inputs, draw_inputs, ours_net
from echolab.config.build import train_config_from
from echolab.config.compose import compose
from echolab.data.shard_writer import ShardWriter
from echolab.data.train_dataset import MicroBatch
from echolab.diffusion.objectives import Supervised
from echolab.diffusion.phases import FLAT, ModalityDropout
from echolab.heartbeat import Heartbeat
from echolab.models.attention import attention_from, use_attention
from echolab.tasks.table import DEFAULT_TASK
from echolab.training.callbacks.validation import on_device
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine.activation_checkpointing import (
    KEPT,
    OFFLOAD,
    checkpoint_blocks,
    offload_activations,
)
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters, masters_of
from echolab.training.fit import fit
from echolab.training.module import draws_of

BARE, STEP = "bare loop", "training step"
CLIPS, TASK, FLOW_SHIFT = 4, DEFAULT_TASK, 5.0
LEARNING_RATE, MAX_GRAD_NORM, EMA_DECAY = 1e-6, 1.0, 0.999
WARMUP = 3  # steps that are not counted
SMALLEST: dict[str, Any] = {  # a network with a short step, which shows the engine's own cost
    "dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 1, "in_channels": 36,
    "out_channels": 16, "text_dim": 32, "image_dim": 32, "audio_dim": None, "freq_dim": 32,
}  # fmt: skip
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


class Subject(NamedTuple):
    """The run that is measured."""

    architecture: Mapping[str, Any]
    folder: Path  # folder of clips and runs
    device: str
    precision: str  # fp32, bf16
    checkpointing: str
    attention: str
    seed: int

    def settings(self, run: str, steps: int) -> dict[str, Any]:
        """Return the settings of a supervised run over the clips, as in `echolab train`."""
        # Compose the run from conf/, as `echolab train` does.
        config = compose([
            "trainer=cpu", "logger=none", "phases=flat", f"tasks={TASK}", "batch_size=1",
            f"trainer.accelerator={'gpu' if self.device == 'cuda' else 'cpu'}",
            f"trainer.precision={PRECISIONS[self.precision]}",
            f"trainer.attention={self.attention}",
            f"trainer.activation_checkpointing={self.checkpointing}",
            f"data.clips={self.folder / 'clips'}", f"run_dir={self.folder / run}",
            f"seed={self.seed}", f"flow_shift={FLOW_SHIFT}",
            f"schedule.epochs=[{{kind:sft,steps:{steps}}}]", "schedule.warmup=0",
            f"optim.lr={LEARNING_RATE}", f"optim.max_grad_norm={MAX_GRAD_NORM}",
            f"optim.ema_decay={EMA_DECAY}", "save_every=0", "val_every=0", "verify_export=false",
        ])  # fmt: skip
        return {**config, "model": dict(self.architecture)}


def write_clips(subject: Subject, inputs: Inputs) -> None:
    """Write an encoded dataset of clips of the size of `inputs`."""
    conditions = {name: part[0].cpu() for name, part in inputs.conditions._asdict().items()}
    tensors = {name: conditions[name] for name in ("text", "image", "audio", "face")}
    tensors[f"known.{TASK}"] = conditions["known"]
    tensors[f"known_latents.{TASK}"] = conditions["known_latents"]
    latents = inputs.latents[0].cpu()
    tensors["weight"] = torch.ones(1, *latents.shape[1:])
    # Every clip has the same random values.
    with ShardWriter(subject.folder / "clips", kind="encoded") as writer:
        for number in range(CLIPS):
            sample = save({**tensors, "latents": latents.roll(number, -1).contiguous()})
            writer.write(f"clip-{number}", {"safetensors": sample, "json": b"{}"})


def build_training(subject: Subject, net: nn.Module, run: str, steps: int) -> TrainConfig:
    """Build the run as `echolab train` does, with the measured network."""
    return train_config_from(subject.settings(run, steps), "")._replace(net=net)


def build_net(subject: Subject) -> nn.Module:
    """Build the network on the CPU, with its attention kernel."""
    net = ours_net(subject.architecture, subject.seed, "cpu")
    use_attention(net, attention_from(subject.attention, subject.device))
    return net


def batches_of(training: TrainConfig) -> Iterator[MicroBatch]:
    """Iterate over the micro-batches that `fit` would train on, by the same loader."""
    schedule, train_data = training.schedule, training.build_data()
    data = ShardDataModule(
        train_data, schedule.place, schedule.steps, training.curriculum, Heartbeat(None)
    )
    return iter(data.train_dataloader())


# The baseline: the same network, optimizer and data, without Lightning.
class Bare:
    """A copy of a network with optimizer, weight average and training step in plain PyTorch."""

    def __init__(self, subject: Subject, net: nn.Module) -> None:
        """Copy the network to the device and make its optimizer."""
        self.subject, self.net = subject, copy.deepcopy(net).to(subject.device)
        if subject.checkpointing in KEPT:
            checkpoint_blocks(self.net, KEPT[subject.checkpointing])
        offloads = subject.checkpointing == OFFLOAD
        self.offloading = offload_activations(self.net) if offloads else nullcontext()
        self.device = torch.device(subject.device)
        self.objective = Supervised(ModalityDropout(FLAT))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.net.parameters() if p.ndim >= 2]},
            {"params": [p for p in self.net.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        self.masters: Masters = masters_of(self.net, self.optimizer)
        self.masters.prepare()
        self.ema = Ema(EMA_DECAY)
        self.ema.start(self.masters)

    def step(self, item: MicroBatch) -> None:
        """Run one optimizer step."""
        batch = on_device(item.batch, self.device)  # type: ignore[arg-type]
        draws = draws_of(item._replace(batch=batch), seed=self.subject.seed, shift=FLOW_SHIFT)
        # Forward and backward as in the module, without its records.
        rounded = self.subject.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=rounded):
            with self.offloading:
                loss = self.objective(self.net, batch, draws)
        self.optimizer.zero_grad(set_to_none=True)  # at this point as in Lightning
        loss.value.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), MAX_GRAD_NORM, foreach=True)
        self.optimizer.step()

    def average(self) -> None:
        """Update the average once."""
        self.ema.update(self.masters)


# -- the average ---------------------------------------------------------------------------------


def average_rows(subject: Subject, net: nn.Module, pairs: int) -> Iterator[Row]:
    """Yield rows of one update of the average compared with a step; the ratio is its cost."""
    say("measuring engine/ema")
    bare = Bare(subject, net)
    item = next(batches_of(build_training(subject, net, "bare", 1)))
    pair = measure(bare.average, lambda: bare.step(item), pairs, subject.device)
    yield from pair.rows("engine/ema", STEP, subject.device)


# -- Lightning, the module and the callbacks -----------------------------------------------------


class AlternatingTimer:
    """Runs a bare step after every step of the engine, and measures both."""

    def __init__(self, bare: Bare, items: Iterator[MicroBatch]) -> None:
        """Store the bare loop and its micro-batches."""
        self.bare, self.items = bare, items
        self.engine: list[Cost] = []
        self.plain: list[Cost] = []
        self.since = (0.0, 0.0)

    def _timestamps(self) -> tuple[float, float]:
        # Wait for the GPU to finish its queued work.
        if self.bare.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _bare_step(self) -> None:
        self.bare.step(next(self.items))
        self.bare.average()

    def __call__(self, step: int, steps: int) -> None:
        """Record the step that the engine finished, then run and record a bare step."""
        del steps
        now = self._timestamps()
        # The first steps allocate memory and compile.
        if step > 1:
            self.engine.append(Cost(now[0] - self.since[0], now[1] - self.since[1]))
        self.plain.append(cost_of(self._bare_step, self.bare.device.type))
        self.since = self._timestamps()


def medians(costs: list[Cost]) -> Cost:
    """Return the medians of time and processor time, without the first few."""
    counted = costs[WARMUP:]
    return Cost(
        statistics.median(cost.seconds for cost in counted),
        statistics.median(cost.processor_seconds for cost in counted),
    )


def measure_alternately(
    subject: Subject, net: nn.Module, steps: int, run: str
) -> tuple[Cost, Cost]:
    """Return the median costs of an engine step and of a bare step.

    The engine's last step saves a checkpoint and is not counted.
    """
    steps += WARMUP + 2
    training = build_training(subject, net, run, steps)
    timer = AlternatingTimer(Bare(subject, net), batches_of(training))
    fit(training._replace(on_step=timer))
    return medians(timer.engine[:-1]), medians(timer.plain[1:-1])


def module_rows(subject: Subject, net: nn.Module, pairs: int) -> Iterator[Row]:
    """Yield rows of `fit` compared with a bare loop, and of the time it adds to a short step."""
    say("measuring engine/module")
    engine, plain = measure_alternately(subject, net, 3 * pairs, "module")
    yield Row("engine/module/time", engine.seconds, "s", BARE, plain.seconds)
    # On the CPU processor seconds are steadier than wall time.
    if subject.device == "cpu":
        taken = engine.processor_seconds, plain.processor_seconds
        yield Row("engine/module/processor_time", taken[0], "s", BARE, taken[1])

    # The engine adds a constant time, which a short step shows best.
    short = subject._replace(architecture=SMALLEST, folder=subject.folder / "short")
    write_clips(short, draw_inputs(SMALLEST, (5, 32, 32), subject.seed, "cpu"))
    engine, other = measure_alternately(short, build_net(short), 20 * pairs, "module")
    yield Row("engine/module/short_step", engine.seconds, "s", BARE, other.seconds)
    yield Row("engine/module/added", engine.seconds - other.seconds, "s", STEP, plain.seconds)

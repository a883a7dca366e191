"""The Lightning module: forward pass, objectives by kind of epoch, optimizer and measurements."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from echolab.data.train_dataset import MicroBatch
from echolab.diffusion.sigmas import draw_noise
from echolab.heartbeat import Heartbeat
from echolab.tasks.table import TASKS
from echolab.training import distributed
from echolab.training.engine.activation_checkpointing import offload_activations
from echolab.training.engine.sequence_parallel import SequenceSplit, sequence_group
from echolab.types import Draws, Loss, PreferencePair, SyncBatch


class Objective(Protocol):
    """`objectives.Supervised` and the other objectives."""

    def __call__(self, net: Any, batch: Any, draws: Draws) -> Loss: ...


class Reference(Protocol):
    """A frozen network: `models.frozen.Frozen`, or a base or frozen adapters (`adapters.lora`)."""

    def load(self, weights: Mapping[str, Tensor]) -> None: ...

    def to(self, device: torch.device | str) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Optim(NamedTuple):
    """Settings of AdamW, gradient clipping and averages; the schedule sets the learning rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # limit of the gradient norm, for clipping
    ema_decay: float = 0.999
    extra_ema_decays: tuple[float, ...] = ()  # decays of additional averages
    posthoc_ema_stds: tuple[float, ...] = ()  # widths of power averages, for post-hoc EMA


class Meter:
    """Collects losses and their parts on the device; `flush` averages them over steps and ranks."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._tasks: list[str] = []

    def add(self, loss: Loss, tasks: list[str]) -> None:
        """Add one micro-batch: the loss and its parts, each [B] or []."""
        self.add_value("loss", loss.value)
        for name, part in loss.parts.items():
            self.add_value(name, part)
        if "error" in loss.parts:
            self._tasks += tasks

    def add_value(self, name: str, value: Tensor) -> None:
        """Add any number of values [...]."""
        self._values.setdefault(name, []).append(value.detach().reshape(-1))

    def flush(self) -> dict[str, float]:
        """Return the means by name, with prefix `train/`, and reset; collective.

        Every rank must have added values with the same names.
        """
        # Use sums and counts, so that ranks with different counts are averaged correctly.
        totals: dict[str, tuple[float, int]] = {}
        for name, parts in self._values.items():
            values = torch.cat(parts).double().cpu()
            if name == "error":  # report by task: list all, since ranks draw different tasks
                for task in TASKS:
                    pairs = zip(values.tolist(), self._tasks, strict=True)
                    errors = [error for error, drawn_task in pairs if drawn_task == task]
                    totals[f"train/error/{task}"] = (sum(errors), len(errors))
            else:
                totals[f"train/{name}"] = (float(values.sum()), len(values))
        self._values, self._tasks = {}, []
        return distributed.means(totals)


def draws_of(item: MicroBatch, *, seed: int, shift: float) -> Draws:
    """Draw noise, levels and uniforms: a pure function of (seed, epoch, key) of each clip."""
    match item.batch:
        case PreferencePair():
            clips = item.batch.chosen
        case SyncBatch():  # the noise varies the pixels of the crops
            clips = item.batch.crops
        case _:
            clips = item.batch.latents
    # Draw for all clips of an epoch at once; a step may span two epochs.
    shape = tuple(clips.shape[1:])
    of_epochs = []
    for epoch, pairs in groupby(zip(item.epochs, item.batch.keys, strict=True), lambda p: p[0]):
        keys = [key for _, key in pairs]
        of_epochs.append(draw_noise(keys, shape, seed=seed, epoch=epoch, shift=shift))
    return Draws(*(torch.cat(parts).to(clips.device) for parts in zip(*of_epochs, strict=True)))


def number_of(item: MicroBatch, seed: int) -> int:
    """Return a 56-bit seed, a pure function of (seed, epoch, key) of all clips."""
    text = f"{seed} {item.kind} {item.epochs} {item.batch.keys}".encode()
    return int.from_bytes(blake2b(text, digest_size=7).digest(), "big")


class DiffusionModule(pl.LightningModule):
    """Trains `net`; objectives hold a reference outside of the module tree."""

    def __init__(
        self,
        net: nn.Module,
        objectives: Mapping[str, Objective],
        *,
        optim: Optim,
        seed: int,
        shift: float,
        clip_here: bool = True,
        loss_factor: float = 1.0,
        sequence_parallel: int = 1,
        offloads: bool = False,
        heartbeat: Heartbeat,
    ) -> None:
        super().__init__()
        self.net = net
        self.objectives = dict(objectives)
        self.optim, self.seed, self.shift = optim, seed, shift
        self.clip_here = clip_here  # false with DeepSpeed, which clips itself
        # Compensates that both Lightning and DeepSpeed divide a loss by the micro-batches per step.
        self.loss_factor = loss_factor
        self.sequence_parallel = sequence_parallel
        self.offloads = offloads  # move activations to host memory until the backward pass
        self._offloading: AbstractContextManager[Any] | None = None
        # Measurements that callbacks read after each step.
        self.meter = Meter()
        self.heartbeat = heartbeat
        self._loss: Tensor | None = None  # sum over the micro-batches of the step
        self._margins: list[tuple[Tensor, float]] = []  # mean preference margin, loss weight
        self.norm: Tensor | None = None  # norm of the last gradient before clipping
        self.on_draws: Callable[[MicroBatch, Draws], None] | None = None  # set by the ledger
        self.drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in net.modules())

    def setup(self, stage: str) -> None:
        """Set up sequence parallelism; the ranks are connected by now."""
        if self.sequence_parallel > 1:
            SequenceSplit(self.net, sequence_group(self.sequence_parallel))

    def training_step(self, item: MicroBatch, index: int) -> Tensor:
        """Compute the loss of one micro-batch."""
        self.heartbeat.enter("forward")
        # Draw the noise of each clip, and record it in the ledger before use.
        draws = draws_of(item, seed=self.seed, shift=self.shift)
        if self.on_draws:
            self.on_draws(item, draws)
        if self.drops:  # seed dropout by the clips, so that a resumed run drops the same units
            torch.manual_seed(number_of(item, self.seed))
        with self._forward_context():
            loss = self.objectives[item.kind](self.net, item.batch, draws)
        # A micro-batch that only pads a step has weight 0 and counts in no mean.
        value = loss.value * item.loss_weight
        if item.loss_weight:
            if "margin" in loss.parts:
                self._margins.append((loss.parts["margin"].mean(), item.loss_weight))
            self.meter.add(loss._replace(value=value), item.batch.tasks)
        else:  # add empty values, since all ranks must add the same names
            empty = {name: part.reshape(-1)[:0] for name, part in loss.parts.items()}
            self.meter.add(Loss(value, empty), [])
        # Keep the loss on the device, since reading it would wait for the GPU.
        part = value.detach().float()
        self._loss = part if self._loss is None else self._loss + part
        return value * self.loss_factor

    def _forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of each forward pass, created when the weights are on the device."""
        if not self.offloads:
            return nullcontext()
        if self._offloading is None:
            self._offloading = offload_activations(self.net)
        return self._offloading

    def take_loss(self) -> Tensor:
        """Return and reset the sum of this rank's losses, on the device."""
        assert self._loss is not None
        total, self._loss = self._loss, None
        return total

    def take_margin(self) -> dict[str, Tensor | float]:
        """Return this rank's vote entries for the step's mean margin; empty without pairs."""
        margins, self._margins = self._margins, []
        if not margins:
            return {}
        # Sum in fp64, so that the order of the ranks does not matter.
        means = torch.stack([margin.double() * share for margin, share in margins])
        return {"margin": means.sum(), "margin_share": sum(share for _, share in margins)}

    def take_norm(self) -> Tensor:
        """Return the gradient norm before clipping, on the device."""
        # DeepSpeed clips in its own step and stores the norm.
        if not self.clip_here:
            engine: Any = self.trainer.strategy.deepspeed_engine  # type: ignore[attr-defined]
            self.norm = torch.as_tensor(engine.get_global_grad_norm())
        assert self.norm is not None
        self.meter.add_value("gradient_norm", self.norm)
        return self.norm

    def on_before_backward(self, loss: Tensor) -> None:
        """Enter section `backward` of the heartbeat."""
        self.heartbeat.enter("backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip by norm; not done by Lightning, so that the norm is computed only once."""
        self.heartbeat.enter("optimizer")
        if self.clip_here:
            norm = nn.utils.clip_grad_norm_(
                self.net.parameters(), self.optim.max_grad_norm, foreach=True
            )
            self.norm = norm.detach()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make AdamW, without weight decay for vectors (norms, biases, modulation)."""
        # Two groups, since weight decay applies only to matrices.
        trained = [p for p in self.net.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        o = self.optim
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,  # set before every step
            betas=o.betas,
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=True,
        )

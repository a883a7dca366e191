"""Report what the running engine does, read from the engine itself instead of the settings.

Settings can be misleading: "16-mixed" under DeepSpeed is pure fp16, accumulation was silently reset
to 1, an optimizer clipped only on some ranks.  Therefore a plan is read from the engine, printed
and compared with the expected plan; step counters are compared at every step; and the norm of the
gradients that the optimizer received is checked.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DeepSpeedStrategy
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from echolab.errors import ConfigError, EcholabError
from echolab.models.frozen import Frozen
from echolab.training.engine.master_weights import MOMENTS, Masters
from echolab.training.engine.sequence_parallel import SequenceSplit
from echolab.training.engine.strategies import Machine

CLIP_SLACK = 1e-3  # relative tolerance of the norm after clipping above its limit

# Hooks of a LightningModule that are never called here, and those that DeepSpeed does not call.
NEVER_CALLED = (
    "validation_step", "test_step", "predict_step", "lr_scheduler_step",
    "on_save_checkpoint", "on_load_checkpoint",
)  # fmt: skip
NOT_BY_DEEPSPEED = ("backward", "configure_gradient_clipping")


class Plan(NamedTuple):
    """The configuration of one rank's running engine; dtypes as torch names them."""

    strategy: str  # one of machine.STRATEGIES
    world: int  # number of ranks
    data_parallel: int  # number of ranks, or groups of ranks, with different clips
    sequence_parallel: int  # number of ranks that share a clip
    accumulation: int  # micro-batches per rank and optimizer step
    clip: float  # limit of the gradient norm
    optimizer: str
    batches: str  # dtype of batches, and so of noise, targets and losses
    compute: str  # dtype of matrix products
    parameters: str
    masters: str
    moments: str
    gradients: str  # dtype in which they are summed over micro-batches and ranks
    average: str  # dtype of the EMA
    offload: str  # state in host memory: none, or optimizer
    trained: int  # number of trained parameters (tensors)
    frozen: int  # number of frozen parameters (tensors)
    blocks: int
    checkpointed: int  # number of checkpointed blocks
    compiled: int  # number of compiled blocks
    attention: str

    def lines(self) -> list[str]:
        """Return the plan as lines to print when a run starts."""
        width = max(map(len, self._fields))
        return [f"{name:{width}}  {value}" for name, value in self._asdict().items()]


def _dtypes(tensors: Iterable[Tensor]) -> str:
    names = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return "+".join(sorted(names))


def _strategy_name(trainer: pl.Trainer) -> str:
    """Name the strategy by the types of the engine's objects."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        zero: Any = trainer.optimizers[0]
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            return "zero3"
        return "zero2" if zero.partition_gradients else "zero1"
    return "ddp" if isinstance(trainer.strategy.model, DistributedDataParallel) else "single"


def _compute_dtype(trainer: pl.Trainer, net: nn.Module) -> str:
    """Return the dtype of the result of a matrix product, in the network's precision."""
    parameter = next(net.parameters())
    # Compute a product, since the effect of autocast is only visible in the result.
    probe = torch.ones(1, 1, dtype=parameter.dtype, device=parameter.device)
    with trainer.precision_plugin.forward_context():
        return _dtypes([probe @ probe])


def _gradient_dtypes(trainer: pl.Trainer, net: nn.Module) -> str:
    zero: Any = trainer.optimizers[0]
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return _dtypes(p for p in net.parameters() if p.requires_grad)
    kinds = {zero.gradient_accumulation_dtype, zero.communication_data_type}
    return "+".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def _offload_name(trainer: pl.Trainer) -> str:
    zero: Any = trainer.optimizers[0]
    held = getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False)
    return "optimizer" if held else "none"


def _sequence_ranks(net: nn.Module) -> tuple[int, str]:
    """Return (number of ranks that share a clip, attention function) of the first block."""
    if not blocks_of(net):
        return 1, "none"
    attend: Any = blocks_of(net)[0].self_attn.attend
    split = getattr(attend, "__self__", None)
    if isinstance(split, SequenceSplit):
        return split.world, split.attend.__name__
    return 1, attend.__name__


def blocks_of(net: nn.Module) -> list[Any]:
    """Return the transformer blocks of a network; SyncNet has none."""
    return list(getattr(net, "blocks", ()))


def plan_of(trainer: pl.Trainer, net: nn.Module, masters: Masters, average: list[Tensor]) -> Plan:
    """Read the plan from the trainer's engine, its optimizer and `net`.

    Call after setup, when `masters` are prepared.  `average` is this rank's EMA.
    """
    # Read everything from the running objects, not from the settings.
    strategy = _strategy_name(trainer)
    zero = strategy.startswith("zero")
    wrapper: Any = trainer.optimizers[0]
    module: Any = trainer.lightning_module
    engine: Any = trainer.strategy.model
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    sequence_parallel, attention = _sequence_ranks(net)
    # DeepSpeed accumulates gradients itself; otherwise Lightning does.
    blocks = blocks_of(net)
    accumulation = engine.gradient_accumulation_steps() if zero else trainer.accumulate_grad_batches
    return Plan(
        strategy=strategy,
        world=world,
        data_parallel=world // sequence_parallel,
        sequence_parallel=sequence_parallel,
        accumulation=accumulation,
        clip=float(wrapper.clip_grad if zero else module.optim.max_grad_norm * module.clip_here),
        optimizer=type(masters.optimizer).__name__,
        batches=_dtypes([trainer.precision_plugin.convert_input(torch.ones(1))]),
        compute=_compute_dtype(trainer, net),
        parameters=_dtypes(net.parameters()),
        masters=_dtypes(masters.local),
        moments=_dtypes(tensor for part in MOMENTS for tensor in masters.flats(part)),
        gradients=_gradient_dtypes(trainer, net),
        average=_dtypes(average),
        offload=_offload_name(trainer),
        trained=sum(p.requires_grad for p in net.parameters()),
        frozen=sum(not p.requires_grad for p in net.parameters()),
        blocks=len(blocks),
        checkpointed=sum("forward" in vars(block) for block in blocks),
        compiled=sum(block._compiled_call_impl is not None for block in blocks),
        attention=attention,
    )


def expected_plan(machine: Machine, accumulation: int, clip: float, blocks: int) -> dict[str, Any]:
    """Return the entries that a plan must have under these settings."""
    # The compute dtype for this precision.
    low = "float32" if machine.precision == "32-true" else "bfloat16"
    return {
        "strategy": machine.strategy,
        "world": machine.world,
        "data_parallel": machine.world // machine.sequence_parallel,
        "sequence_parallel": machine.sequence_parallel,
        "accumulation": accumulation,
        "clip": clip,
        "batches": "float32",
        "compute": low,
        "parameters": low if machine.sharded else "float32",
        "masters": "float32",
        "moments": "float32",
        "gradients": low if machine.sharded else "float32",
        "average": "float32",
        "offload": machine.offload,
        "checkpointed": blocks if machine.activation_checkpointing in ("selective", "full") else 0,
        "compiled": blocks if machine.compile else 0,
    }


def check(plan: Plan, asked: dict[str, Any]) -> None:
    """Raise EcholabError, naming all differences, if the engine differs from the settings."""
    # List all differences in one message.
    differ = [
        f"{name} is {getattr(plan, name)}, asked for {value}"
        for name, value in asked.items()
        if getattr(plan, name) != value
    ]
    if differ:
        raise EcholabError(
            f"the training engine is not as set: {'; '.join(differ)}; "
            "check the versions of deepspeed and pytorch-lightning against constraints.txt"
        )


def skipped(trainer: pl.Trainer) -> int:
    """Return the number of steps that DeepSpeed skipped for a gradient that is not finite."""
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return 0
    return int(trainer.strategy.deepspeed_engine.skipped_steps)


def check_counts(trainer: pl.Trainer, *, steps: int, accumulation: int, skipped: int = 0) -> None:
    """Raise EcholabError unless the engine counted `steps` optimizer steps since its start.

    Call after the last micro-batch of each step.  `skipped` is the number of steps that DeepSpeed
    skipped and a rollback undid.
    """
    # The counters of Lightning and DeepSpeed must both agree with the loop.
    counts = {"lightning's global_step": (trainer.global_step, steps)}
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        engine = trainer.strategy.deepspeed_engine
        counts["deepspeed's global_steps"] = (engine.global_steps, steps)
        counts["deepspeed's micro_steps"] = (engine.micro_steps, steps * accumulation)
        counts["deepspeed's skipped_steps"] = (engine.skipped_steps, skipped)
    differ = [f"{name} is {a}, not {b}" for name, (a, b) in counts.items() if a != b]
    if differ:
        raise EcholabError(
            f"after {steps} steps of {accumulation} micro-batches: {'; '.join(differ)}; nothing "
            "was saved after this; go on from the last checkpoint, with a lower learning rate "
            "where steps were skipped"
        )


def check_hooks(module: pl.LightningModule, machine: Machine) -> None:
    """Raise ConfigError for hooks that are never called: misspelled, or ignored by the engine."""
    unknown = [
        name
        for name in dir(type(module))
        if name.startswith(("on_", "configure_", "optimizer_")) and not hasattr(_PLAIN, name)
    ]
    # DeepSpeed runs backward and clipping itself.
    ignored = NEVER_CALLED + (NOT_BY_DEEPSPEED if machine.sharded else ())
    uncalled = unknown + [name for name in ignored if is_overridden(name, module)]
    if uncalled:
        raise ConfigError(
            f"{type(module).__name__}.{uncalled[0]}: never called with strategy "
            f"{machine.strategy}; remove it, or see that its name is one of Lightning's hooks"
        )


_PLAIN = pl.LightningModule


class ClippedNorm:
    """Sums the squares of the gradients that the optimizer receives, in a hook of its step.

    Under ZeRO the optimizer steps one group at a time over unscaled and clipped fp32 partitions,
    which are freed afterwards, so they can only be read in such a hook.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, replicated: int = 1) -> None:
        """Install the hook; `replicated` ranks have equal gradients: 1 under ZeRO, else all."""
        self.replicated = replicated
        self._squares: list[Tensor] = []
        # Use a post-hook, since Lightning computes the gradients inside of `step`.
        self._hook = optimizer.register_step_post_hook(self._record_gradients)

    def _record_gradients(
        self, optimizer: torch.optim.Optimizer, given: Any, keywords: Any
    ) -> None:
        gradients = [
            p.grad.float() for group in optimizer.param_groups for p in group["params"]
            if p.grad is not None
        ]  # fmt: skip
        if gradients:
            # Use one kernel for all tensors, and read nothing from the device.
            norms = torch._foreach_norm(gradients)
            self._squares.append(torch.stack(norms).square().sum())

    def take(self) -> Tensor:
        """Return this rank's sum of squares [] since the last call, to be summed over ranks."""
        if not self._squares:
            return torch.zeros(())
        total = torch.stack(self._squares).sum() / self.replicated
        self._squares.clear()
        return total


def check_clipped(squares: float, limit: float, step: int) -> float:
    """Return the gradient norm after clipping; raise EcholabError if it exceeds `limit`.

    `squares` is `ClippedNorm.take` summed over all ranks.
    """
    norm = squares**0.5
    if norm > limit * (1 + CLIP_SLACK):
        raise EcholabError(
            f"step {step}: the gradient's norm after clipping is {norm:.6g}, over "
            f"optim.max_grad_norm={limit:g}: the engine did not clip on all ranks; "
            "go on from the last checkpoint with another trainer.strategy"
        )
    return norm


# -- trained and frozen networks --------------------------------------------------


def _names_by_storage(parameters: Iterable[tuple[str, Any]]) -> dict[int, str]:
    return {p.untyped_storage().data_ptr(): name for name, p in parameters if p.numel()}


def check_frozen_networks(net: nn.Module, frozen: Iterable[tuple[str, Frozen]]) -> None:
    """Raise ConfigError if a frozen network is not frozen, or shares weights with `net`.

    `frozen` has networks with their names for the message, but not a base with its adapters
    switched off, which shares weights on purpose.  Call before the engine wraps `net`, since ZeRO 3
    leaves its parameters empty.  A reference that shares weights with the policy would change with
    it, and preference training would have no effect.
    """
    if not any(p.requires_grad for p in net.parameters()):
        raise ConfigError("the network has nothing to train: all its parameters are frozen")
    # Compare storages, since a view of a trained parameter shares weights too.
    own = _names_by_storage(net.named_parameters())
    for called, other in frozen:
        if other.net.training or any(p.requires_grad for p in other.net.parameters()):
            raise ConfigError(f"{called}: must be in eval mode and without gradients; freeze it")
        shared = own.keys() & _names_by_storage(other.net.named_parameters()).keys()
        if shared:
            raise ConfigError(
                f"{called}: shares {len(shared)} tensors with the trained network, "
                f"{own[min(shared)]} among them, and would follow it; give it a copy"
            )


def check_alone(module: nn.Module, net: nn.Module) -> None:
    """Raise ConfigError if `module` has parameters that do not belong to `net`.

    The engine would wrap, partition and save a frozen network inside the module tree.
    """
    own = {id(p) for p in net.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) not in own:
            raise ConfigError(
                f"{type(module).__name__}.{name}: is no parameter of the trained network; "
                "hold frozen networks outside the module tree, in models.frozen.Frozen"
            )

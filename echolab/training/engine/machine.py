"""The trainer settings of a run, and which of them can be combined.  Imports no torch.

The supervisor and the command line check the settings before any rank is started.
"""

from typing import NamedTuple

from echolab.errors import ConfigError

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")
PRECISIONS = ("32-true", "bf16-mixed")
OFFLOADS = ("none", "optimizer")
CHECKPOINTINGS = ("none", "full", "selective", "offload")

# Precisions of Lightning that are refused here, with the reason.
REFUSED = {
    "bf16-true": "master weights in bf16 lose updates below 1/256 of a weight",
    "16-mixed": "under DeepSpeed it is pure fp16, and small gradients of video models vanish in it",
    "16-true": "master weights in fp16 lose updates below 1/2048 of a weight",
}


class Machine(NamedTuple):
    """Trainer settings.  The ranks must already have been started."""

    strategy: str = "single"  # one of STRATEGIES
    devices: int = 1  # ranks per node
    num_nodes: int = 1
    accelerator: str = "cpu"
    precision: str = "32-true"  # one of PRECISIONS
    zero3_shard_small: bool = False  # make ZeRO 3 partition small tensors too, for tests
    attention: str = "auto"  # one of attention.NAMES
    activation_checkpointing: str = "none"  # one of CHECKPOINTINGS
    compile: bool = False  # compile the blocks
    sequence_parallel: int = 1  # ranks that share a clip
    offload: str = "none"  # with optimizer, fp32 masters and moments are in host memory

    @property
    def world(self) -> int:
        """Total number of ranks."""
        return self.devices * self.num_nodes

    @property
    def sharded(self) -> bool:
        """True if DeepSpeed holds the weights."""
        return self.strategy.startswith("zero")

    @property
    def device(self) -> str:
        """Device type as torch names it."""
        return "cuda" if self.accelerator in ("gpu", "cuda") else self.accelerator


def _unknown_choice(machine: Machine) -> str | None:
    # Check settings that have a fixed list of choices.
    known = {
        "strategy": STRATEGIES,
        "activation_checkpointing": CHECKPOINTINGS,
        "offload": OFFLOADS,
    }
    for key, names in known.items():
        if (value := getattr(machine, key)) not in names:
            return f"trainer.{key}={value}: unknown; one of {', '.join(names)}"
    if machine.precision in PRECISIONS:
        return None
    why = REFUSED.get(machine.precision, "unknown")
    return f"trainer.precision={machine.precision}: {why}; one of {', '.join(PRECISIONS)}"


def conflict(machine: Machine) -> str | None:
    """Return a one-line error with remedy if these settings cannot be combined, else None.

    All other combinations are supported: strategy, precision, checkpointing, compile, sequence
    parallelism, offload, and any accumulation.
    """
    if fault := _unknown_choice(machine):
        return fault
    # Several ranks need a distributed strategy.
    world, group_size = machine.world, machine.sequence_parallel
    if world < 1 or (machine.strategy == "single" and world > 1):
        return (
            f"trainer.strategy={machine.strategy}: not for {world} ranks; "
            f"use {'ddp, zero1, zero2 or zero3' if world > 1 else 'trainer.devices=1'}"
        )
    if group_size < 1 or world % group_size:
        return (
            f"trainer.sequence_parallel={group_size}: must divide the number of ranks, {world}; "
            "use 1, or another number of ranks"
        )
    if fault := _offload_conflict(machine):
        return fault
    if machine.compile and machine.strategy == "zero3":
        return (
            "trainer.compile=true: torch.compile traces the hooks by which zero3 gathers weights, "
            "and gradients come out wrong; use strategy zero2, or compile=false"
        )
    return None


def _offload_conflict(machine: Machine) -> str | None:
    """Return a one-line error with remedy if offloading is not possible, else None."""
    # Only ZeRO has separate master weights, which can be moved to the host.
    if machine.offload == "optimizer" and not machine.sharded:
        return (
            f"trainer.offload=optimizer: {machine.strategy} keeps its weights and their masters in "
            "one; use strategy zero1, zero2 or zero3, or offload=none"
        )
    # Activation offload needs a GPU, and recognizes weights by their storage.
    if machine.activation_checkpointing != "offload":
        return None
    if machine.device != "cuda":
        return (
            "trainer.activation_checkpointing=offload: moves activations from a GPU to host "
            f"memory, and trainer.accelerator={machine.accelerator} has them there; use none, "
            "selective or full, or trainer.accelerator=gpu"
        )
    if machine.strategy == "zero3":
        return (
            "trainer.activation_checkpointing=offload: zero3 moves weights between uses, which "
            "the offload would then mistake for activations; use strategy zero2, or selective"
        )
    return None


def accumulation_steps(batch_size: int, micro_batch_size: int | None, machine: Machine) -> int:
    """Return the micro-batches per rank and step; raise ConfigError if they do not divide."""
    if why := conflict(machine):
        raise ConfigError(why)
    # A group of ranks that share clips counts once.
    groups = machine.world // machine.sequence_parallel
    micro = micro_batch_size or max(1, batch_size // groups)
    multiple = groups * micro
    if batch_size < 1 or micro < 1 or batch_size % multiple:
        raise ConfigError(
            f"batch_size={batch_size}: not a multiple of {groups} ranks x micro_batch_size={micro};"
            f" use {max(1, -(-batch_size // multiple)) * multiple}, or another micro_batch_size"
        )
    return batch_size // multiple

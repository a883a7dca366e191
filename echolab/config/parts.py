"""Parts of a training run that need no torch, built from their settings.

The supervisor checks a configuration by building these; the ranks train with them.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from echolab.launch.section_timeouts import SectionTimeouts
from echolab.training.engine.machine import Machine
from echolab.training.guards.spikes import Guards
from echolab.training.intervals import Intervals

# Settings of the run that are intervals in steps.
INTERVALS = ("log_every", "save_every", "val_every", "replica_check_every", "snapshot_every")


def machine_from(trainer: Mapping[str, Any]) -> Machine:
    """Return where a run trains, from conf/trainer."""
    return Machine(
        strategy=trainer["strategy"],
        devices=trainer["devices"],
        nodes=trainer["num_nodes"],
        accelerator=trainer["accelerator"],
        precision=trainer["precision"],
        shard_small=trainer["zero3_shard_small"],
        attention=trainer["attention"],
        checkpointing=trainer["activation_checkpointing"],
        compile=trainer["compile"],
        sequence_parallel=trainer["sequence_parallel"],
        offload=trainer["offload"],
    )


def rate_of(lr: float, scale: float) -> float:
    """Return the learning rate of an epoch.

    The product is that of the decimal numbers, so that 2e-5 scaled by 0.1 is 2e-6 to the last bit.
    """
    return float(Decimal(repr(lr)) * Decimal(repr(scale)))


def intervals_from(config: Mapping[str, Any]) -> Intervals:
    """Return how often a run logs, saves and validates; raise ConfigError for a conflict."""
    return Intervals(
        log=config["log_every"],
        save=config["save_every"],
        validate=config["val_every"],
        replicas=config["replica_check_every"],
        snapshot=config["snapshot_every"],
    )


def guards_from(loss_spike: Mapping[str, Any]) -> Guards:
    """Return how spikes are detected and handled; raise ConfigError for a conflict."""
    return Guards(
        policy=loss_spike["policy"],
        limit=loss_spike["threshold"],
        window=loss_spike["window"],
        warmup=loss_spike["min_history"],
        back=loss_spike["rollback_steps"],
        skip_batches=loss_spike["skip_batches"],
        at_most=loss_spike["max_rollbacks"],
    ).check()


def timeouts_from(timeouts: Mapping[str, Any]) -> SectionTimeouts:
    """Return the timeouts of the sections, in seconds; raise ConfigError if one is not positive."""
    return SectionTimeouts(**timeouts).check()

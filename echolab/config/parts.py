"""Parts of a training run that need no torch, built from their settings.

The supervisor checks a configuration by building these parts; the ranks train with them.

The parts include the user's callbacks: only classes that echolab or an installed distribution
registers (`echolab.plugins`), by entry points of the group `echolab.callbacks`.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from echolab import plugins
from echolab.errors import ConfigError
from echolab.heartbeat import SectionTimeouts
from echolab.training.engine.machine import Machine
from echolab.training.guards.spikes import SpikeConfig
from echolab.training.intervals import Intervals

if TYPE_CHECKING:
    from echolab.training.callbacks.callback import Callback

CALLBACKS_GROUP = "echolab.callbacks"
OWN_CALLBACKS = "echolab.training.callbacks"  # the namespace that needs no registration
# Settings of the run that are intervals in steps.
INTERVALS = ("log_every", "save_every", "val_every", "replica_check_every", "snapshot_every")


def machine_from(trainer: Mapping[str, Any]) -> Machine:
    """Return the devices, strategy and precision of a run, from conf/trainer."""
    return Machine(
        strategy=trainer["strategy"],
        devices=trainer["devices"],
        num_nodes=trainer["num_nodes"],
        accelerator=trainer["accelerator"],
        precision=trainer["precision"],
        zero3_shard_small=trainer["zero3_shard_small"],
        attention=trainer["attention"],
        activation_checkpointing=trainer["activation_checkpointing"],
        compile=trainer["compile"],
        sequence_parallel=trainer["sequence_parallel"],
        offload=trainer["offload"],
    )


def rate_of(lr: float, scale: float) -> float:
    """Return the learning rate of an epoch.

    The factors are multiplied as decimal numbers, so that 2e-5 scaled by 0.1 is exactly 2e-6.
    """
    return float(Decimal(repr(lr)) * Decimal(repr(scale)))


def intervals_from(config: Mapping[str, Any]) -> Intervals:
    """Return the intervals of logging, saving and validating; raise ConfigError for a conflict."""
    return Intervals(
        log_every=config["log_every"],
        save_every=config["save_every"],
        val_every=config["val_every"],
        replica_check_every=config["replica_check_every"],
        snapshot_every=config["snapshot_every"],
    )


def spike_config_from(loss_spike: Mapping[str, Any]) -> SpikeConfig:
    """Return the detection and handling of loss spikes; raise ConfigError for a conflict."""
    return SpikeConfig(
        policy=loss_spike["policy"],
        threshold=loss_spike["threshold"],
        window=loss_spike["window"],
        min_history=loss_spike["min_history"],
        rollback_steps=loss_spike["rollback_steps"],
        skip_batches=loss_spike["skip_batches"],
        max_rollbacks=loss_spike["max_rollbacks"],
    ).check()


def timeouts_from(timeouts: Mapping[str, Any]) -> SectionTimeouts:
    """Return the timeouts of the sections, in seconds; raise ConfigError if one is not positive."""
    return SectionTimeouts(**timeouts).check()


# -- the user's callbacks -------------------------------------------------------------------------


def callbacks_from(config: Mapping[str, Any]) -> list["Callback"]:
    """Build the callbacks of conf/callbacks, in order; raise ConfigError if one is refused."""
    return [
        _build(entry["target"], entry["args"], f"callbacks.custom[{number}]")
        for number, entry in enumerate(config["custom"])
    ]


def check_targets(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a target that is not registered; nothing is imported."""
    for number, entry in enumerate(config["custom"]):
        plugins.registered_path(
            entry["target"], f"callbacks.custom[{number}]", group=CALLBACKS_GROUP,
            namespace=OWN_CALLBACKS, kind="class",
        )  # fmt: skip


def _build(target: str, arguments: Mapping[str, Any], setting: str) -> "Callback":
    """Import a registered class and call it."""
    from echolab.training.callbacks.callback import Callback

    callback_class = plugins.import_registered(
        target, setting, group=CALLBACKS_GROUP, namespace=OWN_CALLBACKS, kind="class"
    )
    if not (isinstance(callback_class, type) and issubclass(callback_class, Callback)):
        raise ConfigError(
            f"{setting}.target={target}: is no subclass of {OWN_CALLBACKS}.callback.Callback; "
            "derive it"
        )
    plugins.check_arguments(callback_class, (), arguments, target, setting)
    # Errors of the constructor itself are the user's own.
    return callback_class(**arguments)

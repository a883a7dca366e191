"""Strategies for Lightning: a single process, DDP, or DeepSpeed ZeRO 1 to 3, on GPUs and CPUs.

`machine.conflict` defines the supported combinations; the tests train all of them and compare the
result with that of a single plain process.
"""

import os
from typing import Any
from unittest import mock

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import nn

from echolab.errors import ConfigError
from echolab.training.engine.activation_checkpointing import compiler_missing
from echolab.training.engine.machine import Machine, conflict
from echolab.training.engine.master_weights import masters_of


def refusal(machine: Machine) -> str | None:
    """Return a one-line error with remedy if `machine` cannot be used on this host, else None.

    The reasons are a conflict between settings, or a missing compiler.
    """
    if why := conflict(machine):
        return why
    if machine.compile and (missing := compiler_missing(machine.device)):
        return f"trainer.compile=true: {missing}"
    return None


class AnyDeviceDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, also on CPUs (over gloo, with DeepSpeed's CPU accelerator).

    On GPUs it equals the parent, except that it does not round batches and the initial values of
    the masters to bf16.  On CPUs it replaces methods of Lightning 2.6, which refuses CPUs in
    `setup_environment`, checks GPU indices in `setup_distributed`, and passes `device_rank=None` to
    `deepspeed.initialize`.
    """

    @property
    def _on_cpu(self) -> bool:
        return not isinstance(self.accelerator, CUDAAccelerator)

    def setup_environment(self) -> None:
        if not self._on_cpu:
            return super().setup_environment()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if not self._on_cpu:
            return super().setup_distributed()
        import deepspeed

        # Skip compiling a shared-memory operator, which takes 50 s and needs a compiler and ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
        return None

    def init_deepspeed(self) -> None:
        if not self._on_cpu:
            return super().init_deepspeed()
        import deepspeed

        original = deepspeed.initialize

        def without_args(args: Any = None, **keywords: Any) -> Any:
            return original(**keywords)  # without args, the engine reads LOCAL_RANK

        with mock.patch.object(deepspeed, "initialize", without_args):
            super().init_deepspeed()
        return None

    def setup(self, trainer: pl.Trainer) -> None:
        """Keep noise, targets and losses in fp32: the network casts its own inputs."""
        # Without this, Lightning would round the batch to bf16.
        self.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        super().setup(trainer)

    def _setup_model_and_optimizer(self, model: nn.Module, *given: Any) -> tuple[Any, Any]:
        """Set up the engine, with fp32 masters that start from the unrounded weights.

        DeepSpeed rounds the weights to bf16 before it copies its fp32 masters from them.
        """
        if self.precision_plugin.precision == "32-true":
            return super()._setup_model_and_optimizer(model, *given)
        # References suffice: rounding allocates new memory and does not change these tensors.
        unrounded = {
            name: parameter.detach().float()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        engine, zero = super()._setup_model_and_optimizer(model, *given)
        # The masters were copied from the rounded weights: set them again.
        masters = masters_of(model, zero)
        masters.fill(masters.local, unrounded)
        return engine, zero


def strategy_of(machine: Machine) -> Strategy | str:
    """Return the strategy for Lightning's trainer; raise ConfigError if `refusal` refuses."""
    if why := refusal(machine):
        raise ConfigError(why)
    if machine.strategy == "single":
        return "auto"
    if machine.strategy == "ddp":
        return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True)
    # Lightning requires this batch size, which DeepSpeed only uses in its log.
    strategy = AnyDeviceDeepSpeedStrategy(
        stage=int(machine.strategy[-1]), logging_batch_size_per_gpu=1
    )
    config: Any = strategy.config
    if machine.strategy == "zero3" and machine.zero3_shard_small:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if machine.offload == "optimizer":
        # Use torch's fused AdamW on the CPU, since DeepSpeed's CPU optimizer must be compiled.
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": machine.device == "cuda",
        }
    return strategy


def cluster_environment() -> LightningEnvironment | SLURMEnvironment:
    """Return Slurm's environment if srun itself started this rank, else the launcher's.

    Lightning must not requeue jobs: `signals` and slurm/train.sbatch handle signals and requeueing.
    """
    if "ECHOLAB_LAUNCH" in os.environ:  # a supervisor started this rank, inside Slurm or not
        return LightningEnvironment()
    inside = "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ
    if inside and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()

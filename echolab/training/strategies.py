"""How ranks share the work: alone, DDP, or DeepSpeed ZeRO 1 to 3, on GPUs and on CPUs."""

import os
from typing import Any
from unittest import mock

from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, Strategy

from echolab.errors import ConfigError

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3")


class AnyDeviceDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed, on CPUs too: over gloo, with DeepSpeed's CPU accelerator.

    On GPUs every method is the parent's.  Lightning 2.6 refuses CPUs in `setup_environment`, checks
    GPU indices in `setup_distributed`, and passes `device_rank=None` to `deepspeed.initialize`.
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

        # Else a shared-memory operation is compiled first: 50 s, a compiler and ninja.
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
            return original(**keywords)  # the engine then takes LOCAL_RANK

        with mock.patch.object(deepspeed, "initialize", without_args):
            super().init_deepspeed()
        return None


def strategy_from(name: str, *, shard_small: bool = False) -> Strategy | str:
    """A Lightning strategy; `shard_small` makes ZeRO 3 cut small tensors too (tests need it)."""
    if name == "single":
        return "auto"
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True)
    if name not in STRATEGIES:
        raise ConfigError(f"trainer.strategy={name}: unknown; one of {', '.join(STRATEGIES)}")
    # Batch size is only for DeepSpeed's own log; Lightning asks for it.
    strategy = AnyDeviceDeepSpeedStrategy(stage=int(name[-1]), logging_batch_size_per_gpu=1)
    if name == "zero3" and shard_small:
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # type: ignore[index]
    return strategy


def cluster_environment() -> LightningEnvironment | SLURMEnvironment:
    """Slurm's where srun started us; else ranks come from the launcher's environment.

    Lightning never requeues: signals and requeueing are ours (`stopping`, slurm/train.sbatch).
    """
    inside = "SLURM_NTASKS" in os.environ and "SLURM_PROCID" in os.environ
    if inside and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()

"""Everything a training run is made of, and whether the parts fit each other."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from echolab.data.bad_samples import QUARANTINE, TolerantReader
from echolab.data.batch_sampler import DEFAULT_SHUFFLE, ShuffleConfig
from echolab.data.collate import common_shapes
from echolab.data.shard_reader import ShardDataset, check_same_encoders
from echolab.data.train_dataset import build_mixture
from echolab.diffusion.phases import Allocator
from echolab.errors import ConfigError, DataError, FencedError
from echolab.geometry import geometry_of
from echolab.heartbeat import Heartbeat
from echolab.tasks.curriculum import Curriculum
from echolab.tasks.table import TASK_TABLE
from echolab.training.callbacks.callback import Callback
from echolab.training.datamodule import TrainData, ValData, data_of
from echolab.training.engine.machine import Machine, accumulation_steps
from echolab.training.engine.placement import check_device
from echolab.training.guards.spikes import SpikeConfig
from echolab.training.intervals import Intervals
from echolab.training.module import Objective, Optim, Reference
from echolab.training.schedule import Schedule
from echolab.training.signals import FOREVER

Sink = Callable[[int, dict[str, float]], None]


ALONE, OPTIM, SPIKES = Machine(), Optim(), SpikeConfig()
EMPTY: Mapping[str, Any] = {}


def check_dataset(dataset: ShardDataset, kind: str, architecture: Mapping[str, Any]) -> None:
    """Raise DataError for a dataset of another kind, ConfigError if the network cannot read it."""
    if dataset.kind != kind:
        raise DataError(f"{dataset.folder}: kind {dataset.kind}, need {kind}; give another dataset")
    if not len(dataset):
        raise DataError(f"{dataset.folder}: holds no sample; nothing to train on")
    # The sizes that dataset and network must share.
    form = common_shapes(dataset)
    latents, audio = form["latents" if kind == "encoded" else "chosen"], form["audio"]
    sizes: dict[str, Any] = {
        "text_dim": form["text"][-1],
        "image_dim": form["image"][-1],
        "audio_dim": audio[-1],
        "audio_layers": audio[1] if len(audio) == 3 else None,
        "out_channels": latents[0],
    }
    # null in the architecture means no such branch, which any dataset fits.
    has_audio = architecture.get("audio_dim") is not None
    for name, there in sizes.items():
        here = architecture.get(name)
        differs = here is not None and here != there
        if name == "audio_layers":
            differs = has_audio and here != there
        if differs:
            raise ConfigError(
                f"model.{name}={'null' if here is None else here}: the clips of {dataset.folder} "
                f"have {'null' if there is None else there}; take the model= that fits their "
                "encoders"
            )
    # Patches must divide the latents, or positions would be lost.
    check_geometry(dataset, architecture)
    for size, step in zip(latents[1:], architecture.get("patch_size") or (), strict=False):
        if size % step:
            raise ConfigError(
                f"model.patch_size={list(architecture['patch_size'])}: does not divide the latents "
                f"{list(latents[1:])} of {dataset.folder}; take the model= that fits them"
            )


def check_geometry(dataset: ShardDataset, architecture: Mapping[str, Any]) -> None:
    """Raise ConfigError if the network divides clips otherwise than the dataset's encoders."""
    clips, network = dataset.geometry, geometry_of(architecture)
    for name in ("time_stride", "space_stride", "patch"):  # channels: see the tensors themselves
        if getattr(clips, name) != getattr(network, name):
            setting = "patch_size" if name == "patch" else name
            raise ConfigError(
                f"model.{setting}: {name} is {getattr(network, name)}, the clips of "
                f"{dataset.folder} have {getattr(clips, name)}; take the model= that fits their "
                "encoders"
            )


def check_tasks(dataset: ShardDataset, tasks: Sequence[str], setting: str) -> None:
    """Raise ConfigError for a task that the samples of an encoded dataset have no tensors for."""
    # Tasks are stored as tensors named known.TASK.
    posed = {name.partition(".")[2] for name in common_shapes(dataset) if name.startswith("known.")}
    for task in tasks:
        if TASK_TABLE[task].has_known and task not in posed:
            raise ConfigError(
                f"{setting}: task {task}, for which the clips of {dataset.folder} have no tensor "
                f"known.{task}; leave it out, or encode the dataset again"
            )


def check_data(
    clips: Sequence[ShardDataset],
    pairs: Sequence[ShardDataset],
    val_data: ValData | None,
    architecture: Mapping[str, Any],
    curriculum: Curriculum,
    parity: bool,
) -> None:
    """Look at the first good samples of each dataset, which takes no weights.

    Raises DataError, or ConfigError if they do not fit the network, the tasks or each other.
    """
    # Each dataset by itself, then those that share batches.
    for dataset in clips:
        check_dataset(dataset, "encoded", architecture)
        check_tasks(dataset, curriculum.tasks, "tasks.tasks")
    for one, other in combinations(clips, 2):
        a, b = common_shapes(one), common_shapes(other)
        for name in ("text", "image", "audio"):
            if tuple(a["latents"]) == tuple(b["latents"]) and tuple(a[name]) != tuple(b[name]):
                raise ConfigError(
                    f"data.clips: {one.folder} and {other.folder} have clips of one size, but "
                    f"{name} of {list(a[name])} and {list(b[name])}; encode them alike"
                )
    for dataset in pairs:
        check_dataset(dataset, "preference", architecture)
    # Validation data is read by the network too, and by the export check.
    if val_data:
        check_dataset(val_data.clips, "encoded", architecture)
        check_tasks(val_data.clips, val_data.tasks, "data.val_tasks")
        if parity:  # samples of the export are compared on held-out clips
            check_tasks(val_data.clips, curriculum.tasks, "tasks.tasks")


class TrainConfig(NamedTuple):
    """Everything a training run is made of.

    Fields that a setting of conf/ sets have its name.  Checkpoints lie in `run_dir/checkpoints`,
    and training resumes bit-exactly from the newest complete one, under any number of ranks and any
    strategy.  Without one, training starts from the averaged weights of the checkpoint `init_from`,
    or from `net` as it is.
    `objectives` has one entry for each kind of epoch; preference objectives hold `reference`,
    which is loaded at the start of each of their epochs with the averaged weights of that moment,
    or always with those of `ref_model`.
    """

    net: nn.Module
    architecture: Mapping[str, Any]
    run_dir: Path
    clips: Sequence[ShardDataset]  # one for each size of clips, or more, mixed by weight
    schedule: Schedule
    curriculum: Curriculum
    objectives: Mapping[str, Objective]
    batch_size: int  # clips of the largest size a step, over all ranks
    seed: int = 0
    flow_shift: float = 5.0
    pairs: Sequence[ShardDataset] = ()
    clip_weights: Sequence[float] | None = None  # of `clips`; None: by the numbers of their samples
    pair_weights: Sequence[float] | None = None
    shuffle: ShuffleConfig = DEFAULT_SHUFFLE
    log_samples: bool = False  # whether `run_dir/ledger` records the samples of each step
    max_bad_fraction: float = 0.0  # of samples to skip; quarantine.jsonl lists them
    accepts_changed_data: bool = False  # accepts other data than the run was trained on so far
    reference: Reference | None = None
    ref_model: Path | None = None
    ref_model_sync_steps: int = 0  # steps between mixings of the weights into it; 0: never
    ref_model_mixup_alpha: float = 0.6  # share of the weights in such a mixing
    init_from: Path | None = None
    origins: Mapping[str, Any] = EMPTY  # what it starts from and refers to, by content; rank 0's
    adapters: Mapping[str, Any] | None = None  # of an adapted `net`: settings and base
    val_data: ValData | None = None
    phases: Allocator | None = None  # for the held-out error
    optim: Optim = OPTIM
    machine: Machine = ALONE
    micro_batch_size: int | None = None
    num_workers: int = 0
    intervals: Intervals | None = None
    settings_digest: str = ""  # must be equal on all ranks: a digest of the settings, say
    log_metrics: Sink | None = None  # (step, values), on rank 0
    on_step: Callable[[int, int], None] | None = None  # (step, steps), on rank 0
    stop_after_step: int | None = None  # the step to end after, before the schedule's end
    signal_grace_seconds: Mapping[int, float] | None = None  # by number: from signal to kill
    job_end_time: float = FOREVER  # by the system's clock: the run is saved before
    loss_spike: SpikeConfig = SPIKES
    max_host_memory_gb: float | None = None  # of a rank with its workers; above, the run ends
    verify_export: bool = False  # before it is done, samples of an export are compared
    on_begin: Callable[[int], None] | None = None  # (step), on rank 0, called when training starts
    print_lines: Callable[[list[str]], None] | None = None  # lines for the user, on rank 0
    on_failure: Callable[[BaseException], None] | None = None  # before anything is tidied up
    fenced: Callable[[], bool] | None = None  # whether another process has taken the run, on rank 0
    callbacks: Sequence[Callback] = ()  # the user's own, in order
    heartbeat: Heartbeat | None = None  # by which a supervisor sees how far this rank is

    @property
    def quarantine(self) -> Path | None:
        """Where bad samples are listed, if any are borne with."""
        return self.run_dir / QUARANTINE if self.max_bad_fraction else None

    def check_ours(self) -> None:
        """Raise FencedError where another process has taken the run; on rank 0, before writing."""
        if self.fenced and self.fenced():
            raise self.taken()

    def taken(self) -> FencedError:
        """Return the error of a process from which another has taken the run."""
        return FencedError(f"{self.run_dir}: a later launch took over the run; this one leaves")

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed holds the weights."""
        return self.machine.strategy.startswith("zero")

    @property
    def mixes_reference(self) -> bool:
        """Whether the reference follows the trained weights within a preference epoch."""
        return self.ref_model_sync_steps > 0 and self.reference is not None

    def check(self) -> None:
        """Raise ConfigError for parts that do not fit each other."""
        # Schedule, optimizer and validation, which need no data.
        missing = {epoch.kind for epoch in self.schedule.epochs} - set(self.objectives)
        if missing:
            raise ConfigError(f"schedule: no objective for {', '.join(sorted(missing))} epochs")
        if (
            not self.optim.max_grad_norm > 0
        ):  # ZeRO would take 0 for no limit, others for no gradient
            raise ConfigError(
                f"optim.max_grad_norm={self.optim.max_grad_norm:g}: must be over 0; "
                ".inf is no limit"
            )
        if self.val_data and not self.phases:
            raise ConfigError("val_data: needs phases too")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ConfigError(
                f"objective.ref_model_mixup_alpha={self.ref_model_mixup_alpha:g}: must be above 0 "
                "and at most 1; 0.6 is usual"
            )
        check_device(self.machine)
        if not 0 < self.flow_shift < math.inf:
            raise ConfigError(f"flow_shift={self.flow_shift:g}: must be above 0; 5 is usual")
        # The datasets: their samples, and the encoders that made them.
        check_data(
            self.clips,
            self.pairs,
            self.val_data,
            self.architecture,
            self.curriculum,
            self.verify_export,
        )
        if any(clips.encoders != self.clips[0].encoders for clips in self.clips):
            names = ", ".join(str(clips.folder) for clips in self.clips)
            raise ConfigError(f"data.clips: {names} were encoded by different networks")
        # Everything that meets in one run must come from the same encoders.
        first = self.clips[0]
        for dataset in (*self.pairs, *([self.val_data.clips] if self.val_data else [])):
            check_same_encoders(dataset.folder, dataset.encoders, first.folder, first.encoders)

    def reader_of(self, dataset: ShardDataset) -> TolerantReader:
        """Return the reader of single samples of a dataset, within the budget for bad ones."""
        return TolerantReader(
            dataset, max_bad_fraction=self.max_bad_fraction, quarantine=self.quarantine
        )

    def build_data(self, order_names: Mapping[str, Sequence[str]] = EMPTY) -> TrainData:
        """Plan the batches; raise EcholabError if that is impossible.

        `order_names` are what the order of "clips" and "pairs" depends on, by default their
        fingerprints.
        """
        # Settings that both mixtures share.
        names = {"clips": (), "pairs": (), **order_names}
        shared: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        shared |= {"max_bad_fraction": self.max_bad_fraction, "quarantine": self.quarantine}
        # Clips and pairs are two mixtures, each with an order of its own.
        clips = build_mixture(
            self.clips, kind="encoded", weights=self.clip_weights, shuffle=self.shuffle,
            order_names=names["clips"], **shared,
        )  # fmt: skip
        pairs = None
        if self.pairs:  # few and met often: their epochs always run on into each other
            order = self.shuffle._replace(last_batch="carry")
            pairs = build_mixture(
                self.pairs, kind="preference", weights=self.pair_weights, shuffle=order,
                order_names=names["pairs"], **shared,
            )  # fmt: skip
        # How each batch is divided among ranks and micro-batches.
        accumulation = accumulation_steps(self.batch_size, self.micro_batch_size, self.machine)
        together = self.machine.sequence_parallel
        return TrainData(
            clips,
            pairs,
            self.batch_size,
            accumulation,
            self.num_workers,
            self.seed,
            together,
            self.machine.devices,
            self.quarantine,
        )

    def identity(self, train_data: TrainData) -> dict[str, Any]:
        """Return what a checkpoint must agree on with the run."""
        # Everything that would make the steps to come others than was planned.
        return {
            "architecture": dict(self.architecture),
            "adapters": dict(self.adapters) if self.adapters else None,
            "clips": [clips.fingerprint for clips in self.clips],
            "encoders": dict(self.clips[0].encoders),
            "pairs": [pairs.fingerprint for pairs in self.pairs],
            "order": train_data.clips.sampler.state(),
            "data": [{"first": 0, **data_of(train_data)}],
            "origins": dict(self.origins),
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

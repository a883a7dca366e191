"""The configuration of a training run, and checks that its parts are compatible."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from echolab.evaluation.config import EvaluationConfig
from echolab.geometry import geometry_of
from echolab.heartbeat import Heartbeat
from echolab.metrics.sync_clips import check_talkers, is_sync, read_talker
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
LogEvaluation = Callable[[int, list[list[Any]], dict[str, Path]], None]


ALONE, OPTIM, SPIKES = Machine(), Optim(), SpikeConfig()
EMPTY: Mapping[str, Any] = {}


def check_dataset(dataset: ShardDataset, kind: str, architecture: Mapping[str, Any]) -> None:
    """Raise DataError for a dataset of another kind, ConfigError if the network cannot read it."""
    if dataset.kind != kind:
        raise DataError(f"{dataset.folder}: kind {dataset.kind}, need {kind}; give another dataset")
    if not len(dataset):
        raise DataError(f"{dataset.folder}: holds no sample; nothing to train on")
    # Sizes that must be equal in dataset and network.
    shapes = common_shapes(dataset)
    latents, audio = shapes["latents" if kind == "encoded" else "chosen"], shapes["audio"]
    sizes: dict[str, Any] = {
        "text_dim": shapes["text"][-1],
        "image_dim": shapes["image"][-1],
        "audio_dim": audio[-1],
        "audio_layers": audio[1] if len(audio) == 3 else None,
        "out_channels": latents[0],
    }
    # null in the architecture means that the branch does not exist; any dataset is compatible.
    has_audio = architecture.get("audio_dim") is not None
    for name, dataset_size in sizes.items():
        model_size = architecture.get(name)
        differs = model_size is not None and model_size != dataset_size
        if name == "audio_layers":
            differs = has_audio and model_size != dataset_size
        if differs:
            raise ConfigError(
                f"model.{name}={'null' if model_size is None else model_size}: the clips of "
                f"{dataset.folder} have {'null' if dataset_size is None else dataset_size}; "
                "use the model= that fits their encoders"
            )
    # The patch size must divide the latents, or positions would be cut off.
    check_geometry(dataset, architecture)
    for size, step in zip(latents[1:], architecture.get("patch_size") or (), strict=False):
        if size % step:
            raise ConfigError(
                f"model.patch_size={list(architecture['patch_size'])}: does not divide the latents "
                f"{list(latents[1:])} of {dataset.folder}; use the model= that fits them"
            )


def check_geometry(dataset: ShardDataset, architecture: Mapping[str, Any]) -> None:
    """Raise ConfigError if strides or patch size of network and dataset differ."""
    clips, network = dataset.geometry, geometry_of(architecture)
    for name in ("time_stride", "space_stride", "patch"):  # `check_dataset` compares the channels
        if getattr(clips, name) != getattr(network, name):
            setting = "patch_size" if name == "patch" else name
            raise ConfigError(
                f"model.{setting}: {name} is {getattr(network, name)}, the clips of "
                f"{dataset.folder} have {getattr(clips, name)}; use the model= that fits their "
                "encoders"
            )


def check_tasks(dataset: ShardDataset, tasks: Sequence[str], setting: str) -> None:
    """Raise ConfigError for a task whose tensors are missing in an encoded dataset."""
    # The tensors of a task are stored under the name known.TASK.
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
    """Check the first good sample of each dataset; this does not need the weights.

    Raise DataError for bad data, ConfigError if a dataset does not match the network, the tasks or
    another dataset.
    """
    # SyncNet is trained on raw datasets.
    if is_sync(architecture):
        for dataset in (*clips, *([val_data.clips] if val_data else [])):
            check_talkers(dataset, architecture)
        return
    # Check each dataset alone, then pairs of datasets that share batches.
    for dataset in clips:
        check_dataset(dataset, "encoded", architecture)
        check_tasks(dataset, curriculum.tasks, "tasks.tasks")
    for first, second in combinations(clips, 2):
        a, b = common_shapes(first), common_shapes(second)
        for name in ("text", "image", "audio"):
            if tuple(a["latents"]) == tuple(b["latents"]) and tuple(a[name]) != tuple(b[name]):
                raise ConfigError(
                    f"data.clips: {first.folder} and {second.folder} have clips of one size, but "
                    f"{name} of {list(a[name])} and {list(b[name])}; encode them alike"
                )
    for dataset in pairs:
        check_dataset(dataset, "preference", architecture)
    # Validation and the export check use the validation data.
    if val_data:
        check_dataset(val_data.clips, "encoded", architecture)
        check_tasks(val_data.clips, val_data.tasks, "data.val_tasks")
        if parity:  # the export check samples all trained tasks on held-out clips
            check_tasks(val_data.clips, curriculum.tasks, "tasks.tasks")


class TrainConfig(NamedTuple):
    """The configuration of a training run.

    A field that corresponds to a setting in conf/ has the name of the setting.  Checkpoints are in
    `run_dir/checkpoints`; training resumes bit-exactly from the newest complete checkpoint, with
    any number of ranks and any strategy.  Without a checkpoint, training starts from the averaged
    weights of the checkpoint `init_from`, or from the weights of `net`.

    `objectives` has one entry for each kind of epoch.  Preference objectives use `reference`, which
    is loaded at the start of each preference epoch with the averaged weights of that step, or with
    those of the checkpoint `ref_model`.
    """

    net: nn.Module
    architecture: Mapping[str, Any]
    run_dir: Path
    clips: Sequence[ShardDataset]  # one or more datasets per clip size, mixed by weight
    schedule: Schedule
    curriculum: Curriculum
    objectives: Mapping[str, Objective]
    batch_size: int  # clips of the largest size per optimizer step, over all ranks
    seed: int = 0
    flow_shift: float = 5.0
    pairs: Sequence[ShardDataset] = ()
    clip_weights: Sequence[float] | None = None  # mixing weights of `clips`; None: sample counts
    pair_weights: Sequence[float] | None = None  # mixing weights of `pairs`; None: sample counts
    shuffle: ShuffleConfig = DEFAULT_SHUFFLE
    log_samples: bool = False  # record the samples of each step in `run_dir/ledger`
    max_bad_fraction: float = 0.0  # fraction of bad samples to skip, listed in quarantine.jsonl
    accepts_changed_data: bool = False  # allow datasets that differ from those trained on so far
    reference: Reference | None = None
    ref_model: Path | None = None
    ref_model_sync_steps: int = 0  # steps between mixings of the weights into the reference; 0: off
    ref_model_mixup_alpha: float = 0.6  # share of the trained weights in such a mixing
    init_from: Path | None = None
    origins: Mapping[str, Any] = EMPTY  # content hashes of initial weights and reference; of rank 0
    adapters: Mapping[str, Any] | None = None  # settings and base of an adapted `net`
    val_data: ValData | None = None
    phases: Allocator | None = None  # modality dropout for the held-out error
    optim: Optim = OPTIM
    machine: Machine = ALONE
    micro_batch_size: int | None = None
    num_workers: int = 0
    intervals: Intervals | None = None
    settings_digest: str = ""  # digest of the settings, which must be equal on all ranks
    log_metrics: Sink | None = None  # (step, values), called on rank 0
    on_step: Callable[[int, int], None] | None = None  # (step, steps), called on rank 0
    stop_after_step: int | None = None  # end the run after this step, before the schedule's end
    signal_grace_seconds: Mapping[int, float] | None = None  # from signal to kill, by signal number
    job_end_time: float = FOREVER  # seconds since 1970 by which the run must be saved
    loss_spike: SpikeConfig = SPIKES
    max_host_memory_gb: float | None = None  # limit per rank with its workers; above it, stop
    evaluation: EvaluationConfig | None = None  # samples and scores during training
    log_evaluation: LogEvaluation | None = None  # (step, table, videos), called on rank 0
    verify_export: bool = False  # compare the export with the training model at the end
    on_begin: Callable[[int], None] | None = None  # (step), called on rank 0 when training starts
    print_lines: Callable[[list[str]], None] | None = None  # prints lines for the user, on rank 0
    on_failure: Callable[[BaseException], None] | None = None  # called before any cleanup
    fenced: Callable[[], bool] | None = None  # whether another process took over the run; rank 0
    callbacks: Sequence[Callback] = ()  # the user's callbacks, in order
    heartbeat: Heartbeat | None = None  # reports this rank's progress to a supervisor

    @property
    def quarantine(self) -> Path | None:
        """File that lists the bad samples; None if bad samples are not allowed."""
        return self.run_dir / QUARANTINE if self.max_bad_fraction else None

    def check_ours(self) -> None:
        """Raise FencedError if another process has taken over the run; call before writing."""
        if self.fenced and self.fenced():
            raise self.taken()

    def taken(self) -> FencedError:
        """Return the error to raise if another process has taken over the run."""
        return FencedError(f"{self.run_dir}: a later launch took over the run; this one leaves")

    @property
    def sharded(self) -> bool:
        """True if DeepSpeed holds the weights."""
        return self.machine.strategy.startswith("zero")

    @property
    def mixes_reference(self) -> bool:
        """True if the reference follows the trained weights within a preference epoch."""
        return self.ref_model_sync_steps > 0 and self.reference is not None

    def check(self) -> None:
        """Raise ConfigError if parts of the configuration are incompatible."""
        # Check schedule, optimizer and validation settings, which need no data.
        missing = {epoch.kind for epoch in self.schedule.epochs} - set(self.objectives)
        if missing:
            raise ConfigError(f"schedule: no objective for {', '.join(sorted(missing))} epochs")
        # A norm of 0 means no limit under ZeRO, but zero gradients otherwise.
        if not self.optim.max_grad_norm > 0:
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
        # Check the samples of the datasets, and the encoders that produced them.
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
        # All datasets of a run must come from the same encoders.
        first = self.clips[0]
        for dataset in (*self.pairs, *([self.val_data.clips] if self.val_data else [])):
            check_same_encoders(dataset.folder, dataset.encoders, first.folder, first.encoders)

    def reader_of(self, dataset: ShardDataset) -> TolerantReader:
        """Return a reader for single samples of a dataset; it skips up to `max_bad_fraction`."""
        return TolerantReader(
            dataset, max_bad_fraction=self.max_bad_fraction, quarantine=self.quarantine
        )

    def build_data(self, order_names: Mapping[str, Sequence[str]] = EMPTY) -> TrainData:
        """Build the training data; raise EcholabError if the settings are impossible.

        `order_names` are names that determine the order of "clips" and "pairs", by default the
        fingerprints of the datasets.
        """
        # Settings of both mixtures.
        names = {"clips": (), "pairs": (), **order_names}
        shared: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        shared |= {"max_bad_fraction": self.max_bad_fraction, "quarantine": self.quarantine}
        # Clips and pairs are two mixtures, each with its own order.
        sync = is_sync(self.architecture)
        clips = build_mixture(
            self.clips, kind="raw" if sync else "encoded", weights=self.clip_weights,
            shuffle=self.shuffle, order_names=names["clips"], **shared,
        )  # fmt: skip
        pairs = None
        if self.pairs:  # always carry partial batches over, since epochs of pairs are short
            order = self.shuffle._replace(last_batch="carry")
            pairs = build_mixture(
                self.pairs, kind="preference", weights=self.pair_weights, shuffle=order,
                order_names=names["pairs"], **shared,
            )  # fmt: skip
        # Divide each batch among ranks and micro-batches.
        accumulation = accumulation_steps(self.batch_size, self.micro_batch_size, self.machine)
        group_size = self.machine.sequence_parallel
        return TrainData(
            clips,
            pairs,
            self.batch_size,
            accumulation,
            self.num_workers,
            self.seed,
            group_size,
            self.machine.devices,
            self.quarantine,
            partial(read_talker, architecture=self.architecture, seed=self.seed) if sync else None,
        )

    def identity(self, train_data: TrainData) -> dict[str, Any]:
        """Return the properties in which a checkpoint must equal this run in order to resume."""
        # A change of any of these would change the remaining steps.
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

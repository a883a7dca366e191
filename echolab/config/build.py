"""Build the arguments of `fit` from the settings of conf/train.yaml."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from echolab.config.networks import Adapted, checked_placement, reference_of, start_of
from echolab.config.origins import checkpoints_from, origins_from
from echolab.config.parts import (
    callbacks_from,
    intervals_from,
    machine_from,
    rate_of,
    spike_config_from,
)
from echolab.data.batch_sampler import ShuffleConfig
from echolab.data.shard_reader import (
    ShardDataset,
    check_same_encoders,
    open_dataset,
    shared_samples,
)
from echolab.diffusion.objectives import NegativePreference, Preference, Supervised
from echolab.diffusion.phases import (
    FLAT,
    PHDA,
    PHDA_BY_PROGRESS,
    Allocator,
    ModalityDropout,
    ModalityScaling,
    PhaseSchedule,
    without_dropout,
)
from echolab.errors import ConfigError, DataError
from echolab.evaluation.config import EvaluationConfig
from echolab.evaluation.sampling import Sampling
from echolab.launch.run_dir import rank_from_environment
from echolab.metrics.sync_clips import is_sync, measure_cepstra
from echolab.metrics.sync_training import SyncContrast, standardize
from echolab.tasks.curriculum import Curriculum, Stage, hard_to_easy
from echolab.training.checkpoints.checkpoint import open_verified
from echolab.training.config import TrainConfig, check_data
from echolab.training.datamodule import ValData
from echolab.training.engine.machine import Machine
from echolab.training.engine.placement import Placement
from echolab.training.module import Optim, Reference
from echolab.training.schedule import Epoch, Schedule
from echolab.training.signals import end_of_job, grace_from

# The setting that allows held-out clips in the training set.
ACCEPT = "data.val_overlaps=accept"
# Choices of conf/phases.
PHASES = {"phda": PHDA, "phda_by_progress": PHDA_BY_PROGRESS, "flat": FLAT}
ALLOCATORS: dict[str, Callable[[PhaseSchedule], Allocator]] = {
    "dropout": ModalityDropout,
    "scale": ModalityScaling,
}


def phases_from(config: Mapping[str, Any]) -> Allocator:
    """Return how modalities are weighted at a noise level, from conf/phases."""
    return ALLOCATORS[config["mode"]](PHASES[config["schedule"]])


def curriculum_from(config: Mapping[str, Any], origin: Path | None = None) -> Curriculum:
    """Return the curriculum of conf/tasks.

    The curriculum continues that of the checkpoint `origin`, unless tasks.restart is set.
    """
    stages = (
        [Stage(stage["steps"], stage["targets"]) for stage in config["stages"]]
        if config["stages"]
        else hard_to_easy(config["steps_per_stage"], config["tasks"])
    )
    curriculum = Curriculum(stages, config["ema_decay"], config["min_prob"])
    if origin is None or config.get("restart"):
        return curriculum
    return curriculum.continued_from(open_verified(origin).state["curriculum"])


def schedule_from(config: Mapping[str, Any]) -> Schedule:
    """Return the epochs and their learning rates, from conf/schedule and optim.lr."""
    # An epoch scales optim.lr; `rate_of` computes the product exactly.
    schedule, lr = config["schedule"], float(config["optim"]["lr"])
    epochs = [
        Epoch(str(e["kind"]), int(e["steps"]), rate_of(lr, float(e.get("lr_scale", 1.0))))
        for e in schedule["epochs"]
    ]
    return Schedule(
        epochs, cycles=schedule["cycles"], warmup=schedule["warmup"], decay=schedule["decay"]
    )


def objectives_from(
    config: Mapping[str, Any], phases: Allocator, reference: Reference | None
) -> dict[str, Any]:
    """Return the objectives by kind of epoch; ndpo and dpo need a reference model."""
    # Preference losses compare with a reference model.
    objectives: dict[str, Any] = {"sft": Supervised(phases), "sync": SyncContrast()}
    if reference:
        # Both forwards of a pair must see the same modalities.
        all_modalities = without_dropout(phases)
        objectives["ndpo"] = NegativePreference(
            all_modalities, reference, config["beta"], config["target_grad_factor"]
        )
        objectives["dpo"] = Preference(
            all_modalities,
            reference,
            config["beta"],
            loss_type=config["loss_type"],
            label_smoothing=config["label_smoothing"],
            sft_weight=config["sft_weight"],
            target_grad_factor=config["target_grad_factor"],
        )
    return objectives


def mixing_from(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `TrainConfig` for updates of the reference model by the weights."""
    names = ("ref_model_sync_steps", "ref_model_mixup_alpha")
    return {name: objective[name] for name in names if name in objective}


def datasets_from(config: Mapping[str, Any], key: str) -> list[ShardDataset]:
    """Open the datasets that the setting data.`key` names, if any, and return them."""
    # A setting names one dataset, several, or none.
    named: str | Sequence[str] = config[key] or []
    paths = [named] if isinstance(named, str) else named
    cache, cache_gb = config["cache_dir"], float(config["cache_gb"])
    return [open_dataset(path, cache_dir=cache, cache_gb=cache_gb) for path in paths]


def reading_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `TrainConfig` from conf/data, except for validation."""
    return {
        "clips": datasets_from(config, "clips"),
        "pairs": datasets_from(config, "pairs"),
        "clip_weights": config["clip_weights"],
        "pair_weights": config["pair_weights"],
        "shuffle": ShuffleConfig(
            config["shuffle_block_size"],
            config["shuffle_buffer"],
            config["last_batch"],
            config["token_budget"],
        ),
        "log_samples": config["log_samples"],
        "max_bad_fraction": float(config["max_bad_fraction"]),
        "accepts_changed_data": config.get("changed") == "accept",
        "num_workers": config["num_workers"],
    }


def val_data_from(config: Mapping[str, Any]) -> ValData | None:
    """Return the validation data of conf/data, or None without data.val_clips."""
    # No validation without held-out clips.
    if not config["val_clips"]:
        return None
    return ValData(
        datasets_from(config, "val_clips")[0],
        num_clips=config["val_num_clips"],
        batch_size=config["val_batch_size"],
        tasks=tuple(config["val_tasks"]),
    )


def check_together(
    data: Mapping[str, Any],
    reading: Mapping[str, Any],
    val_data: ValData | None,
    checkpoints: Sequence[Path | None],
) -> None:
    """Raise DataError for datasets and checkpoints that cannot be combined in one run."""
    clips, pairs = reading["clips"], reading["pairs"]
    check_checkpoints(checkpoints, clips[0])
    if val_data:
        accepted = data.get("val_overlaps") == "accept"
        check_held_out(val_data.clips, clips, pairs, accepted)


def check_checkpoints(checkpoints: Sequence[Path | None], clips: ShardDataset) -> None:
    """Raise DataError for a checkpoint that was trained on latents of other encoders."""
    # The latents of two encoders are not comparable.
    for path in checkpoints:
        if path:
            encoders = open_verified(path).state.get("encoders") or {}
            check_same_encoders(path, encoders, clips.folder, clips.encoders)


def check_held_out(
    held_out: ShardDataset,
    clips: Sequence[ShardDataset],
    pairs: Sequence[ShardDataset],
    accepted: bool,
) -> None:
    """Raise DataError if held-out clips are in the training set; if `accepted`, warn instead."""
    # The same dataset, or one that shares samples with it.
    for dataset in clips:
        if dataset.fingerprint == held_out.fingerprint:
            _warn_or_raise(
                f"data.val_clips: {held_out.folder} is the training set {dataset.folder}", accepted
            )
        elif shared := shared_samples(held_out, dataset):
            few = shared < len(held_out)
            words = f"{shared} of its {len(held_out)} samples are in the training set"
            _warn_or_raise(
                f"data.val_clips: {held_out.folder}: {words} {dataset.folder}", accepted or few
            )
    # A dataset of pairs records the dataset that provided its prompts.
    for dataset in pairs:
        if dataset.description.get("prompts") == held_out.fingerprint:
            words = f"data.pairs: {dataset.folder} was sampled from the held-out clips"
            _warn_or_raise(f"{words} {held_out.folder}", accepted)


def _warn_or_raise(words: str, accepted: bool) -> None:
    """Print a warning if `accepted`, else raise DataError."""
    if not accepted:
        raise DataError(f"{words}; give other clips, or {ACCEPT} if that is meant")
    # Print the line only once for all ranks.
    if rank_from_environment() == 0:
        print(
            f"echolab: warning: {words}: val/loss says nothing about new clips there",
            file=sys.stderr,
        )


def evaluation_from(config: Mapping[str, Any]) -> EvaluationConfig | None:
    """Return what an evaluation in training samples and scores, None if evaluation.every is 0."""
    return evaluation_of(config) if config["evaluation"]["every"] else None


def evaluation_of(config: Mapping[str, Any]) -> EvaluationConfig:
    """Return what an evaluation samples and scores, from conf/evaluation and conf/metrics.

    Raise ConfigError if the held-out clips or their autoencoder are not given.
    """
    settings, metrics = config["evaluation"], config["metrics"]
    for name in ("raw", "clips", "vae"):
        if not settings[name]:
            raise ConfigError(f"evaluation.{name}: an evaluation needs it; give its path")
    sampling = Sampling(
        settings["task"], settings["num_steps"], settings["flow_shift"],
        settings["audio_guidance_scale"], settings["seed"], settings["batch_size"],
    )  # fmt: skip
    folders = {
        name: Path(metrics[name]) if metrics[name] else None for name in ("networks", "real")
    }
    limit = settings["max_seconds"]
    return EvaluationConfig(
        every=settings["every"],
        raw=open_dataset(settings["raw"]),
        clips=open_dataset(settings["clips"]),
        vae=Path(settings["vae"]),
        sampling=sampling,
        scores=metrics["scores"],
        num_clips=settings["num_clips"],
        max_seconds=math.inf if limit is None else limit,
        num_videos=settings["num_videos"],
        **folders,
    )


def optim_from(config: Mapping[str, Any]) -> Optim:
    """Return the settings of AdamW and of the averages, from conf/optim."""
    return Optim(
        betas=tuple(config["betas"]),
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        max_grad_norm=config["max_grad_norm"],
        ema_decay=config["ema_decay"],
        extra_ema_decays=tuple(config["extra_ema_decays"]),
        posthoc_ema_stds=tuple(config["posthoc_ema_stds"]),
    )


def data_from(
    config: Mapping[str, Any], origin: Path | None, pinned: Path | None
) -> dict[str, Any]:
    """Return datasets and curriculum; raise EcholabError if they do not fit the network."""
    reading, val_data = reading_from(config["data"]), val_data_from(config["data"])
    check_together(config["data"], reading, val_data, (origin, pinned))
    curriculum = curriculum_from(config["tasks"], origin)
    datasets = (reading["clips"], reading["pairs"], val_data)
    check_data(*datasets, config["model"], curriculum, config["verify_export"])
    evaluation = evaluation_from(config)
    return {**reading, "curriculum": curriculum, "val_data": val_data, "evaluation": evaluation}


def start_on(
    clips: Sequence[ShardDataset],
    config: Mapping[str, Any],
    origin: Path | None,
    seed: int,
    placement: Placement,
) -> tuple[nn.Module, Adapted | None, Path | None]:
    """Build the network to train as `start_of`; a SyncNet with the scale of its first clips."""
    net, own, initial = start_of(config, origin, seed, placement)
    # A checkpoint that is loaded later holds the scale of its own run.
    if is_sync(config["model"]):
        standardize(net, *measure_cepstra(clips[0]))
    return net, own, initial


def train_config_from(
    config: Mapping[str, Any], settings_digest: str, machine: Machine | None = None
) -> TrainConfig:
    """Build the configuration of `fit`; `machine`, if given, replaces that of the settings."""
    schedule, phases = schedule_from(config), phases_from(config["phases"])
    seed, prefers = int(config["seed"]), schedule.prefers
    origin, pinned = checkpoints_from(config)
    parts = data_from(config, origin, pinned) | mixing_from(config["objective"])
    machine = machine or machine_from(config["trainer"])
    placement = checked_placement(config, machine, prefers=prefers)  # before weights are read
    net, own, initial = start_on(parts["clips"], config, origin, seed, placement)
    reference = reference_of(config, own, pinned) if prefers else None
    return TrainConfig(
        run_dir=Path(config["run_dir"]),
        settings_digest=settings_digest,
        net=net,
        architecture=config["model"],
        **parts,
        callbacks=callbacks_from(config["callbacks"]),
        schedule=schedule,
        objectives=objectives_from(config["objective"], phases, reference),
        phases=phases,
        reference=reference,
        ref_model=pinned,
        init_from=initial,
        origins=origins_from(config, origin, pinned),
        adapters=own.record if own else None,
        optim=optim_from(config["optim"]),
        machine=machine,
        batch_size=config["batch_size"],
        micro_batch_size=config["micro_batch_size"],
        flow_shift=float(config["flow_shift"]),
        seed=seed,
        intervals=intervals_from(config),
        loss_spike=spike_config_from(config["loss_spike"]),
        max_host_memory_gb=config["max_host_memory_gb"],
        verify_export=config["verify_export"],
        signal_grace_seconds=grace_from(config["signal_grace_seconds"]),
        job_end_time=end_of_job(),
    )

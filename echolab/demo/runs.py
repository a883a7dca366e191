"""The demo's training runs, its preference pairs and its scores."""

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from echolab.atomic_io import write_whole
from echolab.cli.pairs import VERDICTS, judge_candidates
from echolab.config.networks import last_checkpoint, load_policy
from echolab.data.clips import load_clips
from echolab.data.index import INDEX
from echolab.data.shard_reader import open_dataset
from echolab.demo.pages import keep_samples
from echolab.demo.settings import (
    ARCHITECTURE,
    AUDIO_SCALES,
    BATCH,
    PREFERENCE,
    SHIFT,
    DemoSettings,
    Folder,
    curriculum_of,
    schedule_of,
)
from echolab.diffusion.objectives import NegativePreference, Preference, Supervised
from echolab.diffusion.phases import PHDA, KeepModalities, of_preferences
from echolab.fitting import load_net, work_dtype
from echolab.inference.judging import (
    FRAMES,
    SYNC_JUDGE,
    Sampling,
    load_autoencoder,
    load_judges,
    network_file,
    sample_pixels,
)
from echolab.metrics.demo_networks import FrameFeatures, SyncNetDemo
from echolab.metrics.scores import Judges, cepstra_of, score_clips
from echolab.models.frozen import Frozen
from echolab.models.transformer import EchoTransformer
from echolab.models.weights import initialize
from echolab.preference.candidates import sample_candidates
from echolab.preference.pack import pack_pairs, read_verdicts
from echolab.preference.settings import checked
from echolab.progress import progress
from echolab.tracking.metrics import MetricsLog, read_metrics
from echolab.tracking.score_table import REFERENCES
from echolab.tracking.wandb_run import WandbRun
from echolab.training.config import Intervals
from echolab.training.datamodule import HeldOut
from echolab.training.fit import Machine, Training, fit
from echolab.training.module import Optim
from echolab.types import Clips

PHASES = KeepModalities(PHDA)


def train(settings: DemoSettings, out: Folder, name: str, seed: int) -> None:
    """One training run, from where it was stopped; KeyboardInterrupt when it is stopped again."""
    training = training_of(settings, out, name, seed)
    training.folder.mkdir(parents=True, exist_ok=True)
    log, wandb_run = start_logs(out, name, seed, settings)
    try:
        with progress(f"training {name}", training.schedule.steps) as advance:
            result = fit(
                training._replace(
                    log=lambda step, values: tell(log, wandb_run, step, values),
                    on_step=lambda step, steps: advance(step, ""),
                )
            )
    finally:
        wandb_run.finish()
    if result.stopped_by or not result.done:
        raise KeyboardInterrupt


def training_of(settings: DemoSettings, out: Folder, name: str, seed: int) -> Training:
    """The run that makes checkpoint `name`; all but `sft` go on from that one."""
    first, schedule = name == "sft", schedule_of(settings, name)
    net = EchoTransformer(**ARCHITECTURE)
    initialize(net, torch.Generator().manual_seed(seed))
    reference = None if "sft" in name else Frozen(EchoTransformer(**ARCHITECTURE))
    return Training(
        net,
        ARCHITECTURE,
        folder=out.run(name, seed),
        clips=[open_dataset(out.train)],
        schedule=schedule,
        curriculum=curriculum_of(settings.sft_steps if first else 1),
        objectives=objectives_of(reference),
        batch_size=BATCH,
        seed=seed if first else 1000 + seed,
        shift=SHIFT,
        pairs=[open_dataset(out.pairs(seed))] if reference else [],
        reference=reference,
        initial=None if first else last_checkpoint(out.run("sft", seed)),
        held_out=HeldOut(open_dataset(out.held_out), at_most=BATCH),
        phases=PHASES,
        optim=Optim(betas=(0.9, 0.99), ema_decay=0.995 if first else 0.98),
        machine=Machine(precision=precision()),
        every=Intervals(log=10, save=100, validate=max(10, schedule.steps // 4)),
    )


def objectives_of(reference: Frozen | None) -> dict[str, Any]:
    """Supervised alone, or all three kinds against a reference."""
    if reference is None:
        return {"sft": Supervised(PHASES)}
    chosen = checked(PREFERENCE)
    common = (of_preferences(PHASES), reference, chosen.beta)
    return {
        "sft": Supervised(PHASES),
        "ndpo": NegativePreference(*common),
        "dpo": Preference(
            *common,
            loss_type=chosen.loss_type,
            label_smoothing=chosen.label_smoothing,
            anchor=chosen.anchor,
        ),
    }


def precision() -> str:
    return "bf16-mixed" if work_dtype() == torch.bfloat16 else "32-true"


def start_logs(
    out: Folder, name: str, seed: int, settings: DemoSettings
) -> tuple[MetricsLog, WandbRun]:
    """metrics.jsonl, and a wandb run of the same id at every attempt."""
    run = out.run(name, seed)
    path = run / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    attempt = 1 + max((int(row["attempt"]) for row in rows), default=0)
    identity = f"demo-{out.token}-{name}-{seed}"
    config = {"architecture": ARCHITECTURE, "seed": seed, "checkpoint": name}
    config |= {key: getattr(settings, key) for key in DemoSettings.__dataclass_fields__}
    wandb_run = WandbRun(run, project="echolab-demo", run_id=identity, name=name, config=config)
    return MetricsLog(path, attempt), wandb_run


def tell(log: MetricsLog, wandb_run: WandbRun, step: int, values: dict[str, float]) -> None:
    log.log(step, values)
    wandb_run.log(step, values)


def make_pairs(settings: DemoSettings, out: Folder, seed: int) -> None:
    """Sample from `sft`, judge, keep best and worst."""
    if (out.pairs(seed) / INDEX).exists():
        return
    dataset, folder = open_dataset(out.train), out.candidates(seed)
    net = load_policy(last_checkpoint(out.run("sft", seed)))
    sampling = settings.sampling()
    with progress("sampling candidates", settings.prompts) as advance:
        sample_candidates(
            net, dataset, folder, prompts=settings.prompts, candidates=settings.candidates,
            batch=32, steps=sampling.steps, shift=SHIFT, audio_scales=AUDIO_SCALES, seed=100 + seed,
            weights=last_checkpoint(out.run("sft", seed)).name,
            dtype=work_dtype(), report=lambda done: advance(done, ""),
        )  # fmt: skip
    with progress("judging candidates", settings.prompts) as advance:
        judge_candidates(
            folder, load_clips(out.raw_train, settings.prompts), load_autoencoder(out.networks),
            load_net(network_file(out.networks, SYNC_JUDGE), SyncNetDemo),
            load_net(network_file(out.networks, FRAMES), FrameFeatures),
            lambda done: advance(done, ""),
        )  # fmt: skip
    verdicts = read_verdicts(folder / VERDICTS)
    pack_pairs(folder, verdicts, dataset, out.pairs(seed), least_margin=0.5)


def score(settings: DemoSettings, out: Folder, name: str, seed: int) -> None:
    """Add a row to scores.json, and keep the clips that the report shows.

    A checkpoint is sampled with guidance by sound, and without: what guidance adds at the price of
    a second pass is a part of what preference training can teach.
    """
    truth, judges = truth_and_judges(out, 4 * settings.held_out_clips)
    pixels, cepstra = truth.float_pixels(), cepstra_of(truth)
    if name == "shuffled_sound":  # each clip with the sound, and the visemes, of the one before
        assert truth.visemes is not None
        truth = truth._replace(samples=truth.samples.roll(1, 0), visemes=truth.visemes.roll(1, 0))
        cepstra = cepstra_of(truth)
    if name in REFERENCES:
        scores = score_clips(judges, pixels, truth, cepstra)
    else:
        sampling = settings.sampling()
        pixels = held_out_samples(settings, out, name, seed, sampling)
        alone = held_out_samples(settings, out, name, seed, sampling._replace(audio_scale=1.0))
        unguided = score_clips(judges, alone, truth, cepstra)
        scores = {
            **score_clips(judges, pixels, truth, cepstra),
            "sync_c_unguided_demo": unguided["sync_c_demo"],
            "mouth_corr_unguided": unguided["mouth_corr"],
        }
    rows = json.loads(out.scores.read_text())["rows"] if out.scores.exists() else []
    rows = [r for r in rows if (r["checkpoint"], r["seed"]) != (name, seed)]
    rows.append({"checkpoint": name, "seed": seed, "scores": scores})
    write_whole(out.scores, json.dumps({"rows": rows}, indent=1).encode())
    keep_samples(out.samples / f"seed_{seed}" / name, pixels, truth)


@lru_cache(maxsize=1)
def truth_and_judges(out: Folder, real_clips: int) -> tuple[Clips, Judges]:
    """The held-out clips, and the judges with the features of so many training clips."""
    real = load_clips(out.raw_train, real_clips)
    return load_clips(out.raw_held_out), load_judges(out.networks, real)


def held_out_samples(
    settings: DemoSettings, out: Folder, name: str, seed: int, sampling: Sampling
) -> Tensor:
    """Clips [N, 3, T, Y, X] of a checkpoint for the held-out talkers."""
    net, numbers = load_policy(last_checkpoint(out.run(name, seed))), range(settings.held_out_clips)
    label = f"sampling from {name}" + (", unguided" if sampling.audio_scale == 1 else "")
    with progress(label, len(numbers)) as advance:
        return sample_pixels(
            net, load_autoencoder(out.networks), open_dataset(out.held_out), numbers, "i2v",
            sampling, lambda done: advance(done, ""),
        )  # fmt: skip

"""A rank of test_evaluation_training.py: a short run with or without evaluation."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import runs
import small_run
import torch

from echolab.data.shard_reader import open_dataset
from echolab.diffusion.objectives import Supervised
from echolab.evaluation.config import EvaluationConfig
from echolab.evaluation.sampling import Sampling
from echolab.fitting import save_net
from echolab.metrics.demo_networks import ClipFeatures, FrameFeatures, SyncNetDemo
from echolab.models.state_dict import initialize
from echolab.models.transformer import EchoTransformer
from echolab.tasks.curriculum import Curriculum, Stage
from echolab.training import distributed
from echolab.training.callbacks import evaluation as callback
from echolab.training.config import Intervals
from echolab.training.fit import Machine, TrainConfig, fit
from echolab.training.module import Optim

STEPS, CLIPS = 4, 4
SCORES = [
    {"names": ["sync_c_demo", "sync_d_demo"], "target": "echolab.metrics.demo:sync"},
    {"names": ["fid_demo"], "target": "echolab.metrics.demo:fid"},
    {"names": ["fvd_demo"], "target": "echolab.metrics.demo:fvd"},
    {"names": ["psnr_first_frame"], "target": "echolab.metrics.fidelity:first_frame"},
    {"names": ["mouth_corr"], "target": "echolab.metrics.motion:mouth_corr"},
]


def save_networks(folder: Path) -> None:
    """Write demo networks with random weights."""
    torch.manual_seed(3)
    save_net(folder / "sync_evaluator.safetensors", SyncNetDemo(), {})
    sizes = {"labels": 6, "size": 64}
    save_net(folder / "frames.safetensors", FrameFeatures(**sizes), sizes)
    save_net(folder / "clips.safetensors", ClipFeatures(**sizes), sizes)


def evaluation_of(root: Path, **changes: Any) -> EvaluationConfig:
    """Return an evaluation of the clips of `small_run` below `root`."""
    settings: dict[str, Any] = {
        "every": 2,
        "raw": open_dataset(root / "raw"),
        "clips": open_dataset(root / "encoded"),
        "vae": root / "autoencoder.safetensors",
        "sampling": Sampling("i2v", steps=2, batch_size=1),
        "scores": SCORES,
        "num_clips": CLIPS - 1,  # not divided by 2 ranks
        "num_videos": 1,
        "networks": root / "networks",
        "real": root / "raw",
    }
    return EvaluationConfig(**settings | changes)


def main(
    root: str, run: str, strategy: str, devices: int, every: int, victim: int = -1, group: int = 1
) -> int:
    """Train; rank `victim` gets SIGTERM during the first evaluation.  Rank 0 writes `run`.json."""
    torch.set_num_threads(1)
    folder = Path(root) / run
    rows: list[dict[str, Any]] = []
    if int(os.environ["RANK"]) == victim:
        decode = callback.score_latents

        def interrupted(*given: Any, **named: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            decode(*given, **named)

        callback.score_latents = interrupted
    net = EchoTransformer(**small_run.ARCHITECTURE)  # type: ignore[arg-type]
    initialize(net, torch.Generator().manual_seed(0))
    result = fit(TrainConfig(
        net, small_run.ARCHITECTURE, run_dir=folder,
        clips=[open_dataset(Path(root) / "encoded")],
        schedule=runs.schedule(("sft", STEPS)), curriculum=Curriculum([Stage(1, {"i2v": 1.0})]),
        objectives={"sft": Supervised(runs.PHASES)}, batch_size=4, optim=Optim(ema_decay=0.5),
        machine=Machine(strategy, devices=devices, zero3_shard_small=True, sequence_parallel=group,
                        activation_checkpointing="none"),
        intervals=Intervals(log_every=1, save_every=1),
        evaluation=evaluation_of(Path(root), every=every) if every else None,
        log_metrics=lambda step, values: rows.append({"step": step, **values}),
    ))  # fmt: skip
    record = {
        "reason": result.reason,
        "step": result.step,
        "rows": [{k: v for k, v in row.items() if k == "step" or k.startswith(("eval/", "train/l"))}
                 for row in rows],
    }  # fmt: skip
    if distributed.rank() == 0:
        Path(f"{folder}.json").write_text(json.dumps(record))
    return 0


def evaluate(root: str, out: str) -> int:
    """Sample and score with the trained network of `small_run`; rank 0 writes the scores."""
    import torch.distributed as dist

    from echolab.config.networks import last_checkpoint, load_policy
    from echolab.evaluation.decoding import load_vae
    from echolab.evaluation.sampling import Share
    from echolab.evaluation.scoring import Scorer, score_samples

    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    evaluation = evaluation_of(Path(root), num_clips=CLIPS)
    held_out, device = evaluation.held_out(), torch.device("cpu")
    scorer = Scorer(evaluation.metrics(held_out)[0], held_out)
    net = load_policy(last_checkpoint(Path(root) / "run"))
    share = Share(distributed.rank(), distributed.world())
    vae = load_vae(evaluation.vae, device)
    score_samples(scorer, net, vae, evaluation.sampling, share, device=device, dtype=torch.float32)
    results = scorer.results(evaluation.sampling, reduce=distributed.total)
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(results.values()))
    return 0

"""`echolab evaluate watch=RUN`: score each new checkpoint of a run, in a job of its own.

The settings are those of the run (`evaluation.*`, `metrics.*`), so that the numbers equal those of
an evaluation in training.  Several watchers share the checkpoints: each holds the lease of the
folder of an evaluation while it works on it.  Results are recorded as in training; metrics go to a
file of their own, since a second writer could damage the file of a running training.
"""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from echolab.config.build import evaluation_of, schedule_from
from echolab.config.check import check
from echolab.config.networks import check_encoders, load_policy
from echolab.config.parts import machine_from
from echolab.config.stored import resolved
from echolab.encoders.encode import Autoencoder
from echolab.errors import BusyError, CheckpointError
from echolab.evaluation.decoding import load_vae, vae_fingerprint
from echolab.evaluation.held_out import HeldOut
from echolab.evaluation.records import (
    PREFIX,
    folder_of,
    is_recorded,
    keep_video,
    remove_old_videos,
    videos_of,
    write_results,
)
from echolab.evaluation.sampling import Share
from echolab.evaluation.scoring import COLUMNS, Results, Scorer, score_samples
from echolab.launch import run_dir
from echolab.launch.run_dir import config_of
from echolab.progress import progress
from echolab.tracking.metrics import EVALUATIONS, MetricsLog
from echolab.tracking.wandb_run import WandbRun
from echolab.training.callbacks.validation import autocast_dtype, compute_dtype
from echolab.training.checkpoints import checkpoint as checkpoints
from echolab.training.checkpoints.checkpoint import open_checkpoint, saved_steps

Log = Callable[[int, Results, float], None]  # step, results, seconds


class Watcher:
    """The evaluation of a run's checkpoints, with everything that they share."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        """Open clips and networks; raise EcholabError if one does not fit the others."""
        self.run, self.evaluation = run, evaluation_of(config)
        self.held_out: HeldOut = self.evaluation.held_out()
        # Say at once which scores are left out, not after the first checkpoint.
        for line in self.evaluation.metrics(self.held_out)[1]:
            print(f"echolab: {line}", file=sys.stderr)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vae: Autoencoder = load_vae(self.evaluation.vae, self.device)
        self.dtype = compute_dtype(machine_from(config["trainer"]))

    def waiting(self) -> list[int]:
        """Return the steps of complete checkpoints that are not evaluated, oldest first."""
        # The manifest is written last.
        folder = self.run / "checkpoints"
        complete = [s for s in saved_steps(folder) if (path(folder, s) / "manifest.json").is_file()]
        return sorted(step for step in complete if not is_recorded(self.run, step))

    def score(self, step: int) -> tuple[Results, float]:
        """Return the scores of a checkpoint, and the seconds that they took.

        Raise CheckpointError if the run has removed it, DataError for other encoders.
        """
        began = time.monotonic()
        place = path(self.run / "checkpoints", step)
        open_checkpoint(place)  # verified before the network is built
        check_encoders(place, {"video": vae_fingerprint(self.evaluation.vae)})
        net = load_policy(place).to(self.device)
        # Sample as training does: same batches, same precision.
        scorer = Scorer(self.evaluation.metrics(self.held_out)[0], self.held_out)
        keep = partial(keep_video, folder_of(self.run, step), self.evaluation.num_videos)
        with progress(f"scoring step {step}", len(self.held_out)) as advance:

            def keep_and_advance(index: int, clip: Any) -> None:
                keep(index, clip)
                advance(index + 1, "")

            score_samples(
                scorer, net, self.vae, self.evaluation.sampling, Share(), device=self.device,
                dtype=autocast_dtype(net, self.dtype), keep=keep_and_advance,
            )  # fmt: skip
        return scorer.results(self.evaluation.sampling), time.monotonic() - began


def path(folder: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return checkpoints.folder_of(folder, step)


def watch(run: Path, *, once: bool, poll_seconds: float) -> int:
    """Score every new checkpoint once, until the last step of the run is scored; return 0.

    With `once` score only those that exist.
    """
    # Environment variables in the settings are refused: the run may be another user's.
    config = check(resolved(config_of(run), ()))
    watcher = Watcher(run, config)
    last_step, scored = schedule_from(config).steps, 0
    metrics = MetricsLog(run / EVALUATIONS, attempt=0)
    tracker = _tracker(run, config)
    try:
        while True:
            scored += sum(_score_one(watcher, step, metrics, tracker) for step in watcher.waiting())
            # The run saves its last step, so its evaluation is the last one.
            if once or is_recorded(run, last_step):
                break
            time.sleep(poll_seconds)
    finally:
        metrics.close()
        tracker.finish()
    print(f"{run}: {scored} checkpoints scored; metrics in {run / EVALUATIONS}")
    return 0


def _score_one(watcher: Watcher, step: int, metrics: MetricsLog, tracker: WandbRun) -> bool:
    """Score a checkpoint and record the results; return False if that was not possible now."""
    # Another watcher that has the lease scores this checkpoint.
    try:
        with run_dir.held(folder_of(watcher.run, step)) as lease:
            if is_recorded(watcher.run, step):
                return False
            results, seconds = watcher.score(step)
            lease.check()
            values = results.values(PREFIX) | {f"{PREFIX}seconds": seconds}
            metrics.log(step, values)
            write_results(watcher.run, step, results, seconds)
    except BusyError:
        return False
    except (CheckpointError, FileNotFoundError) as error:
        print(f"echolab: step {step}: not scored ({error})", file=sys.stderr)
        return False
    # The tracker is last: it may lose records, the run folder does not.
    tracker.log(step, values)
    tracker.log_videos(step, videos_of(watcher.run, step))
    rows = [[step, *row] for row in results.rows()]
    tracker.log_table(f"{PREFIX}scores", ["step", *COLUMNS], rows)
    remove_old_videos(watcher.run)
    return True


def _tracker(run: Path, config: Mapping[str, Any]) -> WandbRun:
    """Return the wandb run of the training, recorded offline.

    Of two online writers of one run wandb would drop the rows of one; `wandb sync` adds the records
    of this one to the run.
    """
    logger = config["logger"]
    return WandbRun(
        run,
        project=logger["project"],
        run_id=run_dir.id_of(run),
        name=run.resolve().name,
        config={},
        mode="disabled" if logger["mode"] == "disabled" else "offline",
    )

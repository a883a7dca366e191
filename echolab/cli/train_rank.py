"""One rank of `echolab train`: build the arguments of `fit`, train, and report the end."""

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from echolab.atomic_io import write_atomic
from echolab.config.build import train_config_from
from echolab.errors import ConfigError, StorageError
from echolab.evaluation.scoring import COLUMNS
from echolab.heartbeat import Heartbeat, heartbeat_from_environment
from echolab.launch import exit_codes, run_dir
from echolab.launch.exit_codes import CAUSES, cause_of_result
from echolab.progress import progress
from echolab.redaction import mask_values
from echolab.tracking.metrics import MetricsLog
from echolab.tracking.wandb_run import FINISH_SECONDS, HURRY_SECONDS, WandbRun
from echolab.training.fit import FitResult, TrainConfig, fit


def train(
    config: Mapping[str, Any],
    heartbeat: Heartbeat | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
    on_end: Callable[[FitResult], None] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train the run of these settings; rank 0 holds the run folder and logs metrics.

    `heartbeat` defaults to the one that the environment defines.  `on_failure` is called with an
    exception before any cleanup, including Lightning's, which may take long or hang, and which
    turns a KeyboardInterrupt into a SystemExit.  `on_end` is called with the result before the
    wait for the tracker.  `kept` are the settings without secrets, which are stored and sent.
    """
    # Stored and sent settings hold no secret.
    kept = mask_values(config) if kept is None else kept
    heartbeat = heartbeat or heartbeat_from_environment()
    training = _training(config)._replace(heartbeat=heartbeat, on_failure=on_failure)
    on_end = on_end or (lambda result: None)
    # Only rank 0 holds the run folder and the tracker.
    if run_dir.rank_from_environment() != 0:
        on_end(result := fit(training))
        return result
    # Claim the folder, train, and wait for the tracker for a limited time.
    with run_dir.claim(training.run_dir, kept, may_change=may_change(config)) as run:
        training = training._replace(on_begin=partial(run_dir.begin, run, kept))
        wandb_run = _wandb_run(config["logger"], kept, run)
        try:
            on_end(result := _fit(training, run, wandb_run))
            heartbeat.enter("teardown")
            wandb_run.finish(HURRY_SECONDS if result.stopped_by else FINISH_SECONDS)
            return result
        except BaseException as error:
            # Record the failure first: the cleanup after it may hang.
            if on_failure:
                on_failure(error)
            raise
        finally:
            wandb_run.finish()


def _fit(training: TrainConfig, run: run_dir.Run, wandb_run: WandbRun) -> FitResult:
    """Train as rank 0, which logs metrics and shows the progress."""
    metrics = MetricsLog(run.folder / "metrics.jsonl", run.attempt)

    def log(step: int, values: dict[str, float]) -> None:
        with suppress(OSError):  # the lease cannot be checked while the file system fails
            run.lease.check()
        metrics.log(step, values)
        wandb_run.log(step, values)

    def log_evaluation(step: int, rows: list[list[Any]], videos: dict[str, Path]) -> None:
        wandb_run.log_videos(step, videos)
        wandb_run.log_table("eval/scores", ["step", *COLUMNS], [[step, *row] for row in rows])

    # Show the progress of optimizer steps.
    with progress(f"training {run.folder}", training.schedule.steps) as advance:
        ours = training._replace(
            fenced=run.lease.fenced,
            log_metrics=log,
            log_evaluation=log_evaluation,
            print_lines=partial(_report_engine, run.folder),
        )
        try:
            return fit(ours._replace(on_step=lambda step, _: advance(step, "")))
        finally:
            metrics.close()


def may_change(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings that may change when a run resumes, since only later steps use them."""
    # The steps already trained must remain valid.
    accepted = config["data"].get("changed") == "accept"
    return (
        "schedule",
        "optim.lr",
        "evaluation",
        "metrics",
        *(("data.clip_weights", "data.pair_weights") if accepted else ()),
    )


def _report_engine(folder: Path, lines: list[str]) -> None:
    """Print the effective engine configuration and write it to engine.txt."""
    print("\n".join(["echolab: effective engine configuration:", *lines]), flush=True)
    try:
        write_atomic(folder / "engine.txt", "\n".join([*lines, ""]).encode())
    except StorageError as error:  # the lines were printed above
        print(f"echolab: {error}", file=sys.stderr, flush=True)


def _wandb_run(logger: Mapping[str, Any], kept: Mapping[str, Any], run: run_dir.Run) -> WandbRun:
    return WandbRun(
        run.folder,
        project=logger["project"],
        run_id=run.id,
        name=run.folder.name,
        config=kept,
        mode=logger["mode"],
    )


def _training(config: Mapping[str, Any]) -> TrainConfig:
    try:
        return train_config_from(config, run_dir.digest(config))
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"a setting is missing or of the wrong kind ({error}); see `echolab train --help`"
        ) from error


def exit_code(result: FitResult, folder: Path) -> int:
    """Print how the run ended and return its exit code."""
    # Only rank 0 prints how the run ended.
    cause = CAUSES[cause_of_result(result.reason, unsaved=result.unsaved)]
    if run_dir.rank_from_environment() == 0:
        if result.done:
            print(f"echolab: {folder}: all {result.steps} steps done; newest {result.checkpoint}")
        else:
            by = f" ({signal.Signals(result.stopped_by).name})" if result.stopped_by else ""
            print(
                f"echolab: {folder}: {cause.summary}{by} at step {result.step} of {result.steps}; "
                f"{cause.next_action}",
                file=sys.stderr,
            )
    return exit_codes.DONE if result.done else cause.exit_code

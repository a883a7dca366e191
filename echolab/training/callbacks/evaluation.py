"""Evaluation during training: samples of held-out clips by the averaged weights, and their scores.

Like validation, evaluation does not affect training: weights, moments, averages, random states and
modes are restored bit-exactly.  Sampling is spread over the ranks, and each rank makes the same
number of network calls.  The folder `evaluations/step-N` of the run has the results with the metric
cards, and the first clips as mp4 with audio.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from echolab.encoders.encode import Autoencoder
from echolab.errors import DataError, EcholabError
from echolab.evaluation.config import EvaluationConfig, planned_clips
from echolab.evaluation.decoding import free, load_vae
from echolab.evaluation.held_out import HeldOut
from echolab.evaluation.records import (
    PREFIX,
    folder_of,
    keep_video,
    last_time,
    remove_old_videos,
    videos_of,
    write_results,
)
from echolab.evaluation.sampling import Part, Share, parts_of, sample_parts
from echolab.evaluation.scoring import Results, Scorer, score_latents
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.callbacks.checkpoints import Checkpoints
from echolab.training.callbacks.metrics import LogMetrics
from echolab.training.callbacks.step_sync import EvaluationInterrupted, StepSync
from echolab.training.callbacks.validation import autocast_dtype, compute_dtype, unchanged
from echolab.training.config import TrainConfig
from echolab.training.datamodule import ShardDataModule
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import Masters


class EvaluationCallback(Callback):
    """Logs the scores of sampled held-out clips at intervals and at the end of the run."""

    def __init__(
        self,
        config: TrainConfig,
        data: ShardDataModule,
        *,
        masters: Masters,
        ema: Ema,
        checkpoints: Checkpoints,
        sync: StepSync,
        log: LogMetrics,
    ) -> None:
        """Open clips and metrics, so that a missing file is noticed before the first step."""
        self.config, self.data = config, data
        self.masters, self.ema = masters, ema
        self.checkpoints, self.sync, self.log = checkpoints, sync, log
        self.evaluation: EvaluationConfig | None = None
        if config.evaluation and config.evaluation.every:
            self.evaluation = config.evaluation
            # New networks draw their first weights: training must not notice.
            with unchanged(nn.Module(), torch.device("cpu")):
                self.held_out: HeldOut = together(config.evaluation.held_out)
                self._check_metrics(config.evaluation)

    def _check_metrics(self, evaluation: EvaluationConfig) -> None:
        """Print the metrics that are left out; raise DataError if ranks have other ones."""
        # Ranks with other metrics would sum different tables.
        metrics, lines = together(partial(evaluation.metrics, self.held_out))
        names = " ".join(name for metric in metrics for name in metric.cards())
        if not distributed.agree(names):
            raise DataError(
                f"metrics: rank {distributed.rank()} can compute {names or 'none'}, another rank "
                "others; put the networks of the metrics on every node"
            )
        if lines and self.config.print_lines and distributed.rank() == 0:
            self.config.print_lines(lines)

    def after_step(self, state: RunState) -> None:
        """Evaluate if due, unless a rank requested the end of the run."""
        # The last step of a run is evaluated too.
        evaluation = self.evaluation
        if evaluation is None or state.vote.reason:
            return
        if state.step % evaluation.every and not state.ends:
            return
        self.run(state, evaluation)
        # An interrupted evaluation ends the run: save the last steps.
        if state.vote.reason:
            self.checkpoints.save_if_due(state)

    def run(self, state: RunState, evaluation: EvaluationConfig) -> None:
        """Log the scores; if a rank requests an end, store that vote in `state`."""
        self.checkpoints.publish(state)  # a long evaluation could leave no time to publish later
        self.sync.heartbeat.enter("eval")
        # The slowest rank decides how long an evaluation takes.
        began = time.monotonic()
        try:
            results = self._results(state, evaluation)
        except EvaluationInterrupted as interruption:
            result = "its scores are not recorded for this step"
            self.sync.accept_interruption(state, interruption, "evaluation", result)
            return
        seconds = distributed.largest([math.ceil(1000 * (time.monotonic() - began))])[0] / 1000
        # The time of all sections so far gives the share that evaluation took.
        spent = self.sync.heartbeat.seconds
        figures = {
            "seconds": seconds,
            "clips": float(max(score.clips for score in results.scores.values())),
            "time_share": seconds / max(sum(spent.values()) + seconds, seconds),
        }
        values = results.values(PREFIX) | {f"{PREFIX}{k}": v for k, v in figures.items()}
        self.log.log(state, values)
        state.metrics |= values
        if distributed.rank() == 0:
            self._record(state, results, seconds)

    # -- sampling and scoring -------------------------------------------------------------------

    def _results(self, state: RunState, evaluation: EvaluationConfig) -> Results:
        """Return the scores over all ranks; collective."""
        held_out = self._planned(state, evaluation)
        poll, device = partial(self.sync.poll, state), state.module.device
        with unchanged(state.module.net, device):
            # All ranks sample; then they leave the averaged weights before anything else fails.
            with self.ema.applied(self.masters):
                batches = self._sample(state, evaluation, held_out)
            scorer, fault = self._score(state, evaluation, held_out, batches, poll)
        distributed.raise_together(DataError, fault)
        assert scorer is not None
        return scorer.results(evaluation.sampling, reduce=distributed.total)

    def _planned(self, state: RunState, evaluation: EvaluationConfig) -> HeldOut:
        """Return the clips that fit into the time limit; all ranks get the decision of rank 0."""
        # Each rank would read its own clock; the plan must be one.
        count = len(self.held_out)
        if distributed.rank() == 0:
            clips, seconds = last_time(state.run_dir)
            count = planned_clips(count, evaluation.max_seconds, clips, seconds)
        return self.held_out.limited(distributed.from_first(count))

    def _sample(
        self, state: RunState, evaluation: EvaluationConfig, held_out: HeldOut
    ) -> list[tuple[Part, Tensor]]:
        """Return the latents of this rank's clips; polled at each step of the sampler."""
        # Ranks that share a clip sample it together, and one of them scores it.
        group_size = self.config.machine.sequence_parallel
        share = Share(
            distributed.rank() // group_size,
            distributed.world() // group_size,
            counts=self.data.writer is not None,
        )
        net, sampling = state.module.net, evaluation.sampling
        dtype = autocast_dtype(net, compute_dtype(self.config.machine))
        parts = parts_of(len(held_out), sampling.batch_size, share)
        return list(
            sample_parts(
                net, held_out, sampling, parts, device=state.module.device, dtype=dtype,
                poll=partial(self.sync.poll, state),
            )
        )  # fmt: skip

    def _score(
        self,
        state: RunState,
        evaluation: EvaluationConfig,
        held_out: HeldOut,
        batches: list[tuple[Part, Tensor]],
        poll: Callable[[], None],
    ) -> tuple[Scorer | None, str]:
        """Score this rank's clips; return a fault instead of raising it.

        Other ranks wait in `poll`, so this rank must call it equally often after a fault too.
        """
        scorer, fault, device = None, "", state.module.device
        vae: Autoencoder | None = None
        try:
            scorer = Scorer(evaluation.metrics(held_out)[0], held_out)
            vae = load_vae(evaluation.vae, device)
        except (EcholabError, RuntimeError, OSError) as error:
            fault = f"evaluation: {error}"
        # Score this rank's batches; a repeated batch only keeps the number of polls equal.
        folder = folder_of(state.run_dir, state.step)
        keep = partial(keep_video, folder, evaluation.num_videos)
        for part, latents in batches:
            poll()
            if not part.counted or fault or scorer is None or vae is None:
                continue
            try:
                score_latents(scorer, vae, part.indices, latents.to(device), keep)
            except (EcholabError, RuntimeError, ValueError, OSError) as error:
                fault = f"evaluation of clip {part.indices.start} and following: {error}"
        vae = None
        free(device)
        return scorer, fault

    # -- files ----------------------------------------------------------------------------------

    def _record(self, state: RunState, results: Results, seconds: float) -> None:
        """Write the results, send videos and table to the tracker, and remove old videos."""
        write_results(state.run_dir, state.step, results, seconds)
        if self.config.log_evaluation:
            videos = videos_of(state.run_dir, state.step)
            self.config.log_evaluation(state.step, results.rows(), videos)
        remove_old_videos(state.run_dir)


def together(make: Callable[[], Any]) -> Any:
    """Return the result of `make`; if it fails on any rank, raise that error on all ranks."""
    # A rank that raised alone would leave the others in a collective.
    result, fault, kind = None, "", DataError
    try:
        result = make()
    except EcholabError as error:
        fault, kind = str(error), type(error)  # type: ignore[assignment]
    distributed.raise_together(kind, fault)
    return result

"""Sample held-out clips from a checkpoint, score them, and store rows and samples."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from echolab.atomic_io import write_atomic
from echolab.config.metrics import metrics_named
from echolab.config.networks import check_encoders, last_checkpoint, load_policy
from echolab.data.shard_reader import open_dataset
from echolab.encoders.demo import CausalAutoencoder
from echolab.evaluation.choice import build_metrics, chosen
from echolab.evaluation.decoding import decode, load_vae, vae_fingerprint
from echolab.evaluation.held_out import HeldOut
from echolab.evaluation.records import keep_video, write_clip
from echolab.evaluation.sampling import Part, Sampling, Share, sample_parts
from echolab.evaluation.scoring import (
    Keep,
    Results,
    Scorer,
    score_reconstructions,
    score_recordings,
    score_samples,
)
from echolab.fitting import load_net, work_dtype
from echolab.inference.commands import EvaluateArguments
from echolab.metrics.metric import VideoClip, VideoMetric
from echolab.metrics.setup import Setup
from echolab.progress import progress
from echolab.tasks.table import TASKS
from echolab.tracking.published import print_paper_table, read_rows

AUTOENCODER = "autoencoder"
SYNC_JUDGE = "sync_judge"
UNGUIDED = ("sync_c_demo", "mouth_corr")  # scores that are also computed without audio guidance


def network_file(networks: Path, name: str) -> Path:
    """Return the file of a fitted network."""
    return networks / f"{name}.safetensors"


def load_autoencoder(networks: Path) -> CausalAutoencoder:
    """Load the demo autoencoder."""
    return load_net(network_file(networks, AUTOENCODER), CausalAutoencoder)


def evaluate_checkpoint(arguments: EvaluateArguments) -> None:
    """Score generated clips, or the held-out clips themselves, and print the scores."""
    # Build the metrics first: a missing file must not be noticed after an hour of sampling.
    evaluation = Evaluation(arguments)
    if arguments.checkpoint:
        checkpoint = last_checkpoint(arguments.checkpoint)
        subject, results = str(checkpoint), evaluation.of_checkpoint(checkpoint)
    else:
        subject, results = str(arguments.reference), evaluation.of_reference()

    # Add the row to the table, and print it.
    scores = results.values()
    cards = {name: results.cards[name].to_json() for name in scores}
    row = {"checkpoint": arguments.row_name, "seed": arguments.train_seed,
           "scores": scores, "cards": cards}  # fmt: skip
    if arguments.scores:
        add_row(arguments.scores, row)
    if arguments.table:
        print_paper_table(
            read_rows(arguments.scores) if arguments.scores else [row], arguments.format
        )
    elif arguments.format == "json":
        print(json.dumps({"checkpoint": subject, "scores": scores, "cards": cards}))
    else:
        print_results(results)


def print_results(results: Results) -> None:
    """Print scores with their intervals and the hashes of their cards."""
    table = Table("score", "value", "95 % interval", "clips", "card")
    # A score without value shows the reason in its place.
    missing = results.missing()
    for name, score in results.scores.items():
        value = missing[name] if name in missing else f"{score.value:.3f}"
        interval = f"{score.low:.3f} to {score.high:.3f}" if score.low == score.low else ""
        card = results.cards[name].hash if name in results.cards else ""
        table.add_row(name, value, interval, str(score.clips), card)
    Console().print(table)


class Evaluation:
    """The held-out clips and the metrics of one command."""

    def __init__(self, arguments: EvaluateArguments) -> None:
        """Open the datasets and build the metrics.

        Raise WeightsError if a score that was asked for by name cannot be computed.
        """
        self.arguments = arguments
        # The encoded clips condition the network; recordings are scored without them.
        encoded = open_dataset(arguments.clips) if arguments.checkpoint else None
        self.held_out = HeldOut(open_dataset(arguments.raw), encoded, arguments.num_clips)
        self.metrics = self._metrics(arguments.score)

    def _metrics(self, names: tuple[str, ...]) -> list[VideoMetric]:
        """Return new metrics; print a line for each that cannot be computed."""
        # Each evaluation needs empty tables, so the metrics are built again.
        arguments, held_out = self.arguments, self.held_out
        scores = metrics_named(arguments.metrics)["scores"]
        setup = Setup(len(held_out), held_out.frames, arguments.networks, arguments.real)
        entries = chosen(scores, names) if names else scores
        metrics, lines = build_metrics(entries, setup, required=bool(names))
        for line in lines:
            print(f"echolab: {line}", file=sys.stderr)
        return metrics

    @property
    def vae_path(self) -> Path:
        """The autoencoder of the clips."""
        return self.arguments.vae or network_file(self.arguments.networks, AUTOENCODER)

    def of_reference(self) -> Results:
        """Return the scores of the held-out clips, of reconstructions, or with other audio."""
        # The audio of another clip gives the chance level of lip sync.
        scorer = Scorer(self.metrics, self.held_out)
        shuffled = self.arguments.reference == "shuffled_sound"
        with progress(f"scoring {self.arguments.reference}", len(self.held_out)) as advance:

            def keep(index: int, clip: VideoClip) -> None:
                self.keep(index, clip)
                advance(index + 1, "")

            if self.arguments.reference == "reconstruction":
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                score_reconstructions(scorer, load_vae(self.vae_path, device), device, keep)
            else:
                score_recordings(scorer, range(len(self.held_out)), shuffled=shuffled, keep=keep)
        return scorer.results(None)

    def of_checkpoint(self, checkpoint: Path) -> Results:
        """Return the scores of clips sampled from a checkpoint; write some of the clips.

        Raise DataError or CheckpointError if clips, encoders and checkpoint do not match.
        """
        assert self.held_out.encoded is not None
        # Sample with guidance; without guidance and other tasks if requested.
        sampler = Sampler(self, checkpoint)
        name, sampling = self.arguments.row_name, sampling_of(self.arguments)
        scorer = Scorer(self.metrics, self.held_out)
        sampler.score(f"sampling from {name}", scorer, sampling, keep=self.keep)
        results = scorer.results(sampling)
        if self.arguments.unguided:
            results = self._with_unguided(results, sampler, sampling)
        if self.arguments.task_samples:
            self._sample_tasks(sampler, self.arguments.task_samples)
        return results

    def _with_unguided(self, results: Results, sampler: "Sampler", sampling: Sampling) -> Results:
        """Add scores without guidance, of which preference training can teach a part."""
        # Only lip sync depends on the guidance.
        names = tuple(name for name in UNGUIDED if name in results.scores)
        scorer = Scorer(self._metrics(names), self.held_out)
        unguided = sampling._replace(audio_scale=1.0)
        sampler.score(f"sampling from {self.arguments.row_name}, unguided", scorer, unguided)
        other = scorer.results(unguided)
        scores, cards = dict(results.scores), dict(results.cards)
        for score in names:
            # The suffix of stand-ins stays last.
            stem = score.removesuffix("_demo")
            renamed = f"{stem}_unguided{score.removeprefix(stem)}"
            scores[renamed] = other.scores[score]
            cards[renamed] = other.cards[score].with_evaluation(metric=renamed)
        return Results(scores, cards)

    def keep(self, index: int, clip: VideoClip) -> None:
        """Write one of the first clips as an mp4 file with its audio, if samples are kept."""
        arguments = self.arguments
        if arguments.samples:
            keep_video(arguments.samples, arguments.num_samples, index, clip)

    def _sample_tasks(self, sampler: "Sampler", folder: Path) -> None:
        """Write one clip of every task that is not scored, each with another talker."""
        # Each task uses another held-out clip.
        folder.mkdir(parents=True, exist_ok=True)
        sampling = sampling_of(self.arguments)
        for index, task in enumerate(name for name in TASKS if name != self.arguments.task):
            at = index % len(self.held_out)
            clip = sampler.sample_clip(at, sampling._replace(task=task))
            write_clip(folder / f"{task}.mp4", clip)


class Sampler:
    """A checkpoint's network with the autoencoder to decode its samples."""

    def __init__(self, evaluation: Evaluation, checkpoint: Path) -> None:
        """Raise DataError or CheckpointError if clips, encoders and checkpoint do not match."""
        dataset = evaluation.held_out.encoded
        assert dataset is not None
        self.held_out = evaluation.held_out
        # Clips, encoders and checkpoint must belong together.
        path = evaluation.vae_path
        check_encoders(checkpoint, {"video": vae_fingerprint(path)})
        check_encoders(checkpoint, dict(dataset.encoders))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vae = load_vae(path, self.device)
        self.net = load_policy(checkpoint).to(self.device)

    def score(
        self, title: str, scorer: Scorer, sampling: Sampling, keep: Keep | None = None
    ) -> None:
        """Sample and score all held-out clips."""
        with progress(title, len(self.held_out)) as advance:

            def keep_and_advance(index: int, clip: VideoClip) -> None:
                if keep:
                    keep(index, clip)
                advance(index + 1, "")

            score_samples(
                scorer, self.net, self.vae, sampling, Share(), device=self.device,
                dtype=work_dtype(self.device), keep=keep_and_advance,
            )  # fmt: skip

    def sample_clip(self, index: int, sampling: Sampling) -> VideoClip:
        """Return one sampled clip."""
        part = [Part(range(index, index + 1), True)]
        ((_, latents),) = sample_parts(
            self.net, self.held_out, sampling, part, device=self.device,
            dtype=work_dtype(self.device),
        )  # fmt: skip
        frames, _ = decode(self.vae, latents)
        return self.held_out.clip(index, frames[0])


def sampling_of(arguments: EvaluateArguments) -> Sampling:
    """Return the settings of the sampler, with guidance."""
    return Sampling(
        arguments.task, arguments.num_steps, arguments.flow_shift,
        arguments.audio_guidance_scale, arguments.seed, arguments.batch_size,
    )  # fmt: skip


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a score table, in place of an earlier one of the same name and seed."""
    # Keep the rows of other checkpoints.
    others = [
        other for other in read_rows(path)
        if (other["checkpoint"], other["seed"]) != (row["checkpoint"], row["seed"])
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"rows": [*others, row]}, indent=1).encode())

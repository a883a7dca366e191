"""The global batches are the same for any ranks, workers and micro-batches, and after any kill."""

import contextlib
import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import encoded
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from echolab.cli.__main__ import main
from echolab.data.batch_sampler import LastBatch, ShuffleConfig
from echolab.data.ledger import (
    LEDGER,
    Attempt,
    LedgerWriter,
    Row,
    audit_run,
    next_attempt,
    read_ledger,
)
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.data.shard_writer import ShardWriter
from echolab.data.train_dataset import DatasetMixture, MicroBatch, TrainDataset, build_mixture
from echolab.tasks.table import TASKS
from echolab.tracking.metrics import read_metrics
from echolab.training.callbacks.sample_ledger import noise_hashes
from echolab.training.config import Intervals
from echolab.training.module import draws_of
from echolab.types import PreferencePair

PLAN = runs.schedule(("sft", 4), ("dpo", 2), ("sft", 5))
SMALL, LARGE = (1, 2, 2), (3, 2, 2)  # latent frames, height, width
ECHOLAB = (sys.executable, "-m", "echolab.cli")
CLIPS = [("a", 11, LARGE), ("b", 7, LARGE), ("c", 9, SMALL)]


def tensors(seed: int, size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Return the smallest possible clip."""
    latents = torch.full((1, *size), float(seed))
    made = {name: torch.zeros(1, 1) for name in ("text", "image")}
    made |= {"audio": torch.zeros(2 * (4 * (size[0] - 1) + 1), 1)}
    made |= {"face": torch.ones(1), "weight": torch.ones(1, *size), "latents": latents}
    for task in TASKS:
        if task != "t2v":
            made |= {f"known.{task}": torch.zeros(4, *size), f"known_latents.{task}": latents}
    return {name: tensor.clone() for name, tensor in made.items()}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardDataset]:
    folder = tmp_path_factory.mktemp("data")
    for name, count, size in CLIPS:
        with ShardWriter(folder / name, kind="encoded", samples_per_shard=4) as writer:
            for i in range(count):
                writer.write(f"{name}-{i}", {"safetensors": save(tensors(i, size)), "json": b"{}"})
    with ShardWriter(folder / "pairs", kind="preference", samples_per_shard=2) as writer:
        for i in range(5):
            one = tensors(i, LARGE)
            kept = {name: one[name] for name in ("text", "image", "audio", "face", "weight")}
            kept |= {"known": one["known.i2v"], "known_latents": one["known_latents.i2v"]}
            kept |= {"chosen": one["latents"] + 1, "rejected": one["latents"] - 1}
            writer.write(f"pair-{i}", {"safetensors": save(kept), "json": b'{"task": "i2v"}'})
    return {name: open_dataset(folder / name) for name in ("a", "b", "c", "pairs")}


class Cut(NamedTuple):
    """How an attempt splits the batches, and where it ends."""

    world: int
    accumulation: int
    workers: int
    steps: int  # done before it is killed
    saved: int  # of these, behind a checkpoint


class Case(NamedTuple):
    """The data to train on, and the attempts."""

    clips: tuple[str, ...]
    weights: tuple[float, ...] | None
    order: ShuffleConfig
    batch_size: int
    seed: int
    cuts: tuple[Cut, ...]

    def stocks(self, datasets: dict[str, ShardDataset]) -> tuple[DatasetMixture, DatasetMixture]:
        shared: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        clips = [datasets[name] for name in self.clips]
        return (
            build_mixture(
                clips, kind="encoded", weights=self.weights, shuffle=self.order, **shared
            ),
            build_mixture([datasets["pairs"]], kind="preference", **shared),
        )

    def items(
        self, stocks: tuple[DatasetMixture, DatasetMixture], cut: Cut, rank: int
    ) -> TrainDataset:
        return TrainDataset(
            *stocks, step_plan=PLAN.place, curriculum=runs.curriculum(), batch_size=self.batch_size,
            accumulation=cut.accumulation, seed=self.seed, steps=PLAN.steps, rank=rank,
            world=cut.world,
        )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    clips = draw(st.sampled_from([("a",), ("c",), ("a", "b"), ("a", "c"), ("a", "b", "c")]))
    mixed = "a" in clips and "b" in clips
    remainders: list[LastBatch] = ["carry"] if mixed else ["carry", "drop", "pad"]
    weights = tuple(draw(st.sampled_from([1.0, 2.0, 0.5])) for _ in clips)
    order = ShuffleConfig(
        shuffle_block_size=draw(st.integers(1, 5)),
        shuffle_buffer=draw(st.integers(0, 6)),
        last_batch=draw(st.sampled_from(remainders)),
        # A batch of one small dataset shares no slots: drop needs one full batch an epoch.
        token_budget=draw(st.sampled_from([None, 12, 25])) if mixed else None,
    )
    batch_size = draw(st.integers(1, 8)) if order.last_batch != "drop" else draw(st.integers(1, 3))
    cuts = []
    for _ in range(draw(st.integers(1, 3))):
        world = draw(st.sampled_from([w for w in range(1, 9) if batch_size % w == 0]))
        own = batch_size // world
        accumulation = draw(st.sampled_from([a for a in range(1, own + 1) if own % a == 0]))
        steps = draw(st.integers(0, PLAN.steps))
        cuts.append(
            Cut(world, accumulation, draw(st.integers(0, 3)), steps, draw(st.integers(0, steps)))
        )
    cuts.append(Cut(1, 1, 0, PLAN.steps, PLAN.steps))
    used = None if draw(st.booleans()) else weights
    return Case(clips, used, order, batch_size, draw(st.integers(0, 2)), tuple(cuts))


def loaded(items: TrainDataset, first: int, stop: int, workers: int) -> list[MicroBatch]:
    """Return a loader's items [first, stop); each worker is a copy that reads ahead."""
    if not workers:
        return [items[i] for i in range(first, stop)]
    copies = [copy.deepcopy(items) for _ in range(workers)]
    ahead = min(stop + 2 * workers, items.stop)
    return [copies[(i - first) % workers][i] for i in range(first, ahead)][: stop - first]


def row(seed: int, parts: list[MicroBatch]) -> Row:
    """Return one rank's row of a step."""
    real = [part for part in parts if part.loss_weight]
    return Row(
        parts[0].step,
        parts[0].kind,
        [source for part in real for source in part.sources],
        [epoch for part in real for epoch in part.epochs],
        [key for part in real for key in part.batch.keys],
        [hashed for part in real for hashed in noise_hashes(draws_of(part, seed=seed, shift=5.0))],
    )


def trained(
    case: Case, cuts: tuple[Cut, ...], stocks: tuple[DatasetMixture, DatasetMixture], run: Path
) -> None:
    """Train through the schedule in these attempts, and keep the ledger."""
    first = 0
    contents = [mixture.sampler.datasets() for mixture in stocks]
    for cut in cuts:
        stop = min(first + cut.steps, PLAN.steps)
        attempt = Attempt(next_attempt(run / LEDGER), cut.world, first, *contents)
        for rank in range(cut.world):
            writer = LedgerWriter(run / LEDGER, attempt, rank)
            size = cut.accumulation
            items = case.items(stocks, cut, rank)
            audit = loaded(items, first * size, stop * size, cut.workers)
            for i in range(0, len(audit), size):
                writer.write(row(case.seed, audit[i : i + size]))
        first = min(first + cut.saved, PLAN.steps)


def batches(run: Path) -> list[list[tuple[int, int, str, str]]]:
    """Return (dataset, epoch, key, noise) of each step's complete global batch, in order."""
    steps = read_ledger(run).steps
    assert sorted(steps) == list(range(PLAN.steps))
    return [
        [
            clip
            for row in steps[step]
            for clip in zip(row.sources, row.epochs, row.keys, row.noise, strict=True)
        ]
        for step in range(PLAN.steps)
    ]


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_every_split_into_attempts_has_the_same_batches(
    datasets: dict[str, ShardDataset], tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    stocks = case.stocks(datasets)
    undisturbed, killed = tmp_path_factory.mktemp("unbroken"), tmp_path_factory.mktemp("killed")
    trained(case, case.cuts[-1:], stocks, undisturbed)
    trained(case, case.cuts, stocks, killed)
    assert batches(killed) == batches(undisturbed)
    assert audit_run(killed).exact


def test_ranks_have_equal_steps_and_tokens(datasets: dict[str, ShardDataset]) -> None:
    case = Case(("a", "b", "c"), None, ShuffleConfig(token_budget=25), 8, 0, ())
    stocks = case.stocks(datasets)
    of_ranks = [case.items(stocks, Cut(4, 2, 0, 0, 0), rank) for rank in range(4)]
    for i in range(2 * PLAN.steps):
        items = [of_rank[i] for of_rank in of_ranks]
        shapes = {item.batch.weight.shape for item in items}
        assert len(shapes) == 1  # nobody waits for a rank with longer clips
        assert shapes.pop().numel() <= 25


def test_pairs_are_never_split(datasets: dict[str, ShardDataset]) -> None:
    case = Case(("a",), None, ShuffleConfig(), 4, 0, ())
    stocks = case.stocks(datasets)
    for world in (1, 2, 4):
        for rank in range(world):
            for step in (4, 5):
                item = case.items(stocks, Cut(world, 1, 0, 0, 0), rank)[step]
                pair = item.batch
                assert isinstance(pair, PreferencePair)
                assert (pair.chosen - pair.rejected == 2).all()  # both halves of one pair
                noise = draws_of(item, seed=0, shift=5.0).noise
                assert noise.shape == pair.chosen.shape  # one noise for both


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    """Return the left half of a wide clip's latents or masks."""
    return tensor[..., :2].contiguous()


def test_clips_of_two_sizes_train_together(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "narrow", kind="encoded", samples_per_shard=2) as writer:
        for i in range(5):
            made = runs.clip_tensors(200 + i)
            wide = [n for n in made if n.startswith(("latents", "weight", "known"))]
            made |= {name: narrow(made[name]) for name in wide} | {"face": made["face"][:2].clone()}
            writer.write(f"narrow-{i}", {"safetensors": save(made), "json": b"{}"})
    clips = [runs.write_clips(tmp_path / "clips", 7), open_dataset(tmp_path / "narrow")]
    result, rows = runs.train(
        tmp_path, runs.schedule(("sft", 6)), clips=clips, clip_weights=[1.0, 2.0], batch_size=2,
        log_samples=True, intervals=Intervals(log_every=1),
    )  # fmt: skip
    assert result.done and len(rows) == 6
    steps = read_ledger(tmp_path / "run").steps
    sources = [set(step[0].sources) for step in steps.values()]
    # A wide clip takes the place of three narrow ones.
    assert [len(step[0].keys) for step in steps.values()] == [2 if s == {0} else 6 for s in sources]
    assert {0} in sources and {1} in sources and audit_run(tmp_path / "run").exact


# -- real processes ---------------------------------------------------------------------------


def command(run: Path, clips: Path, devices: int, *words: str) -> list[str]:
    """Return the words of `echolab` that train with that many gloo ranks."""
    return [
        "train", *encoded.SETTINGS, f"data.clips={clips}",
        encoded.plan(("sft", 8)), "batch_size=6", "data.log_samples=true", f"run_dir={run}",
        "trainer.strategy=ddp", f"trainer.devices={devices}", *words,
    ]  # fmt: skip


def descendants(pid: int) -> list[int]:
    """Return the descendants of a process, by Linux's own account."""
    try:
        own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, own) for one in (child, *descendants(child))]


def kill_at(words: list[str], run: Path, step: int) -> None:
    """Start a run, and kill all its processes at once when it has logged `step`."""
    process = subprocess.Popen(
        [*ECHOLAB, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics, end = run / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        shown = metrics.read_text() if metrics.exists() else ""
        if shown.count("\n") >= step:
            break
        time.sleep(0.002)
    for pid in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):  # ranks die with their supervisor
            os.kill(pid, signal.SIGKILL)
    assert process.wait(timeout=600) == -signal.SIGKILL


def losses(run: Path) -> list[float]:
    rows = read_metrics(run / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.slow
def test_a_killed_run_resumed_on_other_ranks_trains_the_same_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, _ = encoded.write(tmp_path / "data", 10)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert main(command(unbroken, clips, 1, "trainer.strategy=single")) == 0
    step = random.SystemRandom().randint(1, 6)
    words = command(killed, clips, 3, "data.num_workers=1", "micro_batch_size=1")
    kill_at(words, killed, step)
    subprocess.run([*ECHOLAB, *command(killed, clips, 2)], check=True, timeout=900)

    def effective(run: Path) -> list[list[tuple[Any, ...]]]:
        steps = read_ledger(run).steps
        return [[clip for row in steps[n] for clip in zip(*row[2:], strict=True)] for n in range(8)]

    assert effective(killed) == effective(
        unbroken
    )  # keys, epochs and noise of every step, in order
    assert losses(killed) == pytest.approx(losses(unbroken), rel=1e-3)
    capsys.readouterr()
    assert main(["data", "audit", str(killed), "format=json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert audit["exact"] and audit["steps"] == 8 and audit["attempts"] == 2, (step, audit)

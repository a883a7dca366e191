"""The shared evaluation: equal work on every rank, the scores of the demo, clips that fail."""

from pathlib import Path

import drawn
import numpy as np
import pytest
import torch
from batch_scores import Judges, score_clips

from data_prep.draw import draw_dataset
from data_prep.options import DrawOptions
from echolab.config.metrics import metrics_named
from echolab.data.shard_reader import open_dataset
from echolab.errors import ConfigError, WeightsError
from echolab.evaluation.choice import build_metrics, chosen
from echolab.evaluation.decoding import decode
from echolab.evaluation.held_out import HeldOut
from echolab.evaluation.sampling import Share, parts_of
from echolab.evaluation.scoring import NOT_FINITE, Scorer, score_latents, score_recordings
from echolab.inference.inputs import load_clips
from echolab.metrics.demo import FrechetDemo, SyncDemo, features_of
from echolab.metrics.demo_networks import ClipFeatures, FrameFeatures, SyncNetDemo
from echolab.metrics.fidelity import FirstFrame
from echolab.metrics.metric import VideoClip, VideoMetric
from echolab.metrics.mfcc import cepstra_of
from echolab.metrics.motion import MouthCorrelation
from echolab.metrics.setup import Setup

CLIPS = 5


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a raw dataset."""
    folder = tmp_path_factory.mktemp("raw") / "raw"
    draw_dataset(DrawOptions(folder, num_clips=CLIPS), lambda done: None)
    return folder


def judges() -> Judges:
    torch.manual_seed(0)
    frame, clip = FrameFeatures(labels=6, size=64).eval(), ClipFeatures(labels=12, size=64).eval()
    with torch.no_grad():
        real = features_of(frame, clip, drawn.clips(8, first=200).float_pixels())
    return Judges(SyncNetDemo().eval(), frame, clip, *real)


def metrics_of(judges: Judges, frames: int = 25) -> list[VideoMetric]:
    return [
        SyncDemo(CLIPS, judges.sync),
        FrechetDemo(CLIPS, judges.frame, judges.real_frames, frames=frames),
        FrechetDemo(CLIPS, judges.clip, judges.real_clips, frames=frames),
        FirstFrame(CLIPS),
        MouthCorrelation(CLIPS),
    ]


@pytest.mark.parametrize("shuffled", [False, True])
def test_scores_equal_those_of_one_batch(raw: Path, shuffled: bool) -> None:
    truth, nets = load_clips(raw), judges()
    scorer = Scorer(metrics_of(nets), HeldOut(open_dataset(raw), None, CLIPS))
    score_recordings(scorer, range(CLIPS), shuffled=shuffled)
    results = scorer.results(None)
    if shuffled:
        assert truth.visemes is not None
        truth = truth._replace(samples=truth.samples.roll(1, 0), visemes=truth.visemes.roll(1, 0))
    expected = score_clips(nets, truth.float_pixels(), truth, cepstra_of(truth))
    assert results.values() == pytest.approx(expected, rel=1e-5)
    for name, score in results.scores.items():
        card = results.cards[name]
        assert (score.clips, card.clips, card.frames, card.metric) == (CLIPS, CLIPS, 25, name)
        assert score.low <= score.value + 1e-9 and score.value <= score.high + 1e-9, name


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_ranks_make_equally_many_calls_and_score_each_clip_once(rows: int, size: int) -> None:
    shares = [parts_of(CLIPS, size, Share(row, rows)) for row in range(rows)]
    assert len({len(parts) for parts in shares}) == 1
    counted = [i for parts in shares for part in parts if part.counted for i in part.indices]
    assert sorted(counted) == list(range(CLIPS))
    # The composition of batches, and so the rounding, is that of one rank.
    alone = {part.indices for part in parts_of(CLIPS, size, Share())}
    assert {part.indices for parts in shares for part in parts} == alone
    silent = parts_of(CLIPS, size, Share(0, rows, counts=False))
    assert not any(part.counted for part in silent) and len(silent) == len(shares[0])


@pytest.mark.parametrize("rows", [2, 3])
def test_tables_of_ranks_add_up_to_those_of_one_process(raw: Path, rows: int) -> None:
    nets = judges()
    held_out = HeldOut(open_dataset(raw), None, CLIPS)
    complete = Scorer(metrics_of(nets), held_out)
    score_recordings(complete, range(CLIPS))
    ranks = [Scorer(metrics_of(nets), held_out) for _ in range(rows)]
    for row, scorer in enumerate(ranks):
        score_recordings(scorer, range(row, CLIPS, rows))
    for position, metric in enumerate(complete.metrics):
        for name in metric._defaults:
            parts = torch.stack([getattr(scorer.metrics[position], name) for scorer in ranks])
            assert torch.equal(parts.sum(0), getattr(metric, name))


class _Constant:
    """An autoencoder that decodes any latents to given pixels."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pixels


def test_pixels_that_are_not_finite_are_flagged_and_not_scored(raw: Path) -> None:
    truth = load_clips(raw)
    pixels = truth.float_pixels()
    pixels[1, 0, 3] = float("nan")
    scorer = Scorer([FirstFrame(CLIPS)], HeldOut(open_dataset(raw), None, CLIPS))
    score_latents(scorer, _Constant(pixels), range(CLIPS), torch.zeros(CLIPS, 1))
    (score,) = scorer.results(None).scores.values()
    assert score.value == 100 and score.clips == CLIPS - 1
    assert dict(score.flags) == {NOT_FINITE: 1}
    pixels[:] = float("inf")
    scorer = Scorer([FirstFrame(CLIPS)], HeldOut(open_dataset(raw), None, CLIPS))
    score_latents(scorer, _Constant(pixels), range(CLIPS), torch.zeros(CLIPS, 1))
    results = scorer.results(None)
    assert results.values() == {} and results.missing() == {
        "psnr_first_frame": f"{NOT_FINITE} ({CLIPS})"
    }


def test_pixels_are_rounded_and_clipped_to_8_bits() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 5, 1, 1).expand(-1, 3, -1, -1, -1)
    frames, finite = decode(_Constant(pixels), torch.zeros(1, 1))
    assert frames.dtype == torch.uint8 and frames.shape == (1, 5, 3, 1, 1)
    assert frames[0, :, 0, 0, 0].tolist() == [0, 0, 128, 255, 255] and finite == [True]


def test_clips_that_a_metric_cannot_score_are_flagged() -> None:
    metric = SyncDemo(3, SyncNetDemo().eval())
    held = drawn.clips(1)
    frames = held.pixels[0].transpose(0, 1)
    metric.update(0, VideoClip("silent", frames, None, lips=held.lips[0]))
    metric.update(1, VideoClip("short", frames[:9], held.samples[0], lips=held.lips[0]))
    metric.update(2, VideoClip("faceless", frames, held.samples[0]))
    scores = metric.compute()
    assert all(np.isnan(score.value) for score in scores.values())
    assert dict(scores["sync_c_demo"].flags) == dict.fromkeys(metric.reasons, 1)


def test_missing_networks_are_named_or_refused(tmp_path: Path) -> None:
    entries = [
        {"names": ["sync_c_demo", "sync_d_demo"], "target": "echolab.metrics.demo:sync"},
        {"names": ["psnr_first_frame"], "target": "echolab.metrics.fidelity:first_frame"},
    ]
    setup = Setup(CLIPS, 25, tmp_path)
    metrics, lines = build_metrics(entries, setup)
    assert [list(metric.cards()) for metric in metrics] == [["psnr_first_frame"]]
    assert len(lines) == 1 and lines[0].startswith("sync_c_demo, sync_d_demo: left out: ")
    with pytest.raises(WeightsError, match="sync_c_demo, sync_d_demo: .*not there"):
        build_metrics(chosen(entries, ["sync_c_demo"]), setup, required=True)
    with pytest.raises(ConfigError, match="score fid: not among"):
        chosen(entries, ["fid"])
    with pytest.raises(ConfigError, match="neither below echolab.metrics nor registered"):
        build_metrics([{"names": ["x"], "target": "os:system"}], setup)
    with pytest.raises(ConfigError, match="computes .'psnr_first_frame'."):
        build_metrics([{**entries[1], "names": ["fid"]}], setup)
    with pytest.raises(ConfigError, match="does not take them"):
        build_metrics([{**entries[1], "args": {"color": 1}}], setup)


@pytest.mark.parametrize("name", ["demo", "released"])
def test_shipped_metrics_name_the_scores_that_they_compute(name: str, tmp_path: Path) -> None:
    """A missing file is named; names that differ from the metric's would raise ConfigError."""
    entries = metrics_named(name)["scores"]
    for entry in entries:
        if entry["target"] == "echolab.metrics.sync:sync":
            entry["args"] = {"weights": "random"}
    metrics, lines = build_metrics(entries, Setup(CLIPS, 25, tmp_path, tmp_path))
    computed = sum(len(metric.cards()) for metric in metrics)
    left_out = sum(line.split(": left out")[0].count(",") + 1 for line in lines)
    assert computed + left_out == sum(len(entry["names"]) for entry in entries)
    assert len(metrics) >= 2 and lines

"""The law of every metric: any number of ranks gives the same bits as one process."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ForkServer
from torch import Tensor, nn

from echolab.metrics.card import Card
from echolab.metrics.feature_metric import NOT_FINITE, FeatureMetric
from echolab.metrics.metric import Score, VideoClip, VideoMetric, bootstrap, mean_score
from echolab.metrics.weights import Network

CLIPS, ROWS, DIM = 7, 2, 5


class Brightness(VideoMetric):
    """The mean brightness of a clip: the smallest metric with a reason."""

    reasons = ("dark", "one frame")

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.add_table("light")

    light: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        if len(clip.frames) == 1:
            return "one frame"
        if not clip.frames.any():
            return "dark"
        self.light[index] = clip.frames.double().mean() / 3
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        return {"brightness": mean_score(self.light[scored])}

    def cards(self) -> dict[str, Card]:
        return {"brightness": Card(metric="brightness", definition="mean", preprocessing="none")}


class Probe(FeatureMetric):
    """Distances of features that are a few numbers of each clip; odd clips give NaN."""

    frechet, kernel, unbiased, reasons = "fd", "kd", True, (NOT_FINITE,)

    def __init__(self, num_clips: int) -> None:
        network = Network(nn.Identity(), "numbers", "none", "")
        super().__init__(num_clips, network, rows=ROWS, dim=DIM, counts=(3, 99), draws=20)

    def clip_features(self, clip: VideoClip) -> Tensor:
        generator = torch.Generator().manual_seed(int(clip.key))
        features = torch.randn(ROWS, DIM, generator=generator)
        # Zeros with a sign and NaN must not change the bits of any other row.
        features[0, 0] = -0.0
        if clip.key == "5":
            features[1, 1] = math.nan
        return features

    def card(self) -> Card:
        return Card(metric="fd", definition="Frechet", preprocessing="none")


def clip(index: int, frames: int = 4) -> VideoClip:
    """Return a clip of noise; clip 2 is dark and clip 3 has one frame."""
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randint(256, (1 if index == 3 else frames, 3, 4, 4), generator=generator)
    return VideoClip(str(index), (pixels * (index != 2)).to(torch.uint8))


def plain(scores: dict[str, Score]) -> dict[str, Any]:
    """Return scores as JSON values that keep every bit."""
    return {
        name: [float(n).hex() for n in score[:3]] + [score.clips, dict(score.flags)]
        for name, score in scores.items()
    }


def scored(indices: dict[int, list[int]], rank: int, reference: Tensor) -> dict[str, Any]:
    """Return the scores of both metrics, from the clips of a rank and those of all others."""
    brightness, probe = Brightness(CLIPS), Probe(CLIPS)
    probe.set_reference(reference, "noise")
    for index in indices[rank]:
        brightness.update(index, clip(index))
        probe.update(index, clip(index))
    features = probe.all_features()
    result = {**plain(brightness.compute()), **plain(probe.compute())}
    result["features"] = [value.hex() for value in features.flatten().tolist()]
    # Collecting features leaves the states of a rank as they were.
    assert int(probe.visits.sum()) == len(indices[rank])
    return result


def reference_features() -> Tensor:
    return torch.randn(6, ROWS, DIM, generator=torch.Generator().manual_seed(99)).double() + 0.3


def score_on_ranks(to: str, indices: dict[str, list[int]]) -> int:
    """Score the clips of this rank, and write the scores of all."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    shares = {int(key): value for key, value in indices.items()}
    result = scored(shares, rank, reference_features())
    Path(to, f"{rank}.json").write_text(json.dumps(result))
    return 0


# Uneven shares; the last rank has one clip or none, and clip 6 is on no rank.
SHARES = {
    1: {0: [0, 1, 2, 3, 4, 5]},
    2: {0: [5, 0, 3, 1], 1: [2, 4]},
    4: {0: [4], 1: [0, 1, 2], 2: [5, 3], 3: []},
}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_gives_the_bits_of_one_process(
    world: int, fork_server: ForkServer, tmp_path: Path
) -> None:
    fork_server.run("test_metric:score_on_ranks", world=world,
                    arguments={"to": str(tmp_path), "indices": SHARES[world]})  # fmt: skip
    expected = scored(SHARES[1], 0, reference_features())
    for rank in range(world):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
    # The scores are of the clips that could be scored, and the others are counted.
    assert expected["brightness"][3:] == [4, {"dark": 1, "one frame": 1, "not sampled": 1}]
    assert expected["fd"][3:] == [5, {NOT_FINITE: 1, "not sampled": 1}]
    assert all(math.isfinite(float.fromhex(value)) for value in expected["fd"][:3])
    assert expected["fd_n99"][4]["less than 99 clips"] == 1


def test_a_clip_that_two_ranks_scored_is_left_out(fork_server: ForkServer, tmp_path: Path) -> None:
    shares = {0: [0, 1, 4], 1: [2, 4]}
    fork_server.run("test_metric:score_on_ranks", world=2,
                    arguments={"to": str(tmp_path), "indices": shares})  # fmt: skip
    result = json.loads((tmp_path / "0.json").read_text())
    flags = {"dark": 1, "not sampled": 3, "scored by several ranks": 1}
    assert result["brightness"][3:] == [2, flags]
    assert result["fd"][3] == 3


def test_a_set_without_scores_is_nan_and_says_why() -> None:
    metric = Brightness(2)
    empty = metric.compute()["brightness"]
    assert math.isnan(empty.value) and empty.clips == 0 and empty.flags == {"not sampled": 2}
    metric.reset()
    metric.update(0, clip(2))
    dark = metric.compute()["brightness"]
    assert math.isnan(dark.value) and dark.flags == {"dark": 1, "not sampled": 1}
    with pytest.raises(ValueError, match="at least one clip"):
        Brightness(0)


def test_one_sample_has_a_mean_without_an_interval_and_no_distance() -> None:
    metric, probe = Brightness(1), Probe(1)
    metric.update(0, clip(0))
    one = metric.compute()["brightness"]
    assert one.value == float(clip(0).frames.double().mean() / 3) and math.isnan(one.low)
    probe.update(0, clip(0))
    assert probe.compute()["fd"].flags == {"no reference clips": 1}
    probe.set_reference(reference_features(), "noise")
    probe.reset()
    probe.update(0, clip(0))
    distance = probe.compute()["fd"]
    assert math.isnan(distance.value) and distance.flags == {"less than two clips": 1}


def test_a_row_is_filled_once_and_in_range() -> None:
    metric = Brightness(2)
    metric.update(1, clip(2))
    with pytest.raises(ValueError, match=r"clip 1 \(0\): was scored before"):
        metric.update(1, clip(0))
    for outside in (-1, 2):
        with pytest.raises(ValueError, match="the set has 2 clips"):
            metric.update(outside, clip(0))


def test_the_bootstrap_covers_the_mean_of_a_known_distribution() -> None:
    """An interval of 95 % contains the true mean in about 95 of 100 samples."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(100):
        low, high = bootstrap(torch.randn(30, generator=generator), seed=trial, draws=300)
        hits += low < 0 < high
    assert 86 <= hits <= 99
    assert bootstrap(torch.arange(9.0)) == bootstrap(torch.arange(9.0))
    assert all(math.isnan(bound) for bound in bootstrap(torch.ones(2)))

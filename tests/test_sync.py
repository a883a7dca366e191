"""Sync-C and Sync-D: the sign of the offset, and the effect of padding with zeros."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from echolab.metrics.sync import (
    padded_distances,
    sync_score,
    unpadded_distances,
    window_count,
)


def features(count: int, seed: int = 0, dim: int = 64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + mean


Distances = Callable[[Tensor, Tensor, int], Tensor]
BOTH = pytest.mark.parametrize("distances", [padded_distances, unpadded_distances])


@BOTH
@pytest.mark.parametrize("shift", [0, 3, -3, 10, -10])
def test_the_offset_is_the_number_of_frames_the_audio_is_early(
    distances: Distances, shift: int
) -> None:
    """Early audio: the audio of window i belongs to the lips of window i + shift."""
    lips = features(120)
    score = sync_score(distances(lips, lips.roll(-shift, 0), 15), 120)
    assert score.offset == shift
    assert score.windows == 120
    assert score.confidence > 1


@BOTH
def test_the_score_follows_its_definition(distances: Distances) -> None:
    lips, audio, most = features(30, 1), features(30, 2), 4
    by_hand = []
    for j in range(-most, most + 1):
        norms = []
        for i in range(30):
            inside = 0 <= i + j < 30
            if not inside and distances is unpadded_distances:
                continue
            sound_window = audio[i + j] if inside else torch.zeros(64)
            norms.append(float((lips[i] - sound_window).norm()))
        by_hand.append(sum(norms) / len(norms))
    computed = distances(lips, audio, most)
    torch.testing.assert_close(computed, torch.tensor(by_hand).double(), rtol=1e-5, atol=1e-4)
    score = sync_score(computed, 30)
    ordered = sorted(by_hand)
    assert score.distance == pytest.approx(ordered[0], rel=1e-5)
    assert score.confidence == pytest.approx(ordered[most] - ordered[0], abs=1e-4)
    assert score.offset == most - by_hand.index(ordered[0])


def test_perfect_features_have_no_distance() -> None:
    lips = features(50)
    assert sync_score(unpadded_distances(lips, lips, 15), 50).distance == pytest.approx(0)
    assert sync_score(padded_distances(lips, lips, 15), 50).distance < 1e-4  # the published 1e-6


@pytest.mark.parametrize(
    ("windows", "published"), [(20, 22.7), (50, 8.9), (100, 4.4), (200, 2.2), (393, 1.1)]
)
def test_padding_alone_gives_confidence_on_short_clips(windows: int, published: float) -> None:
    """The features are unrelated, with mean 3 in 1024 dimensions, and as many windows as in the
    case. Each padded zero costs |V| - |V - A| = 32 (sqrt 10 - sqrt 2) = 56, and at the median
    of the shifts 8 of L windows have one.
    """
    lips, audio = features(windows, 1, 1024, 3.0), features(windows, 2, 1024, 3.0)
    padded = sync_score(padded_distances(lips, audio, 15), windows)
    assert padded.confidence == pytest.approx(published, rel=0.1, abs=0.2)
    expected = 8 / windows * 32 * (math.sqrt(10) - math.sqrt(2))
    assert padded.confidence == pytest.approx(expected, rel=0.1, abs=0.2)
    unpadded = sync_score(unpadded_distances(lips, audio, 15), windows)
    assert unpadded.confidence < min(1.0, padded.confidence)


def test_features_nearer_to_zero_than_to_each_other_give_the_last_shift() -> None:
    lips, audio = features(60, 1, 4096), features(60, 2, 4096)
    assert abs(sync_score(padded_distances(lips, audio, 15), 60).offset) == 15


def test_the_last_possible_window_is_omitted() -> None:
    assert window_count(393, 251_904) == 388
    assert window_count(25, 16_000) == 20
    assert window_count(25, 15_999) == 19


def test_a_clip_of_no_more_windows_than_shifts_is_refused() -> None:
    with pytest.raises(ValueError, match="15 windows, need more than the largest shift, 15"):
        unpadded_distances(features(15), features(15), 15)

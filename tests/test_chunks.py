"""Chunks of a long video: they cover the video, and join without a jump."""

import pytest
import torch

from echolab.diffusion.long_video import chunk_spans, cross_fade, join_chunks
from echolab.errors import ConfigError


def test_chunks_are_those_of_the_released_code() -> None:
    assert chunk_spans(218, 113, 8) == [(0, 113), (105, 218)]
    assert chunk_spans(229, 113, 8) == [(0, 113), (105, 218), (210, 231)]
    assert chunk_spans(229, 113, 8, fill=True)[-1] == (210, 323)


@pytest.mark.parametrize("frames", [1, 5, 8, 25, 26, 42, 43, 100])
@pytest.mark.parametrize("fill", [False, True])
def test_chunks_cover_the_video_and_fill_their_latent_frames(frames: int, fill: bool) -> None:
    spans = chunk_spans(frames, 25, 8, fill)
    assert spans[0][0] == 0 and frames <= spans[-1][1]
    assert fill or spans[-1][1] < frames + 4
    assert all((stop - start) % 4 == 1 for start, stop in spans)
    assert all(b[0] == a[1] - 8 for a, b in zip(spans, spans[1:], strict=False))
    assert all(b[1] > a[1] for a, b in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(("size", "overlap", "message"), [(24, 8, "window=24"), (25, 25, "overlap"),
                                                       (25, 0, "overlap=0")])  # fmt: skip
def test_impossible_chunk_lengths_are_refused(size: int, overlap: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chunk_spans(100, size, overlap)


def test_the_cross_fade_between_chunks_is_linear() -> None:
    before, after = torch.zeros(3, 9, 2, 2), torch.ones(3, 9, 2, 2)
    full = cross_fade(before, after, 5)
    expected = [0.0] * 4 + [0.0, 0.25, 0.5, 0.75, 1.0] + [1.0] * 4
    assert full[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_joining_the_chunks_of_a_video_restores_it() -> None:
    video, spans = torch.randn(3, 59, 2, 2), chunk_spans(59, 25, 8)
    parts = [video[:, start:stop] for start, stop in spans]
    torch.testing.assert_close(join_chunks(parts, 8), video)
    assert spans[-1][1] == 59

"""Spans to clips of 4n+1 frames: the length that the video encoder groups by fours."""

from echolab.geometry import WAN


def cut_span(first: int, last: int, frames: int, least: int) -> tuple[list[tuple[int, int]], int]:
    """Clips (first, after-last) of `frames` from the start of a span, and where they end.

    What is left gives one more, shorter clip if it still has `least` frames.
    """
    clips = []
    while last - first >= frames:
        clips.append((first, first + frames))
        first += frames
    rest = WAN.frames(WAN.latent_frames(last - first))
    if last > first and rest >= least:
        clips.append((first, first + rest))
        first += rest
    return clips, first


def is_clip_length(frames: int) -> bool:
    """4n+1, and long enough for one latent frame beside the first."""
    return frames > 1 and WAN.is_clip_length(frames)

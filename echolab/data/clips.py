"""Load a small raw dataset into memory, for fitting and judging the demo networks."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echolab.data.media import Frames, Tracks, decode_flac, decode_mp4, decode_tracks
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError
from echolab.types import Clips


def load_clips(folder: Path, count: int | None = None) -> Clips:
    """Return the first `count` clips of a raw dataset; raise DataError if their sizes differ."""
    dataset = open_dataset(folder)
    if dataset.kind != "raw":
        raise DataError(f"{folder}: holds {dataset.kind} samples; give a dataset of the raw kind")
    count = len(dataset) if count is None else min(count, len(dataset))
    if count < 1:
        raise DataError(
            f"{folder}: {count} of its {len(dataset)} clips asked for; need one or more"
        )
    # Frames: all of one size, so that they stack.
    members = [dataset.read(i) for i in range(count)]
    frames = [decode_mp4(m["mp4"]) for m in members]
    for key, clip in zip(dataset.keys, frames, strict=False):
        if clip.shape != frames[0].shape:
            raise DataError(
                f"{folder}: clip {key} is {clip.shape[:3]}, the first {frames[0].shape[:3]} "
                "(frames, height, width); prepare them with one frames= and one size="
            )
    # Boxes and, of drawn talkers, the shape of the mouth.
    tracks = [decode_tracks(m["tracks.npz"]) for m in members]
    # Audio: 640 samples a frame, at 16 kHz and 25 frames a second.
    length = 640 * frames[0].shape[0]
    audio = [decode_flac(m["flac"])[:length] for m in members]
    for key, track in zip(dataset.keys, audio, strict=False):
        if len(track) < length:
            raise DataError(
                f"{folder}: clip {key} has {len(track)} audio samples, {frames[0].shape[0]} "
                f"frames need {length}; prepare it again"
            )
    return Clips(
        keys=dataset.keys[:count],
        pixels=torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).contiguous(),
        samples=torch.from_numpy(np.stack(audio)),
        face=torch.from_numpy(np.stack([t.face for t in tracks])),
        lips=torch.from_numpy(np.stack([t.lips for t in tracks])),
        visemes=_visemes(tracks),
        about=[json.loads(m["json"]) for m in members],
    )


def _visemes(tracks: list[Tracks]) -> Tensor | None:
    """Return opening and width of the mouths [B, T, 2], None if one clip lacks them."""
    if not all({"opening", "width"} <= set(track.extra) for track in tracks):
        return None
    curves = [np.stack([t.extra["opening"], t.extra["width"]], -1) for t in tracks]
    return torch.from_numpy(np.stack(curves)).float()


def to_frames(pixels: Tensor) -> Frames:
    """Return pixels [3, T, Y, X] in [-1, 1] as frames uint8 [T, Y, X, 3]."""
    scaled = ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round()
    return np.asarray(scaled.to(torch.uint8).numpy(), np.uint8)


def to_pixels(frames: Frames) -> Tensor:
    """Return frames uint8 [T, Y, X, 3] as pixels [3, T, Y, X] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1

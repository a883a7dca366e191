"""A small raw dataset in memory, for fitting and judging the stand-in networks."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echolab.data.media import Frames, decode_flac, decode_mp4, decode_tracks
from echolab.data.shard_reader import open_dataset
from echolab.errors import DataError
from echolab.types import Clips


def load_clips(folder: Path, count: int | None = None) -> Clips:
    """The first `count` clips of a raw dataset; DataError where their sizes differ."""
    dataset = open_dataset(folder)
    if dataset.kind != "raw":
        raise DataError(f"{folder}: holds {dataset.kind} samples; give a dataset of the raw kind")
    count = len(dataset) if count is None else min(count, len(dataset))
    if count < 1:
        raise DataError(
            f"{folder}: {count} of its {len(dataset)} clips asked for; need one or more"
        )
    members = [dataset.read(i) for i in range(count)]
    frames = [decode_mp4(m["mp4"]) for m in members]
    for key, clip in zip(dataset.keys, frames, strict=False):
        if clip.shape != frames[0].shape:
            raise DataError(
                f"{folder}: clip {key} is {clip.shape[:3]}, the first {frames[0].shape[:3]} "
                "(frames, height, width); prepare them with one frames= and one size="
            )
    tracks = [decode_tracks(m["tracks.npz"]) for m in members]
    visemes = None
    if all({"opening", "width"} <= set(track.extra) for track in tracks):
        curves = [np.stack([t.extra["opening"], t.extra["width"]], -1) for t in tracks]
        visemes = torch.from_numpy(np.stack(curves)).float()
    length = 640 * frames[0].shape[0]
    sounds = [decode_flac(m["flac"])[:length] for m in members]
    for key, sound in zip(dataset.keys, sounds, strict=False):
        if len(sound) < length:
            raise DataError(
                f"{folder}: clip {key} has {len(sound)} samples of sound, {frames[0].shape[0]} "
                f"frames need {length}; prepare it again"
            )
    return Clips(
        keys=dataset.keys[:count],
        pixels=torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).contiguous(),
        samples=torch.from_numpy(np.stack(sounds)),
        face=torch.from_numpy(np.stack([t.face for t in tracks])),
        lips=torch.from_numpy(np.stack([t.lips for t in tracks])),
        visemes=visemes,
        about=[json.loads(m["json"]) for m in members],
    )


def to_frames(pixels: Tensor) -> Frames:
    """Pixels [3, T, Y, X] in [-1, 1] as frames uint8 [T, Y, X, 3]."""
    scaled = ((pixels.permute(1, 2, 3, 0) + 1) * 127.5).round()
    return np.asarray(scaled.to(torch.uint8).numpy(), np.uint8)


def to_pixels(frames: Frames) -> Tensor:
    """The inverse: frames [T, Y, X, 3] as pixels [3, T, Y, X] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1

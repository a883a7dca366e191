"""The parts of a raw sample as tensors, each decoded only where it is asked for."""

import json
from pathlib import Path

import torch
from torch import Tensor

from echolab.data.media import decode_flac, decode_mp4, decode_tracks
from echolab.data.shard_reader import ShardDataset, open_dataset
from echolab.errors import DataError
from echolab.geometry import WAN

Members = dict[str, bytes]


def open_raw(source: Path) -> ShardDataset:
    """A dataset of raw samples; DataError for one of another kind."""
    dataset = open_dataset(source)
    if dataset.kind != "raw":
        raise DataError(f"{source}: holds {dataset.kind} samples; give a dataset of the raw kind")
    return dataset


def caption_of(members: Members) -> str:
    """What is seen, in words; DataError where the sample does not say."""
    try:
        return str(json.loads(members["json"])["caption"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"json holds no caption ({error!r}); make the sample again") from error


def sound_of(members: Members) -> Tensor:
    """[n] in [-1, 1] at 16 kHz."""
    return torch.from_numpy(decode_flac(members["flac"]))


def boxes_of(members: Members) -> tuple[Tensor, Tensor]:
    """Boxes of face and lips, [T, 4] each, in pixels."""
    tracks = decode_tracks(members["tracks.npz"])
    return torch.from_numpy(tracks.face), torch.from_numpy(tracks.lips)


def pixels_of(members: Members) -> Tensor:
    """[3, T, Y, X] in [-1, 1]; DataError where an encoder would drop frames or cut edges."""
    frames = torch.from_numpy(decode_mp4(members["mp4"]))
    count, height, width = frames.shape[:3]
    side = WAN.token_pixels
    if not WAN.is_clip_length(count) or height % side or width % side:
        raise DataError(
            f"{count} frames of {height} x {width}; need {WAN.clip_lengths} frames and sides that "
            f"are multiples of {side}; cut the source again with `python -m data_prep run`"
        )
    return frames.permute(3, 0, 1, 2).float() / 127.5 - 1

"""The held-out clips of an evaluation: encoded inputs of the network, and the recorded videos.

Two datasets hold the same clips in the same order: the encoded one conditions the network, the raw
one has the audio, the reference image and the recorded video that scores need.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from echolab.data.collate import collate_clips, read_clip
from echolab.data.media import Tracks, decode_flac, decode_mp4, decode_tracks
from echolab.data.shard_reader import ShardDataset
from echolab.encoders.demo import SAMPLES_PER_FRAME
from echolab.errors import DataError
from echolab.metrics.metric import VideoClip
from echolab.types import Batch


class Recording(NamedTuple):
    """One clip of a raw dataset."""

    frames: Tensor  # [T, 3, Y, X] uint8
    samples: Tensor  # [n] fp32 at 16 kHz
    tracks: Tracks

    @property
    def visemes(self) -> Tensor | None:
        """Opening and width [T, 2] of a synthetic talker's mouth; None for recorded people."""
        extra = self.tracks.extra
        if not {"opening", "width"} <= set(extra):
            return None
        return torch.from_numpy(np.stack([extra["opening"], extra["width"]], -1)).float()


def read_recording(raw: ShardDataset, index: int) -> Recording:
    """Decode clip `index` of a raw dataset; raise DataError if its audio ends before the video."""
    # Frames in the order that metrics use: time, color, height, width.
    members = raw.read(index)
    frames = torch.from_numpy(decode_mp4(members["mp4"])).permute(0, 3, 1, 2).contiguous()
    samples = decode_flac(members["flac"])[: SAMPLES_PER_FRAME * len(frames)]
    if len(samples) < SAMPLES_PER_FRAME * len(frames):
        raise DataError(
            f"{raw.folder}: clip {raw.keys[index]} has {len(samples)} audio samples, "
            f"{len(frames)} frames need {SAMPLES_PER_FRAME * len(frames)}; prepare it again"
        )
    return Recording(frames, torch.from_numpy(samples), decode_tracks(members["tracks.npz"]))


CACHE_BYTES = 2**28  # of recordings that are kept for the next sampler or the next evaluation


class HeldOut:
    """The first clips of a held-out set."""

    def __init__(self, raw: ShardDataset, encoded: ShardDataset | None, num_clips: int) -> None:
        """Use the first `num_clips` clips of `raw`, or all if there are fewer.

        Without `encoded` the recorded clips can be scored, but none can be sampled.  Raise
        DataError if the datasets do not hold the same clips.
        """
        if raw.kind != "raw":
            raise DataError(f"{raw.folder}: holds {raw.kind} samples; give a raw dataset")
        # The datasets must agree clip by clip, or samples get the audio of another clip.
        count = min(num_clips, len(raw))
        if count < 1:
            raise DataError(
                f"{raw.folder}: {num_clips} of its {len(raw)} clips asked for; need one or more"
            )
        self.raw, self.encoded, self.keys = raw, encoded, list(raw.keys[:count])
        if encoded is not None and self.keys != list(encoded.keys[:count]):
            raise DataError(
                f"{encoded.folder}: its clips are not those of {raw.folder}; encode that one again"
            )
        # The first clip stands for all: metrics need the number of frames before the first sample.
        self._kept: dict[int, Recording] = {}
        self._kept_bytes = 0
        self.frames = len(self.recording(0).frames)

    def __len__(self) -> int:
        return len(self.keys)

    def limited(self, num_clips: int) -> "HeldOut":
        """Return the first `num_clips` of these clips."""
        return HeldOut(self.raw, self.encoded, min(num_clips, len(self)))

    @property
    def fingerprint(self) -> str:
        """A digest of the keys and of the raw dataset, for the metric card."""
        text = "\n".join([self.raw.fingerprint, *self.keys])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def recording(self, index: int) -> Recording:
        """Return the recorded clip `index`; small sets are decoded once."""
        # Guided and unguided samples, and later evaluations, need the same recordings.
        if index in self._kept:
            return self._kept[index]
        recording = read_recording(self.raw, index)
        size = recording.frames.numel() + 4 * recording.samples.numel()
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[index] = recording
            self._kept_bytes += size
        return recording

    def inputs(self, indices: Sequence[int], task: str) -> Batch:
        """Return the network's inputs of some clips."""
        assert self.encoded is not None
        return collate_clips(self.encoded, [read_clip(self.encoded, i, task) for i in indices])

    def clip(self, index: int, frames: Tensor | None = None, *, audio_of: int = 0) -> VideoClip:
        """Return clip `index` with generated `frames` [T, 3, Y, X] uint8, or with its recording.

        The audio is that of clip `index - audio_of`: with 1 every clip has the audio of another.
        """
        # Audio and visemes belong together; face and lips belong to the frames.
        own = self.recording(index)
        sounding = own if not audio_of else self.recording((index - audio_of) % len(self))
        if frames is None:
            frames = own.frames
        return VideoClip(
            key=self.keys[index],
            frames=frames,
            samples=sounding.samples,
            reference=own.frames[0],
            truth=own.frames,
            face=torch.from_numpy(own.tracks.face),
            lips=torch.from_numpy(own.tracks.lips),
            visemes=sounding.visemes,
        )

"""Read spans of talking faces from raw datasets, to train and to validate SyncNet.

A sample of a raw dataset has a video at 25 frames per second, audio at 16 kHz, and boxes of face
and lips for every frame.  A span of T frames has 4 T - 1 columns of cepstra, and T - 5 windows of
lips and audio, as SyncNet is evaluated.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echolab.data.download import FetchError
from echolab.data.media import Frames, Samples, decode_flac, decode_mp4, decode_tracks
from echolab.data.samples import TRIED
from echolab.data.shard_reader import ShardDataset
from echolab.errors import DataError, MediaError
from echolab.metrics.demo_networks import crop_lips
from echolab.metrics.face_track import FaceTrack, crop_track
from echolab.metrics.mfcc import mfcc
from echolab.types import SyncBatch

MEMBERS = ("mp4", "flac", "tracks.npz")
SAMPLES_PER_FRAME = 640
HELD_OUT = -1  # epoch of held-out clips: the middle span, and boxes as they were tracked
NETWORK = "network"  # key of an architecture that names SyncNet or SyncNetDemo
MEASURED = 64  # clips of which the cepstra's mean and standard deviation are measured

Boxes = NDArray[np.float32]  # [T, 4]


class _Talker(NamedTuple):
    """A decoded sample of a raw dataset."""

    frames: Frames  # [T, Y, X, 3]
    face: Boxes
    lips: Boxes
    samples: Samples  # [640 T]


def is_sync(architecture: Mapping[str, Any]) -> bool:
    """Return whether an architecture is that of a SyncNet, not of a transformer."""
    return NETWORK in architecture


def span_generator(seed: int, epoch: int, key: str) -> torch.Generator:
    """Return the random generator of a clip's span and boxes, a function of its arguments."""
    digest = blake2b(f"{seed}/{epoch}/span/{key}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def read_talker(
    dataset: ShardDataset, i: int, epoch: int, *, architecture: Mapping[str, Any], seed: int
) -> SyncBatch:
    """Return a span of sample `i`, without batch dimension; raise DataError for a bad sample.

    The span and the variation of its boxes depend on (seed, epoch, key) alone.  With epoch HELD_OUT
    it is the middle of the clip, at the tracked boxes.
    """
    talker, key = _decode(dataset, i), dataset.keys[i]
    length = int(architecture["frames"])
    spare = len(talker.frames) - length
    if spare < 0:
        raise DataError(
            f"{dataset.folder}: sample {key} has {len(talker.frames)} frames, "
            f"model.frames={length}; prepare longer clips, or lower model.frames"
        )
    # Draw the span, or take the middle.
    generator = None if epoch == HELD_OUT else span_generator(seed, epoch, key)
    start = spare // 2
    if generator:
        start = int(torch.randint(spare + 1, (), generator=generator))
    # Each network has its own crop: of the lips at one box, or of the face at smoothed boxes.
    crop = _lip_crops if architecture[NETWORK] == "SyncNetDemo" else _face_crops
    crops = crop(talker, slice(start, start + length), generator)
    audio = talker.samples[SAMPLES_PER_FRAME * start : SAMPLES_PER_FRAME * (start + length)]
    return SyncBatch(crops, torch.from_numpy(mfcc(audio)), [key])


def _lip_crops(talker: _Talker, span: slice, generator: torch.Generator | None) -> Tensor:
    """Return crops uint8 [T, 3, 24, 32] at the lips of the first frame, as scores use them."""
    box = vary_boxes(talker.lips[span][:1], generator, position=0.07, size=0.1)
    pixels = torch.from_numpy(np.ascontiguousarray(talker.frames[span])).permute(3, 0, 1, 2)
    crops = crop_lips(pixels[None].float(), torch.from_numpy(box))[0]
    return crops.round().clamp(0, 255).to(torch.uint8)


def _face_crops(talker: _Talker, span: slice, generator: torch.Generator | None) -> Tensor:
    """Return crops uint8 [T, 3, 224, 224] of the face, as the published pipeline makes them."""
    # Smooth over the complete clip, so that a span has no ends of its own.
    boxes = vary_boxes(talker.face, generator, position=0.03, size=0.05)
    crops = crop_track(talker.frames, FaceTrack(0, boxes.astype(np.float64)))[span]
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).contiguous()


def vary_boxes(
    boxes: Boxes, generator: torch.Generator | None, *, position: float, size: float
) -> Boxes:
    """Move and resize the boxes [T, 4] of a clip, as detectors vary; not without a generator.

    All frames change equally.  `position` and `size` are standard deviations, relative to the first
    box.
    """
    if generator is None:
        return boxes
    # A constant offset and scale of the clip: a crop must not tremble.
    across, down, scale = torch.randn(3, generator=generator).tolist()
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    center = center + 2 * half[:1] * position * np.array([across, down], np.float32)
    half = half * max(0.5, 1 + size * scale)
    return np.concatenate([center - half, center + half], axis=1).astype(np.float32)


def _decode(dataset: ShardDataset, i: int) -> _Talker:
    """Decode a sample; raise DataError if its video, audio or tracks are unusable."""
    where = f"{dataset.folder}: sample {dataset.keys[i]}"
    members = dataset.read(i)
    if missing := [name for name in MEMBERS if name not in members]:
        raise DataError(
            f"{where}: has no {' and no '.join(missing)}, which SyncNet is trained on; prepare it "
            "again with `python -m data_prep`"
        )
    # The video, the audio, and the boxes.
    try:
        frames, samples = decode_mp4(members["mp4"]), decode_flac(members["flac"])
        tracks = decode_tracks(members["tracks.npz"])
    except MediaError as error:
        raise DataError(f"{where}: {error}; prepare it again") from error
    # Frames, boxes and audio must cover the same time.
    for name, boxes in (("face", tracks.face), ("lips", tracks.lips)):
        if boxes.shape != (len(frames), 4) or not np.isfinite(boxes).all():
            raise DataError(
                f"{where}: {name} boxes {boxes.shape} for {len(frames)} frames, need finite ones "
                "for each; prepare it again"
            )
    if len(samples) < (needed := SAMPLES_PER_FRAME * len(frames)):
        raise DataError(
            f"{where}: has {len(samples)} audio samples, {len(frames)} frames need {needed}; "
            "prepare it again"
        )
    return _Talker(frames, tracks.face, tracks.lips, samples[:needed])


# -- datasets --------------------------------------------------------------------------------------


def check_talkers(dataset: ShardDataset, architecture: Mapping[str, Any]) -> None:
    """Raise DataError unless a dataset is raw and holds a usable sample.

    Of the first samples, some may be bad; the budget for bad samples applies to training.
    """
    if dataset.kind != "raw":
        raise DataError(f"{dataset.folder}: kind {dataset.kind}, need raw; give another dataset")
    if not len(dataset):
        raise DataError(f"{dataset.folder}: holds no sample; nothing to train on")
    # Decode until one sample is good.
    first: DataError | None = None
    for i in range(min(len(dataset), TRIED)):
        try:
            read_talker(dataset, i, HELD_OUT, architecture=architecture, seed=0)
            return
        except FetchError:
            raise  # a failure of the server, not of a sample
        except DataError as error:
            first = first or error
    assert first
    raise first


def measure_cepstra(dataset: ShardDataset) -> tuple[Tensor, Tensor]:
    """Return mean [13] and standard deviation [13] of the cepstra of the first clips."""
    # Clips are decoded completely, so that a sample is good or bad as in training.
    columns = []
    for i in range(min(len(dataset), MEASURED)):
        try:
            columns.append(torch.from_numpy(mfcc(_decode(dataset, i).samples)))
        except FetchError:
            raise
        except DataError:
            continue  # training replaces bad samples within its budget, or refuses them
    if not columns:
        raise DataError(f"{dataset.folder}: none of its first clips is usable; prepare it again")
    cepstra = torch.cat(columns)
    return cepstra.mean(0), cepstra.std(0).clamp_min(1e-3)

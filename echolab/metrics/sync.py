"""Sync-C, Sync-D and the audio-visual offset of SyncNet, for embeddings V (lips) and A (audio).

    d(i, j) = |V_i - A_(i + j)|,  j = -s .. s
    D(j)    = mean over i of d(i, j)
    Sync-D  = min D,  Sync-C = median D - min D,  offset = -argmin

Window i is frames i .. i + 4 with cepstra 4 i .. 4 i + 19.  A positive offset means that the audio
is early.  The original pads A with zeros at both ends; on short clips the padding itself increases
confidence (over 20 for 20 unrelated windows).  Therefore use the padded form to compare with
published numbers, and the unpadded form for clips of a few seconds.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from echolab.metrics.card import Card
from echolab.metrics.face_track import (
    FaceTrack,
    YuNet,
    crop_track,
    find_tracks,
    main_track,
    source_frames,
    tracks_of_boxes,
)
from echolab.metrics.metric import Score, VideoClip, VideoMetric, mean_score
from echolab.metrics.mfcc import mfcc
from echolab.metrics.networks.syncnet import FRAMES_PER_WINDOW, SyncNet, VideoSyncNet
from echolab.metrics.setup import Setup
from echolab.metrics.weights import (
    SYNCNET,
    Network,
    check_weights,
    random_network,
    released_network,
)
from echolab.model_files import find_model_file
from echolab.vision.face_models import YUNET

MAX_SHIFT = 15  # frames, as published
SAMPLES_PER_FRAME = 640  # at 25 fps and 16 kHz
RELIABLE_WINDOWS = 100  # fewer: padding and chance move the scores
SILENCE_DB = -60.0  # of full scale; recorded speech has -45 or more
SMALL_FACE = 100  # pixels; the published pipeline drops smaller faces

# Why a clip has no score, and what to know of those that have one.
NO_AUDIO, NOT_FINITE, SILENT = "no audio", "audio that is not finite", "silence"
NO_FACE, SEVERAL_FACES = "no face", "several faces"
TOO_SHORT = "no more windows than the largest shift"
NO_ANSWER = "offset at the largest shift: no answer"

ARCHITECTURE = "SyncNet (joonson/syncnet_python), 13 631 616 parameters"
DEFINITIONS = {
    "sync_c": "median minus minimum of D(j), mean over clips; run_syncnet of syncnet_python",
    "sync_d": "minimum of D(j), mean over clips; run_syncnet of syncnet_python",
    "av_offset": "-argmin D(j) in frames at 25 fps, positive if audio is early, mean over clips "
    "with an answer",
    "av_offset_abs": "absolute value of av_offset, mean over clips with an answer",
}
PREPROCESSING = (
    "25 fps; box by median of 13 frames, crop scale 0.4, 224 px, BGR 0..255, not encoded again; "
    "MFCC of 16-bit samples at 16 kHz"
)


class Sync(NamedTuple):
    """The sync scores of one clip."""

    confidence: float
    distance: float
    offset: int  # in frames
    windows: int


def window_count(frames: int, samples: int) -> int:
    """Return the number of windows of a clip, one less than possible, as in the original."""
    return min(frames, samples // 640) - FRAMES_PER_WINDOW


def padded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], of embeddings [L, D], with zero-padded audio."""
    # Every shift has L terms; those beyond the clip are distances to zero.
    padded = functional.pad(audio, (0, 0, max_shift, max_shift))
    shifted = padded.unfold(0, 2 * max_shift + 1, 1).transpose(1, 2)  # [L, 2 s + 1, D]
    return (visual[:, None] - shifted + 1e-6).norm(dim=-1).mean(0)


def unpadded_distances(visual: Tensor, audio: Tensor, max_shift: int) -> Tensor:
    """Return D(j), [2 s + 1], averaged only over windows that have audio at shift j.

    Raise ValueError unless there are more windows than the largest shift.
    """
    # No window is paired with audio outside the clip.
    count = len(visual)
    if count <= max_shift:
        raise ValueError(f"{count} windows, need more than the largest shift, {max_shift}")
    means = []
    for shift in range(-max_shift, max_shift + 1):
        first, last = max(0, -shift), min(count, count - shift)
        means.append((visual[first:last] - audio[first + shift : last + shift]).norm(dim=-1).mean())
    return torch.stack(means)


def sync_score(distances: Tensor, windows: int) -> Sync:
    """Compute Sync-C, Sync-D and the offset from D(j)."""
    # The middle of the curve is shift 0.
    lowest, index = distances.min(0)
    offset = (len(distances) - 1) // 2 - int(index)
    median = distances.quantile(0.5)
    return Sync(float(median - lowest), float(lowest), offset, windows)


# The published form, and the one without padding, by the suffix of their scores.
FORMS = {"": padded_distances, "_unpadded": unpadded_distances}


# -- the metric ------------------------------------------------------------------------------------


class SyncScore(VideoMetric):
    """Sync-C, Sync-D and the audio-visual offset, in the published form and without padding.

    `sync_c`, `sync_d` and `av_offset` pad with zeros as published; the same names with `_unpadded`
    average only over windows inside the clip.  `av_offset` is the mean over clips in frames, and
    `av_offset_abs` that of its absolute value; a clip whose offset is the largest shift has no
    answer, is counted in the flags, and does not enter the offsets.  `sync_windows` is the mean
    number of windows.
    """

    reasons = (NO_AUDIO, NOT_FINITE, SILENT, NO_FACE, SEVERAL_FACES, TOO_SHORT)

    def __init__(
        self,
        num_clips: int,
        network: Network,
        *,
        yunet: Path | None = None,
        max_shift: int = MAX_SHIFT,
    ) -> None:
        """Score with a network of `released_syncnet` or `random_syncnet`.

        Faces are detected by the file `yunet`; without it, they are the boxes of each clip.
        """
        super().__init__(num_clips)
        self.network, self.max_shift = network, max_shift
        self.video_net = VideoSyncNet(as_syncnet(network.net))
        self.detect = None if yunet is None else YuNet(yunet)
        # Curves D(j) contain all scores of a clip.
        self.add_table("curves", len(FORMS), 2 * max_shift + 1)
        self.add_table("windows")
        self.add_table("small_face")

    curves: Tensor
    windows: Tensor
    small_face: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the curves of the main face of the clip."""
        if clip.samples is None or not len(clip.samples):
            return NO_AUDIO
        if not bool(clip.samples.isfinite().all()):
            return NOT_FINITE
        # Convert to 25 fps by repeating or leaving out frames.
        shown = source_frames(len(clip.frames), clip.fps)
        needed = self.max_shift + 1 + FRAMES_PER_WINDOW
        if min(len(shown), len(clip.samples) // SAMPLES_PER_FRAME) < needed:
            return TOO_SHORT
        frames = clip.frames.permute(0, 2, 3, 1).cpu().numpy()[shown]
        track = self._track(frames, clip, shown, needed)
        if isinstance(track, str):
            return track
        samples = clip.samples[SAMPLES_PER_FRAME * track.first : SAMPLES_PER_FRAME * track.last]
        if level_db(samples) < SILENCE_DB:
            return SILENT
        count = window_count(len(track.boxes), len(samples))
        if count <= self.max_shift:
            return TOO_SHORT
        lips, audio = self._embed(crop_track(frames, track), samples, count)
        for row, distances in enumerate(FORMS.values()):
            self.curves[index, row] = distances(lips, audio, self.max_shift)
        self.windows[index] = count
        self.small_face[index] = float(track.side < SMALL_FACE)
        return ""

    def _track(
        self, frames: NDArray[np.uint8], clip: VideoClip, shown: NDArray[np.int64], needed: int
    ) -> FaceTrack | str:
        """Return the track of the speaker's face, or the reason why there is none."""
        # The card says which of both sources is used.
        if self.detect is not None:
            tracks = find_tracks(frames, self.detect)
        elif clip.face is None:
            tracks = []
        else:
            tracks = tracks_of_boxes(clip.face.cpu().double().numpy()[shown], *frames.shape[2:0:-1])
        if not tracks:
            return NO_FACE
        if max(len(track.boxes) for track in tracks) < needed:
            return TOO_SHORT
        return main_track(tracks, needed) or SEVERAL_FACES

    def _embed(
        self, crops: NDArray[np.uint8], samples: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Return the vectors of lips and of audio, both [count, 1024]."""
        # The last windows that one stream has alone are left out.
        lips = self.video_net.embed_frames(torch.from_numpy(crops).permute(0, 3, 1, 2))
        cepstra = torch.from_numpy(mfcc(samples.float().cpu().numpy()))
        audio = self.video_net.embed_cepstra(cepstra)
        return lips[:count].double(), audio[:count].double()

    def sync_of(self, index: int) -> dict[str, Sync]:
        """Return the scores of clip `index` in both forms, "" and "_unpadded"."""
        count = int(self.windows[index])
        return {f: sync_score(self.curves[index, i], count) for i, f in enumerate(FORMS)}

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the means over clips; offsets only of those with an answer."""
        rows = [self.sync_of(int(index)) for index in scored]
        notes = {
            f"fewer than {RELIABLE_WINDOWS} windows": int(
                (self.windows[scored] < RELIABLE_WINDOWS).sum()
            ),
            f"face under {SMALL_FACE} pixels": int(self.small_face[scored].sum()),
        }
        scores: dict[str, Score] = {}
        for form in FORMS:
            syncs = [row[form] for row in rows]
            offsets = values(sync.offset for sync in syncs if abs(sync.offset) < self.max_shift)
            flags = {**notes, NO_ANSWER: len(syncs) - len(offsets)}
            means = {
                f"sync_c{form}": values(sync.confidence for sync in syncs),
                f"sync_d{form}": values(sync.distance for sync in syncs),
                f"av_offset{form}": offsets,
                f"av_offset_abs{form}": offsets.abs(),
            }
            counted = {flag: count for flag, count in flags.items() if count}
            scores |= {name: mean_score(v)._replace(flags=counted) for name, v in means.items()}
        return {**scores, "sync_windows": mean_score(self.windows[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the cards of all scores."""
        cards = {"sync_windows": self._card("sync_windows", "windows of a clip, mean over clips")}
        for form in FORMS:
            padding = "none" if form else "zeros, as published"
            for name, definition in DEFINITIONS.items():
                cards[name + form] = self._card(name + form, definition, padding=padding)
        return cards

    def _card(self, metric: str, definition: str, **settings: str) -> Card:
        faces = "boxes of the clip" if self.detect is None else "YuNet, main face"
        return Card(
            metric=metric,
            definition=definition,
            preprocessing=PREPROCESSING,
            network=self.network.architecture,
            weights=self.network.weights,
            license=self.network.license,
            settings={
                "max_shift": self.max_shift,
                "faces": faces,
                "silence_db": SILENCE_DB,
                **settings,
            },
        )


def released_syncnet(folder: Path | None = None, *, download: bool = False) -> Network:
    """Return SyncNet with the released weights, from a folder of weights or by download.

    Raise MissingWeightsError without the file, and WeightsError for a wrong one.
    """
    return released_network(
        SyncNet(), SYNCNET, folder, architecture=ARCHITECTURE, download=download
    )


def random_syncnet(seed: int = 0) -> Network:
    """Return SyncNet with random weights, to test all of the metric; its card says so."""
    return random_network(SyncNet(), ARCHITECTURE, seed)


def sync(setup: Setup, *, weights: str = "released", detect: bool = False) -> VideoMetric:
    """Build the scores from a configuration; raise WeightsError if a file is missing.

    With `detect` YuNet detects faces as in the published pipeline, else they are the tracked
    boxes of the held-out clips.
    """
    # A generated face may leave the tracked box, but a detector may miss it.
    check_weights(weights)
    network = random_syncnet() if weights == "random" else released_syncnet(setup.networks)
    yunet = find_model_file(YUNET, setup.networks) if detect else None
    return SyncScore(setup.num_clips, network, yunet=yunet)


def as_syncnet(net: nn.Module) -> SyncNet:
    """Return the network; raise TypeError for another one."""
    if not isinstance(net, SyncNet):
        raise TypeError(f"{type(net).__name__}: the scores of lip sync need SyncNet")
    return net


def values(numbers: Iterable[float]) -> Tensor:
    """Return numbers as a tensor [N] in fp64."""
    return torch.tensor(list(numbers), dtype=torch.float64)


def level_db(samples: Tensor) -> float:
    """Return the mean level of audio in [-1, 1], in dB of full scale."""
    # A floor of -120 dB stands for no audio at all.
    power = float(samples.double().square().mean()) if len(samples) else 0.0
    return 10 * math.log10(max(power, 1e-12))

"""A learned network that is not SyncNet agrees: our crops and cepstra of real clips match."""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from first_frames import first_frames
from light_asd import light_asd
from numpy.typing import NDArray
from torch import Tensor

from echolab.data.media import read_audio
from echolab.metrics.face_track import YuNet, crop_track, find_tracks, main_track
from echolab.metrics.mfcc import mfcc

FRAMES = 50  # 2 s
CLIPS = (
    "th_aoc", "th_may5s", "th_retalk2", "th_retalk4", "th_tpsmm", "th_infinitetalk",
    "hb_latentsync1", "hb_wan_animate", "th_lrs3_crop224", "grid_lbax4n",
)  # fmt: skip


class Speaker(NamedTuple):
    """The face and the voice of one clip."""

    grays: Tensor  # [T, 112, 112]
    samples: NDArray[np.float32]  # [640 T]


def read_speaker(path: Path, detect: YuNet) -> Speaker:
    """Return the main face of the first 2 s, and the audio of the same time."""
    frames = first_frames(path, FRAMES)
    track = main_track(find_tracks(frames, detect), 25)
    assert track is not None and len(track.boxes) == FRAMES
    # Light-ASD reads the middle of SyncNet's crop.
    crops = [cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY) for crop in crop_track(frames, track)]
    grays = torch.from_numpy(np.stack(crops)[:, 56:168, 56:168].astype(np.float32))
    return Speaker(grays, read_audio(path)[: 640 * FRAMES])


@pytest.mark.slow
@pytest.mark.media
def test_a_face_speaks_its_own_audio_and_not_that_of_others(media: Path, weights: Path) -> None:
    """Mean logits of Light-ASD fall if the audio is that of one of two other speakers.

    They fall for nine of the ten clips; the tenth is a GRID sentence, which the network does not
    take for speech with any audio.
    """
    state = torch.load(weights / "light_asd_ava.model", map_location="cpu", weights_only=True)
    net, detect = light_asd(state), YuNet(weights / "yunet_n_640_640.onnx")
    files = [next((media / "video").glob(f"{name}.*")) for name in CLIPS]
    speakers = [read_speaker(path, detect) for path in files]
    # Four columns for each frame: one more than the audio of the frames gives.
    columns = [
        torch.from_numpy(mfcc(np.pad(speaker.samples, (0, 400)))[: 4 * FRAMES])
        for speaker in speakers
    ]
    falls = []
    for index, speaker in enumerate(speakers):
        seen = net.see(speaker.grays)
        own, *others = (
            float(net(seen, columns[(index + step) % len(columns)]).mean()) for step in (0, 1, 2)
        )
        falls.append(own - float(np.mean(others)))
    assert sum(fall > 0 for fall in falls) >= 9, falls
    assert np.mean(falls) > 0.2

"""SyncNet: its published architecture, and the same function on a complete video."""

import copy

import numpy as np
import pytest
import torch
from seeded import seeded_syncnet
from torch import Tensor, nn

from echolab.metrics.networks.syncnet import (
    SyncNet,
    VideoSyncNet,
    audio_windows,
    lip_windows,
)


@pytest.fixture(scope="module")
def net() -> SyncNet:
    return seeded_syncnet()


def test_the_state_has_the_names_and_sizes_of_the_released_file() -> None:
    net = SyncNet()
    state = net.state_dict()
    assert len(state) == 102
    assert sum(p.numel() for p in net.parameters()) == 13_631_616
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert parts == {
        "netcnnaud": 4_875_712, "netfcaud": 788_992, "netfclip": 788_992, "netcnnlip": 7_177_920,
    }  # fmt: skip
    convolutions = [f"netcnnaud.{i}" for i in (0, 4, 8, 11, 14, 18)]
    convolutions += [f"netcnnlip.{i}" for i in (0, 4, 8, 11, 14, 18)]
    heads = [f"{head}.{i}" for head in ("netfcaud", "netfclip") for i in (0, 3)]
    norms = {name.removesuffix(".running_mean") for name in state if name.endswith("_mean")}
    weights = {name.removesuffix(".weight") for name in state if name.endswith(".weight")}
    assert weights - norms == {*convolutions, *heads}
    numbered = {f"{name}.{int(i) + 1}" for name, i in (c.split(".") for c in convolutions)}
    assert norms == numbered | {"netfcaud.1", "netfclip.1"}


def test_vectors_equal_those_of_the_original_program(net: SyncNet) -> None:
    """The numbers are of the original class with the same weights and inputs."""
    generator = np.random.RandomState(7)
    lips = torch.from_numpy(generator.uniform(0, 255, (2, 3, 5, 224, 224)).astype(np.float32))
    audio = torch.from_numpy((generator.standard_normal((2, 1, 13, 20)) * 8).astype(np.float32))
    lip_vectors, audio_vectors = net.embed_lips(lips), net.embed_audio(audio)

    def close(computed: Tensor, *expected: float) -> None:
        torch.testing.assert_close(computed, torch.tensor(expected), rtol=1e-4, atol=1e-4)

    close(lip_vectors[0, :4], 563.2631, 781.9584, 72.9051, 436.4740)
    close(lip_vectors.norm(dim=1), 17719.87, 17399.32)
    close(audio_vectors[0, :4], -24.43622, -25.21033, -28.57576, -10.03383)
    close(audio_vectors.norm(dim=1), 945.3024, 968.7851)


def vary_norms(net: SyncNet) -> SyncNet:
    """Give every batch norm statistics, scales of both signs and shifts."""
    varied = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for norm in varied.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for values in (norm.weight, norm.bias, norm.running_mean):
                values.copy_(torch.randn(len(values), generator=generator))
            norm.running_var.uniform_(0.5, 2, generator=generator)
    return varied


def test_a_complete_video_gives_the_vectors_of_its_windows(net: SyncNet) -> None:
    """Batch norms have scales of both signs, so that ReLU and pool may change places only after
    they are folded.  Seventeen windows need a second batch.
    """
    varied = vary_norms(net)
    video = VideoSyncNet(varied)
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (21, 3, 224, 224), dtype=torch.uint8, generator=generator)
    bgr = frames.flip(1).float()
    plain = torch.cat([varied.embed_lips(window[None]) for window in lip_windows(bgr)])
    fast = video.embed_frames(frames)
    assert fast.shape == (17, 1024)
    assert (fast - plain).norm() / plain.norm() < 1e-5

    cepstra = 8 * torch.randn(99, 13, generator=generator)
    windows = [cepstra[4 * i : 4 * i + 20].T[None, None] for i in range(20)]
    plain = torch.cat([varied.embed_audio(window) for window in windows])
    fast = video.embed_cepstra(cepstra)
    assert fast.shape == (20, 1024)
    assert (fast - plain).norm() / plain.norm() < 1e-5
    torch.testing.assert_close(audio_windows(cepstra), torch.cat(windows))


def test_too_short_videos_are_refused(net: SyncNet) -> None:
    video = VideoSyncNet(net)
    with pytest.raises(ValueError, match="4 frames: a window needs 5"):
        video.embed_frames(torch.zeros(4, 3, 224, 224, dtype=torch.uint8))
    with pytest.raises(ValueError, match="19 columns: a window needs 20"):
        video.embed_cepstra(torch.zeros(19, 13))

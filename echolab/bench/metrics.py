"""`echolab bench metrics`: clips per second of scores, compared with plain implementations."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from echolab.bench.commands import MetricsArguments
from echolab.bench.measure import Row, measure, say
from echolab.bench.models import relative
from echolab.metrics.mfcc import mfcc
from echolab.metrics.networks.syncnet import (
    CROP_PIXELS,
    SyncNet,
    VideoSyncNet,
    audio_windows,
    full_precision,
    lip_windows,
)
from echolab.metrics.sync import SAMPLES_PER_FRAME, as_syncnet, random_syncnet

PUBLISHED_BATCH = 20  # windows, of run_syncnet in syncnet_python
PLAIN_SYNC = "SyncNet, window by window"


def rows_of(arguments: MetricsArguments) -> list[Row]:
    """Return the rows of the scores that the arguments request."""
    measured = {"sync": sync_rows}
    return [row for score in arguments.scores for row in measured[score](arguments)]


def sync_rows(arguments: MetricsArguments) -> Iterator[Row]:
    """Yield rows of SyncNet on a clip of face crops, with its audio."""
    # Values of weights and pixels do not change the time.
    generator = torch.Generator().manual_seed(arguments.seed)
    size = (arguments.frames, 3, CROP_PIXELS, CROP_PIXELS)
    crops = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    samples = 0.1 * torch.randn(SAMPLES_PER_FRAME * arguments.frames, generator=generator)
    net = as_syncnet(random_syncnet(arguments.seed).net)
    plain, video = net.to(arguments.device), VideoSyncNet(net).to(arguments.device)
    audio = samples.numpy()

    def ours() -> tuple[Tensor, Tensor]:
        return video.embed_frames(crops), video.embed_cepstra(torch.from_numpy(mfcc(audio)))

    def published() -> tuple[Tensor, Tensor]:
        return embed_windows(plain, crops, audio)

    # Compare outputs before times.
    pairs = zip(ours(), published(), strict=True)
    difference = max(relative(first, second) for first, second in pairs)
    yield Row("sync/output_difference", difference, "relative", PLAIN_SYNC)
    say("measuring sync")
    pair = measure(ours, published, arguments.pairs, arguments.device)
    clips = 1 / pair.ours.seconds, 1 / pair.baseline.seconds
    yield Row("sync/clips", clips[0], "1/s", PLAIN_SYNC, clips[1])
    yield from pair.rows("sync", PLAIN_SYNC, arguments.device)


@torch.no_grad()
def embed_windows(
    net: SyncNet, frames: Tensor, samples: np.ndarray, batch: int = PUBLISHED_BATCH
) -> tuple[Tensor, Tensor]:
    """Embed crops uint8 RGB [T, 3, 224, 224] and audio as published: windows in batches."""
    device = next(net.parameters()).device
    # The published program builds float windows of BGR frames on the CPU, batch by batch.
    lips = lip_windows(frames.flip(1).float()).split(batch)
    audio = audio_windows(torch.from_numpy(mfcc(samples))).split(batch)
    with full_precision():
        return (
            torch.cat([net.embed_lips(windows.contiguous().to(device)) for windows in lips]),
            torch.cat([net.embed_audio(windows.contiguous().to(device)) for windows in audio]),
        )

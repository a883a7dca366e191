"""The demo's data, its autoencoder and its judges."""

import torch

from data_prep.draw import DrawOptions, draw_dataset
from data_prep.encode import encode_dataset
from echolab.cli.fit import fit_network
from echolab.data.clips import load_clips
from echolab.data.index import INDEX
from echolab.demo.settings import DemoSettings, Folder
from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.encoders.encode import demo_encoders
from echolab.inference.judging import (
    AUTOENCODER,
    CLIPS,
    FRAMES,
    SYNC_EVALUATOR,
    SYNC_JUDGE,
    load_autoencoder,
    network_file,
)
from echolab.progress import progress
from echolab.types import Clips

FIRST_HELD_OUT = 1_000_000  # their numbers: no talker of the training set is among them
PORTION = 32


def draw_talkers(settings: DemoSettings, out: Folder) -> None:
    """Two raw datasets; no talker is in both."""
    for folder, clips, first in (
        (out.raw_train, settings.train_clips, 0),
        (out.raw_held_out, settings.held_out_clips, FIRST_HELD_OUT),
    ):
        if not (folder / INDEX).exists():
            with progress(f"drawing {folder.name}", clips) as advance:
                options = DrawOptions(folder, clips=clips, seed=settings.data_seed, first=first)
                draw_dataset(options, lambda done: advance(done, ""))


def fit_judges(settings: DemoSettings, out: Folder) -> None:
    """The autoencoder; two SyncNets that share neither seed nor talkers; two feature networks."""
    clips = load_clips(out.raw_train)
    half = len(clips.keys) // 2

    def fit(name: str, what: str, data: Clips, steps: int, seed: int) -> None:
        path = network_file(out.networks, name)
        if not path.exists():
            fit_network(what, data, path, steps=steps, seed=seed)

    fit(AUTOENCODER, "autoencoder", clips, settings.autoencoder_steps, 0)
    passed = through(load_autoencoder(out.networks), clips)
    first, second = slice(0, half), slice(half, None)
    fit(SYNC_JUDGE, "sync", both(clips, passed, first), settings.sync_steps, 1)
    fit(SYNC_EVALUATOR, "sync", both(clips, passed, second), settings.sync_steps, 2)
    fit(FRAMES, "frames", clips, settings.feature_steps, 3)
    fit(CLIPS, "clips", clips, max(1, settings.feature_steps // 2), 4)


@torch.no_grad()
def through(video: CausalAutoencoder, clips: Clips) -> Clips:
    """The same clips after encoding and decoding: SyncNet must know that blur, and hear no less."""
    parts = []
    for portion in torch.arange(len(clips.keys)).split(PORTION):
        pixels = video.decode(video.encode(clips.float_pixels(portion)))
        parts.append(((pixels + 1) * 127.5).round().to(torch.uint8))
    return clips._replace(pixels=torch.cat(parts))


def both(clips: Clips, passed: Clips, which: slice) -> Clips:
    """Some clips, as they are and as they come out of the autoencoder."""
    return clips._replace(
        keys=clips.keys[which] * 2,
        pixels=torch.cat([clips.pixels[which], passed.pixels[which]]),
        samples=clips.samples[which].repeat(2, 1),
        face=clips.face[which].repeat(2, 1, 1),
        lips=clips.lips[which].repeat(2, 1, 1),
        visemes=None,
        about=clips.about[which] * 2,
    )


def encode_talkers(settings: DemoSettings, out: Folder) -> None:
    """Encoded shards of both datasets."""
    encoders = demo_encoders(load_autoencoder(out.networks))
    for raw, encoded, clips in (
        (out.raw_train, out.train, settings.train_clips),
        (out.raw_held_out, out.held_out, settings.held_out_clips),
    ):
        if not (encoded / INDEX).exists():
            with progress(f"encoding {encoded.name}", clips) as advance:
                encode_dataset(raw, encoded, encoders, lambda done: advance(done, ""))

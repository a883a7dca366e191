"""Fit the demo networks that stand in for large released ones."""

import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from echolab.data.index import INDEX
from echolab.encoders.demo import WIDTH, CausalAutoencoder, fit_autoencoder
from echolab.errors import DataError
from echolab.fitting import Report, load_net, save_net
from echolab.inference.inputs import load_clips
from echolab.metrics.demo_networks import (
    fit_clip_features,
    fit_frame_features,
    fit_sync,
    talker_labels,
)
from echolab.metrics.mfcc import cepstra_of
from echolab.progress import progress
from echolab.types import Clips

BATCH = 32  # clips that the autoencoder reconstructs at once


def read_clips(data: Path, first: int, count: int | None, vae: Path | None) -> Clips:
    """Return the clips to fit on, with their reconstructions by `vae` if it is given.

    Raise DataError if there are no clips.
    """
    # The modification time of the index changes if the dataset is written again.
    index = data / INDEX
    stamp = index.stat().st_mtime_ns if index.is_file() else 0
    clips = _decoded(data, None if count is None else first + count, stamp)
    if first >= len(clips.keys):
        raise DataError(
            f"first_clip={first}: {data} has {len(clips.keys)} clips; give a smaller one"
        )
    clips = Clips(
        keys=clips.keys[first:],
        pixels=clips.pixels[first:],
        samples=clips.samples[first:],
        face=clips.face[first:],
        lips=clips.lips[first:],
        visemes=None if clips.visemes is None else clips.visemes[first:],
        metadata=clips.metadata[first:],
    )
    return with_reconstructions(clips, vae) if vae else clips


@lru_cache(maxsize=2)  # several fits in one process, as in the demo, decode the clips once
def _decoded(data: Path, count: int | None, stamp: int) -> Clips:
    return load_clips(data, count)


@torch.no_grad()
def with_reconstructions(clips: Clips, vae_file: Path) -> Clips:
    """Return each clip twice: the original, and the clip after encoding and decoding.

    SyncNet judges decoded clips, so it must be trained on their blur too.
    """
    # Decode the latents of every clip.
    vae = load_net(vae_file, CausalAutoencoder)
    decoded = []
    for indices in torch.arange(len(clips.keys)).split(BATCH):
        pixels = vae.decode(vae.encode(clips.float_pixels(indices)))
        decoded.append(((pixels + 1) * 127.5).round().to(torch.uint8))
    return clips._replace(
        keys=clips.keys * 2,
        pixels=torch.cat([clips.pixels, *decoded]),
        samples=clips.samples.repeat(2, 1),
        face=clips.face.repeat(2, 1, 1),
        lips=clips.lips.repeat(2, 1, 1),
        visemes=None,
        metadata=clips.metadata * 2,
    )


def fit_network(network: str, clips: Clips, out: Path, *, steps: int, seed: int) -> float:
    """Fit one network, write it to `out`, and return the last loss."""
    last_loss = float("nan")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Name the state after the content of the clips, so that a fit never resumes on other clips.
    state = out.with_suffix(f".{zlib.crc32(clips.pixels.numpy().data):08x}.progress")
    with progress(f"fitting {out.stem}", steps) as advance:

        def report(done: int, total: int, loss: float) -> None:
            nonlocal last_loss
            last_loss = loss
            advance(done, f"loss {loss:.4f}")

        # Fit, save the network, and remove the state.
        net, config = FITS[network](clips, steps, seed, state, report)
    save_net(out, net, config)
    state.unlink(missing_ok=True)
    return last_loss


# -- networks ------------------------------------------------------------------------------------

Fitted = tuple[nn.Module, dict[str, int]]


def _autoencoder(clips: Clips, steps: int, seed: int, state: Path, report: Report) -> Fitted:
    net = fit_autoencoder(clips.pixels, clips.lips, steps=steps, seed=seed, progress=state,
                          report=report)  # fmt: skip
    return net, {"width": WIDTH}


def _sync(clips: Clips, steps: int, seed: int, state: Path, report: Report) -> Fitted:
    net = fit_sync(clips.pixels, clips.lips, cepstra_of(clips), steps=steps, seed=seed,
                   progress=state, report=report)  # fmt: skip
    return net, {}


def _frames(clips: Clips, steps: int, seed: int, state: Path, report: Report) -> Fitted:
    # Features of a classifier of mouth and head.
    labels = talker_labels(clips.face, _visemes(clips))
    net = fit_frame_features(clips.pixels, labels, steps=steps, seed=seed, progress=state,
                             report=report)  # fmt: skip
    return net, {"labels": net.head.out_features, "size": clips.pixels.shape[-1]}


def _clips(clips: Clips, steps: int, seed: int, state: Path, report: Report) -> Fitted:
    labels = talker_labels(clips.face, _visemes(clips))
    net = fit_clip_features(clips.pixels, labels, steps=steps, seed=seed, progress=state,
                            report=report)  # fmt: skip
    return net, {"labels": net.head.out_features, "size": clips.pixels.shape[-1]}


def _visemes(clips: Clips) -> Tensor:
    if clips.visemes is None:
        raise DataError("feature networks are fitted on visemes, which only drawn talkers have; "
                        "give a dataset of `python -m data_prep draw`")  # fmt: skip
    return clips.visemes


FITS: dict[str, Callable[[Clips, int, int, Path, Report], Fitted]] = {
    "autoencoder": _autoencoder,
    "sync": _sync,
    "frames": _frames,
    "clips": _clips,
}

"""`echolab fit WHAT DATA OUT`: the small networks that stand in for the big released ones."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.data.clips import load_clips
from echolab.encoders.demo_vae_training import WIDTH, fit_autoencoder
from echolab.errors import ConfigError, DataError
from echolab.fitting import Report, save_net
from echolab.metrics.demo_networks_training import (
    fit_clip_features,
    fit_frame_features,
    fit_sync,
    talker_labels,
)
from echolab.metrics.scores import cepstra_of
from echolab.progress import progress
from echolab.types import Clips


@dataclass(frozen=True)
class FitArguments:
    """Fit a stand-in network on a small raw dataset.

    autoencoder: pixels to latents and back.  sync: lips and sound, for Sync-C_demo.  frames, clips:
    features for FID_demo and FVD_demo, which need drawn talkers (their visemes are known).
    A fit that was stopped goes on when the same command is given again.
    """

    what: Literal["autoencoder", "sync", "frames", "clips"] = field(
        metadata={"help": "which network"}
    )
    data: Path = field(metadata={"help": "a dataset of the raw kind"})
    out: Path = field(metadata={"help": "the network's file, .safetensors"})
    steps: int = field(default=800, metadata={"help": "optimizer steps"})
    seed: int = field(default=0, metadata={"ge": 0, "help": "of first values and batches"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})


def main(argv: list[str]) -> int:
    arguments = parse(FitArguments, argv, command="echolab fit",
                      positional=("what", "data", "out"))  # fmt: skip
    if arguments.steps < 1:
        raise ConfigError(f"steps={arguments.steps}: must be 1 or more")
    prove_writable(arguments.out)
    clips = load_clips(arguments.data)
    last = fit_network(arguments.what, clips, arguments.out, steps=arguments.steps,
                       seed=arguments.seed)  # fmt: skip
    figures = {"out": str(arguments.out), "steps": arguments.steps, "loss": last}
    plain = f"{arguments.out}: {arguments.what} after {arguments.steps} steps, loss {last:.4f}"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0


def fit_network(what: str, clips: Clips, out: Path, *, steps: int, seed: int) -> float:
    """Fit one network and write it; the last loss that was reported."""
    last = float("nan")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Named after the clips: a fit is never continued on other ones.
    state = out.with_suffix(f".{zlib.crc32(clips.pixels.numpy().data):08x}.progress")
    with progress(f"fitting {out.stem}", steps) as advance:

        def report(done: int, total: int, loss: float) -> None:
            nonlocal last
            last = loss
            advance(done, f"loss {loss:.4f}")

        net, config = FITS[what](clips, steps, seed, state, report)
    save_net(out, net, config)
    state.unlink(missing_ok=True)
    return last


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

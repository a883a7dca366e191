"""`python -m data_prep encode SOURCE OUT video=FILE`: raw shards to what training reads.

With `encoders=released` they are those of Wan and wav2vec2, one after another in memory; see
`data_prep.stages`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from data_prep.raw import (
    Members,
    boxes_of,
    caption_of,
    open_raw,
    pixels_of,
    sound_of,
)
from data_prep.stages import encode_in_stages, stored
from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.data.shard_reader import ShardWriter, open_dataset
from echolab.encoders.demo_vae import CausalAutoencoder
from echolab.encoders.encode import Encoders, demo_encoders, encode_clip
from echolab.encoders.loading import find_released, released_encoders
from echolab.encoders.umt5 import as_written, cleaned
from echolab.errors import ConfigError
from echolab.fitting import load_net
from echolab.progress import progress

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLEAN = {"no": as_written, "wan": cleaned}


@dataclass(frozen=True)
class EncodeOptions:
    """Compute latents and conditions of every clip once, and write encoded shards.

    Released encoders work through the dataset one after another, so that the largest alone must
    fit in memory; the same command goes on where it was stopped.
    """

    source: Path = field(metadata={"help": "a dataset of the raw kind"})
    out: Path = field(metadata={"help": "the new dataset's folder"})
    encoders: Literal["demo", "released"] = field(
        default="demo", metadata={"help": "the demo's stand-ins, or those of Wan and wav2vec2"}
    )
    video: Path | None = field(
        default=None, metadata={"help": "demo: the autoencoder, from `echolab fit autoencoder`"}
    )
    weights: Path | None = field(
        default=None, metadata={"help": "released: a folder such as Wan2.1-Fun-V1.1-1.3B-InP"}
    )
    audio: Path | None = field(default=None, metadata={"help": "released: a folder of wav2vec2"})
    sound: Literal["preview", "flash"] = field(
        default="preview",
        metadata={"help": "released: the last state twice a frame, or all layers once"},
    )
    device: str = field(default="cpu", metadata={"help": "released: such as cuda or cuda:1"})
    dtype: Literal["bf16", "fp32"] = field(
        default="bf16", metadata={"help": "released: precision; sound is always fp32"}
    )
    tiling: bool = field(
        default=False, metadata={"help": "released: videos in blended tiles, for less memory"}
    )
    clean: Literal["no", "wan"] = field(
        default="no", metadata={"help": "released: captions as they are, or as Wan cleans them"}
    )
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})


def main(argv: list[str]) -> int:
    """The command; prints a summary to standard output."""
    options = parse(EncodeOptions, argv, command="data_prep encode", positional=("source", "out"))
    prove_writable(options.out, folder=True)
    if options.encoders == "released":
        encoders = _released(options)
        settings: dict[str, str | bool] = {"dtype": options.dtype, "tiling": options.tiling}
        clips = encode_in_stages(options.source, options.out, encoders, settings)
    else:
        video = _needed("video", options.video, options)
        encoders = demo_encoders(load_net(video, CausalAutoencoder))
        with progress("encoding clips", len(open_dataset(options.source))) as advance:
            clips = encode_dataset(
                options.source, options.out, encoders, lambda done: advance(done, "")
            )
    figures = {"out": str(options.out), "clips": clips, "encoders": encoders.fingerprints}
    plain = f"{options.out}: {clips} encoded clips"
    print(json.dumps(figures) if options.format == "json" else plain)
    return 0


def _needed(name: str, value: Path | None, options: EncodeOptions) -> Path:
    if value is None:
        raise ConfigError(f"{name}=: needed with encoders={options.encoders}; give its path")
    return value


def _released(options: EncodeOptions) -> Encoders:
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"device={options.device}: not here ({line}); give cpu") from error
    files = find_released(
        _needed("weights", options.weights, options), _needed("audio", options.audio, options)
    )
    return released_encoders(
        files,
        device,
        DTYPES[options.dtype],
        speech=options.sound,
        clean=CLEAN[options.clean],
        tiling=options.tiling,
    )


def encode_dataset(
    source: Path, out: Path, encoders: Encoders, report: Callable[[int], None]
) -> int:
    """Encode every sample of `source` into the new dataset `out`; the number of samples.

    All encoders are at work on each sample, and what is stopped starts from the beginning.
    """
    dataset = open_raw(source)
    with ShardWriter(
        out,
        kind="encoded",
        encoders=encoders.fingerprints,
        geometry=encoders.geometry,
        description={"source": dataset.fingerprint},
    ) as writer:
        for i, key in enumerate(dataset.keys):
            members = dataset.read(i)
            tensors = encode_members(encoders, members)
            writer.write(key, {"safetensors": stored(key, tensors), "json": members["json"]})
            report(i + 1)
    return len(dataset)


def encode_members(encoders: Encoders, members: Members) -> dict[str, torch.Tensor]:
    """The encoded tensors of one raw sample."""
    face, lips = boxes_of(members)
    return encode_clip(
        encoders, pixels_of(members), sound_of(members), caption_of(members), face, lips
    )

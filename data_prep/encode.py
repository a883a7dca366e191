"""`python -m data_prep encode SOURCE OUT video=FILE`: raw shards to what training reads."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save

from echolab.arguments import parse
from echolab.data.media import decode_flac, decode_mp4, decode_tracks
from echolab.data.progress import progress
from echolab.data.shards import ShardWriter, open_dataset
from echolab.encoders.autoencoder import CausalAutoencoder
from echolab.encoders.encode import Encoders, demo_encoders, encode_clip
from echolab.errors import DataError
from echolab.fitting import load_net


@dataclass(frozen=True)
class EncodeOptions:
    """Compute latents and conditions of every clip once, and write encoded shards."""

    source: Path = field(metadata={"help": "a dataset of the raw kind"})
    out: Path = field(metadata={"help": "the new dataset's folder"})
    video: Path = field(metadata={"help": "the video autoencoder, from `echolab fit autoencoder`"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})


def main(argv: list[str]) -> int:
    """The command; prints a summary to standard output."""
    options = parse(EncodeOptions, argv, command="data_prep encode", positional=("source", "out"))
    encoders = demo_encoders(load_net(options.video, CausalAutoencoder))
    with progress("encoding clips", len(open_dataset(options.source))) as advance:
        clips = encode_dataset(
            options.source, options.out, encoders, lambda done: advance(done, "")
        )
    figures = {"out": str(options.out), "clips": clips, "encoders": encoders.fingerprints}
    plain = f"{options.out}: {clips} encoded clips"
    print(json.dumps(figures) if options.format == "json" else plain)
    return 0


def encode_dataset(
    source: Path, out: Path, encoders: Encoders, report: Callable[[int], None]
) -> int:
    """Encode every sample of `source` into the new dataset `out`; the number of samples."""
    dataset = open_dataset(source)
    if dataset.kind != "raw":
        raise DataError(f"{source}: holds {dataset.kind} samples; give a dataset of the raw kind")
    with ShardWriter(
        out,
        kind="encoded",
        encoders=encoders.fingerprints,
        description={"source": dataset.fingerprint},
    ) as writer:
        for i, key in enumerate(dataset.keys):
            members = dataset.read(i)
            tensors = encode_members(encoders, members)
            stored = {name: value.half().contiguous() for name, value in tensors.items()}
            writer.write(key, {"safetensors": save(stored), "json": members["json"]})
            report(i + 1)
    return len(dataset)


def encode_members(encoders: Encoders, members: dict[str, bytes]) -> dict[str, torch.Tensor]:
    """The encoded tensors of one raw sample."""
    frames = torch.from_numpy(decode_mp4(members["mp4"]))
    tracks = decode_tracks(members["tracks.npz"])
    pixels = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
    return encode_clip(
        encoders,
        pixels,
        torch.from_numpy(decode_flac(members["flac"])),
        json.loads(members["json"])["caption"],
        torch.from_numpy(tracks.face),
        torch.from_numpy(tracks.lips),
    )

"""`python -m data_prep draw OUT clips=64 seed=0`: a dataset of talkers drawn by the program."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.synthetic_face import FPS, Talker, draw_talker
from echolab.arguments import parse
from echolab.atomic_io import prove_writable
from echolab.data.media import encode_flac, encode_mp4, encode_tracks
from echolab.data.shard_reader import ShardWriter
from echolab.errors import ConfigError
from echolab.geometry import WAN
from echolab.progress import progress


@dataclass(frozen=True)
class DrawOptions:
    """Draw talking faces with known visemes and write them as raw shards.

    A clip is a pure function of its number and the seed.  `first` numbers the first clip, so that
    two datasets of one seed need not share a talker.
    """

    out: Path = field(metadata={"help": "the new dataset's folder"})
    clips: int = field(default=64, metadata={"help": "how many clips"})
    seed: int = field(default=0, metadata={"ge": 0, "help": "another seed, other talkers"})
    first: int = field(default=0, metadata={"ge": 0, "help": "number of the first clip"})
    frames: int = field(default=25, metadata={"help": "frames a clip, 4n+1"})
    size: int = field(default=64, metadata={"help": "height and width in pixels, times 16"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})


def main(argv: list[str]) -> int:
    """The command; prints a summary to standard output."""
    options = parse(DrawOptions, argv, command="data_prep draw", positional=("out",))
    prove_writable(options.out, folder=True)
    with progress("drawing talkers", options.clips) as advance:
        draw_dataset(options, lambda done: advance(done, ""))
    seconds = options.clips * options.frames / FPS
    figures = {"out": str(options.out), "clips": options.clips, "seconds": seconds}
    plain = f"{options.out}: {options.clips} clips, {seconds:.0f} s of talk"
    print(json.dumps(figures) if options.format == "json" else plain)
    return 0


def draw_dataset(options: DrawOptions, report: Callable[[int], None]) -> None:
    """Write the dataset; ConfigError for sizes that the network cannot take."""
    if options.clips < 1:
        raise ConfigError(f"clips={options.clips}: must be 1 or more")
    if options.frames < 5 or not WAN.is_clip_length(options.frames):
        raise ConfigError(
            f"frames={options.frames}: must be {WAN.clip_lengths} and 5 or more, such as 25"
        )
    if options.size < 32 or options.size % WAN.token_pixels:
        raise ConfigError(
            f"size={options.size}: must be a multiple of {WAN.token_pixels} and 32 or more"
        )
    with ShardWriter(
        options.out, kind="raw", description={"source": "drawn", "seed": options.seed}
    ) as writer:
        for number in range(options.first, options.first + options.clips):
            talker = draw_talker(options.seed, number, frames=options.frames, size=options.size)
            writer.write(f"talker_{options.seed}_{number:06d}", members_of(talker, number, options))
            report(number - options.first + 1)


def members_of(talker: Talker, number: int, options: DrawOptions) -> dict[str, bytes]:
    """One sample of the raw kind."""
    about = {
        "caption": talker.look.caption(),
        "source": "drawn",
        "seed": options.seed,
        "number": number,
        "frames": options.frames,
        "height": options.size,
        "width": options.size,
        "fps": FPS,
    }
    curves = {"opening": talker.opening, "width": talker.width}
    return {
        "mp4": encode_mp4(talker.frames, FPS),
        "flac": encode_flac(talker.samples),
        "tracks.npz": encode_tracks(talker.face, talker.lips, extra=curves),
        "json": json.dumps(about).encode(),
    }

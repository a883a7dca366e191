"""Write a raw dataset of synthetic talkers."""

import json
from collections.abc import Callable

from data_prep.options import DrawOptions
from data_prep.synthetic_face import FPS, Talker, draw_talker
from echolab.data.media import encode_flac, encode_mp4, encode_tracks
from echolab.data.shard_writer import ShardWriter
from echolab.progress import progress


def draw_and_report(options: DrawOptions) -> None:
    """Draw as `options` say and print a summary."""
    with progress("drawing talkers", options.num_clips) as advance:
        draw_dataset(options, lambda done: advance(done, ""))
    seconds = options.num_clips * options.frames / FPS
    figures = {"out": str(options.out), "clips": options.num_clips, "seconds": seconds}
    plain = f"{options.out}: {options.num_clips} clips, {seconds:.0f} s of speech"
    print(json.dumps(figures) if options.format == "json" else plain)


def draw_dataset(options: DrawOptions, report: Callable[[int], None]) -> None:
    """Write the dataset, calling `report` with the number of clips done."""
    with ShardWriter(
        options.out, kind="raw", description={"source": "drawn", "seed": options.seed}
    ) as writer:
        for index in range(options.first, options.first + options.num_clips):
            talker = draw_talker(options.seed, index, frames=options.frames, size=options.size)
            writer.write(f"talker_{options.seed}_{index:06d}", members_of(talker, index, options))
            report(index - options.first + 1)


def members_of(talker: Talker, index: int, options: DrawOptions) -> dict[str, bytes]:
    """Return one sample of the raw kind."""
    facts = {
        "caption": talker.look.caption(),
        "source": "drawn",
        "seed": options.seed,
        "number": index,
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
        "json": json.dumps(facts).encode(),
    }

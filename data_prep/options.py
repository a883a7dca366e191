"""What `python -m data_prep run` can be told."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.cut import is_clip_length
from echolab.errors import ConfigError
from echolab.geometry import WAN

# What changes how the work is done or shown, and not what comes out.
NOT_OF_THE_RESULT = ("source", "out", "weights", "workers", "stall_seconds", "format")


def option(default: Any, text: str) -> Any:
    """A field with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RunOptions:
    """Raw talking videos to a dataset of clips, with a reason for all that is refused."""

    source: Path = field(metadata={"help": "a video, or a folder of them, searched through"})
    out: Path = field(metadata={"help": "folder of the dataset; the same command goes on in it"})
    frames: int = option(49, "frames of a clip at 25 a second, 4n+1; 81 for the 1.3 B network")
    min_frames: int | None = option(None, "take shorter clips (4n+1) down to this; none: never")
    size: int = option(512, "pixels of a side, a multiple of 16")
    crop: Literal["head", "frame"] = option("head", "a square around the head, or all the picture")
    min_face_pixels: float = option(96.0, "a face must be this tall in the source")
    caption: str = option("A person is talking.", "caption; {stem}, {folder}; FILE.txt wins")
    detect_every: int = option(2, "ask the face detector every so many frames")
    crf: int = option(12, "H.264 quality of the clips; lower is better")
    samples_per_shard: int = option(64, "clips of a tar")
    weights: Path | None = option(None, "folder of the face models; none: ECHOLAB_WEIGHTS, cache")
    workers: int = option(1, "files worked on at a time, each in a process of its own")
    stall_seconds: float = option(120.0, "give a file up when it makes no progress for this long")
    format: Literal["text", "json"] = option("text", "how the summary is printed")

    def __post_init__(self) -> None:
        least = self.frames if self.min_frames is None else self.min_frames
        for name, frames in (("frames", self.frames), ("min_frames", least)):
            if not is_clip_length(frames) or frames > self.frames:
                raise ConfigError(f"{name}={frames}: give 4n+1, at least 5 and at most frames")
        side = WAN.token_pixels
        if self.size < side or self.size % side:
            raise ConfigError(f"size={self.size}: give a multiple of {side}")
        if not 0 <= self.crf <= 51:
            raise ConfigError(f"crf={self.crf}: give 0 (lossless) to 51 (worst)")
        for name in ("detect_every", "samples_per_shard", "workers", "stall_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give 1 or more")
        if self.detect_every > 5:
            raise ConfigError(f"detect_every={self.detect_every}: at most 5, or faces are lost")

    def of_the_result(self) -> dict[str, Any]:
        """The options that decide what comes out."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_OF_THE_RESULT}

"""The arguments of `python -m data_prep run`, `draw` and `encode`, and checks of their values.

This module imports nothing heavy, so that a wrong argument is refused at once.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import argument
from echolab.errors import ConfigError, DataError, MediaError, WeightsError
from echolab.geometry import WAN

# Options that change how the work is done or shown, but not its result.
EXECUTION_OPTIONS = ("source", "out", "face_models", "workers", "stall_seconds", "format")


def is_clip_length(frames: int) -> bool:
    """Return whether a clip may have `frames` frames: 4n+1, and more than one latent frame."""
    return frames > 1 and WAN.is_clip_length(frames)


@dataclass(frozen=True)
class RunOptions:
    """Cut raw talking videos into a dataset of clips, and list what is refused, with reasons.

    The same command resumes an interrupted run.
    """

    source: Path = argument("video, or folder of videos, searched recursively", section="Files")
    out: Path = argument("dataset folder")
    face_models: Path | None = argument(
        "folder of the face detector and landmark models", None,
        default_text="ECHOLAB_WEIGHTS, cache", aka=("weights",),
    )  # fmt: skip
    samples_per_shard: int = argument("clips per tar", 64, ge=1)
    format: Literal["text", "json"] = argument("summary format", "text")

    frames: int = argument(
        "frames of a clip at 25 fps, 4n+1; 81 for the 1.3 B network", 49, section="Clips"
    )
    min_frames: int | None = argument(
        "shortest clip to keep, frames, 4n+1", None, default_text="frames"
    )
    size: int = argument(
        "side of the square, or of one with the frame's area, pixels, a multiple of 16", 512
    )
    crop: Literal["head", "frame"] = argument("square around the head, or the full frame", "head")
    crf: int = argument("H.264 quality, 0 lossless to 51 worst", 12, ge=0, le=51)
    caption: str = argument(
        "caption of videos without a .txt; {stem} and {folder} are replaced",
        "A person is talking.",
    )

    min_face_pixels: float = argument(
        "smallest height of a face in the source, pixels", 96.0, ge=0, section="Detection"
    )
    detect_every: int = argument("frames from one face detection to the next", 2, ge=1, le=5)
    workers: int = argument("processes, one file each at a time", 1, ge=1)
    stall_seconds: float = argument(
        "seconds without progress until a file is given up", 120.0, ge=1
    )

    def __post_init__(self) -> None:
        # Check the limits that depend on several fields or on the latent grid.
        least = self.frames if self.min_frames is None else self.min_frames
        for name, frames in (("frames", self.frames), ("min_frames", least)):
            if not is_clip_length(frames) or frames > self.frames:
                raise ConfigError(
                    f"{name}={frames}: give {WAN.clip_lengths}, at least 5 and at most frames"
                )
        # A token covers 2 x 2 latents of 8 x 8 pixels, so sides are multiples of 16 pixels.
        side = WAN.token_pixels
        if self.size < side or self.size % side:
            raise ConfigError(f"size={self.size}: give a multiple of {side}")

    def check_inputs(self) -> None:
        """Raise MediaError if the source does not exist, before the heavy imports."""
        if not self.source.exists():
            raise MediaError(f"{self.source}: not there; give a video or a folder of videos")

    def result_options(self) -> dict[str, Any]:
        """Return the options that affect the result."""
        # The number of processes, for one, does not change the dataset.
        return {k: v for k, v in asdict(self).items() if k not in EXECUTION_OPTIONS}


@dataclass(frozen=True)
class DrawOptions:
    """Draw synthetic talkers, whose visemes are known, and write them as raw shards.

    A clip is a pure function of its index and the seed: datasets with one seed and disjoint indices
    share no talker.
    """

    out: Path = argument("new dataset folder", section="Files")
    format: Literal["text", "json"] = argument("summary format", "text")

    num_clips: int = argument("clips to draw", 64, ge=1, aka=("clips", "count"), section="Talkers")
    seed: int = argument("seed of looks, motion and speech", 0, ge=0)
    first: int = argument("index of the first clip", 0, ge=0)
    frames: int = argument("frames of a clip at 25 fps, 4n+1", 25, ge=5)
    size: int = argument("height and width, pixels, a multiple of 16", 64, ge=32)

    def __post_init__(self) -> None:
        # The autoencoder needs 4n+1 frames, and sides that are multiples of a token's side.
        if self.num_clips < 1:
            raise ConfigError(f"num_clips={self.num_clips}: must be 1 or more")
        if self.frames < 5 or not WAN.is_clip_length(self.frames):
            raise ConfigError(
                f"frames={self.frames}: must be {WAN.clip_lengths} and 5 or more, such as 25"
            )
        if self.size < 32 or self.size % WAN.token_pixels:
            raise ConfigError(
                f"size={self.size}: must be a multiple of {WAN.token_pixels} and 32 or more"
            )


@dataclass(frozen=True)
class EncodeOptions:
    """Compute latents and conditions of every clip once, and write encoded shards.

    Released encoders process the dataset one after another, so that only the largest must fit in
    memory; the same command resumes an interrupted run.
    """

    source: Path = argument("raw dataset", section="Files")
    out: Path = argument("new dataset folder")
    encoded: Path | None = argument(
        "encoded dataset of the same source: copy it, and add the known latents of tasks that it "
        "lacks", None,
    )  # fmt: skip
    format: Literal["text", "json"] = argument("summary format", "text")

    encoders: Literal["demo", "released"] = argument(
        "small fitted encoders of the demo, or those of Wan and wav2vec2", "demo",
        section="Encoders",
    )  # fmt: skip
    vae: Path | None = argument(
        "demo: autoencoder of `echolab fit autoencoder`", None, aka=("video",)
    )
    encoder_dir: Path | None = argument(
        "released: folder such as Wan2.1-Fun-V1.1-1.3B-InP", None, aka=("weights",)
    )
    wav2vec: Path | None = argument("released: folder of wav2vec2", None, aka=("audio",))
    speech: Literal["preview", "flash"] = argument(
        "released: wav2vec2's last layer twice a frame, or all layers once", "preview",
        aka=("sound",),
    )  # fmt: skip
    clean: Literal["no", "wan"] = argument(
        "released: cleaning of captions, none or that of Wan's own code", "no"
    )

    device: str = argument(
        "released: device, such as cuda or cuda:1", "cpu", section="Memory and speed"
    )
    dtype: Literal["bf16", "fp32"] = argument(
        "released: precision of video, text and image; audio is always fp32", "bf16"
    )
    tiling: bool = argument("released: encode videos in blended tiles, with less memory", False)

    def check_inputs(self) -> None:
        """Raise an EcholabError for a missing input, before the heavy imports."""
        # Check datasets, except remote ones.
        for folder in (self.source, self.encoded):
            index = folder / "dataset.json" if folder is not None else Path()
            if not index.exists() and ":/" not in str(folder):
                raise DataError(f"{index}: not there; the folder is no complete dataset")
        # Check the files of the selected encoders.
        for name in ("vae",) if self.encoders == "demo" else ("encoder_dir", "wav2vec"):
            path = self.required_path(name)
            if not path.exists():
                remedy = "fit it with `echolab fit`" if name == "vae" else "download or copy it"
                raise WeightsError(f"{path}: not there; {remedy}, or give another {name}=PATH")

    def required_path(self, name: str) -> Path:
        """Return an argument that the selected encoders need; raise ConfigError if it is absent."""
        # The required arguments depend on `encoders`, so the parser cannot require any of them.
        path: Path | None = getattr(self, name)
        if path is None:
            raise ConfigError(f"{name}: needed with encoders={self.encoders}; give {name}=PATH")
        return path

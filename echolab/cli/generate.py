"""`echolab generate image=I audio=A out=V.mp4`: a talking video with its sound."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_prep.faces import FaceDetector, FaceMesh, boxes, mouth_from_corners
from data_prep.pack import cut_out, frame_head
from data_prep.weights import LANDMARKER, YUNET, find_weight
from echolab.arguments import parse
from echolab.cli.demo_pages import to_frames
from echolab.cli.policy import check_encoders, last_checkpoint, load_policy
from echolab.data.media import read_audio, read_image, write_video
from echolab.data.progress import progress
from echolab.diffusion.guidance import guided
from echolab.diffusion.sampling import sample_euler
from echolab.diffusion.sigmas import draw, sampling_sigmas
from echolab.diffusion.windows import windowed, windows
from echolab.encoders.autoencoder import CausalAutoencoder
from echolab.encoders.encode import Encoders, demo_encoders, encode_clip
from echolab.errors import ConfigError, MediaError
from echolab.fitting import load_net, work_dtype
from echolab.types import Conditions

WINDOW, OVERLAP = 7, 2  # latent frames: what the demo's network was trained on
SAMPLES_PER_FRAME = 640
LEAST_FRAMES = 5
DETECT_PIXELS = 640  # the longer side of the picture that the detector gets
SURE, RIVAL = 0.9, 0.5  # another face counts from this score, and this share of the largest
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class GenerateArguments:
    """Make a picture speak.

    The picture is cropped around its face and scaled to what the network was trained on; the video
    is as long as the sound, made in overlapping windows.  The face is found by YuNet (see
    `weights`), or given by `face`.
    """

    image: Path = field(metadata={"help": "a picture with one face"})
    audio: Path = field(metadata={"help": "speech, any format that FFmpeg reads"})
    out: Path = field(metadata={"help": "the mp4 file to write"})
    prompt: str = field(default="a talking person", metadata={"help": "what is to be seen"})
    checkpoint: Path = field(
        default=Path("runs/demo/seed_0/dpo"), metadata={"help": "a run, or one of its checkpoints"}
    )
    video: Path = field(
        default=Path("runs/demo/networks/autoencoder.safetensors"),
        metadata={"help": "the autoencoder it was trained with"},
    )
    face: tuple[float, ...] | None = field(
        default=None, metadata={"help": "x0,y0,x1,y1 of the face in the picture, in pixels"}
    )
    size: int = field(default=64, metadata={"help": "height and width of the video"})
    steps: int = field(default=12, metadata={"help": "of the sampler"})
    shift: float = field(default=3.0, metadata={"help": "of the sampler's noise levels"})
    audio_scale: float = field(default=2.0, metadata={"help": "guidance by sound; 1 is none"})
    seconds: float | None = field(default=None, metadata={"help": "of the sound to use"})
    seed: int = field(default=0, metadata={"help": "of the noise"})
    weights: Path | None = field(default=None, metadata={"help": "folder of the face models"})
    format: Literal["text", "json"] = field(default="text", metadata={"help": "of the summary"})

    def check(self) -> None:
        """ConfigError for values that cannot be."""
        if self.out.suffix != ".mp4":
            raise ConfigError(f"out={self.out}: must end in .mp4")
        if self.size < 32 or self.size % 16:
            raise ConfigError(f"size={self.size}: must be a multiple of 16, and 32 or more")
        if self.seconds is not None and not 0 < self.seconds < 3600:
            raise ConfigError(f"seconds={self.seconds}: must be above 0 and below 3600")
        if self.steps < 1 or not 0 < self.shift < 100:
            raise ConfigError(f"steps={self.steps}, shift={self.shift}: must be above 0")
        box = self.face
        if box is not None and not (len(box) == 4 and box[0] < box[2] and box[1] < box[3]):
            raise ConfigError(f"face={box}: give four numbers, x0,y0,x1,y1, with x0<x1 and y0<y1")


def main(argv: list[str]) -> int:
    arguments = parse(GenerateArguments, argv, command="echolab generate")
    arguments.check()
    began = time.monotonic()
    picture, samples = read_image(arguments.image), read_audio(arguments.audio)
    if arguments.seconds is not None:
        samples = samples[: round(16_000 * arguments.seconds)]
    frames = len(samples) // SAMPLES_PER_FRAME
    if frames < LEAST_FRAMES:
        raise MediaError(f"{arguments.audio}: {len(samples) / 16_000:.2f} s of sound, need "
                         f"{LEAST_FRAMES / 25} s or more; give a longer file")  # fmt: skip
    net = load_policy(last_checkpoint(arguments.checkpoint))
    encoders = demo_encoders(load_net(arguments.video, CausalAutoencoder))
    check_encoders(last_checkpoint(arguments.checkpoint), encoders.fingerprints)
    still, face, lips = prepare_picture(picture, arguments)
    pixels = speak(net, encoders, still, face, lips, torch.from_numpy(samples), frames, arguments)
    write_video(arguments.out, to_frames(pixels), samples[: frames * SAMPLES_PER_FRAME])
    seconds = time.monotonic() - began
    figures = {"out": str(arguments.out), "frames": frames, "seconds": round(seconds, 2)}
    plain = f"{arguments.out}: {frames} frames ({frames / 25:.2f} s) in {seconds:.1f} s"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0


def prepare_picture(picture: np.ndarray, arguments: GenerateArguments) -> tuple[Tensor, Box, Box]:
    """The picture [3, size, size] in [-1, 1] around the face, and boxes of face and lips in it."""
    face, lips = find_face(picture, arguments)
    height, width = picture.shape[:2]
    framing = frame_head(np.array([face], np.float32), width, height, arguments.size)
    scale = framing.width / (framing.box[2] - framing.box[0])

    def moved(box: Box) -> Box:
        x, y = framing.box[:2]
        return tuple((v - o) * scale for v, o in zip(box, (x, y, x, y), strict=True))  # type: ignore[return-value]

    still = torch.from_numpy(np.ascontiguousarray(cut_out(picture, framing)))
    return still.permute(2, 0, 1).float() / 127.5 - 1, moved(face), moved(lips)


def find_face(picture: np.ndarray, arguments: GenerateArguments) -> tuple[Box, Box]:
    """Boxes of the one face and its lips; MediaError where there is none or more than one."""
    if arguments.face is not None:
        x0, y0, x1, y1 = arguments.face
        across, down = x1 - x0, y1 - y0
        lips = (x0 + 0.25 * across, y0 + 0.62 * down, x1 - 0.25 * across, y0 + 0.92 * down)
        return (x0, y0, x1, y1), lips
    scale = DETECT_PIXELS / max(picture.shape[:2])
    size = tuple(round(side * scale) for side in picture.shape[1::-1])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = np.ascontiguousarray(cv2.resize(picture, size, interpolation=how))
    yunet = find_weight(YUNET, arguments.weights)
    rows = FaceDetector(yunet, scaled.shape[1], scaled.shape[0]).detect(scaled)
    rows = rows[rows[:, 3].argsort()[::-1]]  # the largest first
    rivals = [row for row in rows[1:] if row[-1] >= SURE and row[3] >= RIVAL * rows[0, 3]]
    if len(rows) == 0 or rivals:
        what = f"{1 + len(rivals)} faces" if rivals else "no face"
        raise MediaError(
            f"{arguments.image}: {what} found, need 1; give another picture, or face=x0,y0,x1,y1"
        )
    mesh = FaceMesh(find_weight(LANDMARKER, arguments.weights)).find(scaled, rows[0])
    lips_box = mesh.lips if mesh.presence > 0.5 else mouth_from_corners(rows[0])
    return tuple(boxes(rows)[0] / scale), tuple(lips_box / scale)


def speak(net, encoders: Encoders, still: Tensor, face: Box, lips: Box, samples: Tensor,  # type: ignore[no-untyped-def]
          frames: int, arguments: GenerateArguments) -> Tensor:  # fmt: skip
    """Pixels [3, frames, size, size]: every window hears its own part of the sound."""
    stride = WINDOW - OVERLAP
    needed = -(-(frames - 1) // 4) + 1
    count = max(0, -(-(needed - WINDOW) // stride))
    spans = windows(WINDOW + count * stride, WINDOW, OVERLAP)
    velocities = []
    with torch.no_grad():
        for start, stop in spans:
            told = conditions_of(encoders, still, face, lips, samples, start, stop,
                                     arguments.prompt)  # fmt: skip
            velocities.append(guided(net, told, audio_scale=arguments.audio_scale))
        shape = (16, spans[-1][1], arguments.size // 8, arguments.size // 8)
        noise = draw(["clip"], shape, seed=arguments.seed, epoch=0).noise
        dtype = work_dtype()
        with (
            progress("generating", arguments.steps) as advance,
            torch.autocast(noise.device.type, dtype, enabled=dtype != torch.float32),
        ):
            latents = sample_euler(
                windowed(velocities, spans), noise,
                sampling_sigmas(arguments.steps, arguments.shift),
                lambda step, _: advance(step + 1, ""),
            )  # fmt: skip
        return encoders.video.decode(latents.float())[0, :, :frames]


def conditions_of(encoders: Encoders, still: Tensor, face: Box, lips: Box, samples: Tensor,
                      start: int, stop: int, prompt: str) -> Conditions:  # fmt: skip
    """What the network is told of latent frames [start, stop): its sound, and the same picture."""
    frames = 4 * (stop - start - 1) + 1
    first = 4 * start * SAMPLES_PER_FRAME
    part = functional.pad(samples, (0, 1 << 20))[first : first + frames * SAMPLES_PER_FRAME]
    clip = still[:, None].expand(-1, frames, -1, -1)
    tensors = encode_clip(
        encoders, clip, part, prompt,
        torch.tensor([face]).expand(frames, -1), torch.tensor([lips]).expand(frames, -1),
    )  # fmt: skip
    return Conditions(
        text=tensors["text"][None], image=tensors["image"][None], audio=tensors["audio"][None],
        face=tensors["face"][None], known=tensors["known.i2v"][None],
        known_latents=tensors["known_latents.i2v"][None],
    )  # fmt: skip

"""The released encoders of a folder as one `Encoders`, no more of them in memory than fit."""

import gc
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echolab.encoders.clip import load_image_encoder
from echolab.encoders.encode import Encoders
from echolab.encoders.files import CONFIG, need, sha256_of, weights_in
from echolab.encoders.umt5 import as_written, load_text_encoder
from echolab.encoders.wan_vae import load_autoencoder
from echolab.encoders.wav2vec import EXTRACTOR, load_flash_speech, load_preview_speech
from echolab.errors import WeightsError

SPEECH = {"preview": load_preview_speech, "flash": load_flash_speech}


class ReleasedFiles(NamedTuple):
    """Where each encoder lies: a file in the authors' names, or its library's folder."""

    video: Path
    text: Path
    tokenizer: Path
    image: Path
    audio: Path


# What is looked for in a folder, in this order: the release's own names, then diffusers' folders.
PLACES = {
    "video": ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "vae"),
    "text": (
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "text_encoder",
    ),
    "tokenizer": ("google/umt5-xxl", "tokenizer"),
    "image": (
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
        "image_encoder",
    ),
}


def find_released(folder: Path, audio: Path) -> ReleasedFiles:
    """The encoders in a folder such as Wan2.1-Fun-V1.1-1.3B-InP, and one of wav2vec2.

    Reads no weights; raises WeightsError naming the first part that is not there.
    """
    need(folder, "the folder of the released encoders")
    found = {}
    for part, places in PLACES.items():
        there = [folder / place for place in places if (folder / place).exists()]
        if not there:
            raise WeightsError(
                f"{folder}: no {part} encoder in it, need one of {', '.join(places)}: "
                "download or copy it"
            )
        found[part] = there[0]
    return ReleasedFiles(**found, audio=need(audio, "the folder of wav2vec2"))


def fingerprints(files: ReleasedFiles, speech: str, clean: Callable[[str], str]) -> dict[str, str]:
    """What identifies each encoder: the sha256 of its files, and how they are used."""

    def of(path: Path, *beside: Path) -> str:
        inside = [path / CONFIG, *weights_in(path)] if path.is_dir() else [path]
        return sha256_of([*inside, *beside])

    words = need(files.tokenizer / "tokenizer.json", "the tokenizer of google/umt5-xxl")
    extractor = need(files.audio / EXTRACTOR, "how wav2vec2's sound is normalised")
    return {
        "video": of(files.video),
        "text": f"{of(files.text, words)} {clean.__name__}",
        "image": of(files.image),
        "audio": f"{of(files.audio, extractor)} {speech}",
    }


class Resident:
    """Networks that are loaded when they are asked for; at most `most` stay in memory."""

    def __init__(self, loaders: dict[str, Callable[[], Any]], most: int) -> None:
        self.loaders, self.most = loaders, most
        self.held: OrderedDict[str, Any] = OrderedDict()

    def __call__(self, name: str) -> Any:
        """The network `name`; those used longest ago make room for it before it is loaded."""
        if name not in self.held:
            if len(self.held) == self.most:
                self.held.popitem(last=False)
                gc.collect()  # a network may hold itself in cycles
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self.held[name] = self.loaders[name]()
        self.held.move_to_end(name)
        return self.held[name]


class _Autoencoder:
    """The autoencoder, loaded when it is used."""

    def __init__(self, networks: Resident) -> None:
        self.networks = networks

    def encode(self, pixels: Tensor) -> Tensor:
        return self.networks("video").encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.networks("video").decode(latents)


def released_encoders(
    files: ReleasedFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    speech: str,
    resident: int = 1,
    clean: Callable[[str], str] = as_written,
    tiling: bool = False,
) -> Encoders:
    """The released encoders behind the shape of the demo's; `speech` is preview or flash.

    Each is loaded when it is first used, and at most `resident` (1 to 4) stay: encode all texts,
    then all pictures, and so on, where not all fit.  umT5-XXL alone is 11 GB in bf16.
    """
    networks = Resident(
        {
            "video": partial(load_autoencoder, files.video, device, dtype, tiling=tiling),
            "text": partial(
                load_text_encoder, files.text, files.tokenizer, device, dtype, clean=clean
            ),
            "image": partial(load_image_encoder, files.image, device, dtype),
            "audio": partial(SPEECH[speech], files.audio, device),
        },
        resident,
    )
    return Encoders(
        video=_Autoencoder(networks),
        text=lambda text: networks("text")(text),
        image=lambda picture: networks("image")(picture),
        audio=lambda samples, frames: networks("audio")(samples, frames),
        fingerprints=fingerprints(files, speech, clean),
    )

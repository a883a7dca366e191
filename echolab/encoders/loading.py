"""Load the released encoders of a folder as one `Encoders`, and count their parameters.

Each encoder is loaded at its first use, and a limited number of them remains in memory.
"""

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
from echolab.encoders.files import CONFIG, require, sha256_of, weights_in
from echolab.encoders.umt5 import as_written, load_text_encoder
from echolab.encoders.wan_vae import load_autoencoder
from echolab.encoders.wav2vec import EXTRACTOR, load_flash_speech, load_preview_speech
from echolab.errors import WeightsError

SPEECH = {"preview": load_preview_speech, "flash": load_flash_speech}


class ReleasedFiles(NamedTuple):
    """The path of each encoder: a file with the authors' names, or a folder of its library."""

    video: Path
    text: Path
    tokenizer: Path
    image: Path
    audio: Path


# Candidate names in a folder, in order of preference: the release's names, then diffusers' folders.
NAMES = {
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
    """Return the paths of the encoders in a folder such as Wan2.1-Fun-V1.1-1.3B-InP.

    `audio` is the folder of wav2vec2.  Read no weights; raise a WeightsError that names the first
    missing part.
    """
    require(folder, "the folder of the released encoders")
    # Prefer the release's names, since a folder may contain both.
    paths = {}
    for part, names in NAMES.items():
        existing = [folder / name for name in names if (folder / name).exists()]
        if not existing:
            raise WeightsError(
                f"{folder}: no {part} encoder in it, need one of {', '.join(names)}; "
                "download or copy it"
            )
        paths[part] = existing[0]
    return ReleasedFiles(**paths, audio=require(audio, "the folder of wav2vec2"))


def fingerprints(files: ReleasedFiles, speech: str, clean: Callable[[str], str]) -> dict[str, str]:
    """Return the identity of each encoder: the sha256 of its files, and the processing options."""

    # Include the folder's configuration, which changes how the weights are used.
    def digest(path: Path, *others: Path) -> str:
        inside = [path / CONFIG, *weights_in(path)] if path.is_dir() else [path]
        return sha256_of([*inside, *others])

    # Tokenizer and feature extractor change the features, so they are part of the identity.
    tokenizer = require(files.tokenizer / "tokenizer.json", "the tokenizer of google/umt5-xxl")
    extractor = require(files.audio / EXTRACTOR, "the settings of wav2vec2's feature extractor")
    return {
        "video": digest(files.video),
        "text": f"{digest(files.text, tokenizer)} {clean.__name__}",
        "image": digest(files.image),
        "audio": f"{digest(files.audio, extractor)} {speech}",
    }


class Resident:
    """An LRU cache of at most `limit` networks, each loaded when it is used."""

    def __init__(self, loaders: dict[str, Callable[[], Any]], limit: int) -> None:
        self.loaders, self.limit = loaders, limit
        self.held: OrderedDict[str, Any] = OrderedDict()  # least recently used first

    def __call__(self, name: str) -> Any:
        """Return the network `name`; drop the least recently used one before loading another."""
        # Free memory first, so that there are never `limit` + 1 networks.
        if name not in self.held:
            if len(self.held) == self.limit:
                self.held.popitem(last=False)
                gc.collect()  # a network may contain reference cycles
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            self.held[name] = self.loaders[name]()
        self.held.move_to_end(name)
        return self.held[name]


class _Autoencoder:
    """The video autoencoder, loaded when it is used."""

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
    """Return the released encoders; `speech` is preview or flash.

    Each encoder is loaded at its first use, and at most `resident` (1 to 4) remain in memory: if
    not all fit, encode all texts, then all images, and so on.  umT5-XXL alone is 11 GB in bf16.
    """
    # Loaders by name; each network is built at its first use.
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
    # Look up the network at each call, since it may have been dropped.
    return Encoders(
        video=_Autoencoder(networks),
        text=lambda text: networks("text")(text),
        image=lambda image: networks("image")(image),
        audio=lambda samples, frames: networks("audio")(samples, frames),
        fingerprints=fingerprints(files, speech, clean),
    )


# Architectures without weights.  Source: Wan-Video/Wan2.1, `wan/configs`, `wan/modules/clip.py`.


def _build_vae() -> Any:
    """Return Wan 2.1's VAE without weights."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan()


def _build_umt5() -> Any:
    """Return umT5-XXL's encoder without weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=256_384,
            d_model=4096,
            d_kv=64,
            d_ff=10_240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def _build_clip() -> Any:
    """Return open-CLIP's ViT-H/14 without weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
            hidden_act="gelu",
        )
    )


def _build_wav2vec() -> Any:
    """Return wav2vec2-base without weights."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config())


# The constructor of each network, by input modality.
NETWORKS: dict[str, Callable[[], Any]] = {
    "video": _build_vae,
    "text": _build_umt5,
    "image": _build_clip,
    "audio": _build_wav2vec,
}


def parameters_of(part: str) -> int:
    """Return the number of parameters of an encoder, a key of `NETWORKS`."""
    # Build on the meta device, which allocates no memory.
    with torch.device("meta"):
        net = NETWORKS[part]()
    return sum(parameter.numel() for parameter in net.parameters())

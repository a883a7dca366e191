"""Decode latents to frames, in bf16 on a GPU; the autoencoder is freed afterwards."""

import gc
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from echolab.encoders import wan_vae
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import Autoencoder, fingerprint
from echolab.encoders.files import CONFIG, sha256_of, weights_in
from echolab.fitting import load_net


def load_vae(path: Path, device: torch.device) -> Autoencoder:
    """Load the demo's autoencoder or the released one, whichever the file or folder holds.

    The released one computes in bf16 on a GPU and in fp32 on a CPU, which has no fast bf16.
    """
    if is_demo(path):
        return load_net(path, CausalAutoencoder)
    # fp32 on the GPU would need twice the memory for the same 8-bit pixels.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return wan_vae.load_autoencoder(path, device, dtype)


def is_demo(path: Path) -> bool:
    """Return whether a file holds a fitted autoencoder of the demo."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    # Files of `echolab fit` name their network.
    try:
        with safe_open(path, "pt") as file:
            return "network" in (file.metadata() or {})
    except SafetensorError:
        return False


def vae_fingerprint(path: Path) -> str:
    """Return the fingerprint that datasets record for this autoencoder."""
    # Each kind is fingerprinted as when the dataset was encoded.
    if is_demo(path):
        return fingerprint(load_net(path, CausalAutoencoder))
    return sha256_of([path / CONFIG, *weights_in(path)] if path.is_dir() else [path])


def free(device: torch.device) -> None:
    """Return the memory of networks without references to the device."""
    # A network may contain reference cycles.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor) -> tuple[Tensor, list[bool]]:
    """Decode latents [B, C, F, H, W] to frames uint8 [B, T, 3, Y, X] on the CPU.

    Also return which clips are finite: the frames of the others mean nothing.
    """
    # Check the latents too: an autoencoder that clips its output can hide infinities.
    pixels = vae.decode(latents)
    finite = [bool(a.isfinite().all() and b.isfinite().all())
              for a, b in zip(latents, pixels, strict=True)]  # fmt: skip
    return to_uint8(pixels).cpu(), finite


def to_uint8(pixels: Tensor) -> Tensor:
    """Round pixels [B, 3, T, Y, X] in [-1, 1] to frames uint8 [B, T, 3, Y, X]; clip other values.

    NaN becomes 0.
    """
    scaled = ((pixels.float().nan_to_num(-1.0) + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).transpose(1, 2).contiguous()

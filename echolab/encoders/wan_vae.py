"""The Wan 2.1 video autoencoder as diffusers' AutoencoderKLWan.

Weights come from Wan's file or from a diffusers folder.

Shapes: B clips, T frames, F latent frames (T = 4 (F - 1) + 1), Y, X pixels, H = Y / 8, W = X / 8.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from echolab.encoders.files import (
    CONFIG,
    assign_parameters,
    from_folder,
    frozen,
    read_file,
    read_json,
    shape_of,
)
from echolab.errors import WeightsError
from echolab.geometry import WAN

CHANNELS = WAN.channels
WHAT = f"the VAE of Wan 2.1 ({CHANNELS} channels)"

_TOP = {
    "conv1.": "quant_conv.",
    "conv2.": "post_quant_conv.",
    "encoder.conv1.": "encoder.conv_in.",
    "decoder.conv1.": "decoder.conv_in.",
    "encoder.head.0.": "encoder.norm_out.",
    "encoder.head.2.": "encoder.conv_out.",
    "decoder.head.0.": "decoder.norm_out.",
    "decoder.head.2.": "decoder.conv_out.",
}
_RESIDUAL = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_MIDDLE = {"0": "resnets.0.", "1": "attentions.0.", "2": "resnets.1."}
_UP_PARTS = 4  # blocks per decoder stage: three residual blocks, then the upsampler


def to_diffusers(name: str) -> str:
    """Return the name in AutoencoderKLWan of a tensor of Wan2.1_VAE.pth.

    Source: diffusers, `scripts/convert_wan_to_diffusers.py`.
    """
    for old, new in _TOP.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    match = re.fullmatch(r"(encoder|decoder)\.(middle|downsamples|upsamples)\.(\d+)\.(.*)", name)
    if not match:
        return name
    # Three cases: the middle block, the encoder's flat list of blocks, the decoder's stages.
    half, part, number, rest = match.groups()
    for old, new in _RESIDUAL.items():  # names within a residual block
        rest = new + rest.removeprefix(old) if rest.startswith(old) else rest
    if part == "middle":
        return f"{half}.mid_block.{_MIDDLE.get(number, number + '.')}{rest}"
    if part == "downsamples":  # the encoder's blocks remain a flat list
        return f"{half}.down_blocks.{number}.{rest}"
    # The decoder groups its blocks by stage.
    stage, index = divmod(int(number), _UP_PARTS)
    block = "upsamplers.0" if index == _UP_PARTS - 1 else f"resnets.{index}"
    return f"{half}.up_blocks.{stage}.{block}.{rest}"


class WanAutoencoder:
    """Maps pixels [B, 3, T, Y, X] in [-1, 1] to latents [B, 16, F, H, W] and back.

    Latents are the posterior's mode, normalized by the mean and standard deviation of each channel,
    which diffusers does not apply.  Results are fp32, on the device of the input.  `slicing`
    processes one clip at a time, `tiling` blended tiles of 256 x 256 pixels; both save memory, but
    tiling changes the values slightly.
    """

    def __init__(self, net: AutoencoderKLWan, *, slicing: bool = True, tiling: bool = False):
        # Slicing and tiling are features of diffusers' class.
        self.net = net
        if slicing:
            net.enable_slicing()
        if tiling:
            net.enable_tiling()
        # Mean and standard deviation of each of the 16 channels.
        device = next(net.parameters()).device
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(net.config.latents_mean, device=device).view(shape)
        self.std = torch.tensor(net.config.latents_std, device=device).view(shape)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return normalized latents of clips with 4n + 1 frames and sides divisible by 8."""
        # Convolutions run in the network's precision, the normalization in fp32.
        parameter = next(self.net.parameters())
        raw = self.net.encode(pixels.to(parameter.device, parameter.dtype)).latent_dist.mode()
        return ((raw.float() - self.mean) / self.std).to(pixels.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels of normalized latents, clipped to [-1, 1]."""
        parameter = next(self.net.parameters())
        raw = latents.to(parameter.device, torch.float32) * self.std + self.mean
        return self.net.decode(raw.to(parameter.dtype)).sample.float().to(latents.device)


def load_autoencoder(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    slicing: bool = True,
    tiling: bool = False,
) -> WanAutoencoder:
    """Load the autoencoder from a diffusers `vae` folder or Wan2.1_VAE.pth (or .safetensors).

    Raise WeightsError for an autoencoder with another number of channels.
    """
    net = _from_folder(path, dtype) if path.is_dir() else _from_file(path, device, dtype)
    return WanAutoencoder(frozen(net, device), slicing=slicing, tiling=tiling)


def _from_folder(folder: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    # Refuse Wan 2.2's VAE, which has 48 channels, before loading it.
    config = read_json(folder / CONFIG)
    _check_channels(folder / CONFIG, "z_dim", config.get("z_dim", CHANNELS))
    for key in ("latents_mean", "latents_std"):
        if key in config:
            length = len(config[key]) if isinstance(config[key], list) else 0
            _check_channels(folder / CONFIG, f"length of {key}", length)
    return from_folder(AutoencoderKLWan, folder, dtype)


def _from_file(path: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLWan:
    # Convert the authors' names unless the file has diffusers' names.
    tensors = read_file(path)
    if "post_quant_conv.weight" not in tensors:
        tensors = {to_diffusers(name): tensor for name, tensor in tensors.items()}
    _check_channels(path, "channels of post_quant_conv", _size(tensors, "post_quant_conv", path))
    with torch.device("meta"):
        net = AutoencoderKLWan(base_dim=_size(tensors, "encoder.conv_in", path))
    assign_parameters(net, tensors, path, device, dtype)
    return net


def _size(tensors: Mapping[str, Tensor], layer: str, path: Path) -> int:
    return shape_of(tensors, f"{layer}.weight", path, WHAT)[0]


def _check_channels(path: Path, what: str, channels: int) -> None:
    """Raise WeightsError unless `channels` is that of Wan 2.1."""
    if channels != CHANNELS:
        raise WeightsError(f"{path}: {what} is {channels}, need {CHANNELS}; give {WHAT}")

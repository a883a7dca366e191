"""The networks that are measured, ours and diffusers' with the same weights, and their inputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.bench.measure import Shapes
from echolab.geometry import geometry_of
from echolab.models.state_dict import initialize, to_diffusers
from echolab.models.transformer import EchoTransformer
from echolab.types import Conditions

# Wan's proportions (heads of 128 channels, ffn 5.83 D) at a size that takes a CPU core seconds.
SMALL: dict[str, Any] = {
    "dim": 512, "ffn_dim": 2976, "num_heads": 4, "num_layers": 3, "in_channels": 36,
    "out_channels": 16, "text_dim": 4096, "image_dim": 1280, "audio_dim": None, "freq_dim": 256,
}  # fmt: skip
TEXT_TOKENS, IMAGE_TOKENS = 512, 257
AUDIO_DIM = 768  # wav2vec2's
# Dense bf16 peak in TFLOP/s from NVIDIA's data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}


class Inputs(NamedTuple):
    """Network inputs of one clip."""

    latents: Tensor  # [1, C, F, H, W]
    timesteps: Tensor  # [1]
    conditions: Conditions
    direction: Tensor  # [1, C, F, H, W]   the loss is the inner product with the output


def draw_inputs(
    architecture: Mapping[str, Any], size: tuple[int, ...], seed: int, device: str
) -> Inputs:
    """Draw random inputs for (frames, height, width)."""
    frames, height, width = size
    geometry = geometry_of(architecture)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    channels, grid = geometry.channels, geometry.latent_grid(frames, height, width)
    known = torch.zeros(1, geometry.time_stride, *grid, device=device)
    known[:, :, 0] = 1
    conditions = Conditions(
        text=draw(1, TEXT_TOKENS, architecture["text_dim"]),
        image=draw(1, IMAGE_TOKENS, architecture["image_dim"] or 1),
        audio=draw(1, *audio_shape(architecture, frames)),
        face=torch.ones(1, geometry.tokens(*grid[1:]), device=device),
        known=known,
        known_latents=draw(1, channels, *grid),
    )
    timesteps = torch.tensor([500.0], device=device)
    return Inputs(draw(1, channels, *grid), timesteps, conditions, draw(1, channels, *grid))


def audio_shape(architecture: Mapping[str, Any], frames: int) -> tuple[int, ...]:
    """Return the shape of a clip's audio: two tokens per frame, or Flash's layers per frame."""
    dim = architecture["audio_dim"] or AUDIO_DIM
    layers = architecture.get("audio_layers")
    return (frames, layers, dim) if layers else (2 * frames, dim)


def shapes_of(inputs: Inputs) -> Shapes:
    """Return the numbers of tokens, without audio."""
    frames = inputs.latents.shape[2]
    tokens = frames * inputs.conditions.face.shape[1]
    image = inputs.conditions.image.shape[1] if inputs.conditions.image.shape[2] > 1 else 0
    return Shapes(tokens, inputs.conditions.text.shape[1], image, 0)


def with_audio(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture with the audio branch of the preview model."""
    return {**architecture, "audio_dim": AUDIO_DIM}


def ours_net(architecture: Mapping[str, Any], seed: int, device: str) -> EchoTransformer:
    """Build our network with Wan's initialization, except that its head is not zero.

    With a head of zeros all other gradients would be zero.
    """
    net = EchoTransformer(**architecture)
    generator = torch.Generator().manual_seed(seed)
    initialize(net, generator)
    # Wan initializes the output layer to zero; random values make outputs comparable.
    with torch.no_grad():
        net.head.head.weight.normal_(0, 0.02, generator=generator)
    return net.to(device)


def diffusers_net(net: EchoTransformer, architecture: Mapping[str, Any]) -> nn.Module:
    """Build diffusers' network with the same weights."""
    from diffusers import WanTransformer3DModel

    a = architecture
    device = next(net.parameters()).device
    # Build diffusers' network, and load our weights under its parameter names.
    with torch.device(device):
        theirs: nn.Module = WanTransformer3DModel(
            patch_size=net.patch_size, num_attention_heads=a["num_heads"],
            attention_head_dim=a["dim"] // a["num_heads"], text_dim=a["text_dim"],
            in_channels=a["in_channels"], out_channels=a["out_channels"], freq_dim=a["freq_dim"],
            ffn_dim=a["ffn_dim"], num_layers=a["num_layers"], image_dim=a["image_dim"],
            added_kv_proj_dim=a["dim"] if a["image_dim"] else None,
        )  # fmt: skip
    theirs.load_state_dict({to_diffusers(name): p for name, p in net.state_dict().items()})
    return theirs.to(device)


def run_ours(net: nn.Module, inputs: Inputs) -> Tensor:
    """Return the velocity [1, C, F, H, W]."""
    velocity: Tensor = net(inputs.latents, inputs.timesteps, inputs.conditions)
    return velocity


def run_diffusers(net: nn.Module, inputs: Inputs) -> Tensor:
    """Return the velocity [1, C, F, H, W]."""
    conditions, latents = inputs.conditions, inputs.latents
    config: Any = net.config
    # diffusers' network expects the known pixels as additional input channels.
    if config.in_channels > latents.shape[1]:
        latents = torch.cat([latents, conditions.known, conditions.known_latents], 1)
    image = conditions.image if config.image_dim else None
    velocity: Tensor = net(latents, inputs.timesteps, conditions.text, image, return_dict=False)[0]
    return velocity


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the expected tensor."""
    return float(((actual - expected).norm() / expected.norm()).detach())


def peak_tflops_of(device: str) -> float | None:
    """Return the bf16 peak of the GPU in TFLOP/s, or None if it is not known."""
    # CPUs have no entry in PEAK_TFLOPS.
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)

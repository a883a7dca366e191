"""A small network and random clips, shared by the tests of the core."""

import torch
from torch import Tensor

from echolab.models.state_dict import initialize
from echolab.models.transformer import EchoTransformer
from echolab.types import Batch, Conditions, PreferencePair

CHANNELS, LATENT_FRAMES, HEIGHT, WIDTH = 4, 3, 4, 6
FRAMES = 4 * (LATENT_FRAMES - 1) + 1
SHAPE = (CHANNELS, LATENT_FRAMES, HEIGHT, WIDTH)
SIZES: dict[str, object] = {
    "in_channels": 2 * CHANNELS + 4, "out_channels": CHANNELS,
    "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 16,
    "text_dim": 10, "image_dim": 12, "audio_dim": 6,
}  # fmt: skip


# The released models, at these sizes.
MODELS: dict[str, dict[str, object]] = {
    "wan_t2v_1b3": {"in_channels": CHANNELS, "image_dim": None, "audio_dim": None},
    "wan_fun_inp_1b3": {"audio_dim": None},
    "echomimicv3_preview": {},
    "echomimicv3_flash": {"audio_layers": 3},
}


def architecture(model: str) -> dict[str, object]:
    """Return the settings of a small network that has the names of a released one."""
    return {**SIZES, **MODELS[model]}


def model(name: str, *, trained: bool = True) -> EchoTransformer:
    """Build a small network that has the names of a released one."""
    return net(trained=trained, **MODELS[name])


def net(*, trained: bool = False, initialized: bool = True, **changes: object) -> EchoTransformer:
    """Build a network with Wan's initialization; `trained` also moves what that leaves at zero."""
    made = EchoTransformer(**{**SIZES, **changes})  # type: ignore[arg-type]
    if not initialized:
        return made
    generator = torch.Generator().manual_seed(0)
    initialize(made, generator)
    if trained:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def conditions(clips: int = 2, seed: int = 0, layers: int | None = None) -> Conditions:
    """Return random conditions; half of the face tokens are open, the first frame is known.

    With `layers` the audio is that of Flash.
    """
    g = torch.Generator().manual_seed(seed)
    tokens = HEIGHT // 2 * (WIDTH // 2)
    audio_shape = (FRAMES, layers, 6) if layers else (2 * FRAMES, 6)
    known = torch.zeros(clips, 4, *SHAPE[1:])
    known[:, :, 0] = 1
    return Conditions(
        text=torch.randn(clips, 5, 10, generator=g),
        image=torch.randn(clips, 3, 12, generator=g),
        audio=torch.randn(clips, *audio_shape, generator=g),
        face=(torch.arange(tokens) % 2).float().expand(clips, -1).clone(),
        known=known,
        known_latents=torch.randn(clips, *SHAPE, generator=g),
    )


def latents(clips: int = 2, seed: int = 1) -> Tensor:
    """Return random latents [B, C, F, H, W]."""
    return torch.randn(clips, *SHAPE, generator=torch.Generator().manual_seed(seed))


def batch(clips: int = 2, seed: int = 1) -> Batch:
    """Return clips named clip-0, clip-1, ..."""
    keys = [f"clip-{index}" for index in range(clips)]
    weight = torch.ones(clips, 1, *SHAPE[1:])
    return Batch(latents(clips, seed), conditions(clips, seed), weight, ["i2v"] * clips, keys)


def pair(clips: int = 2) -> PreferencePair:
    """Return two different videos with the same conditions."""
    chosen = batch(clips)
    return PreferencePair(chosen.latents, latents(clips, 9), *chosen[1:])

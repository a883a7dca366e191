"""The straight path from data (sigma 0) to noise (sigma 1), and its velocity.

Wan's conventions (Wan2.1, rectified flow): velocity = noise - latents, and the network gets
timesteps = 1000 sigmas.  All functions compute in fp32, for latents of any dtype.
"""

from torch import Tensor


def _per_clip(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, ...], to broadcast over a tensor [B, ...]."""
    return values.float().reshape(-1, *[1] * (like.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Return the point (1 - sigma) latents + sigma noise of the path.  [B, ...], [B, ...], [B]."""
    sigmas = _per_clip(sigmas, latents)
    return (1 - sigmas) * latents.float() + sigmas * noise.float()


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the derivative of the path with respect to sigma, which is constant.  [B, ...]."""
    return noise.float() - latents.float()


def denoised(noisy_latents: Tensor, velocity: Tensor, sigmas: Tensor) -> Tensor:
    """Return the clean latents that a velocity predicts.  [B, ...], [B, ...], [B]."""
    return noisy_latents.float() - _per_clip(sigmas, noisy_latents) * velocity.float()


def to_timesteps(sigmas: Tensor) -> Tensor:
    """Convert noise levels to the network's timesteps: 0 is data, 1000 is noise."""
    return 1000.0 * sigmas

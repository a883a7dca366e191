"""The straight path from data (sigma 0) to noise (sigma 1), and its velocity.

Wan's conventions (Wan2.1, rectified flow): velocity = noise - latents, and the network gets
timesteps = 1000 sigmas.  Everything here is fp32, for latents of any dtype.
"""

from torch import Tensor


def _per_clip(values: Tensor, like: Tensor) -> Tensor:
    """Return [B] as [B, 1, ...], to multiply a tensor that begins with B."""
    return values.float().reshape(-1, *[1] * (like.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Return the point (1 - sigma) latents + sigma noise of the path.  [B, ...], [B, ...], [B]."""
    sigmas = _per_clip(sigmas, latents)
    return (1 - sigmas) * latents.float() + sigmas * noise.float()


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the derivative of the path by sigma, the same at every sigma.  [B, ...]."""
    return noise.float() - latents.float()


def denoised(noisy_latents: Tensor, velocity: Tensor, sigmas: Tensor) -> Tensor:
    """Return the clean latents that a velocity predicts.  [B, ...], [B, ...], [B]."""
    return noisy_latents.float() - _per_clip(sigmas, noisy_latents) * velocity.float()


def to_timesteps(sigmas: Tensor) -> Tensor:
    """Return the network's timesteps of noise levels: 0 is data, 1000 is noise."""
    return 1000.0 * sigmas

"""Sizes of the latents of a video autoencoder, and of the network's tokens.

Encoders, networks and datasets each have a `LatentGeometry`.  The first latent frame covers only
one frame, so T = time_stride (F - 1) + 1 frames correspond to F latent frames.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class LatentGeometry(NamedTuple):
    """Sizes that encoders, datasets and network must agree on."""

    channels: int  # channels of a latent
    time_stride: int  # frames per latent frame; also the channels of a mask at latent resolution
    space_stride: int  # pixels per latent, in both directions
    patch: int  # latents per token, in both directions

    @property
    def token_pixels(self) -> int:
        """Pixels per token, in both directions; sides of a clip must be multiples of it."""
        return self.space_stride * self.patch

    def frames(self, latent_frames: int) -> int:
        """Return the number of video frames that `latent_frames` latent frames represent."""
        # The first latent frame covers one frame, every other latent frame `time_stride`.
        return self.time_stride * (latent_frames - 1) + 1

    def latent_frames(self, frames: int) -> int:
        """Return the number of complete latent frames of a clip."""
        # Round down: frames that do not fill a latent frame are dropped.
        return (frames - 1) // self.time_stride + 1

    def covering_latent_frames(self, frames: int) -> int:
        """Return the minimum number of latent frames that cover all frames of a clip."""
        return -(-(frames - 1) // self.time_stride) + 1

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) in latents for a frame size in pixels."""
        return height // self.space_stride, width // self.space_stride

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (F, H, W) in latents for a clip size in frames and pixels."""
        return self.latent_frames(frames), *self.latent_size(height, width)

    def tokens(self, height: int, width: int) -> int:
        """Return the number of tokens of a latent frame of height x width latents."""
        return height // self.patch * (width // self.patch)

    def is_clip_length(self, frames: int) -> bool:
        """Return whether a clip of `frames` frames fills its latent frames exactly."""
        # 1, 1 + stride, 1 + 2 stride, ...
        return frames >= 1 and (frames - 1) % self.time_stride == 0

    def near_clip_length(self, frames: int) -> int:
        """Return a valid clip length close to `frames`, as a suggestion for the user."""
        return max(frames // self.time_stride, 1) * self.time_stride + 1

    @property
    def clip_lengths(self) -> str:
        """Valid clip lengths as text for errors and help, such as 4n+1."""
        return f"{self.time_stride}n+1"


WAN = LatentGeometry(channels=16, time_stride=4, space_stride=8, patch=2)  # Wan 2.1, and the demo


def geometry_of(architecture: Mapping[str, Any]) -> LatentGeometry:
    """Return the geometry of a network from its settings (conf/model), with Wan's as defaults.

    Worked example: {"out_channels": 48, "space_stride": 16} yields 48, 4, 16, 2.
    """
    # Use Wan's size for each missing setting.
    return LatentGeometry(
        channels=architecture.get("out_channels", WAN.channels),
        time_stride=architecture.get("time_stride", WAN.time_stride),
        space_stride=architecture.get("space_stride", WAN.space_stride),
        patch=(architecture.get("patch_size") or (1, WAN.patch, WAN.patch))[1],
    )

"""Sizes of the latents of a video autoencoder, and of the tokens that a network makes of them.

Encoders, networks and datasets each carry a `LatentGeometry`.  The first frame of a clip has a
latent frame of its own, so T = time_stride (F - 1) + 1 frames are F latent frames.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class LatentGeometry(NamedTuple):
    """Sizes that encoders, datasets and network must agree on."""

    channels: int  # of a latent
    time_stride: int  # frames of a latent frame; also the channels of a mask at latent resolution
    space_stride: int  # pixels of a latent, in both directions
    patch: int  # latents of a token, in both directions

    @property
    def token_pixels(self) -> int:
        """Pixels of a token, in both directions; sides of a clip are multiples of it."""
        return self.space_stride * self.patch

    def frames(self, latent_frames: int) -> int:
        """Return the number of video frames of so many latent frames."""
        # The first latent frame holds one frame, every other one `time_stride`.
        return self.time_stride * (latent_frames - 1) + 1

    def latent_frames(self, frames: int) -> int:
        """Return how many latent frames a clip fills; frames beyond the last full one are cut."""
        # Rounded down: frames that do not fill a latent frame are cut.
        return (frames - 1) // self.time_stride + 1

    def covering_latent_frames(self, frames: int) -> int:
        """Return the fewest latent frames that hold all frames of a clip of any length."""
        return -(-(frames - 1) // self.time_stride) + 1

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width in latents of a frame in pixels."""
        return height // self.space_stride, width // self.space_stride

    def latent_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return (F, H, W) of a clip of so many frames and pixels."""
        return self.latent_frames(frames), *self.latent_size(height, width)

    def tokens(self, height: int, width: int) -> int:
        """Return the tokens of one latent frame of height x width latents."""
        return height // self.patch * (width // self.patch)

    def is_clip_length(self, frames: int) -> bool:
        """Return whether a clip of so many frames fills its latent frames exactly."""
        # 1, 1 + stride, 1 + 2 stride, ...
        return frames >= 1 and (frames - 1) % self.time_stride == 0

    def near_clip_length(self, frames: int) -> int:
        """Return a clip length close to `frames`, as a proposal for a user."""
        return max(frames // self.time_stride, 1) * self.time_stride + 1

    @property
    def clip_lengths(self) -> str:
        """Clip lengths as errors and help texts write them, such as 4n+1."""
        return f"{self.time_stride}n+1"


WAN = LatentGeometry(channels=16, time_stride=4, space_stride=8, patch=2)  # Wan 2.1, and the demo


def geometry_of(architecture: Mapping[str, Any]) -> LatentGeometry:
    """Return the geometry of a network from its settings (conf/model), with Wan's as defaults.

    Worked example: {"out_channels": 48, "space_stride": 16} gives 48, 4, 16, 2.
    """
    # Settings of a network name its own sizes; those that are absent are Wan's.
    return LatentGeometry(
        channels=architecture.get("out_channels", WAN.channels),
        time_stride=architecture.get("time_stride", WAN.time_stride),
        space_stride=architecture.get("space_stride", WAN.space_stride),
        patch=(architecture.get("patch_size") or (1, WAN.patch, WAN.patch))[1],
    )

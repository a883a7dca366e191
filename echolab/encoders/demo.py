"""The demo's encoders: features without trained networks, and a small video autoencoder.

Captions (instead of umT5): each token represents a pair of consecutive words, so that "blue eyes"
and "blue shirt" differ; its vector is drawn from a generator seeded with a hash of the pair.

Images (instead of CLIP): 16 coarse patches with their positions.

Audio (instead of wav2vec2's 50 vectors per second): two log-mel frames per video frame.  A vector
of wav2vec2 depends on its neighbors and encodes its position (by a convolution).  The network's
attention over a window of audio ignores order, so these features include both: five neighboring
frames, and the token's position as sines and cosines.

Videos (instead of the Wan VAE, whose 127 M parameters are too many for the demo): a causal
autoencoder with the same strides, 4 in time and 8 in space.  Frames are grouped as 1, 4, 4, ...;
the first frame is repeated four times, so that a still clip has equal latent frames and a network
can copy the first frame forward.  No latent frame depends on later frames.  A patch of 4 x 8 x 8
pixels is encoded by a linear basis (principal components, a good codec from the first step) plus a
residual by convolutions over neighboring patches.

Shapes: B clips, T frames, F latent frames (T = 4 (F - 1) + 1), C latent channels, H = Y / 8,
W = X / 8.
"""

import hashlib
import math
import re
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from echolab.errors import MediaError
from echolab.fitting import Report, fit, work_dtype
from echolab.geometry import WAN, LatentGeometry

CAPTION_TOKENS, CAPTION_DIM = 32, 32

IMAGE_SIDE, IMAGE_PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIDE // IMAGE_PATCH) ** 2
IMAGE_DIM = 3 * IMAGE_PATCH**2 + IMAGE_TOKENS

RATE_HZ = 16_000
SAMPLES_PER_FRAME = 640  # at 25 fps
HOP, WINDOW, FFT = 320, 640, 1024
MELS = 40
NEIGHBORS = 2  # neighboring frames on each side
PERIODS = (8, 16, 32, 64)  # periods of the position encoding, in tokens; a latent frame has 8
AUDIO_DIM = (2 * NEIGHBORS + 1) * MELS + 2 * len(PERIODS)

FRAMES, SIDE = WAN.time_stride, WAN.space_stride  # size of a patch in frames and in pixels
PATCH_VALUES = 3 * FRAMES * SIDE**2

# Fitting of the autoencoder.
SPAN = 9  # frames of a training crop
LATENT_NOISE = 0.2  # maximum noise added in training, so that imperfect samples decode well
LIP_WEIGHT = 9.0
WIDTH = 192
BASIS_VALUES = 50_000_000  # pixel values for the principal components: 160 clips of the demo


def word_vector(words: str) -> Tensor:
    """Return a standard normal vector [32] that depends only on the words."""
    seed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest())
    return torch.randn(CAPTION_DIM, generator=torch.Generator().manual_seed(seed))


def encode_caption(caption: str) -> Tensor:
    """Return the features [32, 32] of a caption, zero-padded or truncated."""
    # One token per pair of a word and its successor.
    words = re.findall(r"[\w']+", caption.lower())
    tokens = torch.zeros(CAPTION_TOKENS, CAPTION_DIM)
    for index, pair in enumerate(zip(words, [*words[1:], ""], strict=False)):
        if index == CAPTION_TOKENS:
            break
        tokens[index] = word_vector(" ".join(pair))
    return tokens


def encode_image(image: Tensor | None) -> Tensor:
    """Return the features [16, 208] of an image [3, Y, X] in [-1, 1]; zeros for None.

    The image is resized to 32 x 32, as CLIP resizes to 224 x 224.
    """
    if image is None:
        return torch.zeros(IMAGE_TOKENS, IMAGE_DIM)
    # Append a one-hot position to each patch.
    small = functional.interpolate(image[None], (IMAGE_SIDE, IMAGE_SIDE), mode="area")[0]
    patches = rearrange(small, "c (h p) (w q) -> (h w) (c p q)", p=IMAGE_PATCH, q=IMAGE_PATCH)
    return torch.cat([patches, torch.eye(IMAGE_TOKENS)], dim=1)


@cache
def mel_filters() -> Tensor:
    """Return triangular filters [40, 513] on the mel scale from 0 to 8 kHz."""
    # Corners are equally spaced on the mel scale.
    top = 2595 * math.log10(1 + RATE_HZ / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    hertz = torch.linspace(0, RATE_HZ / 2, FFT // 2 + 1)
    left, center, right = (corners[k : MELS + k, None] for k in range(3))
    rising, falling = (hertz - left) / (center - left), (right - hertz) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0)


def positions(tokens: Tensor) -> Tensor:
    """Return sines and cosines [N, 8] of token indices [N]."""
    angles = 2 * math.pi * tokens[:, None] / torch.tensor(PERIODS)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def check_length(samples: Tensor, frames: int) -> None:
    """Raise MediaError if audio [n] at 16 kHz ends before its clip."""
    needed = frames * SAMPLES_PER_FRAME
    if len(samples) < needed:
        raise MediaError(
            f"audio of {len(samples)} samples ({len(samples) / RATE_HZ:.2f} s) is shorter than "
            f"{frames} frames ({needed} samples); ask for fewer frames"
        )


def encode_audio(samples: Tensor, frames: int) -> Tensor:
    """Return exactly 2 T tokens [2 T, 208], of about unit variance, of audio [n] at 16 kHz.

    Token k is centered on sample 320 k + 160.  Truncate longer audio; raise MediaError for audio
    shorter than the clip.
    """
    check_length(samples, frames)
    needed = frames * SAMPLES_PER_FRAME

    # Log-mel frames, scaled to about unit variance.
    margin = (WINDOW - HOP) // 2
    padded = functional.pad(samples[:needed].float(), (margin, margin))
    windows = padded.unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(windows, FFT).abs().square()
    mels = ((power @ mel_filters().T + 1e-5).log() + 4) / 3  # [2 T, 40]

    # Concatenate each frame with its neighbors and its position.
    around = functional.pad(mels.T, (NEIGHBORS, NEIGHBORS), mode="replicate")
    stacked = around.unfold(1, 2 * NEIGHBORS + 1, 1).permute(1, 2, 0).flatten(1)
    return torch.cat([stacked, positions(torch.arange(len(mels)))], dim=1)


# The video autoencoder, instead of Wan's VAE


class Residual(nn.Module):
    """Residual block with two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_out(functional.silu(self.conv_in(functional.silu(self.norm(x)))))


def to_patches(pixels: Tensor) -> Tensor:
    """Cut [B, 3, T, Y, X] into [B F, 768, H, W]; repeat the first frame to fill its group."""
    padded = torch.cat([pixels[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1), pixels], dim=2)
    return rearrange(
        padded, "b c (f k) (h p) (w q) -> (b f) (k c p q) h w", k=FRAMES, p=SIDE, q=SIDE
    )


def from_patches(patches: Tensor, clips: int) -> Tensor:
    """Invert `to_patches`; keep only the last frame of the first group."""
    padded = rearrange(
        patches, "(b f) (k c p q) h w -> b c (f k) (h p) (w q)", b=clips, k=FRAMES, p=SIDE, q=SIDE
    )
    return padded[:, :, FRAMES - 1 :]


class CausalAutoencoder(nn.Module):
    """Pixels [B, 3, T, Y, X] in [-1, 1] to latents [B, C, F, H, W] and back."""

    mean: Tensor
    std: Tensor

    def __init__(self, *, channels: int = 16, width: int = 192, depth: int = 2) -> None:
        super().__init__()
        self.basis_in = nn.Conv2d(PATCH_VALUES, channels, 1)
        self.basis_out = nn.Conv2d(channels, PATCH_VALUES, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(PATCH_VALUES, width, 1),
            *(Residual(width) for _ in range(depth)),
            nn.Conv2d(width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * channels, width, 3, padding=1),
            *(Residual(width) for _ in range(depth)),
            nn.Conv2d(width, PATCH_VALUES, 1),
        )
        # Initialize the last convolutions to zero, so that training starts from the linear basis.
        for last in (self.encoder[-1], self.decoder[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @property
    def geometry(self) -> LatentGeometry:
        """Latent geometry: Wan's strides with the channels of this network."""
        return WAN._replace(channels=len(self.mean))

    @torch.no_grad()
    def fit_basis(self, pixels: Tensor) -> None:
        """Set the linear part to the principal components of clips [B, 3, T, Y, X]."""
        # Principal components of the patches; eigh sorts them by ascending variance.
        patches = rearrange(to_patches(pixels), "n d h w -> (n h w) d")
        center = patches.mean(0)
        covariance = (patches - center).T @ (patches - center) / len(patches)
        values, vectors = torch.linalg.eigh(covariance)
        channels = len(self.mean)
        basis = vectors[:, -channels:]
        # Whiten only half: in fully whitened latents an error in a patch's brightness, the first
        # component, would count no more than one in its finest detail, and samples look tiled.
        spread = values[-channels:].clamp(min=1e-6) ** 0.25
        # The decoder's basis is the inverse of the encoder's.
        self.basis_in.weight.copy_((basis / spread).T[:, :, None, None])
        assert self.basis_in.bias is not None and self.basis_out.bias is not None
        self.basis_in.bias.copy_(-(center @ basis) / spread)
        self.basis_out.weight.copy_((basis * spread)[:, :, None, None])
        self.basis_out.bias.copy_(center)

    def raw_latents(self, pixels: Tensor) -> Tensor:
        """Return unnormalized latents [B, C, F, H, W]."""
        patches = to_patches(pixels)
        latents = self.basis_in(patches) + self.encoder(patches)
        return rearrange(latents, "(b f) c h w -> b c f h w", b=pixels.shape[0])

    def raw_pixels(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, T, Y, X] of unnormalized latents."""
        before = torch.cat([latents[:, :, :1], latents[:, :, :-1]], dim=2)  # previous latent frame
        now, both = (
            rearrange(x, "b c f h w -> (b f) c h w")
            for x in (latents, torch.cat([latents, before], dim=1))
        )
        return from_patches(self.basis_out(now) + self.decoder(both), latents.shape[0])

    def encode(self, pixels: Tensor) -> Tensor:
        """Return normalized latents: on the training set mean 0 per channel, overall variance 1."""
        raw = self.raw_latents(pixels)
        return (raw - self.mean[:, None, None, None]) / self.std[:, None, None, None]

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels of normalized latents, clipped to [-1, 1]."""
        raw = latents * self.std[:, None, None, None] + self.mean[:, None, None, None]
        return self.raw_pixels(raw).clamp(-1, 1)


def lip_weight(lips: Tensor, height: int, width: int) -> Tensor:
    """Return the loss weight [B, 1, T, Y, X]: 1, and higher in the lip boxes [B, T, 4] (pixels)."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    x0, y0, x1, y1 = (lips[..., k, None, None] for k in range(4))
    inside = (rows >= y0) & (rows <= y1) & (columns >= x0) & (columns <= x1)
    return 1 + LIP_WEIGHT * inside[:, None].float()


def fit_autoencoder(
    pixels: Tensor,
    lips: Tensor,
    *,
    steps: int,
    seed: int,
    progress: Path,
    report: Report,
    batch: int = 16,
) -> CausalAutoencoder:
    """Fit and normalize an autoencoder to clips uint8 [N, 3, T, Y, X] with lip boxes [N, T, 4]."""
    torch.manual_seed(seed)
    # Start from the principal components of a sample of clips.
    net = CausalAutoencoder(width=WIDTH)
    enough = max(1, BASIS_VALUES // pixels[0].numel())
    net.fit_basis(pixels[:enough].float() / 127.5 - 1)
    count, frames = pixels.shape[0], pixels.shape[2]
    span, dtype = min(SPAN, frames), work_dtype()

    def loss_of(generator: torch.Generator) -> Tensor:
        # Draw random temporal crops of random clips.
        which = torch.randint(count, (batch,), generator=generator)
        start = int(torch.randint(frames - span + 1, (), generator=generator))
        truth = pixels[which, :, start : start + span].float() / 127.5 - 1
        weight = lip_weight(lips[which, start : start + span], *truth.shape[-2:])
        # Encode, add noise to simulate imperfect samples, decode.
        with torch.autocast(truth.device.type, dtype, enabled=dtype != torch.float32):
            raw = net.raw_latents(truth)
            level = LATENT_NOISE * torch.rand(batch, 1, 1, 1, 1, generator=generator)
            noise = level * torch.randn(raw.shape, generator=generator)
            error = net.raw_pixels(raw + noise).float() - truth
        # The last term keeps the latents near unit scale, to which LATENT_NOISE is relative.
        return (weight * (error.abs() + 2 * error.square())).mean() + 1e-3 * raw.square().mean()

    fit(net, loss_of, steps=steps, learning_rate=3e-3, seed=seed, progress=progress, report=report)
    set_normalization(net, pixels[:200])
    return net


@torch.no_grad()
def set_normalization(net: CausalAutoencoder, pixels: Tensor) -> None:
    """Set the mean of each channel and a common std from clips uint8 [N, 3, T, Y, X]."""
    raw = torch.cat([net.raw_latents(part.float() / 127.5 - 1) for part in pixels.split(16)])
    net.mean.copy_(raw.mean(dim=(0, 2, 3, 4)))
    net.std.fill_((raw - net.mean[:, None, None, None]).square().mean().sqrt())

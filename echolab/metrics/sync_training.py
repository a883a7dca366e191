"""Train SyncNet: the network by its architecture, the contrastive objective, accuracy by shift.

Windows of a clip are compared with each other, since other times of the same talker are the
hardest negatives, and every fifth window with those of the other clips of the micro-batch.
Embeddings are compared by their product, which for SyncNet, whose vectors are not normalized, is
made to equal minus half of the squared distance.  Shapes: B clips, L windows, D features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from echolab.errors import ConfigError
from echolab.metrics.demo_networks import SyncNetDemo, contrastive_loss
from echolab.metrics.networks.syncnet import SyncNet, audio_windows, lip_windows
from echolab.metrics.sync_clips import NETWORK
from echolab.types import Draws, Loss, SyncBatch

SHIFTS = (1, 2, 5)  # frames by which the audio is shifted, to both sides
MAX_SCALE = 50.0  # factor of the product of unit vectors
DISTANCE_SCALE = 0.1  # factor of half squared distances of SyncNet's vectors
CONTRAST, BRIGHTNESS, NOISE = 0.15, 0.1, 0.05  # standard deviations of the variation of pixels

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {"SyncNetDemo": SyncNetDemo, "SyncNet": SyncNet}


def constructor_arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the network's class, which an exported file records."""
    return {"dim": architecture["embed_dim"]} if architecture[NETWORK] == "SyncNetDemo" else {}


def sync_network(architecture: Mapping[str, Any], seed: int) -> nn.Module:
    """Return a network with PyTorch's initialization, which depends on `seed` alone."""
    # The random state of the process does not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[architecture[NETWORK]](**constructor_arguments(architecture))


def standardize(net: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Set mean and standard deviation of the cepstra; SyncNet's batch norm learns its own."""
    if isinstance(net, SyncNetDemo):
        net.cepstra_mean.copy_(mean)
        net.cepstra_std.copy_(std)


# -- embeddings ------------------------------------------------------------------------------------


def embed_talkers(net: nn.Module, pixels: Tensor, cepstra: Tensor) -> tuple[Tensor, Tensor]:
    """Map crops [B, T, 3, y, x] in [-1, 1] and cepstra to vectors of lips and audio, [B, T - 5, D].

    The product of two vectors is larger the better lips and audio fit.
    """
    match net:
        case SyncNetDemo():
            lips, audio = net.embed_lips(pixels), net.embed_audio(cepstra)
        case SyncNet():
            # SyncNet takes windows of BGR in 0 to 255.
            frames = (pixels.flip(2) + 1) * 127.5
            lips = _per_clip(net.embed_lips, torch.cat([lip_windows(f) for f in frames]), pixels)
            windows = torch.cat([audio_windows(columns) for columns in cepstra])
            audio = _per_clip(net.embed_audio, windows, pixels)
            lips = with_half_squares(lips.float(), first=True)
            audio = with_half_squares(audio.float(), first=False)
        case _:
            raise ConfigError(f"{type(net).__name__}: no SyncNet; use model=syncnet")
    count = min(lips.shape[1], audio.shape[1])
    return lips[:, :count].float(), audio[:, :count].float()


def _per_clip(embed: Callable[[Tensor], Tensor], windows: Tensor, clips: Tensor) -> Tensor:
    """Return the vectors of all windows of all clips, [B, L, D]."""
    return embed(windows).unflatten(0, (len(clips), -1))


def with_half_squares(vectors: Tensor, *, first: bool) -> Tensor:
    """Append two features, so that products are minus half of the squared distance.

    v a - |v|^2 / 2 - |a|^2 / 2 = - |v - a|^2 / 2.
    """
    # The first vectors get (half, 1), the second (1, half).
    half = -vectors.square().sum(-1, keepdim=True) / 2
    one = torch.ones_like(half)
    return torch.cat([vectors, half, one] if first else [vectors, one, half], dim=-1)


def scale_of(net: nn.Module) -> Tensor:
    """Return the factor of the products in the loss; learned by the small network."""
    if isinstance(net, SyncNetDemo):
        return net.log_temperature.exp().clamp(max=MAX_SCALE)
    return torch.tensor(DISTANCE_SCALE, device=next(net.parameters()).device)


# -- objective -------------------------------------------------------------------------------------


def vary_pixels(crops: Tensor, draws: Draws) -> Tensor:
    """Return crops uint8 in [-1, 1], with contrast, brightness and noise of cameras and codecs."""
    # Contrast and brightness vary per clip, uniformly with these standard deviations.
    centered = (draws.uniforms - 0.5) * 12**0.5
    contrast, brightness = (u[:, None, None, None, None] for u in centered.unbind(1))
    pixels = crops.float() / 127.5 - 1
    varied = pixels * (1 + CONTRAST * contrast) + BRIGHTNESS * brightness
    return varied + NOISE * draws.noise


class SyncContrast:
    """The contrastive loss of lips and audio."""

    def __call__(self, net: nn.Module, batch: SyncBatch, draws: Draws) -> Loss:
        """Return the loss; parts: `sync_accuracy` [B], see `shift_accuracies`."""
        lips, audio = embed_talkers(net, vary_pixels(batch.crops, draws), batch.cepstra)
        # Products in bf16 would round differences of squared distances away.
        with torch.autocast(lips.device.type, enabled=False):
            loss = contrastive_loss(lips, audio, scale_of(net))
            exact = shift_accuracies(lips.detach(), audio.detach())[:, 0]
        return Loss(loss, {"sync_accuracy": exact})


def clip_losses(lips: Tensor, audio: Tensor, scale: Tensor) -> Tensor:
    """Return the contrastive loss of each clip with its own windows alone, [B].

    It depends on no other clip, so that validation does not depend on the size of batches.
    """
    # Window i of the lips matches window i of the audio, in both directions.
    logits = scale * torch.einsum("bid,bjd->bij", lips, audio)
    targets = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    losses = [
        functional.cross_entropy(rows.transpose(1, 2), targets, reduction="none").mean(1)
        for rows in (logits, logits.transpose(1, 2))
    ]
    return losses[0] + losses[1]


def shift_accuracies(lips: Tensor, audio: Tensor) -> Tensor:
    """Return the accuracies of each clip, [B, 1 + len(SHIFTS)].

    First the share of windows whose audio is closer than that of every other window of the clip;
    then, by shift K, how often it is closer than the audio K frames earlier or later.  A tie counts
    as half.  NaN for a shift that is as long as the clip.
    """
    # Products of all pairs of windows; the diagonal is true.
    products = torch.einsum("bid,bjd->bij", lips, audio)
    count = products.shape[1]
    true = products.diagonal(dim1=1, dim2=2)  # [B, L]
    others = products + torch.diag(products.new_full((count,), -torch.inf))
    columns = [_wins(true, others.amax(2)) if count > 1 else true.new_full((len(true),), torch.nan)]
    for shift in SHIFTS:
        later, earlier = (products.diagonal(k, dim1=1, dim2=2) for k in (shift, -shift))
        # Row i of the lips is compared with columns i + K and i - K, as far as they exist.
        kept = max(count - shift, 0)
        pairs = torch.cat([true[:, :kept], true[:, count - kept :]], 1)
        columns.append(_wins(pairs, torch.cat([later, earlier], 1)))
    return torch.stack(columns, 1)


def _wins(true: Tensor, other: Tensor) -> Tensor:
    """Return how often `true` is larger, [B]; a tie counts as half."""
    return ((true > other).float() + 0.5 * (true == other).float()).mean(1)

"""PSNR, SSIM and LPIPS against a recorded video, and the PSNR of the first frame.

A generated video follows its audio but not the recorded head, so PSNR and SSIM against the recorded
video are low even for good videos; they compare reconstructions, e.g. ground truth through the
autoencoder.  The first frame is given to the network, and should equal the reference.
"""

from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from echolab.encoders.files import sha256_of
from echolab.errors import WeightsError
from echolab.metrics.card import Card
from echolab.metrics.metric import Score, VideoClip, VideoMetric, mean_score
from echolab.metrics.setup import Setup
from echolab.metrics.weights import ALEXNET, LPIPS_ALEX
from echolab.model_files import find_model_file
from echolab.models.loading import read_pickle

PERFECT_PSNR = 100.0  # dB, for equal images
SSIM_WINDOW = 11  # pixels; the original's Gaussian window with sigma 1.5
ALEXNET_PIXELS = 32  # smallest side that leaves one pixel after AlexNet's last convolution

NO_TRUTH = "no recorded video"
LENGTH = "recorded video of another length"
SIZE = "recorded video of another size"
EMPTY = "no frames"


def psnr_8bit(first: Tensor, second: Tensor) -> Tensor:
    """Return the PSNR [T] in dB of frames [T, ...] uint8, peak 255, 100 dB for equal frames."""
    # One frame at a time: the video in fp64 would need eight times its memory.
    errors = [(a.double() - b.double()).square().mean() for a, b in zip(first, second, strict=True)]
    lowest = 255**2 / 10 ** (PERFECT_PSNR / 10)
    return 10 * torch.log10(255**2 / torch.stack(errors).clamp(min=lowest))


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Return the SSIM [T] of frames [T, 3, Y, X] uint8 with at least 11 pixels a side.

    Wang et al. (2004) as in torchmetrics: Gaussian window, constants of 0.01 and 0.03, mean over
    the pixels and colors; windows at the edges see a mirrored image.
    """
    # In fp32, as the convolutions of fp64 take ten times as long for the fourth digit.
    values = [
        structural_similarity_index_measure(
            a[None].float(), b[None].float(), data_range=255.0, kernel_size=SSIM_WINDOW
        )
        for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(values).double()


def truth_fault(clip: VideoClip, smallest: int = 1) -> str:
    """Return why a clip cannot be compared with its recorded video frame by frame, or ""."""
    if clip.truth is None:
        return NO_TRUTH
    if len(clip.truth) != len(clip.frames):
        return LENGTH
    if not len(clip.frames):
        return EMPTY
    if clip.truth.shape != clip.frames.shape or min(clip.frames.shape[-2:]) < smallest:
        return SIZE
    return ""


class Fidelity(VideoMetric):
    """PSNR in dB and SSIM against the recorded video of the same frames, `psnr` and `ssim`."""

    reasons = (NO_TRUTH, LENGTH, EMPTY, SIZE)

    def __init__(self, num_clips: int, ssim_every: int = 5) -> None:
        """Compute PSNR of all frames, and SSIM, which takes longer, of every fifth."""
        super().__init__(num_clips)
        self.ssim_every = ssim_every
        self.add_table("psnr")
        self.add_table("ssim")

    psnr: Tensor
    ssim: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the means over frames."""
        if fault := truth_fault(clip, SSIM_WINDOW):
            return fault
        assert clip.truth is not None
        self.psnr[index] = psnr_8bit(clip.frames, clip.truth).mean()
        every = slice(None, None, self.ssim_every)
        self.ssim[index] = ssim(clip.frames[every], clip.truth[every]).mean()
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the means over clips."""
        return {"psnr": mean_score(self.psnr[scored]), "ssim": mean_score(self.ssim[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the cards of both scores."""
        frames = "8-bit RGB frames, each with the recorded frame of the same time"
        return {
            "psnr": Card(
                metric="psnr",
                definition="10 log10(255^2 / MSE) of each frame in dB, mean over frames and clips; "
                "100 dB for equal frames",
                preprocessing=frames,
            ),
            "ssim": Card(
                metric="ssim",
                definition="SSIM of Wang et al. 2004 (torchmetrics), mean over frames and clips",
                preprocessing=f"{frames}; mirrored at the edges",
                settings={
                    "window": SSIM_WINDOW,
                    "sigma": 1.5,
                    "k1": 0.01,
                    "k2": 0.03,
                    "every": self.ssim_every,
                },
            ),
        }


class FirstFrame(VideoMetric):
    """PSNR in dB of the first frame against the reference image, `psnr_first_frame`."""

    NO_REFERENCE = "no reference image"
    OTHER_SIZE = "reference image of another size"
    reasons = (NO_REFERENCE, EMPTY, OTHER_SIZE)

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self.add_table("psnr")

    psnr: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the PSNR."""
        if clip.reference is None:
            return self.NO_REFERENCE
        if not len(clip.frames):
            return EMPTY
        if clip.reference.shape != clip.frames.shape[1:]:
            return self.OTHER_SIZE
        self.psnr[index] = psnr_8bit(clip.frames[:1], clip.reference[None])[0]
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"psnr_first_frame": mean_score(self.psnr[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        return {
            "psnr_first_frame": Card(
                metric="psnr_first_frame",
                definition="10 log10(255^2 / MSE) of the first frame and the reference image in "
                "dB, mean over clips; 100 dB if equal",
                preprocessing="8-bit RGB",
            )
        }


# -- LPIPS -----------------------------------------------------------------------------------------


class AlexNetFeatures(nn.Module):
    """The five ReLU activations of AlexNet (Krizhevsky 2014), named as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        # The ReLU layers must not overwrite their input: it is the output of the convolution.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images [N, 3, Y, X] to the activations after each ReLU."""
        activations = []
        for layer in self.features:
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                activations.append(images)
        return activations


class LpipsAlex(nn.Module):
    """LPIPS 0.1 with AlexNet: Zhang et al. 2018, squared differences of unit features."""

    CHANNELS = (64, 192, 384, 256, 256)

    def __init__(self) -> None:
        super().__init__()
        self.net = AlexNetFeatures()
        self.heads = nn.ParameterList(
            [nn.Parameter(torch.ones(channels)) for channels in self.CHANNELS]
        )
        # ImageNet's mean and std, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    shift: Tensor
    scale: Tensor

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance [N] of images [N, 3, Y, X] in [-1, 1]."""
        # Weight the channels by the heads, average over pixels, and sum over the layers.
        distance = torch.zeros(len(first))
        pairs = [self.net((images - self.shift) / self.scale) for images in (first, second)]
        for head, a, b in zip(self.heads, *pairs, strict=True):
            square = (self._unit(a) - self._unit(b)).square()
            distance = distance + torch.einsum("c,ncyx->n", head, square) / a[0, 0].numel()
        return distance

    @staticmethod
    def _unit(features: Tensor) -> Tensor:
        return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def lpips_heads() -> Path:
    """Return the file of LPIPS's linear heads for AlexNet, which torchmetrics ships."""
    return Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"


def load_lpips(alexnet: Path) -> LpipsAlex:
    """Read LPIPS from torchvision's AlexNet file and the heads that torchmetrics ships.

    Raise WeightsError for a file that is not AlexNet's.
    """
    # The classifier of AlexNet is not used.
    network = LpipsAlex()
    stored = read_pickle(alexnet)
    features = {name: value for name, value in stored.items() if name.startswith("features.")}
    try:
        network.net.load_state_dict(features)
    except RuntimeError as error:
        raise WeightsError(
            f"{alexnet}: not torchvision's AlexNet; use alexnet-owt-7be5be79.pth"
        ) from error
    # The heads are 1 x 1 convolutions with one output and no bias.
    heads = read_pickle(lpips_heads())
    for i, head in enumerate(network.heads):
        head.data.copy_(heads[f"lin{i}.model.1.weight"].flatten())
    return network.eval().requires_grad_(False)


class Lpips(VideoMetric):
    """LPIPS with AlexNet against the recorded video of the same frames, `lpips`."""

    reasons = (NO_TRUTH, LENGTH, EMPTY, SIZE)

    def __init__(self, num_clips: int, network: LpipsAlex, weights: str, every: int = 5) -> None:
        """Take a network and the sha256 of its AlexNet file, or the word "random"."""
        super().__init__(num_clips)
        self.network, self.weights, self.every = network.eval(), weights, every
        self.add_table("distance")

    distance: Tensor

    def score_clip(self, index: int, clip: VideoClip) -> str:
        """Store the mean over every fifth frame."""
        if fault := truth_fault(clip, ALEXNET_PIXELS):
            return fault
        assert clip.truth is not None
        # One pair at a time, since the size of a batch changes rounding.
        pairs = zip(clip.frames[:: self.every], clip.truth[:: self.every], strict=True)
        distances = [
            self.network(a[None].float() / 127.5 - 1, b[None].float() / 127.5 - 1) for a, b in pairs
        ]
        self.distance[index] = torch.cat(distances).double().mean()
        return ""

    def scores_of(self, scored: Tensor) -> dict[str, Score]:
        """Return the mean over clips."""
        return {"lpips": mean_score(self.distance[scored])}

    def cards(self) -> dict[str, Card]:
        """Return the card."""
        return {
            "lpips": Card(
                metric="lpips",
                definition="LPIPS 0.1 of Zhang et al. 2018, mean over frames and clips",
                preprocessing="RGB frames in [-1, 1] at full size, each with the recorded frame of "
                "the same time",
                network="AlexNet with LPIPS's linear heads",
                weights=self.weights,
                license=f"{ALEXNET.license} (AlexNet), {LPIPS_ALEX.license} (heads)",
                settings={"every": self.every, "heads": sha256_of([lpips_heads()])},
            )
        }


# -- the functions that a configuration names ------------------------------------------------------


def against_truth(setup: Setup, *, ssim_every: int = 5) -> VideoMetric:
    """Build PSNR and SSIM against the recorded video."""
    return Fidelity(setup.num_clips, ssim_every)


def first_frame(setup: Setup) -> VideoMetric:
    """Build the PSNR of the first frame."""
    return FirstFrame(setup.num_clips)


def lpips(setup: Setup, *, every: int = 5) -> VideoMetric:
    """Build LPIPS; raise MissingWeightsError without AlexNet's file."""
    path = find_model_file(ALEXNET, setup.networks, setting="metrics.networks")
    return Lpips(setup.num_clips, load_lpips(path), sha256_of([path]), every)

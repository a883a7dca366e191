"""SyncNet (Chung and Zisserman, 2016), with the layers of joonson/syncnet_python.

Two streams map 0.2 s of lips and of audio to vectors [1024] that are close if both are in sync.
Every convolution is followed by batch norm and ReLU; the outputs are not normalized.

    lips    5 frames of 224 x 224 pixels, BGR, 0 to 255, no mean, no standard deviation
    audio   13 cepstra of 20 columns of 10 ms, of 16-bit samples at 16 kHz

`SyncNet` is the published network.  `VideoSyncNet` evaluates the same function on a complete video.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

FRAMES_PER_WINDOW = 5
CEPSTRA_PER_FRAME = 4
CEPSTRA_PER_WINDOW = 20
CEPSTRA = 13
CROP_PIXELS = 224
DIM = 1024
WINDOWS_PER_BATCH = 8  # of a complete video; more do not fit into the caches of a CPU


def convolution(inputs: int, outputs: int, kernel: tuple[int, int], pad: int) -> list[nn.Module]:
    """Return a convolution of cepstra with batch norm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=pad)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def frame_convolution(
    inputs: int, outputs: int, size: int, pad: int = 0, stride: int = 1, frames: int = 1
) -> list[nn.Module]:
    """Return a convolution of `frames` frames and size x size pixels with batch norm and ReLU."""
    # Only the first layer spans several frames; none pads or strides in time.
    conv = nn.Conv3d(inputs, outputs, (frames, size, size), (1, stride, stride), (0, pad, pad))
    return [conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]


def frame_pool(pad: int = 0) -> nn.MaxPool3d:
    """Return a pool over 3 x 3 pixels of each frame with stride 2."""
    return nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, pad, pad))


def head() -> nn.Sequential:
    """Return the two linear layers that end a stream."""
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, DIM))


class SyncNet(nn.Module):
    """The published network; parameters have the names of the released `syncnet_v2.model`."""

    def __init__(self) -> None:
        super().__init__()
        # 13 x 20 cepstra -> 11 x 9 -> 5 x 4 -> 1 x 1.
        self.netcnnaud = nn.Sequential(
            *convolution(1, 64, (3, 3), 1),
            nn.MaxPool2d(1, 1),  # keeps the released indices of layers
            *convolution(64, 192, (3, 3), 1),
            nn.MaxPool2d(3, (1, 2)),
            *convolution(192, 384, (3, 3), 1),
            *convolution(384, 256, (3, 3), 1),
            *convolution(256, 256, (3, 3), 1),
            nn.MaxPool2d(3, 2),
            *convolution(256, 512, (5, 4), 0),
        )
        self.netfcaud = head()
        self.netfclip = head()
        # 5 x 224 x 224 pixels -> 109 -> 54 -> 26 -> 13 -> 6 -> 1.
        self.netcnnlip = nn.Sequential(
            *frame_convolution(3, 96, 7, stride=2, frames=FRAMES_PER_WINDOW),
            frame_pool(),
            *frame_convolution(96, 256, 5, pad=1, stride=2),
            frame_pool(pad=1),
            *frame_convolution(256, 256, 3, pad=1),
            *frame_convolution(256, 256, 3, pad=1),
            *frame_convolution(256, 256, 3, pad=1),
            frame_pool(),
            *frame_convolution(256, 512, 6),
        )

    def embed_lips(self, windows: Tensor) -> Tensor:
        """Map windows of lips [N, 3, 5, 224, 224] to vectors [N, 1024]."""
        vectors: Tensor = self.netfclip(self.netcnnlip(windows).flatten(1))
        return vectors

    def embed_audio(self, windows: Tensor) -> Tensor:
        """Map windows of cepstra [N, 1, 13, 20] to vectors [N, 1024]."""
        vectors: Tensor = self.netfcaud(self.netcnnaud(windows).flatten(1))
        return vectors


class VideoSyncNet(nn.Module):
    """SyncNet on all windows of a video; equal to a loop over windows to fp32 rounding.

    A window of lips is the first convolution's output at one frame, since that convolution spans 5
    frames without padding and all later layers work on single frames.  The lip stream is therefore
    run once over the frames: as 2-D convolutions over the 15 color planes of 5 frames, with batch
    norm folded into weights, ReLU after the pool (both are monotone), and channels last.

    Windows of audio share 16 of 20 columns, but each is padded with zeros at its own ends, and the
    padding reaches further in with every layer.  To share what stays equal would save a
    sixth of the multiplications of the audio stream, 2 % of both.  The audio stream is therefore
    run on windows, with the same folding.
    """

    def __init__(self, net: SyncNet) -> None:
        """Fold the weights of a network in evaluation mode."""
        super().__init__()
        self.lips = nn.Sequential(*folded(net.netcnnlip), nn.Flatten(), *folded(net.netfclip))
        self.audio = nn.Sequential(*folded(net.netcnnaud), nn.Flatten(), *folded(net.netfcaud))
        # Pools over channels are five times faster if channels are the innermost dimension.
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @torch.no_grad()
    def embed_frames(self, frames: Tensor) -> Tensor:
        """Map crops of a face, uint8 RGB [T, 3, 224, 224], to one vector per window, [T - 4, 1024].

        Raise ValueError for less than 5 frames.
        """
        count = len(frames) - FRAMES_PER_WINDOW + 1
        if count < 1:
            raise ValueError(f"{len(frames)} frames: a window needs {FRAMES_PER_WINDOW}")
        # Color planes of five successive frames, the innermost dimension in memory.
        planes = frames.flip(1).permute(0, 2, 3, 1).to(self.device)  # [T, Y, X, 3] BGR
        vectors = []
        for first in range(0, count, WINDOWS_PER_BATCH):
            last = min(first + WINDOWS_PER_BATCH, count)
            shifted = [planes[first + k : last + k] for k in range(FRAMES_PER_WINDOW)]
            windows = torch.cat(shifted, -1).float().permute(0, 3, 1, 2)
            with full_precision():
                vectors.append(self.lips(windows))
        return torch.cat(vectors)

    @torch.no_grad()
    def embed_cepstra(self, cepstra: Tensor) -> Tensor:
        """Map cepstra [columns, 13] to one vector per frame, [1 + (columns - 20) // 4, 1024].

        Raise ValueError for less than 20 columns.
        """
        if len(cepstra) < CEPSTRA_PER_WINDOW:
            raise ValueError(f"{len(cepstra)} columns: a window needs {CEPSTRA_PER_WINDOW}")
        # Windows of audio are small: take more of them at once.
        windows = audio_windows(cepstra.to(self.device))
        with full_precision():
            return torch.cat([self.audio(part) for part in windows.split(8 * WINDOWS_PER_BATCH)])


def full_precision() -> AbstractContextManager[None]:
    """Return a context in which GPUs convolve in fp32, instead of TF32 with errors of 1e-3."""
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )
    return context


def lip_windows(frames: Tensor) -> Tensor:
    """Return all windows [T - 4, 3, 5, Y, X], as a view, of frames [T, 3, Y, X]."""
    # A view, which takes no memory.
    return frames.unfold(0, FRAMES_PER_WINDOW, 1).permute(0, 1, 4, 2, 3)


def audio_windows(cepstra: Tensor) -> Tensor:
    """Return all windows [L, 1, 13, 20], as a view, of cepstra [columns, 13]."""
    return cepstra.unfold(0, CEPSTRA_PER_WINDOW, CEPSTRA_PER_FRAME)[:, None]


def folded(layers: nn.Sequential) -> Iterator[nn.Module]:
    """Yield the same function of 2-D layers without batch norm, with ReLU after a pool.

    A convolution of five frames becomes one over their color planes: frame by frame, color by
    color.
    """
    # A batch norm is merged into the layer before it.
    modules = list(layers)
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        match module, following:
            case nn.Conv2d(), nn.BatchNorm2d():
                yield fuse_conv_bn_eval(module, following)
            case nn.Conv3d(), nn.BatchNorm3d():
                yield in_two_dimensions(fuse_conv_bn_eval(module, following))
            case nn.Linear(), nn.BatchNorm1d():
                yield fuse_linear_bn_eval(module, following)
            case nn.Linear(), _:
                yield module
            case nn.ReLU(), nn.MaxPool2d() | nn.MaxPool3d():
                yield pool_of(following)
                yield nn.ReLU(inplace=True)
            case nn.ReLU(), _:
                yield nn.ReLU(inplace=True)


def in_two_dimensions(conv: nn.Conv3d) -> nn.Conv2d:
    """Return the 2-D convolution over color planes that equals a 3-D one at one frame."""
    # The first dimension of the kernel becomes part of the channels.
    outputs, inputs, frames = conv.weight.shape[:3]
    size, stride, pad = conv.kernel_size[1], conv.stride[1], conv.padding[1]
    flat = nn.Conv2d(inputs * frames, outputs, size, stride, pad)
    flat.weight = nn.Parameter(conv.weight.transpose(1, 2).flatten(1, 2))
    flat.bias = conv.bias
    return flat


def pool_of(pool: nn.MaxPool2d | nn.MaxPool3d) -> nn.MaxPool2d:
    """Return the 2-D pool of the same kernel, stride and padding."""

    def last_two(size: Any) -> Any:
        return size if isinstance(size, int) else size[-2:]

    # Pools of single frames have kernels (1, height, width).
    kernel, stride, pad = (last_two(v) for v in (pool.kernel_size, pool.stride, pool.padding))
    return nn.MaxPool2d(kernel, stride, pad)

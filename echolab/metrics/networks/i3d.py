"""I3D: Inception-v1 inflated to three dimensions, with the 400 logits of Kinetics.

FVD is defined on the logits of TF Hub's `deepmind/i3d-kinetics-400/1`, averaged over time and
before softmax.  Padding is TensorFlow's SAME, which depends on the size of the input.  Source:
Carreira and Zisserman 2017; Unterthiner et al. 2018.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from echolab.errors import WeightsError

CLASSES = 400
EPSILON = 1e-3  # of batch norm, as in Sonnet
Triple = tuple[int, int, int]

# Channels of the branches of each block: 1x1; 1x1 and 3x3; 1x1 and 3x3; after the pool.
BLOCKS: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Max pools before layers: kernel and stride in time, height and width.
POOLS: dict[str, tuple[Triple, Triple]] = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Pad [B, C, T, Y, X] with zeros as TensorFlow's SAME: the odd element comes at the end."""
    padding: list[int] = []
    # functional.pad lists the last dimension first.
    sizes = zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True)
    for size, length, step in sizes:
        # SAME gives ceil(size / step) outputs.
        total = max((-(-size // step) - 1) * step + length - size, 0)
        padding += [total // 2, total - total // 2]
    return functional.pad(x, padding) if any(padding) else x


def max_pool_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Pool the maximum with SAME padding; zeros change nothing, since activations are positive."""
    return functional.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class Unit3d(nn.Module):
    """Convolution with SAME padding, batch norm and ReLU; the logits have a bias instead."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 1, *, stride: int = 1, logits: bool = False
    ) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, size, stride, bias=logits)
        self.bn = None if logits else nn.BatchNorm3d(outputs, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, T, Y, X] to [B, outputs, T', Y', X']."""
        x = self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else functional.relu(self.bn(x))


class Mixed(nn.Module):
    """An Inception block of four branches."""

    def __init__(self, inputs: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        # Both double branches have kernels of 3; Inception-v1 has one of 5.
        one, three_in, three, five_in, five, pool = channels
        self.b0 = Unit3d(inputs, one)
        self.b1a, self.b1b = Unit3d(inputs, three_in), Unit3d(three_in, three, 3)
        self.b2a, self.b2b = Unit3d(inputs, five_in), Unit3d(five_in, five, 3)
        self.b3b = Unit3d(inputs, pool)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, T, Y, X] to the concatenated branches."""
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        branches = [
            self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled),
        ]  # fmt: skip
        return torch.cat(branches, 1)


class I3d(nn.Module):
    """I3D of RGB video with 400 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3d(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit3d(64, 64)
        self.Conv3d_2c_3x3 = Unit3d(64, 192, 3)
        # Each block receives the concatenated branches of the one before.
        inputs = 192
        for name, channels in BLOCKS.items():
            self.add_module(name, Mixed(inputs, channels))
            inputs = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = Unit3d(inputs, CLASSES, logits=True)

    def forward(self, video: Tensor) -> Tensor:
        """Map video [B, 3, T, 224, 224] in [-1, 1], T >= 9, to logits [B, 400]."""
        # Layers run in the order of their definition, some after a pool.
        x = video
        for name, layer in self.named_children():
            if name in POOLS:
                x = max_pool_same(x, *POOLS[name])
            if name == "logits":
                x = functional.avg_pool3d(x, (2, 7, 7), stride=1)
            x = layer(x)
        return x.mean((2, 3, 4))


def convert_i3d(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return released tensors under the names of `I3d`.

    Releases name their layers differently, but all define them in the order of the graph, each as a
    unit with one convolution and the four statistics of its batch norm.  Shapes are compared when
    the network is filled.  Raise WeightsError for tensors that are no such units.
    """
    # Pair the convolutions of both by their order.
    units = [name for name, module in _skeleton().named_modules() if isinstance(module, Unit3d)]
    kernels = [name for name, value in tensors.items() if value.ndim == 5]
    if len(kernels) != len(units):
        raise WeightsError(
            f"I3D: {len(kernels)} convolutions in the file, need {len(units)}; "
            "give the released i3d_torchscript.pt"
        )
    converted: dict[str, Tensor] = {}
    for unit, kernel in zip(units, kernels, strict=True):
        convolution = kernel.rpartition(".")[0]
        prefix = convolution.rpartition(".")[0] + "."
        # The tensors of a unit are those below its prefix.
        for name, value in tensors.items():
            if name.startswith(prefix):
                last = name.rpartition(".")[2]
                part = "conv3d" if name.rpartition(".")[0] == convolution else "bn"
                converted[f"{unit}.{part}.{last}"] = value
    return converted


def _skeleton() -> I3d:
    """Return the network without memory, for its names."""
    with torch.device("meta"):
        return I3d()

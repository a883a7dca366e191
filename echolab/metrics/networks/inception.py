"""FID-Inception: the Inception-v3 of 2015-12-05 whose pooled features define FID.

It is not the Inception-v3 of torchvision.  Average pools ignore their padding, the last block has a
max pool instead, and the classifier has 1008 outputs.  Names of parameters are those of
pytorch-fid's released file.  Source: Heusel et al. 2017 and mseitzer/pytorch-fid.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES, CLASSES, SIZE = 2048, 1008, 299
EPSILON = 1e-3  # of batch norm, as in the TensorFlow graph

# Pools of the branches without convolution; FID-Inception does not count padding in averages.
average_pool = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1,
                       count_include_pad=False)  # fmt: skip
max_pool = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(functional.max_pool2d, kernel_size=3, stride=2)


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, Y, X] to [B, outputs, Y', X']."""
        return functional.relu(self.bn(self.conv(x)))


def wide(inputs: int, outputs: int, length: int) -> BasicConv2d:
    """Return a 1 x `length` convolution that keeps the size."""
    return BasicConv2d(inputs, outputs, (1, length), padding=(0, length // 2))


def tall(inputs: int, outputs: int, length: int) -> BasicConv2d:
    """Return a `length` x 1 convolution that keeps the size."""
    return BasicConv2d(inputs, outputs, (length, 1), padding=(length // 2, 0))


class InceptionA(nn.Module):
    """The block of 35 x 35 features."""

    def __init__(self, inputs: int, pool_features: int) -> None:
        super().__init__()
        # Two 3 x 3 convolutions see as much as one of 5 x 5, with fewer weights.
        self.branch1x1 = BasicConv2d(inputs, 64, 1)
        self.branch5x5_1 = BasicConv2d(inputs, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(inputs, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, Y, X] to [B, 224 + pool_features, Y, X]."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average_pool(x))], 1)


class InceptionB(nn.Module):
    """The block that reduces 35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        # Without padding, a stride of 2 maps 35 to 17.
        self.branch3x3 = BasicConv2d(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, Y, X] to [B, inputs + 480, Y / 2, X / 2]."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halve(x)], 1)


class InceptionC(nn.Module):
    """The block of 17 x 17 features, with `c7` channels within its branches."""

    def __init__(self, inputs: int, c7: int) -> None:
        super().__init__()
        # Kernels of 7 x 7 are factored into rows and columns.
        self.branch1x1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7_1 = BasicConv2d(inputs, c7, 1)
        self.branch7x7_2 = wide(c7, c7, 7)
        self.branch7x7_3 = tall(c7, 192, 7)
        self.branch7x7dbl_1 = BasicConv2d(inputs, c7, 1)
        self.branch7x7dbl_2 = tall(c7, c7, 7)
        self.branch7x7dbl_3 = wide(c7, c7, 7)
        self.branch7x7dbl_4 = tall(c7, c7, 7)
        self.branch7x7dbl_5 = wide(c7, 192, 7)
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, Y, X] to [B, 768, Y, X]."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average_pool(x))], 1)


class InceptionD(nn.Module):
    """The block that reduces 17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        # Both branches reduce the size in their last layer.
        self.branch3x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7x3_2 = wide(192, 192, 7)
        self.branch7x7x3_3 = tall(192, 192, 7)
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, Y, X] to [B, inputs + 512, Y / 2, X / 2]."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), halve(x)], 1)


class InceptionE(nn.Module):
    """The block of 8 x 8 features; the last one pools the maximum instead of the average."""

    def __init__(self, inputs: int, *, last: bool) -> None:
        super().__init__()
        self.last = last
        # Two branches end in a row and a column side by side, not one after the other.
        self.branch1x1 = BasicConv2d(inputs, 320, 1)
        self.branch3x3_1 = BasicConv2d(inputs, 384, 1)
        self.branch3x3_2a = wide(384, 384, 3)
        self.branch3x3_2b = tall(384, 384, 3)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = wide(384, 384, 3)
        self.branch3x3dbl_3b = tall(384, 384, 3)
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, Y, X] to [B, 2048, Y, X]."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x) if self.last else average_pool(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class FidInception(nn.Module):
    """Inception-v3 of FID: images to 2048 features, and a classifier that FID does not use."""

    def __init__(self) -> None:
        super().__init__()
        # Stem: 299 x 299 pixels to 35 x 35 features.
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        # Blocks of 35 x 35, 17 x 17 and 8 x 8.
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, last=False)
        self.Mixed_7c = InceptionE(2048, last=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 299, 299] in [-1, 1] to features [B, 2048]."""
        # The two max pools of the stem have no parameters.
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x))))
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))

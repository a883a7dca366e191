"""Light-ASD (Liao et al., CVPR 2023): does this face speak this audio?

A learned audio-visual network that is independent of SyncNet, with public weights.  It reads the
same crops and cepstra, so it checks both.  It does not resolve shifts of a few frames.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

GRAY_MEAN, GRAY_STD = 0.4161, 0.1688


class Branch(nn.Module):
    """Two branches of kernel 3 and 5, first over space or mel, then over time, added."""

    def __init__(self, first: str, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = first
        # Video is [B, C, T, Y, X] and audio is [B, C, mel, T].
        video = first == "s"
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if video else (nn.Conv2d, nn.BatchNorm2d)
        for size in (3, 5):
            half = size // 2
            space = ((1, size, size), (1, stride, stride), (0, half, half))
            over = space if video else ((size, 1), 1, (half, 0))
            time = ((size, 1, 1), 1, (half, 0, 0)) if video else ((1, size), 1, (0, half))
            self.add_module(f"{first}_{size}", conv(inputs, outputs, *over, bias=False))
            self.add_module(f"bn_{first}_{size}", norm(outputs, eps=1e-3))
            self.add_module(f"t_{size}", conv(outputs, outputs, *time, bias=False))
            self.add_module(f"bn_t_{size}", norm(outputs, eps=1e-3))
        self.last = conv(outputs, outputs, 1, bias=False)
        self.bn_last = norm(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of both branches, mixed."""
        total = torch.zeros(())
        for size in (3, 5):
            y = x
            for name in (f"{self.first}_{size}", f"t_{size}"):
                layer, norm = self.get_submodule(name), self.get_submodule(f"bn_{name}")
                y = functional.relu(norm(layer(y)))
            total = total + y
        mixed: Tensor = functional.relu(self.bn_last(self.last(total)))
        return mixed


class Encoder(nn.Module):
    """Three blocks with pools in between."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.video = first == "s"
        self.block1 = Branch(first, 1, 32, stride=2)
        self.block2 = Branch(first, 32, 64)
        self.block3 = Branch(first, 64, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Map grays [1, 1, T, Y, X] or cepstra [1, 1, 13, 4 T] to features [1, T, 128]."""
        for block in (self.block1, self.block2):
            x = block(x)
            if self.video:
                x = functional.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
            else:
                x = functional.max_pool2d(x, (1, 3), (1, 2), (0, 1))
        x = self.block3(x)
        # One feature a frame: the maximum over the image, or the mean over the cepstra.
        x = x.amax((3, 4)) if self.video else x.mean(2)
        return x.transpose(1, 2)


class LightAsd(nn.Module):
    """Both encoders, a GRU in each direction of time, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.visualEncoder = Encoder("s")
        self.audioEncoder = Encoder("m")
        self.GRU = nn.ModuleDict(
            {name: nn.GRU(128, 128, batch_first=True) for name in ("gru_forward", "gru_backward")}
        )
        self.FC = nn.Linear(128, 2)

    @torch.no_grad()
    def see(self, grays: Tensor) -> Tensor:
        """Map grays [T, 112, 112] in 0 to 255 to features [1, T, 128]."""
        seen: Tensor = self.visualEncoder((grays[None, None] / 255 - GRAY_MEAN) / GRAY_STD)
        return seen

    @torch.no_grad()
    def forward(self, seen: Tensor, cepstra: Tensor) -> Tensor:
        """Map features of `see` and cepstra [4 T, 13] to logits of speech [T]."""
        x = seen + self.audioEncoder(cepstra.T[None, None])
        x = functional.gelu(self.GRU["gru_forward"](x)[0])
        x = functional.gelu(self.GRU["gru_backward"](x.flip(1))[0].flip(1))
        logits: Tensor = self.FC(x)[0, :, 1]
        return logits


def light_asd(state: dict[str, Tensor]) -> LightAsd:
    """Return the network with the weights of `pretrain_AVA_CVPR.model`."""
    # The file also has a layer for video alone, which only training uses.
    names = {name.removeprefix("model.").replace("lossAV.", ""): name for name in state}
    net = LightAsd()
    net.load_state_dict({new: state[old] for new, old in names.items() if "lossV" not in old})
    return net.eval().requires_grad_(False)

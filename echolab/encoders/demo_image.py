"""The reference picture as 16 coarse patches with their places: the stand-in for CLIP."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

SIDE, PATCH = 32, 8
TOKENS = (SIDE // PATCH) ** 2
SIZE = 3 * PATCH**2 + TOKENS


def encode_picture(picture: Tensor | None) -> Tensor:
    """A picture [3, Y, X] in [-1, 1] to [16, 208]; squeezed to 32 x 32, as CLIP squeezes to 224.

    Zeros where there is no picture.
    """
    if picture is None:
        return torch.zeros(TOKENS, SIZE)
    small = functional.interpolate(picture[None], (SIDE, SIDE), mode="area")[0]
    patches = rearrange(small, "c (h p) (w q) -> (h w) (c p q)", p=PATCH, q=PATCH)
    return torch.cat([patches, torch.eye(TOKENS)], dim=1)

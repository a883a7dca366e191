"""The image encoder of Wan: CLIP ViT-H/14 as transformers' CLIPVisionModel.

Weights come from Wan's file or from a transformers folder.

Shapes: N = 257 tokens, D = 1280.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from echolab.encoders.files import assign_parameters, from_folder, frozen, read_file, shape_of

HEADS = 16  # attention heads of ViT-H, which tensor shapes do not determine
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
WHAT = "the CLIP of Wan, models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"

_BLOCK = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.proj.": "self_attn.out_proj.",
    "mlp.0.": "mlp.fc1.",
    "mlp.2.": "mlp.fc2.",
}
_TOP = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.": "embeddings.patch_embedding.",
    "pre_norm.": "pre_layrnorm.",
    "post_norm.": "post_layernorm.",
}


def to_transformers(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Convert a tensor of Wan's vision tower, named without `visual.`, to CLIPVisionModel.

    Wan's joint tensor of query, key and value becomes three tensors.
    Source: Wan-Video/Wan2.1, `wan/modules/clip.py`.
    """
    # Separate the block index from the name within the block.
    block = re.match(r"transformer\.(\d+)\.", name)
    start, rest = (f"encoder.layers.{block[1]}.", name[block.end() :]) if block else ("", name)
    if rest.startswith("attn.to_qkv."):
        kind = rest.rsplit(".", 1)[1]
        return {
            f"{start}self_attn.{letter}_proj.{kind}": part
            for letter, part in zip("qkv", tensor.chunk(3), strict=True)
        }
    for old, new in (_BLOCK if block else _TOP).items():
        if rest.startswith(old):
            shape = {"cls_embedding": (-1,), "pos_embedding": tensor.shape[1:]}.get(name)
            shaped = tensor.reshape(shape) if shape is not None else tensor
            return {start + new + rest.removeprefix(old): shaped}
    return {name: tensor}


def resize(image: Tensor, side: int) -> Tensor:
    """Resize and normalize an image [3, Y, X] in [-1, 1] for CLIP: [1, 3, side, side].

    Use bicubic interpolation without antialiasing, as in the release; ignore the aspect ratio.
    """
    size = (side, side)
    # CLIP's mean and standard deviation apply to pixels in [0, 1].
    small = functional.interpolate(image[None].float(), size, mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(v, device=image.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (small / 2 + 0.5 - mean) / std


class ImageEncoder:
    """Maps an image [3, Y, X] in [-1, 1] to the output of the second-to-last block: [257, D], fp32.

    The last block is unused and dropped.
    """

    def __init__(self, net: CLIPVisionModel) -> None:
        del net.encoder.layers[-1]
        self.net = net

    @torch.no_grad()
    def __call__(self, image: Tensor | None) -> Tensor:
        """Return the hidden states; zeros if `image` is None."""
        config = self.net.config
        if image is None:
            return torch.zeros(self.net.embeddings.num_positions, config.hidden_size)
        pixels = resize(image.to(self.net.device), config.image_size)
        states = self.net(pixels.to(self.net.dtype)).last_hidden_state[0]
        return states.float().to(image.device)


def load_image_encoder(path: Path, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """Load the image encoder from a transformers folder or from Wan's file (original names)."""
    net = (
        from_folder(CLIPVisionModel, path, dtype)
        if path.is_dir()
        else _from_file(path, device, dtype)
    )
    return ImageEncoder(frozen(net, device))


def _from_file(path: Path, device: torch.device, dtype: torch.dtype) -> CLIPVisionModel:
    """Return the vision tower of Wan's file, without its text tower and projection."""
    # Keep the vision tower, under transformers' names.
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_file(path).items():
        if name.startswith("visual.") and name != "visual.head":
            tensors |= to_transformers(name.removeprefix("visual."), tensor)
    # Only these tensors are copied to the device.
    config = _config(tensors, path)
    with torch.device("meta"):
        net = CLIPVisionModel(config)
    assign_parameters(net, tensors, path, device, dtype)
    # This buffer is not in the file, so it is still on the meta device.
    net.embeddings.position_ids = torch.arange(net.embeddings.num_positions, device=device)[None]
    return net


def _config(tensors: Mapping[str, Tensor], path: Path) -> CLIPVisionConfig:
    # Derive all sizes except the number of heads from tensor shapes.
    width, _, patch, _ = shape_of(tensors, "embeddings.patch_embedding.weight", path, WHAT)
    positions = shape_of(tensors, "embeddings.position_embedding.weight", path, WHAT)[0]
    hidden = shape_of(tensors, "encoder.layers.0.mlp.fc1.weight", path, WHAT)[0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=len({n.split(".")[2] for n in tensors if n.startswith("encoder.layers")}),
        num_attention_heads=HEADS,
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
    )

"""How large the released encoders are, from their configurations, without their weights.

Wan 2.1's VAE, umT5-XXL's encoder and open-CLIP's ViT-H/14 (Wan-Video/Wan2.1, `wan/configs` and
`wan/modules/clip.py`), and wav2vec2-base.
"""

from collections.abc import Callable
from typing import Any

import torch


def _video() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan()


def _text() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=256_384,
            d_model=4096,
            d_kv=64,
            d_ff=10_240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def _image() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
            hidden_act="gelu",
        )
    )


def _audio() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(Wav2Vec2Config())


RELEASED: dict[str, Callable[[], Any]] = {
    "video": _video,
    "text": _text,
    "image": _image,
    "audio": _audio,
}


def parameters_of(part: str) -> int:
    """How many numbers an encoder holds; its part of `RELEASED`."""
    with torch.device("meta"):
        net = RELEASED[part]()
    return sum(parameter.numel() for parameter in net.parameters())

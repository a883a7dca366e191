"""How much arithmetic a forward pass is, by the shapes it is run with.

A multiplication with its addition counts as two operations; norms, activations and softmax are left
out, as usual for model FLOPs utilization (MFU; PaLM, arXiv 2204.02311, appendix B).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from echolab.geometry import WAN
from echolab.models.audio import WINDOW

FORMULA = (
    "forward FLOPs of a clip = "
    "layers (12 S D^2 + 4 S D ffn + 4 S^2 D + 4 (L + I + A) D^2 + 4 S (L + I + w) D) "
    "+ 2 S D patch (in + out) + 2 L (text D + D^2) + 2 I (image^2 + image D) + 2 A audio D "
    "+ 2 (freq D + 7 D^2); S tokens, L text, I image, A audio tokens, w = 17 of them a frame; "
    "a training step is 3 forwards, recomputation not counted"
)


class Shapes(NamedTuple):
    """The tokens of a clip."""

    tokens: int  # S
    text: int  # L
    image: int  # I
    audio: int  # A; 0 without the branch


def forward_flops(architecture: Mapping[str, Any], shapes: Shapes) -> int:
    """Return the operations of one clip's forward pass through a network of these settings.

    A branch counts if it has tokens; the audio branch is the preview model's.
    """
    dim, ffn = architecture["dim"], architecture["ffn_dim"]
    tokens, text, image, audio = shapes
    # Tokens that are projected to keys and values, and those that a query attends to.
    context = text + image + audio
    attended = text + image + (WINDOW if audio else 0)
    # One block: projections, FFN and attention scores.
    block = 12 * tokens * dim**2 + 4 * tokens * dim * ffn + 4 * tokens**2 * dim
    block += 4 * context * dim**2 + 4 * tokens * attended * dim
    # Patch embedding and head, and the embeddings of the conditions.
    values = math.prod(architecture.get("patch_size", (1, WAN.patch, WAN.patch)))
    values *= architecture["in_channels"] + architecture["out_channels"]
    ends = 2 * tokens * dim * values
    ends += 2 * text * dim * (architecture["text_dim"] + dim)
    ends += 2 * (architecture["freq_dim"] * dim + 7 * dim**2)
    if image:
        ends += 2 * image * architecture["image_dim"] * (architecture["image_dim"] + dim)
    if audio:
        ends += 2 * audio * architecture["audio_dim"] * dim
    return int(architecture["num_layers"] * block + ends)


def step_flops(architecture: Mapping[str, Any], shapes: Shapes) -> int:
    """Return the operations of a training step on one clip: the backward pass is two forwards."""
    return 3 * forward_flops(architecture, shapes)

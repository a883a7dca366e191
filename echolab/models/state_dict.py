"""Names of the parameters in files: those of Wan and EchoMimicV3, and those of diffusers."""

import re
from collections.abc import Mapping

_TOP = {
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "img_emb.proj.0.": "condition_embedder.image_embedder.norm1.",
    "img_emb.proj.1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "img_emb.proj.3.": "condition_embedder.image_embedder.ff.net.2.",
    "img_emb.proj.4.": "condition_embedder.image_embedder.norm2.",
    "head.head.": "proj_out.",
    "head.modulation": "scale_shift_table",
    "audio2token.": "condition_embedder.audio_embedder.",  # ours: diffusers has no sound
    "audio_injection.": "condition_embedder.audio_injection.",
}
_ATTENTION = {
    "q.": "to_q.",
    "k.": "to_k.",
    "v.": "to_v.",
    "o.": "to_out.0.",
    "norm_q.": "norm_q.",
    "norm_k.": "norm_k.",
    "k_img.": "add_k_proj.",
    "v_img.": "add_v_proj.",
    "norm_k_img.": "norm_added_k.",
    "q_audio.": "add_q_audio_proj.",  # these four are ours too
    "k_audio.": "add_k_audio_proj.",
    "v_audio.": "add_v_audio_proj.",
    "norm_k_audio.": "norm_added_k_audio.",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3.": "norm2.",  # diffusers counts the norms in the order they are used
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    number = re.match(r"blocks\.\d+\.", name)
    start, rest = (number[0], name[number.end() :]) if number else ("", name)
    for ours, theirs in (block if number else top).items():
        if rest.startswith(ours):
            return start + theirs + rest[len(ours) :]
    return name  # patch_embedding is called the same


def to_diffusers(name: str) -> str:
    """A parameter's name in diffusers' WanTransformer3DModel."""
    return _renamed(name, _TOP, _BLOCK)


def from_diffusers(name: str) -> str:
    """The original name of a parameter of WanTransformer3DModel."""
    return _renamed(name, _TOP_BACK, _BLOCK_BACK)

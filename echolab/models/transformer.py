"""EchoMimicV3's network: Wan 2.1's diffusion transformer with a local audio branch.

Parameters have the names of the released files (825 tensors for Wan2.1-T2V-1.3B, 983 with the
image branch, 1,076 with the preview's audio; 1,143 of Flash's 1,203, whose `q_audio` has no
effect).  The network gets timesteps, conditions and modality weights; it does not depend on tasks,
noise levels, devices or ranks.  Source: antgroup/echomimic_v3, `src/wan_transformer3d_audio.py`;
Wan-Video/Wan2.1, `wan/modules/model.py`.

Shapes: B clips, S = F P tokens of a clip, P tokens of a latent frame, D width, N heads, d = D / N.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from echolab.errors import ConfigError, DataError
from echolab.geometry import WAN, LatentGeometry
from echolab.models.attention import Attend, sdpa
from echolab.models.audio import (
    FLASH,
    PREVIEW,
    TOKENS_PER_FRAME,
    AudioAttentionConfig,
    AudioTokens,
    FlashAudioTokens,
)
from echolab.models.layers import (
    ImageEmbedding,
    Linear32,
    PatchEmbedding,
    RMSNorm,
    apply_rope,
    modulate,
    rope_freqs,
    timestep_embedding,
)
from echolab.types import Conditions, ModalityWeights


class Context(NamedTuple):
    """The conditions as tokens, shared by all blocks."""

    text: Tensor  # [B, L, D]
    image: Tensor | None  # [B, N, D]
    audio: Tensor | None  # [B, 2 T, D], or Flash's [B, F, 32, D]
    face: Tensor  # [B, 1, P, 1]   broadcast over latent frames
    weights: ModalityWeights | None  # each [B]


def scale_per_sample(values: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply [B, S, D] by one weight per clip [B]; None means 1."""
    return values if weight is None else values * weight.to(values.dtype)[:, None, None]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return two linear layers with a tanh-approximated GELU between them."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, outputs)
    )


class SelfAttention(nn.Module):
    """Self-attention over all tokens of a clip, with rotary position embeddings (RoPE)."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.attend: Attend = sdpa
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, tokens: Tensor, rope: Tensor) -> Tensor:
        """Attend over all tokens: [B, S, D], [S, 1, d / 2, 2] -> [B, S, D]."""
        heads = (self.num_heads, -1)
        queries = apply_rope(self.norm_q(self.q(tokens)).unflatten(-1, heads), rope)
        keys = apply_rope(self.norm_k(self.k(tokens)).unflatten(-1, heads), rope)
        values = self.v(tokens).unflatten(-1, heads)
        return self.o(self.attend(queries, keys, values).flatten(2))


class CrossAttention(nn.Module):
    """Cross-attention to text, image and audio, whose outputs are summed.

    Modalities share the queries and the output projection and have separate keys and values.  The
    audio branch is initialized to zero, so that a new network computes the same as its base.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eps: float,
        image: bool,
        audio_config: AudioAttentionConfig | None,
    ):
        super().__init__()
        self.num_heads, self.audio_config = num_heads, audio_config
        self.attend: Attend = sdpa
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)
        if audio_config:
            self.k_audio = nn.Linear(dim, dim, bias=audio_config.biases)
            self.v_audio = nn.Linear(dim, dim, bias=audio_config.biases)
            self.norm_k_audio = RMSNorm(dim, eps)

    def heads(self, values: Tensor) -> Tensor:
        """Split [..., D] into heads [..., N, d]."""
        return values.unflatten(-1, (self.num_heads, -1))

    def attend_heads(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend and merge the heads: [B, S, N, d], keys and values [B, K, D] -> [B, S, D]."""
        return self.attend(queries, self.heads(keys), self.heads(values)).flatten(2)

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """Return the sum of the modalities' outputs: [B, S, D] -> [B, S, D]."""
        # Text branch, always present; all modalities share its queries.
        queries = self.heads(self.norm_q(self.q(tokens)))
        keys = self.norm_k(self.k(context.text))
        text = self.attend_heads(queries, keys, self.v(context.text))
        weights = context.weights or (None, None, None)
        total = scale_per_sample(text, weights[0])
        # Image branch of Wan's image-to-video networks.
        if context.image is not None:
            keys = self.norm_k_img(self.k_img(context.image))
            image = self.attend_heads(queries, keys, self.v_img(context.image))
            total = total + scale_per_sample(image, weights[1])
        # EchoMimicV3's audio branch: local in time and, in the preview model, limited to the face.
        if context.audio is not None and self.audio_config:
            audio = self.audio_attention(queries, context.audio, context.face, self.audio_config)
            total = total + scale_per_sample(audio, weights[2])
        return self.o(total)

    def audio_attention(
        self, queries: Tensor, audio: Tensor, face: Tensor, config: AudioAttentionConfig
    ) -> Tensor:
        """Let each latent frame attend to the W audio tokens of its window.

        [B, S, N, d], [B, 2 T, D] or [B, F, W, D], [B, 1, P, 1] -> [B, S, D].
        """
        keys = config.windows(
            self.norm_k_audio(self.k_audio(audio)), config.time_stride
        )  # [B, F, W, D]
        values = config.windows(self.v_audio(audio), config.time_stride)
        # Fold latent frames into the batch, so that each attends only to its window.
        clips, frames = keys.shape[:2]
        framewise = queries.unflatten(1, (frames, -1)).flatten(0, 1)  # [B F, P, N, d]
        output = self.attend_heads(framewise, keys.flatten(0, 1), values.flatten(0, 1))
        output = output.unflatten(0, (clips, frames))  # [B, F, P, D]
        return (output * face if config.masked else output).flatten(1, 2)


class Block(nn.Module):
    """Self-attention, cross-attention and FFN, with adaLN modulation of self-attention and FFN."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        eps: float,
        image: bool,
        audio_config: AudioAttentionConfig | None,
    ):
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, image, audio_config)
        self.ffn = _mlp(dim, ffn_dim, dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, tokens: Tensor, time: Tensor, context: Context, rope: Tensor) -> Tensor:
        """Return the next tokens: [B, S, D], [B, 6, D] in fp32, context, positions -> [B, S, D]."""
        # adaLN: shift, scale and gate of self-attention and FFN from the timestep, in fp32.
        modulation = (self.modulation.float() + time).chunk(6, dim=1)  # each [B, 1, D]
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        # Gated self-attention; the gate is applied in fp32.
        update = self.self_attn(modulate(tokens, shift, scale, self.eps), rope)
        tokens = torch.addcmul(tokens.float(), gate, update).type_as(tokens)
        tokens = tokens + self.cross_attn(self.norm3(tokens), context)
        # Gated FFN.
        update = self.ffn(modulate(tokens, ffn_shift, ffn_scale, self.eps))
        return torch.addcmul(tokens.float(), ffn_gate, update).type_as(tokens)


class Head(nn.Module):
    """Output layer: maps tokens to the values of their patches."""

    def __init__(self, dim: int, values: int, eps: float):
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, values)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Map tokens to patches: [B, S, D], [B, D] in fp32 -> [B, S, values]."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return self.head(modulate(tokens, shift, scale, self.eps))


def _check_sizes(dim: int, num_heads: int, in_channels: int, geometry: LatentGeometry) -> None:
    """Raise ConfigError for inconsistent sizes."""
    if dim % (2 * num_heads):
        raise ConfigError(f"model.dim={dim}: must be an even multiple of num_heads={num_heads}")
    out_channels, mask_channels = geometry.channels, geometry.time_stride
    if in_channels not in (out_channels, 2 * out_channels + mask_channels):
        with_known = 2 * out_channels + mask_channels
        raise ConfigError(
            f"model.in_channels={in_channels}: must be {out_channels}, or {with_known} with the "
            "known mask and latents"
        )


def _audio_proj(
    audio_dim: int | None, audio_layers: int | None, dim: int, time_stride: int
) -> AudioTokens | FlashAudioTokens | None:
    """Return the audio projection of the preview model or of Flash, or None without audio."""
    if audio_dim is None:
        return None
    if audio_layers is None:
        return AudioTokens(audio_dim, dim)
    return FlashAudioTokens(audio_dim, audio_layers, dim, time_stride)


class EchoTransformer(nn.Module):
    """The diffusion transformer: from noisy latents, timesteps and conditions to the velocity.

    `image_dim=None` and `audio_dim=None` omit a branch, `in_channels == out_channels` omits mask
    and known latents: with all three omitted it is Wan2.1's text-to-video network.
    `audio_layers=None` selects the preview's audio, two tokens [audio_dim] per video frame; Flash
    uses 12 layers [12, audio_dim] per video frame and no face mask.  Parameters have torch's
    default initialization; `models.state_dict.initialize` sets Wan's.
    """

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        num_layers: int,
        in_channels: int = 36,
        out_channels: int = WAN.channels,
        text_dim: int = 4096,
        image_dim: int | None = 1280,
        audio_dim: int | None = 768,
        audio_layers: int | None = None,
        freq_dim: int = 256,
        patch_size: Sequence[int] = (1, WAN.patch, WAN.patch),
        time_stride: int = WAN.time_stride,
        space_stride: int = WAN.space_stride,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.geometry = LatentGeometry(out_channels, time_stride, space_stride, patch_size[1])
        _check_sizes(dim, num_heads, in_channels, self.geometry)
        self.head_dim, self.freq_dim = dim // num_heads, freq_dim
        self.patch_size: tuple[int, int, int] = tuple(patch_size)  # type: ignore[assignment]
        self.has_mask_input = in_channels > out_channels
        self.patch_embedding = PatchEmbedding(in_channels, dim, self.patch_size)
        # Embeddings of the conditions, under the names of the released files.
        self.text_embedding = _mlp(text_dim, dim, dim)
        self.time_embedding = nn.Sequential(Linear32(freq_dim, dim), nn.SiLU(), Linear32(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear32(dim, 6 * dim))
        self.img_emb = None if image_dim is None else ImageEmbedding(image_dim, dim)
        audio = _audio_proj(audio_dim, audio_layers, dim, time_stride)
        self.audio2token = audio if isinstance(audio, AudioTokens) else None
        self.audio_injection = audio if isinstance(audio, FlashAudioTokens) else None
        audio_config = PREVIEW if self.audio2token else FLASH if self.audio_injection else None
        audio_config = audio_config and audio_config._replace(time_stride=time_stride)
        # Blocks and output layer.
        block_sizes = (dim, ffn_dim, num_heads, eps, image_dim is not None, audio_config)
        self.blocks = nn.ModuleList(Block(*block_sizes) for _ in range(num_layers))
        self.head = Head(dim, out_channels * math.prod(patch_size), eps)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        weights: ModalityWeights | None = None,
    ) -> Tensor:
        """Return the velocity of noisy latents [B, C, F, H, W] at timesteps [B] in 0..1000.

        `weights` scale the three cross-attention outputs; None means 1 for all.  Raise DataError if
        the audio features have another number of frames.
        """
        # Append mask and known latents as channels, then embed patches as tokens.
        latents = noisy_latents
        self._check_audio(conditions.audio, latents.shape[2])
        if self.has_mask_input:
            latents = torch.cat([latents, conditions.known, conditions.known_latents], 1)
        p, q, r = self.patch_size
        frames, rows, columns = latents.shape[2] // p, latents.shape[3] // q, latents.shape[4] // r
        # The residual stream has the parameters' dtype: bf16 as in the release, or fp32 as in Wan's
        # mixed precision; without the cast autocast would return bf16.
        dtype = self.patch_embedding.weight.dtype
        tokens = self.patch_embedding(latents.to(dtype)).to(dtype)
        # Embed timesteps and conditions once for all blocks.
        time = self.time_embedding(timestep_embedding(timesteps, self.freq_dim))  # [B, D]
        modulation = self.time_projection(time).unflatten(1, (6, -1))  # [B, 6, D]
        context = self.context(conditions, weights, tokens.dtype)
        rope = rope_freqs(self.head_dim, (frames, rows, columns), tokens.device)
        for block in self.blocks:
            tokens = block(tokens, modulation, context, rope)
        return rearrange(
            self.head(tokens, time),
            "b (f h w) (p q r c) -> b c (f p) (h q) (w r)",
            f=frames, h=rows, w=columns, p=p, q=q, r=r,
        )  # fmt: skip

    def _check_audio(self, audio: Tensor, latent_frames: int) -> None:
        """Raise DataError unless the audio features match this number of latent frames.

        Windowing works for features of any length, so wrong audio would not be detected later.  In
        a window of a longer video, the preview's features may also cover all of its last latent
        frame.
        """
        # Allowed numbers of features along time.
        frames, layers = self.geometry.frames(latent_frames), self.audio_injection is not None
        filled = TOKENS_PER_FRAME * self.geometry.time_stride * latent_frames
        allowed = (frames,) if layers else (TOKENS_PER_FRAME * frames, filled)
        has_audio = layers or self.audio2token is not None
        if has_audio and (audio.ndim != 3 + layers or audio.shape[1] not in allowed):
            kind = "[B, frames, layers, width]" if layers else "[B, 2 x frames, width]"
            raise DataError(
                f"audio features {list(audio.shape)}: a clip of {frames} frames needs {allowed[0]} "
                f"of them, {kind}; encode the audio for the clip's own length"
            )

    def context(
        self, conditions: Conditions, weights: ModalityWeights | None, dtype: torch.dtype
    ) -> Context:
        """Return the conditions as tokens of the network's width."""
        # Missing branches have no tokens.
        text, image, audio = (part.to(dtype) for part in conditions[:3])
        audio_proj = self.audio2token or self.audio_injection
        return Context(
            text=self.text_embedding(text),
            image=None if self.img_emb is None else self.img_emb(image),
            audio=None if audio_proj is None else audio_proj(audio),
            face=conditions.face.to(dtype)[:, None, :, None],
            weights=weights,
        )

"""Sound for the transformer: features to tokens, tokens to a window for each latent frame.

EchoMimicV3's preview model: two tokens a video frame, eight a latent frame, and latent frame i
hears the 17 tokens [8i - 11, 8i + 5], about 340 ms around its frames.
"""

import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 17  # tokens that a latent frame hears
STRIDE = 8  # tokens of a latent frame
LEAD = 11  # tokens heard before the first of latent frame 0


class AudioTokens(nn.Module):
    """wav2vec2 features [B, 2 T, audio_dim] -> tokens [B, 2 T, D]."""

    def __init__(self, audio_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Linear(audio_dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Silence (zeros) becomes the norm's bias, a learned constant."""
        return self.norm(self.proj(features))


def audio_windows(tokens: Tensor) -> Tensor:
    """The window of every latent frame: [B, 2 T, D] -> [B, F, 17, D], zeros beyond the clip's ends.

    Zero keys take part in the softmax, as in the released model (it computes the true lengths and
    does not use them).  It puts the zeros last; attention does not know the order of its keys.
    """
    frames = (tokens.shape[1] // 2 - 1) // 4 + 1
    tail = STRIDE * (frames - 1) + WINDOW - LEAD - tokens.shape[1]
    padded = F.pad(tokens, (0, 0, LEAD, tail))
    return padded.unfold(1, WINDOW, STRIDE).transpose(2, 3)

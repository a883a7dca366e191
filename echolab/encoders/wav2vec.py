"""Audio features by wav2vec2 (transformers).

Preview uses two tokens of the last layer per frame, Flash one vector of every layer per frame.
Both compute in fp32, as the release does: the network is small.
"""

from pathlib import Path

import numpy as np
import pyloudnorm
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

from echolab.encoders.demo import RATE_HZ, SAMPLES_PER_FRAME, check_length
from echolab.encoders.files import from_folder, frozen, require
from echolab.errors import MediaError, WeightsError

LOUDNESS_LUFS = -23.0
BLOCK_SECONDS = 0.4  # the minimum duration to measure loudness
EXTRACTOR = "preprocessor_config.json"
UNUSED = ("masked_spec_embed",)  # used only in pretraining; wav2vec2-base-960h lacks it


def min_samples(net: Wav2Vec2Model, tokens: int) -> int:
    """Return the minimum number of samples for which wav2vec2 outputs `tokens` tokens."""
    # Invert the length formula of each convolution, from the last to the first.
    length = tokens
    steps = zip(net.config.conv_kernel, net.config.conv_stride, strict=True)
    for kernel, stride in reversed(list(steps)):
        length = (length - 1) * stride + kernel
    return length


def at_loudness(samples: Tensor, lufs: float = LOUDNESS_LUFS) -> Tensor:
    """Scale audio [n] at 16 kHz to an integrated loudness; return silence unchanged."""
    if len(samples) < BLOCK_SECONDS * RATE_HZ:
        raise MediaError(
            f"audio of {len(samples)} samples ({len(samples) / RATE_HZ:.2f} s) has no loudness, "
            f"need {BLOCK_SECONDS} s; give a longer clip"
        )
    # Silence has no finite loudness.
    wave = samples.double().numpy()
    loudness = pyloudnorm.Meter(RATE_HZ).integrated_loudness(wave)
    if not np.isfinite(loudness):
        return samples
    return samples * 10 ** ((lufs - loudness) / 20)


class SpeechEncoder:
    """wav2vec2 with the feature extractor that normalizes its input."""

    def __init__(self, net: Wav2Vec2Model, extractor: Wav2Vec2FeatureExtractor) -> None:
        self.net, self.extractor = net, extractor

    def normalized(self, samples: Tensor) -> Tensor:
        """Normalize audio [n] to the network's input, [1, n] on its device."""
        wave = samples.float().cpu().numpy()
        values = self.extractor(wave, sampling_rate=RATE_HZ, return_tensors="pt").input_values
        return values.to(self.net.device, torch.float32)


class PreviewSpeech(SpeechEncoder):
    """Maps audio to the last hidden state, two tokens per frame: [2 T, 768]."""

    @torch.no_grad()
    def __call__(self, samples: Tensor, frames: int) -> Tensor:
        """Return exactly 2 T tokens of audio [n] in [-1, 1] at 16 kHz.

        As in the release, the network processes all audio, and the tokens are then truncated.  For
        audio exactly as long as its clip it returns only 2 T - 1 tokens, and the release fails;
        here the audio is padded by at most 80 zeros.  Longer audio is allowed.  Raise MediaError
        for audio shorter than the clip.
        """
        check_length(samples, frames)
        values = self.normalized(samples)
        # Pad with zeros to get enough tokens.
        short = max(0, min_samples(self.net, 2 * frames) - values.shape[1])
        states = self.net(functional.pad(values, (0, short))).last_hidden_state[0]
        return states[: 2 * frames].cpu()


class FlashSpeech(SpeechEncoder):
    """Maps audio to the hidden states of every layer, one vector per frame: [T, 12, 768]."""

    @torch.no_grad()
    def __call__(self, samples: Tensor, frames: int) -> Tensor:
        """Return the states of audio [n] in [-1, 1] at 16 kHz, at least as long as the clip.

        The loudness is measured over all audio; the network's input is truncated to the clip, and
        the convolutional features are interpolated to T positions before the transformer.
        """
        check_length(samples, frames)
        # Normalize the loudness of all audio, then truncate to the clip.
        loud = at_loudness(samples.float().cpu())[: frames * SAMPLES_PER_FRAME]

        # The convolutional features have 50 Hz: interpolate them to the frame rate.
        def to_frames(net: nn.Module, inputs: tuple[Tensor], features: Tensor) -> Tensor:
            return functional.interpolate(features, frames, mode="linear", align_corners=True)

        with self.net.feature_extractor.register_forward_hook(to_frames):
            states = self.net(self.normalized(loud), output_hidden_states=True).hidden_states
        return torch.stack(states[1:], dim=2)[0].cpu()


def load_preview_speech(folder: Path, device: torch.device) -> PreviewSpeech:
    """Load the preview model's encoder from a folder such as facebook/wav2vec2-base-960h."""
    return PreviewSpeech(*_load(folder, device))


def load_flash_speech(folder: Path, device: torch.device) -> FlashSpeech:
    """Load Flash's encoder from a folder such as TencentGameMate/chinese-wav2vec2-base."""
    return FlashSpeech(*_load(folder, device))


def _load(folder: Path, device: torch.device) -> tuple[Wav2Vec2Model, Wav2Vec2FeatureExtractor]:
    """Load network and feature extractor from a folder; raise WeightsError."""
    # Load the extractor first: it is small and states the required sample rate.
    path = require(folder / EXTRACTOR, "the settings of wav2vec2's feature extractor")
    try:
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise WeightsError(f"{path}: cannot be read ({line}); copy it again") from error
    if extractor.sampling_rate != RATE_HZ:
        raise WeightsError(
            f"{path}: sampling_rate is {extractor.sampling_rate}, need {RATE_HZ}; give another "
            "wav2vec2"
        )
    net = from_folder(Wav2Vec2Model, folder, torch.float32, unused=UNUSED)
    return frozen(net, device), extractor

"""Audio features by wav2vec2 (transformers): two tokens a frame for preview, all layers for Flash.

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
BLOCK_SECONDS = 0.4  # the shortest audio that has a loudness
EXTRACTOR = "preprocessor_config.json"
UNUSED = ("masked_spec_embed",)  # of training; wav2vec2-base-960h lacks it


def min_samples(net: Wav2Vec2Model, tokens: int) -> int:
    """Return the fewest samples of which wav2vec2's convolutions make `tokens` tokens."""
    # Walk the convolutions backwards from the tokens to the samples.
    length = tokens
    steps = zip(net.config.conv_kernel, net.config.conv_stride, strict=True)
    for kernel, stride in reversed(list(steps)):
        length = (length - 1) * stride + kernel
    return length


def at_loudness(samples: Tensor, lufs: float = LOUDNESS_LUFS) -> Tensor:
    """Return audio [n] at 16 kHz at an integrated loudness; silence stays silence."""
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
    """The network, and the feature extractor that normalizes its input."""

    def __init__(self, net: Wav2Vec2Model, extractor: Wav2Vec2FeatureExtractor) -> None:
        self.net, self.extractor = net, extractor

    def normalized(self, samples: Tensor) -> Tensor:
        """Return audio [n] as the network takes it, [1, n] on its device."""
        wave = samples.float().cpu().numpy()
        values = self.extractor(wave, sampling_rate=RATE_HZ, return_tensors="pt").input_values
        return values.to(self.net.device, torch.float32)


class PreviewSpeech(SpeechEncoder):
    """Maps audio to the last hidden state, two tokens a frame: [2 T, 768]."""

    @torch.no_grad()
    def __call__(self, samples: Tensor, frames: int) -> Tensor:
        """Return exactly 2 T tokens of audio [n] in [-1, 1] at 16 kHz.

        As in the release, the network gets all of the audio, and the tokens are then cut.  Of audio
        as long as its clip it makes 2 T - 1, and the release fails; here zeros, 80 samples at most,
        are added.  Longer audio is allowed.  Raises MediaError for audio shorter than the clip.
        """
        check_length(samples, frames)
        values = self.normalized(samples)
        # Pad with zeros, so that there are enough tokens.
        short = max(0, min_samples(self.net, 2 * frames) - values.shape[1])
        states = self.net(functional.pad(values, (0, short))).last_hidden_state[0]
        return states[: 2 * frames].cpu()


class FlashSpeech(SpeechEncoder):
    """Maps audio to the states of every layer, one vector a frame: [T, 12, 768]."""

    @torch.no_grad()
    def __call__(self, samples: Tensor, frames: int) -> Tensor:
        """Return the states of audio [n] in [-1, 1] at 16 kHz, as long as the clip or longer.

        The loudness is that of all of the audio; the network's input is cut to the clip, and the
        convolutions' features are stretched to T positions before the transformer.
        """
        check_length(samples, frames)
        # Loudness of all audio, then cut to the clip.
        loud = at_loudness(samples.float().cpu())[: frames * SAMPLES_PER_FRAME]

        # The network's own features are 50 a second: stretch them to the frames of the video.
        def to_frames(net: nn.Module, inputs: tuple[Tensor], features: Tensor) -> Tensor:
            return functional.interpolate(features, frames, mode="linear", align_corners=True)

        with self.net.feature_extractor.register_forward_hook(to_frames):
            states = self.net(self.normalized(loud), output_hidden_states=True).hidden_states
        return torch.stack(states[1:], dim=2)[0].cpu()


def load_preview_speech(folder: Path, device: torch.device) -> PreviewSpeech:
    """Load the encoder of the preview model, from a folder such as facebook/wav2vec2-base-960h."""
    return PreviewSpeech(*_load(folder, device))


def load_flash_speech(folder: Path, device: torch.device) -> FlashSpeech:
    """Load the encoder of Flash, from a folder such as TencentGameMate/chinese-wav2vec2-base."""
    return FlashSpeech(*_load(folder, device))


def _load(folder: Path, device: torch.device) -> tuple[Wav2Vec2Model, Wav2Vec2FeatureExtractor]:
    """Load network and feature extractor of a folder; raise WeightsError."""
    # The extractor first: it is small, and names the sample rate that the network needs.
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

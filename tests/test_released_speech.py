"""wav2vec2 as the two released models use it, on tiny checkpoints in the released formats."""

from pathlib import Path

import pytest
import released
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

from echolab.encoders.wav2vec import (
    at_loudness,
    load_flash_speech,
    load_preview_speech,
    min_samples,
)
from echolab.errors import MediaError, WeightsError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base` as facebook's wav2vec2-base-960h, `chinese` as chinese-wav2vec2-base."""
    folder = tmp_path_factory.mktemp("speech")
    released.write_base_960h(folder / "base")
    released.write_chinese_base(folder / "chinese")
    return folder


def audio(samples: int) -> Tensor:
    times = torch.arange(samples) / 16_000
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    return 0.2 * torch.sin(2 * torch.pi * 220 * times) + 0.05 * noise


@pytest.mark.parametrize("more", [0, 1, 79, 80, 640, 5000])
def test_two_tokens_a_frame_for_any_audio_that_follows(folders: Path, more: int) -> None:
    speech = load_preview_speech(folders / "base", CPU)
    for frames in (1, 2, 5, 13, 49, 81):
        tokens = speech(audio(640 * frames + more), frames)
        assert tokens.shape == (2 * frames, 16) and tokens.dtype == torch.float32


def test_the_fewest_samples_make_exactly_the_requested_tokens(folders: Path) -> None:
    net = load_preview_speech(folders / "base", CPU).net
    assert min_samples(net, 1) == 400  # the receptive field of wav2vec2
    assert min_samples(net, 2 * 81) == 640 * 81 + 80  # so a clip's own sound is 80 too short
    for tokens in (1, 2, 9, 50):
        enough = min_samples(net, tokens)
        for samples, made in ((enough, tokens), (enough - 1, tokens - 1)):
            if made:
                assert net.feature_extractor(torch.zeros(1, samples)).shape[-1] == made


def test_tokens_equal_those_of_the_release_if_it_accepts_the_length(folders: Path) -> None:
    frames, samples = 13, audio(640 * 14)  # a frame longer than the clip
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folders / "base")
    net = Wav2Vec2Model.from_pretrained(folders / "base").eval()
    values = extractor(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    torch.testing.assert_close(values.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    with torch.no_grad():
        states = net(values).last_hidden_state[0]
    assert len(states) == 27
    ours = load_preview_speech(folders / "base", CPU)(samples, frames)
    assert torch.equal(ours, states[: 2 * frames])


def test_zeros_that_follow_change_the_last_token_most(folders: Path) -> None:
    """The 80 samples are added after normalizing, so the clip's own audio is unchanged."""
    speech = load_preview_speech(folders / "base", CPU)
    given = []
    speech.net.register_forward_pre_hook(lambda net, inputs: given.append(inputs[0]))
    samples = audio(640 * 5)
    speech(samples, 5)
    assert given[0].shape == (1, 640 * 5 + 80) and not given[0][0, -80:].any()
    assert torch.equal(given[0][:, :-80], speech.normalized(samples))


@pytest.mark.parametrize("kind", ["base", "chinese"])
def test_audio_shorter_than_the_clip_is_refused_with_both_lengths(folders: Path, kind: str) -> None:
    load = {"base": load_preview_speech, "chinese": load_flash_speech}[kind]
    with pytest.raises(MediaError, match=r"8319 samples.*13 frames \(8320 samples\)"):
        load(folders / kind, CPU)(audio(640 * 13 - 1), 13)


def test_flash_uses_every_layer_once_for_each_frame(folders: Path) -> None:
    frames, samples = 17, audio(640 * 20)
    speech = load_flash_speech(folders / "chinese", CPU)
    layers = speech(samples, frames)
    assert layers.shape == (frames, 12, 16)
    # The same by hand, from the parts of the network.
    net = Wav2Vec2Model.from_pretrained(folders / "chinese").eval()
    wave = at_loudness(samples)[: 640 * frames]
    wave = (wave - wave.mean()) / (wave.var(unbiased=False) + 1e-7).sqrt()
    with torch.no_grad():
        features = net.feature_extractor(wave[None])
        assert features.shape[-1] == 2 * frames - 1
        stretched = functional.interpolate(features, frames, mode="linear", align_corners=True)
        assert torch.equal(stretched[..., 0], features[..., 0])
        torch.testing.assert_close(stretched[..., -1], features[..., -1])
        states, _ = net.feature_projection(stretched.transpose(1, 2))
        states = net.encoder.layer_norm(states + net.encoder.pos_conv_embed(states))
        for number, layer in enumerate(net.encoder.layers):
            states = layer(states)
            torch.testing.assert_close(layers[:, number], states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [10, 13, 49, 81])
def test_flash_gives_one_vector_for_each_frame(folders: Path, frames: int) -> None:
    speech = load_flash_speech(folders / "chinese", CPU)
    assert speech(audio(640 * frames), frames).shape == (frames, 12, 16)
    assert not speech.net.feature_extractor._forward_hooks  # nothing is left behind


def test_a_pickle_with_old_names_is_loaded_completely(folders: Path) -> None:
    torch.manual_seed(4)
    written = released.Wav2Vec2ForPreTraining(released.wav2vec_config()).wav2vec2.state_dict()
    loaded = load_flash_speech(folders / "chinese", CPU).net.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)


def test_loudness_follows_the_itu_recommendation() -> None:
    times = torch.arange(32_000) / 16_000
    tone = torch.sin(2 * torch.pi * 997 * times)  # by definition at -3.01 LUFS
    for level in (1.0, 0.03):
        peak = float(at_loudness(level * tone).abs().max())
        assert peak == pytest.approx(10 ** ((-23 + 3.01) / 20), rel=0.01)
    assert torch.equal(at_loudness(torch.zeros(16_000)), torch.zeros(16_000))


def test_flash_ignores_the_loudness_of_a_recording(folders: Path) -> None:
    speech = load_flash_speech(folders / "chinese", CPU)
    loud, quiet = audio(640 * 13), 0.01 * audio(640 * 13)
    torch.testing.assert_close(speech(loud, 13), speech(quiet, 13), rtol=1e-3, atol=1e-4)
    assert bool(speech(torch.zeros(640 * 13), 13).isfinite().all())


def test_audio_without_a_loudness_is_refused(folders: Path) -> None:
    with pytest.raises(MediaError, match=r"5760 samples \(0.36 s\) has no loudness, need 0.4 s"):
        load_flash_speech(folders / "chinese", CPU)(audio(640 * 9), 9)


def test_a_folder_without_its_parts_is_refused(folders: Path, tmp_path: Path) -> None:
    released.write_base_960h(tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"preprocessor_config.json: not there"):
        load_preview_speech(tmp_path / "a", CPU)
    released.write_base_960h(tmp_path / "b")
    released.edit_json(tmp_path / "b" / "preprocessor_config.json", sampling_rate=8000)
    with pytest.raises(WeightsError, match="sampling_rate is 8000, need 16000"):
        load_preview_speech(tmp_path / "b", CPU)
    released.write_base_960h(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="c: holds no weights"):
        load_preview_speech(tmp_path / "c", CPU)

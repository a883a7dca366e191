"""The network: sizes of the released files, parity with diffusers, laws of its branches."""

import pytest
import tiny
import torch
from torch import Tensor

from echolab.config.folders import architecture_of
from echolab.errors import ConfigError, DataError
from echolab.models.attention import sdpa
from echolab.models.audio import (
    FLASH,
    PREVIEW,
    AudioAttentionConfig,
    FlashAudioTokens,
    audio_windows,
    flash_windows,
)
from echolab.models.layers import RMSNorm, apply_rope, rope_freqs, rope_split, timestep_embedding
from echolab.models.state_dict import initialize, released_shapes
from echolab.models.transformer import Context, CrossAttention, EchoTransformer
from echolab.types import Conditions, ModalityWeights

TIMESTEPS = torch.tensor([123.0, 987.0])


SOUND = pytest.mark.parametrize("layers", [None, 3], ids=["preview", "flash"])


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("wan_t2v_1b3", 825, 1_418_996_800),
        ("wan_fun_inp_1b3", 983, 1_564_428_608),
        ("echomimicv3_preview", 1_076, 1_707_215_168),
        ("echomimicv3_flash", 1_203, 1_863_772_992),
    ],
)
def test_networks_have_the_sizes_of_the_released_files(
    model: str, tensors: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = EchoTransformer(**architecture_of(model))
    shapes = released_shapes(net)
    assert len(shapes) == tensors
    assert sum(shape.numel() for shape in shapes.values()) == parameters
    own = {name: parameter.shape for name, parameter in net.named_parameters()}
    assert list(own) == list(net.state_dict())
    dead = {name: shape for name, shape in shapes.items() if name not in own}
    assert own.items() <= shapes.items() and len(own) + len(dead) == tensors
    # Flash's own query for sound: a weight and a bias in each of 30 blocks.
    assert len(dead) == (60 if model == "echomimicv3_flash" else 0)
    assert sum(shape.numel() for shape in dead.values()) == len(dead) // 2 * (1536 * 1536 + 1536)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


@SOUND
def test_a_new_network_ignores_audio_and_predicts_zero(layers: int | None) -> None:
    net, conditions = tiny.net(audio_layers=layers), tiny.conditions(layers=layers)
    assert not net(tiny.latents(), TIMESTEPS, conditions).any(), "the head starts at zero"
    with torch.no_grad():
        net.head.head.weight.normal_()
    louder = conditions._replace(audio=conditions.audio * 9)
    assert torch.equal(
        net(tiny.latents(), TIMESTEPS, conditions), net(tiny.latents(), TIMESTEPS, louder)
    )


def test_a_zero_weight_equals_a_missing_branch() -> None:
    net, conditions = tiny.net(trained=True), tiny.conditions()
    ones, zeros = torch.ones(2), torch.zeros(2)
    deaf = net(tiny.latents(), TIMESTEPS, conditions, ModalityWeights(ones, ones, zeros))
    masked = net(tiny.latents(), TIMESTEPS, conditions._replace(face=conditions.face * 0))
    torch.testing.assert_close(deaf, masked)
    usual = net(tiny.latents(), TIMESTEPS, conditions)
    torch.testing.assert_close(
        net(tiny.latents(), TIMESTEPS, conditions, ModalityWeights(ones, ones, ones)), usual
    )
    for index in range(3):
        less = [ones, ones, ones]
        less[index] = ones / 2
        assert (
            relative(net(tiny.latents(), TIMESTEPS, conditions, ModalityWeights(*less)), usual)
            > 1e-4
        )


@SOUND
def test_a_batch_of_two_equals_two_batches_of_one(layers: int | None) -> None:
    net, conditions = tiny.net(trained=True, audio_layers=layers), tiny.conditions(layers=layers)
    together = net(tiny.latents(), TIMESTEPS, conditions)
    for clip in range(2):
        one = slice(clip, clip + 1)
        alone = net(
            tiny.latents()[one], TIMESTEPS[one], Conditions(*(part[one] for part in conditions))
        )
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


@SOUND
def test_gradients_reach_every_parameter_and_every_input(layers: int | None) -> None:
    """All conditions get a gradient except Flash's face, which has no mask."""
    net, conditions = tiny.net(trained=True, audio_layers=layers), tiny.conditions(layers=layers)
    conditions = Conditions(*(part.requires_grad_() for part in conditions))
    net(tiny.latents(), TIMESTEPS, conditions).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    deaf = [
        name
        for name, part in conditions._asdict().items()
        if part.grad is None or not part.grad.any()
    ]
    assert deaf == (["face"] if layers else [])


def test_audio_acts_in_its_own_latent_frame_and_on_the_face_only() -> None:
    """A token changes the frames whose window holds it, if the face mask is 1."""
    torch.manual_seed(0)
    layer = CrossAttention(48, 2, 1e-6, image=False, audio_config=PREVIEW)
    face = tiny.conditions(1).face
    tokens, audio = torch.randn(1, 3 * 6, 48), torch.randn(1, 18, 48)
    conditions = Context(torch.randn(1, 5, 48), None, audio, face[:, None, :, None], None)
    usual = layer(tokens, conditions)
    for token in range(18):
        changed = audio.clone()
        changed[:, token] += 1
        moved = (layer(tokens, conditions._replace(audio=changed)) != usual).any(-1).view(3, 6)
        frames = [frame for frame in range(3) if 8 * frame - 11 <= token <= 8 * frame + 5]
        expected = torch.zeros(3, 6, dtype=torch.bool)
        expected[frames] = face[0].bool()
        assert torch.equal(moved, expected), token


def test_audio_windows_of_81_frames_have_the_released_indices() -> None:
    tokens = torch.arange(1.0, 163.0)[None, :, None]  # token i holds i + 1; 0 is beyond the clip
    windows = audio_windows(tokens)[0, :, :, 0]
    assert windows.shape == (21, 17)
    valid = [window[window > 0] - 1 for window in windows]
    assert [len(window) for window in valid] == [6, 14, *[17] * 18, 13]
    assert (valid[0][-1], valid[1][-1]) == (5, 13)
    assert (valid[2][0], valid[2][-1]) == (5, 21)
    assert (valid[20][0], valid[20][-1]) == (149, 161)


def test_flash_windows_of_81_frames_have_the_released_indices() -> None:
    """Latent frame i >= 1 gets video frames 4i-3 to 4i and two on each side."""
    frames = torch.arange(81.0)[None, :, None, None]
    first, later = (window[0, ..., 0, 0].tolist() for window in flash_windows(frames))
    assert first == [[0, 0, 0, 1, 2]]
    assert len(later) == 20
    assert later[0] == [0, 0, 1, 2, 3, 4, 5, 6]
    assert later[1] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert later[19] == [75, 76, 77, 78, 79, 80, 80, 80]
    assert flash_windows(frames[:, :1])[1].shape == (1, 0, 8, 1, 1)


def test_flash_tokens_equal_the_released_computation() -> None:
    """The release takes five frames around each video frame, of which a latent frame keeps
    eight.
    """
    torch.manual_seed(0)
    tokens, features = FlashAudioTokens(6, 3, 48), torch.randn(2, 9, 3, 6)
    around = (torch.arange(9)[:, None] + torch.arange(-2, 3)).clamp(0, 8)
    windows = features[:, around]  # [B, T, 5, layers, A]
    groups = windows[:, 1:].unflatten(1, (2, 4))  # [B, F - 1, 4, 5, layers, A]
    middle = groups[:, :, 1:3, 2]
    kept = torch.cat([groups[:, :, 0, :3], middle, groups[:, :, 3, 2:]], 2)  # [B, F - 1, 8, ...]
    hidden = torch.cat(
        [
            tokens.proj1(windows[:, 0].reshape(2, 1, -1)).relu(),
            tokens.proj1_vf(kept.reshape(2, 2, -1)).relu(),
        ],
        1,
    )
    expected = tokens.norm(tokens.proj3(tokens.proj2(hidden).relu()).view(2, 3, 32, 48))
    torch.testing.assert_close(tokens(features), expected)


@pytest.mark.parametrize("config", [PREVIEW, FLASH], ids=["preview", "flash"])
def test_audio_is_added_as_released(config: AudioAttentionConfig) -> None:
    """Frames agree one by one: valid tokens, zeros after them, normed keys, masked output."""
    torch.manual_seed(0)
    layer = CrossAttention(48, 2, 1e-6, image=False, audio_config=config)
    torch.nn.init.normal_(layer.norm_k_audio.weight)
    face, text, tokens = tiny.conditions(1).face, torch.randn(1, 5, 48), torch.randn(1, 3 * 6, 48)
    audio = torch.randn(1, 18, 48) if config is PREVIEW else torch.randn(1, 3, 32, 48)
    conditions = Context(text, None, audio, face[:, None, :, None], None)
    queries = layer.norm_q(layer.q(tokens)).view(3, 6, 2, 24)
    read = []
    for frame in range(3):
        attended = audio[0, frame] if config is FLASH else torch.zeros(17, 48)
        if config is PREVIEW:
            valid = audio[0, max(0, 8 * frame - 11) : 8 * frame + 6]
            attended[: len(valid)] = valid
        keys = layer.norm_k_audio(layer.k_audio(attended)).view(-1, 2, 24)
        values = layer.v_audio(attended).view(-1, 2, 24)
        scores = torch.einsum("snd,knd->nsk", queries[frame], keys) / 24**0.5
        out = torch.einsum("nsk,knd->snd", scores.softmax(-1), values).flatten(1)
        read.append(out * face[0][:, None] if config is PREVIEW else out)
    silent = layer(tokens, conditions._replace(audio=None))
    expected = silent + torch.cat(read)[None] @ layer.o.weight.T
    torch.testing.assert_close(layer(tokens, conditions), expected, rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_position_differences() -> None:
    assert rope_split(128) == (44, 42, 42) and rope_split(32) == (12, 10, 10)
    grid = (3, 4, 5)
    table = rope_freqs(24, grid, torch.device("cpu")).view(*grid, 1, 12, 2)
    query, key = torch.randn(2, 24)

    def score(at: tuple[int, int, int], other: tuple[int, int, int]) -> Tensor:
        return (apply_rope(query[None], table[at]) * apply_rope(key[None], table[other])).sum()

    torch.testing.assert_close(score((0, 1, 2), (1, 3, 3)), score((1, 0, 1), (2, 2, 2)))
    torch.testing.assert_close(score((0, 0, 0), (0, 0, 0)), (query * key).sum())
    assert not torch.isclose(score((0, 0, 0), (1, 0, 0)), score((0, 0, 0), (0, 1, 0)))


def test_a_rope_table_cached_in_inference_works_in_training() -> None:
    rope_freqs.cache_clear()
    net, conditions = tiny.net(trained=True), tiny.conditions()
    with torch.inference_mode():
        net(tiny.latents(), TIMESTEPS, conditions)
    net(tiny.latents(), TIMESTEPS, conditions).sum().backward()
    assert net.blocks[0].self_attn.q.weight.grad.isfinite().all()


def test_the_timestep_embedding_is_cosines_then_sines() -> None:
    values = timestep_embedding(torch.tensor([250.0]), 4)[0]
    expected = torch.tensor([250.0, 2.5], dtype=torch.float64)
    torch.testing.assert_close(values, torch.cat([expected.cos(), expected.sin()]).float())


def test_norm_and_attention_follow_their_definitions() -> None:
    values, norm = torch.randn(2, 3, 8), RMSNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    expected = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(values), expected)
    q, k, v = torch.randn(2, 5, 2, 4), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    scores = torch.einsum("bsnd,bknd->bnsk", q, k) / 2
    expected = torch.einsum("bnsk,bknd->bsnd", scores.softmax(-1), v)
    torch.testing.assert_close(sdpa(q, k, v), expected)


@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_half_precision_is_close_and_timesteps_stay_fp32(how: str) -> None:
    net, conditions = tiny.net(trained=True), tiny.conditions()
    expected = net(tiny.latents(), TIMESTEPS, conditions)
    if how == "parameters":
        net = net.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        actual = net(tiny.latents(), TIMESTEPS, conditions)
        assert net.time_embedding(timestep_embedding(TIMESTEPS, 16)).dtype == torch.float32
    assert relative(actual.float(), expected) < 0.03


def test_the_same_generator_gives_the_same_network() -> None:
    one, other = tiny.net(), tiny.net()
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name
    initialize(other, torch.Generator().manual_seed(1))
    assert not torch.equal(one.blocks[0].ffn[0].weight, other.blocks[0].ffn[0].weight)
    for name, parameter in one.named_parameters():
        zero = "_audio.weight" in name and "norm" not in name or name == "head.head.weight"
        assert parameter.isfinite().all()
        assert zero == (not parameter.any()) or name.endswith("bias"), name


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="dim=50"):
        tiny.net(dim=50, num_heads=4)
    with pytest.raises(ConfigError, match="in_channels=13"):
        tiny.net(in_channels=13)


def test_parameters_are_the_only_state() -> None:
    assert list(tiny.net().buffers()) == []


@pytest.mark.parametrize(
    ("layers", "count", "fits"),
    [
        (None, 18, True), (None, 24, True), *((None, n, False) for n in (5, 9, 16, 17, 20, 26, 36)),
        (3, 9, True), *((3, n, False) for n in (2, 5, 8, 10, 12, 18)),
    ],
)  # fmt: skip
def test_the_network_takes_audio_of_the_clips_own_length(
    layers: int | None, count: int, fits: bool
) -> None:
    """9 frames have 18 tokens (24 in a window of a longer video), or 9 of Flash's."""
    net = tiny.net(audio_layers=layers)
    conditions = tiny.conditions(1, layers=layers)
    audio = torch.zeros(1, count, *conditions.audio.shape[2:])
    given = (tiny.latents(1), torch.tensor([500.0]), conditions._replace(audio=audio))
    if fits:
        assert net(*given).shape == tiny.latents(1).shape
        return
    with pytest.raises(DataError, match="a clip of 9 frames needs") as error:
        net(*given)
    assert "\n" not in str(error.value)
    swapped = conditions._replace(audio=tiny.conditions(1, layers=None if layers else 3).audio)
    with pytest.raises(DataError, match="audio features"):
        net(given[0], given[1], swapped)

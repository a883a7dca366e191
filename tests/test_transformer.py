"""The network: sizes of the released files, parity with diffusers, laws of its branches."""

import warnings

import pytest
import tiny
import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.models.audio import audio_windows
from echolab.models.layers import RMSNorm, attend, rope_split, rope_table, sinusoid, turn
from echolab.models.transformer import CrossAttention, EchoTransformer, Told
from echolab.models.weights import initialise, to_diffusers
from echolab.types import Conditions, ModalityWeights

RELEASED = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
TIMESTEPS = torch.tensor([123.0, 987.0])


@pytest.mark.parametrize(
    ("changes", "tensors", "parameters"),
    [
        ({"in_channels": 16, "image_dim": None, "audio_dim": None}, 825, 1_418_996_800),
        ({"audio_dim": None}, 983, 1_564_428_608),
        ({}, 1_076, 1_707_215_168),
    ],
    ids=["Wan2.1-T2V-1.3B", "Wan2.1-Fun-1.3B-InP", "EchoMimicV3"],
)
def test_sizes_of_the_released_files(changes: dict, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        net = EchoTransformer(**RELEASED, **changes)
    assert len(net.state_dict()) == len(list(net.parameters())) == tensors
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


def pipeline_of_diffusers(net: EchoTransformer, image: bool):
    """diffusers' network with the same weights."""
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, text_dim=10,
        in_channels=net.patch_embedding.in_channels, out_channels=4, freq_dim=16, ffn_dim=64,
        num_layers=2, image_dim=12 if image else None, added_kv_proj_dim=48 if image else None,
        rope_max_seq_len=32,
    )  # fmt: skip
    theirs.load_state_dict({to_diffusers(name): p for name, p in net.state_dict().items()})
    return theirs


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("image", [False, True], ids=["text to video", "image to video"])
def test_output_and_gradients_are_those_of_diffusers(image: bool) -> None:
    warnings.filterwarnings("ignore")
    shape = {} if image else {"in_channels": 4, "image_dim": None}
    net = tiny.net(trained=True, audio_dim=None, **shape)
    theirs, told, noisy = pipeline_of_diffusers(net, image), tiny.conditions(), tiny.latents()
    # diffusers finds the image tokens by counting 512 text tokens from the end.
    told = told._replace(text=torch.randn(2, 512, 10, generator=torch.Generator().manual_seed(2)))
    given = torch.cat([noisy, told.known, told.known_latents], 1) if image else noisy
    ours = net(noisy, TIMESTEPS, told)
    expected = theirs(
        hidden_states=given, timestep=TIMESTEPS, encoder_hidden_states=told.text,
        encoder_hidden_states_image=told.image if image else None,
    ).sample  # fmt: skip
    assert relative(ours, expected) < 1e-4
    direction = tiny.latents(seed=5)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in net.named_parameters():
        assert relative(parameter.grad, gradients[to_diffusers(name)].grad) < 1e-4, name


def test_a_new_network_ignores_sound_and_says_nothing() -> None:
    net, told = tiny.net(), tiny.conditions()
    assert not net(tiny.latents(), TIMESTEPS, told).any(), "the head starts at zero"
    with torch.no_grad():
        net.head.head.weight.normal_()
    louder = told._replace(audio=told.audio * 9)
    assert torch.equal(net(tiny.latents(), TIMESTEPS, told), net(tiny.latents(), TIMESTEPS, louder))


def test_a_zero_weight_is_a_missing_branch() -> None:
    net, told = tiny.net(trained=True), tiny.conditions()
    ones, zeros = torch.ones(2), torch.zeros(2)
    deaf = net(tiny.latents(), TIMESTEPS, told, ModalityWeights(ones, ones, zeros))
    masked = net(tiny.latents(), TIMESTEPS, told._replace(face=told.face * 0))
    torch.testing.assert_close(deaf, masked)
    usual = net(tiny.latents(), TIMESTEPS, told)
    torch.testing.assert_close(
        net(tiny.latents(), TIMESTEPS, told, ModalityWeights(ones, ones, ones)), usual
    )
    for index in range(3):
        less = [ones, ones, ones]
        less[index] = ones / 2
        assert relative(net(tiny.latents(), TIMESTEPS, told, ModalityWeights(*less)), usual) > 1e-4


def test_two_clips_are_one_and_one() -> None:
    net, told = tiny.net(trained=True), tiny.conditions()
    together = net(tiny.latents(), TIMESTEPS, told)
    for clip in range(2):
        one = slice(clip, clip + 1)
        alone = net(tiny.latents()[one], TIMESTEPS[one], Conditions(*(part[one] for part in told)))
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter_and_every_input_but_the_mask() -> None:
    net, told = tiny.net(trained=True), tiny.conditions()
    told = Conditions(*(part.requires_grad_() for part in told))
    net(tiny.latents(), TIMESTEPS, told).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(part.grad is not None and part.grad.any() for part in told)


def test_sound_acts_in_its_own_latent_frame_and_on_the_face_only() -> None:
    """One cross-attention: a token moves the frames whose window holds it, where face is 1."""
    torch.manual_seed(0)
    layer = CrossAttention(48, 2, 1e-6, image=False, audio=True)
    face = tiny.conditions(1).face
    tokens, audio = torch.randn(1, 3 * 6, 48), torch.randn(1, 18, 48)
    told = Told(torch.randn(1, 5, 48), None, audio, face[:, None, :, None], None)
    usual = layer(tokens, told)
    for token in range(18):
        changed = audio.clone()
        changed[:, token] += 1
        moved = (layer(tokens, told._replace(audio=changed)) != usual).any(-1).view(3, 6)
        frames = [frame for frame in range(3) if 8 * frame - 11 <= token <= 8 * frame + 5]
        expected = torch.zeros(3, 6, dtype=torch.bool)
        expected[frames] = face[0].bool()
        assert torch.equal(moved, expected), token


def test_audio_windows_of_81_frames() -> None:
    tokens = torch.arange(1.0, 163.0)[None, :, None]  # token i holds i + 1; 0 is beyond the clip
    windows = audio_windows(tokens)[0, :, :, 0]
    assert windows.shape == (21, 17)
    valid = [window[window > 0] - 1 for window in windows]
    assert [len(window) for window in valid] == [6, 14, *[17] * 18, 13]
    assert (valid[0][-1], valid[1][-1]) == (5, 13)
    assert (valid[2][0], valid[2][-1]) == (5, 21)
    assert (valid[20][0], valid[20][-1]) == (149, 161)


def test_rope_turns_by_differences_of_position() -> None:
    assert rope_split(128) == (44, 42, 42) and rope_split(32) == (12, 10, 10)
    grid = (3, 4, 5)
    table = rope_table(24, grid, torch.device("cpu")).view(*grid, 1, 12)
    query, key = torch.randn(2, 24)

    def score(at: tuple[int, int, int], other: tuple[int, int, int]) -> Tensor:
        return (turn(query[None], table[at]) * turn(key[None], table[other])).sum()

    torch.testing.assert_close(score((0, 1, 2), (1, 3, 3)), score((1, 0, 1), (2, 2, 2)))
    torch.testing.assert_close(score((0, 0, 0), (0, 0, 0)), (query * key).sum())
    assert not torch.isclose(score((0, 0, 0), (1, 0, 0)), score((0, 0, 0), (0, 1, 0)))


def test_a_table_made_in_inference_still_serves_training() -> None:
    rope_table.cache_clear()
    net, told = tiny.net(trained=True), tiny.conditions()
    with torch.inference_mode():
        net(tiny.latents(), TIMESTEPS, told)
    net(tiny.latents(), TIMESTEPS, told).sum().backward()


def test_sinusoid_is_cosines_then_sines() -> None:
    values = sinusoid(torch.tensor([250.0]), 4)[0]
    expected = torch.tensor([250.0, 2.5], dtype=torch.float64)
    torch.testing.assert_close(values, torch.cat([expected.cos(), expected.sin()]).float())


def test_norm_and_attention_by_their_definitions() -> None:
    values, norm = torch.randn(2, 3, 8), RMSNorm(8, 1e-6)
    torch.nn.init.normal_(norm.weight)
    expected = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(values), expected)
    q, k, v = torch.randn(2, 5, 2, 4), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    scores = torch.einsum("bsnd,bknd->bnsk", q, k) / 2
    expected = torch.einsum("bnsk,bknd->bsnd", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(attend(q, k, v), expected)


@pytest.mark.parametrize("how", ["autocast", "parameters"])
def test_half_precision_is_close_and_time_stays_fp32(how: str) -> None:
    net, told = tiny.net(trained=True), tiny.conditions()
    expected = net(tiny.latents(), TIMESTEPS, told)
    if how == "parameters":
        net = net.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = net(tiny.latents(), TIMESTEPS, told)
        assert net.time_embedding(sinusoid(TIMESTEPS, 16)).dtype == torch.float32
    assert relative(found.float(), expected) < 0.03


def test_the_same_generator_gives_the_same_network() -> None:
    one, other = tiny.net(), tiny.net()
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name
    initialise(other, torch.Generator().manual_seed(1))
    assert not torch.equal(one.blocks[0].ffn[0].weight, other.blocks[0].ffn[0].weight)
    for name, parameter in one.named_parameters():
        zero = "_audio.weight" in name and "norm" not in name or name == "head.head.weight"
        assert parameter.isfinite().all()
        assert zero == (not parameter.any()) or name.endswith("bias"), name


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="dim=50"):
        tiny.net(dim=50, num_heads=4)
    with pytest.raises(ConfigError, match="in_channels=13"):
        tiny.net(in_channels=13)


def test_there_is_no_state_besides_parameters() -> None:
    assert list(tiny.net().buffers()) == []

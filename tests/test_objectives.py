"""The objectives: errors by hand, gradients as identities, pairs under one noise."""

import copy
import json
import math

import pytest
import tiny
import torch
from torch import Tensor, nn

from echolab.diffusion.objectives import (
    AdaptiveBeta,
    NegativePreference,
    Preference,
    Supervised,
    stack_pair,
    velocity_error,
)
from echolab.diffusion.phases import FLAT, PHDA, ModalityDropout, ModalityScaling
from echolab.diffusion.preference_losses import PAIR_LOSSES
from echolab.diffusion.sigmas import draw_noise
from echolab.errors import ConfigError
from echolab.models.frozen import Frozen
from echolab.types import Draws, PreferencePair

PHASES = ModalityDropout(FLAT)
DRAWS = draw_noise(["clip-0", "clip-1"], tiny.SHAPE, seed=0, epoch=0)


def frozen(net: nn.Module) -> Frozen:
    return Frozen(copy.deepcopy(net))


def gradient(net: nn.Module, value: Tensor) -> Tensor:
    net.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def always(velocity: Tensor):
    return lambda noisy, timesteps, conditions, weights: velocity


def test_error_is_a_weighted_mean_of_squares() -> None:
    batch = tiny.batch()
    right = DRAWS.noise - batch.latents
    assert velocity_error(always(right), batch, DRAWS, PHASES).tolist() == [0.0, 0.0]
    off = right.clone()
    off[:, :, 0] += 2.0  # an error of 4 in one of three latent frames
    error = velocity_error(always(off), batch, DRAWS, PHASES)
    assert error.tolist() == pytest.approx([4 / 3, 4 / 3], rel=1e-5)
    weight = batch.weight.clone()
    weight[1, :, 0] = 4.0  # 4 of 6 parts of the weight
    error = velocity_error(always(off), batch._replace(weight=weight), DRAWS, PHASES)
    assert error.tolist() == pytest.approx([4 / 3, 4 * 4 / 6], rel=1e-5)


def test_errors_are_fp32_under_a_half_precision_network() -> None:
    net = tiny.net(trained=True)
    full = velocity_error(net, tiny.batch(), DRAWS, PHASES)
    half = velocity_error(net.bfloat16(), tiny.batch(), DRAWS, PHASES)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)


def test_the_supervised_loss_is_the_mean_and_reports_each_clip() -> None:
    net = tiny.net(trained=True)
    loss = Supervised(PHASES)(net, tiny.batch(), DRAWS)
    assert loss.value.item() == pytest.approx(loss.parts["error"].mean().item())
    assert loss.parts["error"].shape == (2,) and not loss.parts["error"].requires_grad


@pytest.mark.parametrize("phases", [ModalityDropout(PHDA), ModalityScaling(PHDA)])
def test_an_untrained_policy_has_loss_log_2_and_half_the_gradient(phases) -> None:
    """At the reference the gradient is 1/2 of that of chosen - rejected error."""
    net = tiny.net(trained=True)
    pair = tiny.pair()
    loss = Preference(phases, frozen(net), beta=700.0)(net, pair, DRAWS)
    assert loss.parts["preference"].tolist() == pytest.approx([math.log(2)] * 2, rel=1e-5)
    assert loss.parts["gradient_factor"].tolist() == pytest.approx([0.5, 0.5])
    both = Draws(*(torch.cat([part, part]) for part in DRAWS))
    chosen, rejected = velocity_error(net, stack_pair(pair), both, phases).chunk(2)
    expected = gradient(net, (chosen - rejected).mean() / 2)
    torch.testing.assert_close(gradient(net, loss.value), expected, rtol=1e-3, atol=1e-6)


def moved(net: nn.Module, seed: int = 3) -> nn.Module:
    other, g = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=g))
    return other


def test_the_gradient_factor_multiplies_the_margin() -> None:
    reference = tiny.net(trained=True)
    policy, pair = moved(reference), tiny.pair()
    one = PreferencePair(
        *(part[:1] for part in pair[:2]), tiny.conditions(1), pair.weight[:1], ["i2v"], ["clip-0"]
    )
    draws = Draws(*(part[:1] for part in DRAWS))
    loss = Preference(PHASES, frozen(reference), beta=50.0)(policy, one, draws)
    both = Draws(*(torch.cat([part, part]) for part in draws))
    chosen, rejected = velocity_error(policy, stack_pair(one), both, PHASES).chunk(2)
    expected = gradient(policy, (loss.parts["gradient_factor"] * (chosen - rejected)).sum())
    torch.testing.assert_close(gradient(policy, loss.value), expected, rtol=1e-3, atol=1e-6)


def test_swapping_the_pair_negates_the_margin() -> None:
    reference = tiny.net(trained=True)
    objective, policy, pair = (
        Preference(PHASES, frozen(reference), 50.0),
        moved(reference),
        tiny.pair(),
    )
    margin = objective(policy, pair, DRAWS).parts["margin"]
    swapped = pair._replace(chosen=pair.rejected, rejected=pair.chosen)
    assert margin.abs().min() > 1e-6
    torch.testing.assert_close(objective(policy, swapped, DRAWS).parts["margin"], -margin)


def test_policy_and_reference_chosen_and_rejected_get_the_same_noise() -> None:
    net, seen = tiny.net(trained=True), []

    def recording(noisy: Tensor, timesteps: Tensor, conditions, weights) -> Tensor:
        seen.append((noisy, timesteps, conditions))
        return net(noisy, timesteps, conditions, weights)

    pair = tiny.pair()
    Preference(PHASES, recording, 50.0)(recording, pair, DRAWS)
    assert len(seen) == 2, "one forward of the policy and one of the reference"
    (reference, times, context), (policy, policy_times, policy_conditions) = seen
    assert torch.equal(reference, policy) and torch.equal(times, policy_times)
    assert all(torch.equal(a, b) for a, b in zip(context, policy_conditions, strict=True))
    sigmas = times[:2].reshape(2, 1, 1, 1, 1) / 1000
    chosen, rejected = policy.chunk(2)  # the clean halves taken away, the noise is left
    noise = chosen - (1 - sigmas) * pair.chosen, rejected - (1 - sigmas) * pair.rejected
    torch.testing.assert_close(*noise)
    assert torch.equal(times[:2], times[2:])


def test_the_example_of_the_docstring_holds() -> None:
    """The velocities are chosen so that the four errors are 1.0, 1.5 and 1.2, 1.5."""
    pair, ones = tiny.pair(1), torch.ones(1, *tiny.SHAPE)
    draws = Draws(*(part[:1] for part in DRAWS))
    targets = torch.cat([draws.noise - pair.chosen, draws.noise - pair.rejected])

    def off(chosen: float, rejected: float):
        return always(targets + torch.cat([ones * chosen**0.5, ones * rejected**0.5]))

    objective = Preference(PHASES, off(1.2, 1.5), beta=10.0)
    loss = objective(off(1.0, 1.5), pair, draws)
    assert loss.parts["margin"].item() == pytest.approx(0.2, rel=1e-4)
    assert loss.value.item() == pytest.approx(0.0627, abs=1e-4)
    assert {key for key in loss.parts if key.startswith("error/")} == {
        "error/chosen", "error/rejected", "error/reference_chosen", "error/reference_rejected"
    }  # fmt: skip


def test_the_anchor_adds_the_chosen_error() -> None:
    reference = tiny.net(trained=True)
    policy, pair = moved(reference), tiny.pair()
    free = Preference(PHASES, frozen(reference), 50.0)(policy, pair, DRAWS)
    tied = Preference(PHASES, frozen(reference), 50.0, sft_weight=3.0)(policy, pair, DRAWS)
    added = 3.0 * free.parts["error/chosen"].mean()
    torch.testing.assert_close(tied.value, free.value + added)


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_every_loss_type_has_gradients_of_error_size(loss_type: str) -> None:
    """This holds for every beta: a learning rate tuned for one serves the others."""
    net, pair = tiny.net(trained=True), tiny.pair()
    size = gradient(net, Supervised(PHASES)(net, tiny.batch(), DRAWS).value).norm()
    for beta in (20.0, 2000.0):
        objective = Preference(PHASES, frozen(net), beta, loss_type, label_smoothing=0.1)
        grown = gradient(net, objective(net, pair, DRAWS).value).norm() / size
        assert 0.01 < grown < 20, (loss_type, beta, grown)


def test_negative_preference_pushes_the_error_up_and_saturates() -> None:
    net, batch = tiny.net(trained=True), tiny.batch()
    objective = NegativePreference(PHASES, frozen(net), beta=700.0)
    loss = objective(net, batch, DRAWS)
    assert loss.parts["preference"].tolist() == pytest.approx([math.log(2)] * 2, rel=1e-5)
    error = velocity_error(net, batch, DRAWS, PHASES).mean()
    torch.testing.assert_close(gradient(net, loss.value), -gradient(net, error) / 2)
    right = DRAWS.noise - batch.latents
    far = NegativePreference(PHASES, always(right), beta=700.0)(always(right + 1), batch, DRAWS)
    assert far.parts["saturated"].tolist() == [1.0, 1.0]
    assert far.parts["gradient_factor"].max() < 1e-6


def test_the_reference_gets_no_gradient() -> None:
    net = tiny.net(trained=True)
    reference, policy = frozen(net), moved(net)
    Preference(PHASES, reference, 50.0)(policy, tiny.pair(), DRAWS).value.backward()
    assert all(parameter.grad is None for parameter in reference.net.parameters())
    holder = nn.Module()
    holder.net, holder.reference = policy, reference
    assert len(list(holder.parameters())) == len(list(policy.parameters()))


def test_beta_follows_the_margin_to_the_target() -> None:
    beta = AdaptiveBeta(1000.0, target=0.1)
    assert beta.value == 1000.0
    for _ in range(200):
        beta.update(0.01)
    assert 1 / (1 + math.exp(beta.value / 2 * 0.01)) == pytest.approx(0.1, rel=1e-6)
    for _ in range(200):
        beta.update(10.0)
    assert beta.value == 100.0, "not below a tenth of the limit"
    for _ in range(400):
        beta.update(-1.0)
    assert beta.value == 1000.0, "a margin below 0 asks for all there is"


def test_beta_resumes_from_its_state_bit_for_bit() -> None:
    margins = (torch.rand(20, generator=torch.Generator().manual_seed(0)) / 100).tolist()
    unbroken, first = AdaptiveBeta(1000.0, 0.2), AdaptiveBeta(1000.0, 0.2)
    for margin in margins:
        unbroken.update(margin)
    for margin in margins[:9]:
        first.update(margin)
    second = AdaptiveBeta(1000.0, 0.2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for margin in margins[9:]:
        second.update(margin)
    assert second.value == unbroken.value and second.state_dict() == unbroken.state_dict()


def test_beta_changes_at_steps_and_not_at_calls() -> None:
    reference = tiny.net(trained=True)
    policy = moved(reference)
    objective = Preference(PHASES, frozen(reference), 1000.0, target_grad_factor=0.1)
    for _ in range(3):
        objective(policy, tiny.pair(), DRAWS)
    assert objective.beta.value == 1000.0
    objective.update(0.005)
    assert objective.beta.value == pytest.approx(2 * math.log(9) / 0.005, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta=0"),
        ({"beta": 1.0, "loss_type": "sigmoidal"}, "loss_type=sigmoidal"),
        ({"beta": 1.0, "label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"beta": 1.0, "loss_type": "exo_pair"}, "exo_pair"),
        ({"beta": 1.0, "target_grad_factor": 0.5}, "target_grad_factor=0.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preference(PHASES, always(torch.zeros(1)), **settings)

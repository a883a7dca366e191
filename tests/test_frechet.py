"""Frechet distance: closed forms, invariances, and torchmetrics as an oracle."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from echolab.metrics.frechet import (
    distance_interval,
    distances_by_count,
    frechet_distance,
    frechet_of_weights,
    kernel_distance,
    kernel_of_weights,
)


def normal(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).double()


def with_covariance(covariance: Tensor, mean: Tensor, count: int = 64, seed: int = 0) -> Tensor:
    """Return features whose sample mean and unbiased covariance are exactly these."""
    raw = normal(count, len(mean), seed)
    raw = raw - raw.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / (count - 1)))
    return raw @ whitening.T @ torch.linalg.cholesky(covariance).T + mean


def rotation(dim: int) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, 7))[0]


def test_commuting_covariances_match_the_closed_form() -> None:
    """The distance is |dm|^2 + sum (sqrt a - sqrt b)^2 if both share their eigenvectors."""
    a, b, turn = torch.rand(6).double() + 0.1, torch.rand(6).double() + 0.1, rotation(6)
    first, second = normal(1, 6, 1)[0], normal(1, 6, 2)[0]
    distance = frechet_distance(
        with_covariance(turn @ a.diag() @ turn.T, first),
        with_covariance(turn @ b.diag() @ turn.T, second, count=99, seed=3),
    )
    expected = (first - second).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance == pytest.approx(float(expected), rel=1e-9)


def test_two_dimensions_match_the_closed_form() -> None:
    """tr (A B)^(1/2) = sqrt(tr A B + 2 sqrt(det A B))."""
    a = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    b = torch.tensor([[0.7, -0.3], [-0.3, 3.0]]).double()
    zero = torch.zeros(2).double()
    distance = frechet_distance(with_covariance(a, zero), with_covariance(b, zero, seed=1))
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    assert distance == pytest.approx(float(a.trace() + b.trace()) - 2 * root, rel=1e-9)


@pytest.mark.parametrize("shape", [(40, 8), (12, 60)])  # more and fewer samples than features
def test_the_distance_is_invariant_to_rotation_shift_and_order(shape: tuple[int, int]) -> None:
    x, y = normal(*shape), 1.5 * normal(shape[0] + 5, shape[1], 1) + 0.3
    distance = frechet_distance(x, y)
    assert distance > 0
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-9)
    turn = rotation(shape[1])
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(x + 5, y + 5) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * distance, rel=1e-9)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x[order], y) == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("shape", [(64, 400), (64, 5)])
def test_the_distance_of_a_set_to_itself_is_zero_and_never_less(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    assert 0 <= frechet_distance(x, x) < 1e-9
    shift = torch.linspace(-1, 1, shape[1]).double()
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-6)


def test_few_samples_are_biased_by_the_published_amount() -> None:
    """The distance of two samples of one Gaussian is the published bias, within a tenth.

    The second value is with the covariance of the population, which matters for few samples only.
    """
    table = ((16, 713.6, 672.1), (100, 478.3, 473.6), (256, 300.7, 299.5), (512, 157.9, 157.6))
    for count, unbiased, population in table:
        x, y = normal(count, 400, 1), normal(count, 400, 2)
        assert frechet_distance(x, y) == pytest.approx(unbiased, rel=0.1)
        ratio = frechet_distance(x, y, unbiased=False) / frechet_distance(x, y)
        assert ratio == pytest.approx(population / unbiased, abs=0.01)


def test_the_covariance_of_the_population_is_smaller_by_one_in_n() -> None:
    x, y = normal(9, 4, 1), normal(9, 4, 2)
    x, y = x - x.mean(0), y - y.mean(0)
    population = frechet_distance(x, y, unbiased=False)
    assert population == pytest.approx(frechet_distance(x, y) * 8 / 9, rel=1e-9)


def test_fewer_than_two_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples, got 1 and 5"):
        frechet_distance(normal(1, 3), normal(5, 3))


class Features(nn.Module):
    """A stand-in for Inception, as torchmetrics asks for it."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3 * 8 * 8, 12, 5).float() / 8)

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) @ self.weight).tanh()


def test_the_distance_equals_torchmetrics() -> None:
    features, generator = Features(), torch.Generator().manual_seed(0)
    real = torch.rand(50, 3, 8, 8, generator=generator)
    made = torch.rand(40, 3, 8, 8, generator=generator) ** 1.3
    oracle = FrechetInceptionDistance(feature=features, normalize=True,
                                      input_img_size=(3, 8, 8))  # fmt: skip
    oracle.update(real, real=True)
    oracle.update(made, real=False)
    with torch.no_grad():
        ours = frechet_distance(features(real), features(made))
    assert ours == pytest.approx(float(oracle.compute()), rel=1e-4)


# -- kernel distance -------------------------------------------------------------------------------


def test_the_kernel_distance_equals_torchmetrics() -> None:
    x, y = normal(30, 12), normal(30, 12, 1) + 0.2
    assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_the_kernel_distance_equals_its_sum_over_pairs() -> None:
    x, y = normal(5, 3), normal(4, 3, 1)

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum((float(a @ b) / 3 + 1) ** 3 for a, b in pairs) / len(pairs)

    within = [
        mean([(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)
    ]
    across = mean([(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    with pytest.raises(ValueError, match="2 samples, got 1 and 4"):
        kernel_distance(x[:1], y)


def test_the_kernel_distance_has_no_bias_where_the_frechet_distance_has() -> None:
    pairs = [(normal(20, 8, seed), normal(20, 8, seed + 1000)) for seed in range(200)]
    values = torch.tensor([kernel_distance(x, y) for x, y in pairs])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 200**0.5
    assert min(frechet_distance(x, y) for x, y in pairs) > 1


# -- clips -----------------------------------------------------------------------------------------


def clips(count: int, seed: int) -> Tensor:
    return normal(count * 2, 6, seed).view(count, 2, 6)


def test_the_distance_falls_with_the_number_of_clips() -> None:
    values = distances_by_count(
        clips(64, 0), clips(64, 1), (4, 8, 16, 32, 64, 128), frechet_distance
    )
    assert list(values) == [4, 8, 16, 32, 64]
    assert list(values.values()) == sorted(values.values(), reverse=True)
    complete = frechet_distance(clips(64, 0).flatten(0, 1), clips(64, 1).flatten(0, 1))
    assert values[64] == pytest.approx(complete, rel=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("count", [3, 12])  # fewer and more rows than features
def test_a_resample_by_weights_is_the_distance_of_the_repeated_clips(
    count: int, unbiased: bool
) -> None:
    first, second = clips(count, 0) + 3, clips(9, 1)
    frechet = frechet_of_weights(first, second, unbiased=unbiased)
    kernel = kernel_of_weights(first, second)
    for rows in (range(count), [0] * (count - 1) + [1], [2, *range(1, count)]):
        weights = torch.bincount(torch.tensor(list(rows)), minlength=count)
        repeated, real = first[list(rows)].flatten(0, 1), second.flatten(0, 1)
        expected = frechet_distance(repeated, real, unbiased=unbiased)
        assert frechet(weights) == pytest.approx(expected, rel=1e-6)
        assert kernel(weights) == pytest.approx(kernel_distance(repeated, real), rel=1e-9)


def frechet_interval(first: Tensor, second: Tensor, seed: int = 0) -> tuple[float, float]:
    return distance_interval(frechet_of_weights(first, second), len(first), seed=seed)


def test_intervals_come_from_resampled_clips_and_the_seed() -> None:
    second = clips(80, 1) + 1
    wide = frechet_interval(clips(10, 0), second)
    assert wide == frechet_interval(clips(10, 0), second)
    assert wide != frechet_interval(clips(10, 0), second, seed=1)
    narrow = frechet_interval(clips(80, 0), second)
    value = frechet_distance(clips(80, 0).flatten(0, 1), second.flatten(0, 1))
    assert narrow[0] < value < narrow[1] and narrow[1] - narrow[0] < (wide[1] - wide[0]) / 1.5
    assert all(math.isnan(n) for n in frechet_interval(clips(2, 0), second))


def test_frames_of_one_clip_are_resampled_together() -> None:
    """A clip repeated as frames carries no more information than the clip."""
    single, second = clips(12, 0)[:, :1], clips(40, 1)
    once, often = (
        distance_interval(kernel_of_weights(first, second), 12)
        for first in (single, single.repeat(1, 4, 1))
    )
    assert often[1] - often[0] == pytest.approx(once[1] - once[0], rel=0.5)

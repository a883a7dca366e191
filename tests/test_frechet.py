"""Frechet distance: closed forms, invariances, and torchmetrics as an oracle."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from echolab.metrics.scores import frechet_distance


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
    """The distance of two samples of one Gaussian is the published bias, within a tenth."""
    for count, published in ((16, 713.6), (100, 478.3), (512, 157.9)):
        distance = frechet_distance(normal(count, 400, 1), normal(count, 400, 2))
        assert distance == pytest.approx(published, rel=0.1)


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

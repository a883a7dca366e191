"""Distances between two sets of features: Frechet and polynomial-kernel, with intervals.

The Frechet distance of few samples is far above zero also for two samples of one distribution: with
2048 features about 1800 at N = 1000.  Only values of the same N can be compared; the unbiased
kernel distance (KID, KVD) does not have this bias.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEGREE, COEFFICIENT = 3, 1.0  # of the polynomial kernel; gamma is 1 / D
Distance = Callable[[Tensor, Tensor], float]


def frechet_distance(first: Tensor, second: Tensor, *, unbiased: bool = True) -> float:
    """Return the Frechet distance between the Gaussian fits of features [N, D] and [M, D].

        FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

    With centered features A and B divided by sqrt(n - 1), S1 = A^T A and S2 = B^T B, and the trace
    of the root is the nuclear norm of A B^T.  No matrix root is needed: the distance is never
    imaginary or negative, and it is exact also with fewer samples than features.  Covariances are
    unbiased (n - 1), as in pytorch-fid, or else of the population (n), as in StyleGAN-V.  Raise
    ValueError for less than two samples.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"a covariance needs 2 samples, got {len(first)} and {len(second)}")
    # The trace of a covariance is the squared norm of its centered features.
    a, b = (_centered(features.double(), unbiased) for features in (first, second))
    shift = (first.double().mean(0) - second.double().mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(a @ b.T, ord="nuc")
    return float((shift + a.square().sum() + b.square().sum() - 2 * cross).clamp(min=0))


def _centered(features: Tensor, unbiased: bool) -> Tensor:
    return (features - features.mean(0)) / (len(features) - unbiased) ** 0.5


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy of features [N, D] and [M, D].

    The kernel is k(x, y) = (x . y / D + 1)^3 (Binkowski et al. 2018), over all samples instead of
    random subsets.  The value of equal distributions is around zero and may be negative.  Raise
    ValueError for less than two samples.
    """
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"a kernel distance needs 2 samples, got {len(first)} and {len(second)}")
    # Leave out pairs of a sample with itself, which bias the mean.
    x, y = first.double(), second.double()
    across = polynomial_kernel(x, y).mean()
    return float(_mean_of_pairs(x) + _mean_of_pairs(y) - 2 * across)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel values [N, M] of features [N, D] and [M, D]."""
    kernel: Tensor = (x @ y.T / x.shape[1] + COEFFICIENT) ** DEGREE
    return kernel


def _mean_of_pairs(x: Tensor) -> Tensor:
    """Return the mean kernel value of different samples."""
    kernel = polynomial_kernel(x, x)
    return (kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1))


# -- features of clips -----------------------------------------------------------------------------
#
# Features of several frames of a clip are [clips, frames, D].  Frames of one clip depend on each
# other, so subsets and resamples are of clips.


def distances_by_count(
    first: Tensor, second: Tensor, counts: Sequence[int], distance: Distance, seed: int = 0
) -> dict[int, float]:
    """Return the distance of random subsets of clips from the full second set, by their number.

    Features are [clips, frames, D].  Subsets are nested, and depend on the number of clips and the
    seed only.  Counts over the number of clips are left out.
    """
    # Draw on the CPU, so that every kind of device scores the same clips.
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    reference = second.flatten(0, 1)
    return {
        count: distance(first[order[:count].to(first.device)].flatten(0, 1), reference)
        for count in counts
        if count <= len(first)
    }


def distance_interval(
    first: Tensor,
    second: Tensor,
    distance: Distance,
    *,
    seed: int = 0,
    draws: int = 100,
) -> tuple[float, float]:
    """Return an interval of 95 % of a distance, by resampling the clips of the first set.

    Features are [clips, frames, D]; the second set is fixed.  A resample repeats clips, which by
    itself increases a distance; so the quantiles of the draws are shifted by the difference between
    the distance and their mean.  The resamples depend on the number of clips and the seed only.
    Return NaN for less than three clips.
    """
    if len(first) < 3:
        return float("nan"), float("nan")
    # Frames of a clip stay together.
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(first), (draws, len(first)), generator=generator).to(first.device)
    reference = second.flatten(0, 1)
    values = [distance(first[rows].flatten(0, 1), reference) for rows in chosen]
    spread = torch.tensor(values, dtype=torch.float64)
    quantiles = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (distance(first.flatten(0, 1), reference) + quantiles - spread.mean()).tolist()
    return low, high

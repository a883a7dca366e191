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
OfWeights = Callable[[Tensor], float]  # a distance, from the number of times that each clip occurs


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


def frechet_of_weights(first: Tensor, second: Tensor, *, unbiased: bool = True) -> OfWeights:
    """Return the Frechet distance of the first set as a function of how often each clip occurs.

    Features are [clips, frames, D].  All that the second set decides is computed once, so that a
    resample costs the eigenvalues of one matrix: D x D, or as large as its distinct rows if these
    are fewer.
    """
    # Center both sets at the mean of the first, for accuracy.
    center, frames = first.double().mean((0, 1)), first.shape[1]
    x, y = (features.double().flatten(0, 1) - center for features in (first, second))
    of_rows = _of_rows_by_covariance if x.shape[1] < len(x) else _of_rows_by_products
    distance = of_rows(x, y, unbiased)
    return lambda weights: distance(weights.double().repeat_interleave(frames))


def _of_rows_by_products(x: Tensor, y: Tensor, unbiased: bool) -> OfWeights:
    """Return the distance of rows [N, D] to [M, D] by their products, for N < D."""
    gap, b, count = y.mean(0), _centered(y, unbiased), len(x)
    squares, across, trace = x.square().sum(1), x @ b.T, b.square().sum()
    products, gram, toward = across @ across.T, x @ x.T, x @ gap

    def distance(w: Tensor) -> float:
        mean_square = w @ gram @ w / count**2
        own = (w @ squares - count * mean_square) / (count - unbiased)
        shift = mean_square - 2 * (w @ toward) / count + gap.square().sum()
        # Rows of sqrt(w) (x - mean) against the second set; rows that do not occur are dropped.
        rows = torch.nonzero(w).flatten()
        toward_mean = products @ w / count
        centered = products - toward_mean[:, None] - toward_mean + w @ toward_mean / count
        scale = (w[rows] / (count - unbiased)).sqrt()
        matrix = centered[rows][:, rows] * scale[:, None] * scale
        cross = torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().sum()
        return float((shift + own + trace - 2 * cross).clamp(min=0))

    return distance


def _of_rows_by_covariance(x: Tensor, y: Tensor, unbiased: bool) -> OfWeights:
    """Return the distance of rows [N, D] to [M, D] by their covariances, for D < N."""
    gap, b, count = y.mean(0), _centered(y, unbiased), len(x)
    # The trace of (S1 S2)^(1/2) is that of the root of R S1 R, for the root R of S2.
    values, vectors = torch.linalg.eigh(b.T @ b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def distance(w: Tensor) -> float:
        mean = w @ x / count
        centered = x - mean
        own = (centered * w[:, None]).T @ centered / (count - unbiased)
        cross = torch.linalg.eigvalsh(root @ own @ root).clamp(min=0).sqrt().sum()
        shift = (mean - gap).square().sum()
        return float((shift + own.trace() + values.sum() - 2 * cross).clamp(min=0))

    return distance


def kernel_of_weights(first: Tensor, second: Tensor) -> OfWeights:
    """Return the kernel distance of the first set as a function of how often each clip occurs."""
    x, y = first.double().flatten(0, 1), second.double().flatten(0, 1)
    within, across = polynomial_kernel(x, x), polynomial_kernel(x, y).mean(1)
    other, frames, count = _mean_of_pairs(y), first.shape[1], len(x)

    def distance(weights: Tensor) -> float:
        w = weights.double().repeat_interleave(frames)
        pairs = w @ within @ w - w @ within.diagonal()
        return float(pairs / (count * (count - 1)) + other - 2 * (w @ across) / count)

    return distance


def distance_interval(
    distance: OfWeights, clips: int, *, seed: int = 0, draws: int = 100
) -> tuple[float, float]:
    """Return an interval of 95 % of a distance, by resampling the clips of the first set.

    The second set is fixed.  A resample repeats clips, which by itself increases a distance; so the
    quantiles of the draws are shifted by the difference between the distance and their mean.  The
    resamples depend on the number of clips and the seed only.  Return NaN for less than three
    clips.
    """
    if clips < 3:
        return float("nan"), float("nan")
    # Frames of a clip stay together: weights are of clips.
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(clips, (draws, clips), generator=generator)
    values = [distance(torch.bincount(rows, minlength=clips)) for rows in chosen]
    spread = torch.tensor(values, dtype=torch.float64)
    quantiles = spread.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (distance(torch.ones(clips)) + quantiles - spread.mean()).tolist()
    return low, high

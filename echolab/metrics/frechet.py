"""Frechet distance between the Gaussian fits of two sets of features.

    FD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

With centered features A and B divided by sqrt(n - 1), S1 = A^T A and S2 = B^T B, and the trace of
the root is the nuclear norm of A B^T.  No matrix root is needed: the distance is never imaginary or
negative, and exact also with fewer samples than features.  Covariances are unbiased (n - 1), as in
pytorch-fid.
"""

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the distance of features [N, D] and [M, D]; raise ValueError below two samples."""
    if len(first) < 2 or len(second) < 2:
        raise ValueError(f"a covariance needs 2 samples, got {len(first)} and {len(second)}")
    a, b = (_centered(features.double()) for features in (first, second))
    shift = (first.double().mean(0) - second.double().mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(a @ b.T, ord="nuc")
    return float((shift + a.square().sum() + b.square().sum() - 2 * cross).clamp(min=0))


def _centered(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / (len(features) - 1) ** 0.5

"""Sequence-level preference losses, with a clip's error instead of its negative log-likelihood.

The formulas are those of trl's DPOTrainer and of the papers named below.  trl 1.16 implements them
in the private method `_compute_loss`, among token masks and gathers; calling it would require a
mock trainer and depend on one release.  So the losses are implemented here, and the tests compare
each one with trl's method.

With s = -error, every loss is a function of the log-ratios  c = s_chosen - s_ref_chosen  and
r = s_rejected - s_ref_rejected, which `beta` multiplies as in trl.  This beta is half of the beta
in the usual notation of Diffusion-DPO.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DISCOPOP_TAU = 0.05  # trl's default


class PairErrors(NamedTuple):
    """Velocity errors of policy and reference on both halves of a pair, each [B]."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """Log-ratio of the chosen clip: positive if the policy is better than the reference."""
        return self.reference_chosen - self.chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """Log-ratio of the rejected clip: positive if the policy is better than the reference."""
        return self.reference_rejected - self.rejected

    @property
    def margin(self) -> Tensor:
        """The log-ratio margin, which preference training increases."""
        return self.chosen_ratio - self.rejected_ratio


# All losses have the same signature, also those that ignore label smoothing.
PairLoss = Callable[[PairErrors, float, float], Tensor]  # (errors, beta, label_smoothing) -> [B]


def logistic_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    """Return -log sigmoid(logits) for labels that are wrong with probability `label_smoothing`."""
    wrong = label_smoothing
    return -(1 - wrong) * F.logsigmoid(logits) - wrong * F.logsigmoid(-logits)


def sigmoid(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return DPO, arXiv 2305.18290, with conservative DPO's smoothing."""
    return logistic_loss(beta * errors.margin, label_smoothing)


def hinge(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return SLiC, arXiv 2305.10425: zero beyond a margin of 1 / beta."""
    return torch.relu(1 - beta * errors.margin)


def ipo(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return IPO, arXiv 2310.12036, eq. 17: zero at a margin of 1 / (2 beta)."""
    return (errors.margin - 1 / (2 * beta)).square()


def exo_pair(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return EXO, arXiv 2402.00856, eq. 16; infinite without label smoothing."""
    # Reverse KL between the policy's and the smoothed label's distribution over the pair.
    logits, wrong = beta * errors.margin, torch.tensor(label_smoothing)
    won = logits.sigmoid() * (F.logsigmoid(logits) - torch.log1p(-wrong))
    return won + (-logits).sigmoid() * (F.logsigmoid(-logits) - torch.log(wrong))


def nca_pair(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return NCA, arXiv 2402.05369, which also keeps the chosen clip likely."""
    # Three binary classifications: chosen twice, against 1 and against 0, and rejected.
    chosen, rejected = beta * errors.chosen_ratio, beta * errors.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return Robust DPO, arXiv 2403.00409: unbiased for flipped labels; may be negative."""
    # Subtract the expected contribution of flipped labels.
    logits, wrong = beta * errors.margin, label_smoothing
    clean = -(1 - wrong) * F.logsigmoid(logits) + wrong * F.logsigmoid(-logits)
    return clean / (1 - 2 * wrong)


def bco_pair(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return BCO, arXiv 2404.04656, without a reward shift: two independent classifiers."""
    return -F.logsigmoid(beta * errors.chosen_ratio) - F.logsigmoid(-beta * errors.rejected_ratio)


def sppo_hard(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return SPPO, arXiv 2405.00675, eq. 4.7 with certain winners."""
    # Regress the ratios to +1 / (2 beta) and -1 / (2 beta).
    chosen, rejected = errors.chosen_ratio, errors.rejected_ratio
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def aot(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return AOT, arXiv 2406.05882: sorted policy gaps minus sorted reference gaps of the batch."""
    # Stochastic dominance: compare the sorted gaps instead of pairs.
    gap = (errors.rejected - errors.chosen).sort().values
    reference_gap = (errors.reference_rejected - errors.reference_chosen).sort().values
    return logistic_loss(beta * (gap - reference_gap), label_smoothing)


def aot_unpaired(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return AOT for chosen and rejected clips that may have different prompts."""
    gap = errors.chosen_ratio.sort().values - errors.rejected_ratio.sort().values
    return logistic_loss(beta * gap, label_smoothing)


def apo_zero(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return APO, arXiv 2408.06266, eq. 7: the chosen clips are better than the policy's own."""
    return 1 - (beta * errors.chosen_ratio).sigmoid() + (beta * errors.rejected_ratio).sigmoid()


def apo_down(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return APO, eq. 8: the chosen clips are worse than the policy's own."""
    return (beta * errors.chosen_ratio).sigmoid() + 1 - (beta * errors.margin).sigmoid()


def discopop(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return DiscoPOP, arXiv 2406.08414, eq. 5: logistic below a logit of 0, exponential above."""
    logits = beta * errors.margin
    return torch.lerp(-F.logsigmoid(logits), (-logits).exp(), (logits / DISCOPOP_TAU).sigmoid())


def sft(errors: PairErrors, beta: float, label_smoothing: float) -> Tensor:
    """Return only the chosen clip's error, which is rejection-sampling fine-tuning."""
    return errors.chosen


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    # trl divides by the completion's length; our error is a mean already.
    "sigmoid_norm": sigmoid,
    "sft": sft,
}


def error_units(loss_type: str, beta: float) -> float:
    """Return the factor that scales a loss's gradient to the scale of an error's gradient.

    The gradient of a loss of the logit is about beta times the gradient of the margin, for losses
    quadratic in the ratios about 1 / beta times; `sft` is an error itself.
    """
    if loss_type == "sft":
        return 1.0
    return beta if loss_type in ("ipo", "sppo_hard") else 1 / beta

"""One forward, three objectives: supervised, paired preference, negative preference.

Each objective is called as `objective(net, batch, draws) -> Loss`.  Objectives draw no random
numbers, and policy and reference, chosen and rejected always get the same noise and noise level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from echolab.diffusion.flow import interpolate, to_timesteps, velocity_target
from echolab.diffusion.phases import Allocator
from echolab.diffusion.preference_losses import PAIR_LOSSES, PairErrors, error_units, logistic_loss
from echolab.errors import ConfigError
from echolab.types import Batch, Conditions, Draws, Loss, ModalityWeights, PreferencePair

Net = Callable[[Tensor, Tensor, Conditions, ModalityWeights | None], Tensor]

SATURATION_LOGIT = 10.0  # beyond this logit the gradient factor is below 5e-5
EMA_DECAY = 0.95  # decay of the running mean margin that determines beta


def velocity_error(net: Net, batch: Batch, draws: Draws, phases: Allocator) -> Tensor:
    """Return the weighted mean squared velocity error of each clip.  [B], fp32."""
    # Noise the latents, and drop or scale modalities by the noise level.
    noisy_latents = interpolate(batch.latents, draws.noise, draws.sigmas)
    timesteps = to_timesteps(draws.sigmas)
    conditions, weights = phases(batch.conditions, timesteps, draws.uniforms)
    # Mean over channels, then a weighted mean over frames, rows and columns.
    velocity = net(noisy_latents, timesteps, conditions, weights).float()
    squares = (velocity - velocity_target(batch.latents, draws.noise)).square().mean(1)
    weight = batch.weight.float().squeeze(1)  # [B, F, H, W]
    return (squares * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1e-6)


@dataclass(frozen=True)
class Supervised:
    """The mean error on real clips."""

    phases: Allocator

    def __call__(self, net: Net, batch: Batch, draws: Draws) -> Loss:
        """Return the mean error; parts: `error` [B]."""
        error = velocity_error(net, batch, draws, self.phases)
        return Loss(error.mean(), {"error": error.detach()})


class AdaptiveBeta:
    """The DPO beta, which sets how fast a preference saturates: fixed, or adapted to the margin.

    The gradient factor of a margin m is sigmoid(-beta m / 2).  With a fixed beta the gradient
    vanishes as the margin grows (factor 0.01 after a few hundred steps).  With a `target`, beta is
    chosen within [limit / 10, limit] so that the running mean margin has the target factor.
    Gradients are in error units for every beta, so beta changes which pairs count, not the step
    size.
    """

    def __init__(self, limit: float, target: float | None):
        if limit <= 0:
            raise ConfigError(f"beta={limit:g}: must be above 0; 100 to 5000 is usual")
        if target is not None and not 0 < target < 0.5:
            raise ConfigError(
                f"target_grad_factor={target:g}: must lie between 0 and 0.5, an untrained "
                "policy's; 0.1 to 0.2 is usual"
            )
        self.limit, self.target = limit, target
        self._sum, self._weight = 0.0, 0.0

    @property
    def value(self) -> float:
        """The beta of the next step."""
        if self.target is None or self._sum <= 0:
            return self.limit
        # Solve sigmoid(-beta m / 2) = target for beta, at the running mean margin.
        logit = math.log(1 / self.target - 1)
        return min(max(2 * logit * self._weight / self._sum, self.limit / 10), self.limit)

    def update(self, margin: float) -> None:
        """Add the mean margin of an optimizer step to the running mean."""
        # `_weight` corrects the bias of an EMA that starts at 0.
        if self.target is not None:
            self._sum = EMA_DECAY * self._sum + (1 - EMA_DECAY) * margin
            self._weight = EMA_DECAY * self._weight + (1 - EMA_DECAY)

    def state_dict(self) -> dict[str, float]:
        """Return the running mean as plain floats."""
        return {"margin_sum": self._sum, "margin_weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`, bit-exactly."""
        self._sum, self._weight = state["margin_sum"], state["margin_weight"]


class _ReferenceObjective:
    """Base of both preference objectives: phases, the frozen reference, and beta.

    A call does not change the state.  After an optimizer step, training calls `update` with the
    mean margin of all its clips, so that beta depends on neither micro-batches nor ranks.
    """

    def __init__(
        self,
        phases: Allocator,
        reference: Net,
        beta: float,
        target_grad_factor: float | None = None,
    ):
        self.phases, self.reference = phases, reference
        self.beta = AdaptiveBeta(beta, target_grad_factor)

    def update(self, margin: float) -> None:
        """Update beta for the next step from the mean margin of an optimizer step."""
        self.beta.update(margin)

    def state_dict(self) -> dict[str, float]:
        """Return the running mean margin that determines beta, as plain floats."""
        return self.beta.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        self.beta.load_state_dict(state)

    def _errors(self, net: Net, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the errors of the policy and of the reference, each [B]."""
        # Run the reference first, so that its activations are freed before the policy's pass.
        with torch.no_grad():
            reference = velocity_error(self.reference, batch, draws, self.phases)
        return velocity_error(net, batch, draws, self.phases), reference

    def _parts(self, margin: Tensor, beta: float) -> dict[str, Tensor]:
        """Return the values to log for margins [B]."""
        # Log whether the policy ranks each pair correctly, and the gradient factor.
        margin = margin.detach()
        logits = beta / 2 * margin
        return {
            "margin": margin,
            "accuracy": (margin > 0).float(),
            "gradient_factor": (-logits).sigmoid(),
            "saturated": (logits.abs() > SATURATION_LOGIT).float(),
            "beta": torch.tensor(beta),
        }


def stack_pair(pair: PreferencePair) -> Batch:
    """Return both halves as one batch of 2B, chosen first, under the same conditions."""
    return Batch(
        latents=torch.cat([pair.chosen, pair.rejected]),
        conditions=Conditions(*(torch.cat([part, part]) for part in pair.conditions)),
        weight=torch.cat([pair.weight, pair.weight]),
        tasks=pair.tasks * 2,
        keys=pair.keys * 2,
    )


class Preference(_ReferenceObjective):
    """Flow-DPO on pairs, in the units of the supervised error.

    margin = (ref_c - pol_c) - (ref_r - pol_r), logit = (beta / 2) margin; the loss of the logit
    (`preference_losses.PAIR_LOSSES`) is multiplied by 2 / beta, so that "sigmoid" has the gradient
    -sigmoid(-logit) grad(margin): beta only sets where the loss saturates.  The chosen clip's error
    is added with weight `sft_weight`, which prevents both errors from rising together.

    Worked example: pol_c 1.0, ref_c 1.2, pol_r 1.5, ref_r 1.5, beta 10 give margin 0.2, logit 1,
    loss (2 / 10) log(1 + 1 / e) = 0.0627.
    """

    def __init__(
        self,
        phases: Allocator,
        reference: Net,
        beta: float,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        sft_weight: float = 0.0,
        target_grad_factor: float | None = None,
    ):
        super().__init__(phases, reference, beta, target_grad_factor)
        # Refuse settings without a finite loss.
        if loss_type not in PAIR_LOSSES:
            raise ConfigError(f"loss_type={loss_type}: unknown; one of {', '.join(PAIR_LOSSES)}")
        if not 0 <= label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing={label_smoothing:g}: must lie in [0, 0.5)")
        if loss_type == "exo_pair" and label_smoothing == 0:
            raise ConfigError("loss_type=exo_pair: infinite at label_smoothing=0; set it to 1e-3")
        self.loss_type, self.label_smoothing = loss_type, label_smoothing
        self.sft_weight = sft_weight

    def __call__(self, net: Net, batch: PreferencePair, draws: Draws) -> Loss:
        """Return the loss; parts: `preference` (unscaled), margin and derived values, errors."""
        # Both halves get the same noise, sigmas and uniforms.
        twice = Draws(*(torch.cat([part, part]) for part in draws))
        policy, reference = self._errors(net, stack_pair(batch), twice)
        # Pass trl's beta to the losses, which is half of Diffusion-DPO's beta.
        errors = PairErrors(*policy.chunk(2), *reference.chunk(2))
        beta = self.beta.value
        loss = PAIR_LOSSES[self.loss_type](errors, beta / 2, self.label_smoothing)
        value = loss.mean() * error_units(self.loss_type, beta / 2)
        parts = {"preference": loss.detach(), **self._parts(errors.margin, beta)}
        parts |= {f"error/{name}": error.detach() for name, error in errors._asdict().items()}
        return Loss(value + self.sft_weight * errors.chosen.mean(), parts)


class NegativePreference(_ReferenceObjective):
    """Loss on rejected clips only: -log sigmoid((beta / 2) (policy - reference)), times 2 / beta.

    This is Diffusion-DPO without its preferred term.  EchoMimicV3 uses it as the second half of its
    training cycle and does not publish its exact form.  It saturates once the policy is clearly
    worse than the reference on the rejected clips; supervised epochs in between prevent drift.
    """

    def __call__(self, net: Net, batch: Batch, draws: Draws) -> Loss:
        """Return the loss of rejected clips; parts as in `Preference`."""
        # The margin is positive once the policy is worse than the reference on the rejected clip.
        policy, reference = self._errors(net, batch, draws)
        margin, beta = policy - reference, self.beta.value
        loss = logistic_loss(beta / 2 * margin, 0.0)
        parts = {"preference": loss.detach(), **self._parts(margin, beta)}
        parts |= {"error/rejected": policy.detach(), "error/reference_rejected": reference}
        return Loss(loss.mean() * 2 / beta, parts)

"""Preference settings in trl's words, checked by trl's own DPOConfig.

Ranges (beta, label_smoothing, the gradient factor) are checked where they are used, by
`diffusion.objectives`: trl leaves them to its trainer.

echolab computes the losses itself (`diffusion.preference_losses`), since trl's are written for
tokens and are private; trl gives the vocabulary, checks the values, and is the oracle of every loss
in the tests.
"""

import tempfile
from dataclasses import dataclass

from echolab.diffusion.preference_losses import PAIR_LOSSES
from echolab.errors import ConfigError


@dataclass(frozen=True)
class PreferenceSettings:
    """beta, loss_type, label_smoothing as in trl; the anchor and the gradient factor are ours."""

    beta: float = 300.0
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0  # times the chosen clip's own error, added to the loss
    target_grad_factor: float | None = None  # beta then follows the margin


def checked(settings: PreferenceSettings) -> PreferenceSettings:
    """The same settings; ConfigError where trl or the loss refuses them."""
    from trl import DPOConfig  # takes seconds: only preference training pays for it

    if settings.loss_type not in PAIR_LOSSES:
        raise ConfigError(
            f"objective.loss_type={settings.loss_type}: unknown; one of {', '.join(PAIR_LOSSES)}"
        )
    for name in ("beta", "label_smoothing", "sft_weight"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            key = "sft_weight" if name == "sft_weight" else name
            raise ConfigError(f"objective.{key}={value}: must be a number")  # trl takes any
    if not 0 <= settings.sft_weight:
        raise ConfigError(f"objective.sft_weight={settings.sft_weight:g}: must be 0 or more")
    try:
        with tempfile.TemporaryDirectory() as folder:
            DPOConfig(
                output_dir=folder,
                report_to="none",
                bf16=False,
                use_cpu=True,
                beta=settings.beta,
                loss_type=[settings.loss_type],
                label_smoothing=settings.label_smoothing,
            )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"objective: trl refuses these settings: {error}") from error
    return settings

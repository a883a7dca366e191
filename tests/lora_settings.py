"""Settings of a run that trains adapters, for `runs.train`: network, reference and objectives."""

from typing import Any

import runs
import tiny

from echolab.diffusion.objectives import NegativePreference
from echolab.training.adapters.lora import (
    AdaptersOff,
    AverageAdapters,
    Lora,
    add_adapters,
    base_fingerprint,
)

LORA = Lora(("self_attn", "cross_attn", "ffn"), rank=3, alpha=6.0)


def settings(reference: str, lora: Lora = LORA, **base: Any) -> dict[str, Any]:
    """Return the settings with the base or the average as the `reference`."""
    net = tiny.net(**{"trained": True, **base})
    add_adapters(net, lora, seed=0)
    frozen = {"base": AdaptersOff, "average": lambda net: AverageAdapters(net, lora)}[reference](
        net
    )
    objectives: dict[str, Any] = {
        "sft": runs.Supervised(runs.PHASES),
        "ndpo": NegativePreference(runs.PHASES, frozen, 100.0, 0.2),
        "dpo": runs.Preference(runs.PHASES, frozen, 100.0, sft_weight=0.5, target_grad_factor=0.2),
    }
    record = {**lora._asdict(), "base": base_fingerprint(net)}
    return {"net": net, "adapters": record, "reference": frozen, "objectives": objectives}

"""fp32 averages of the weights, kept beside the fp32 masters that each rank owns.

Averaging is element by element, so a rank's pieces are enough: no gather, no communication, under
every ZeRO stage.  Lightning's own callback loses its average under ZeRO.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.training.engine.master_weights import Masters
from echolab.training.engine.posthoc_ema import exponent_of, newest_share

EMA, POWER = "ema", "power-"  # names of parts: the second begins those of power profiles


def part_of(decay: float) -> str:
    """The name under which a further average is saved."""
    return f"{EMA}-{decay!r}"


def part_names(more: Sequence[float], widths: Sequence[float]) -> list[str]:
    """Return the names of all averages, in a checkpoint too."""
    return [EMA, *map(part_of, more), *(f"{POWER}{width!r}" for width in widths)]


class Ema:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)).

    n counts updates: a young average forgets its start quickly (TensorFlow's rule).  The average of
    `decay` is the one that validation and sampling use; those of `more` are kept beside it, and so
    are power profiles of `widths` (`profiles`), from which others can be made later.
    """

    def __init__(
        self, decay: float, more: Sequence[float] = (), widths: Sequence[float] = ()
    ) -> None:
        for number in (decay, *more):
            if not 0 <= number < 1:
                raise ConfigError(f"ema_decay={number:g}: must lie in [0, 1); 0.999 is usual")
        for name, numbers in (("ema_more", more), ("ema_widths", widths)):
            if len(set(numbers)) < len(numbers):
                raise ConfigError(f"{name}={list(numbers)}: one is given twice; give each once")
        self.decay, self.more, self.widths = decay, tuple(more), tuple(widths)
        self.updates = 0
        self._decays = {EMA: decay, **{part_of(number): number for number in more}}
        self._exponents = {f"{POWER}{width!r}": exponent_of(width) for width in widths}
        self.flats: dict[str, list[Tensor]] = {}  # by part, as `Masters.local`

    @property
    def parts(self) -> list[str]:
        """Names of the averages, in a checkpoint too."""
        return part_names(self.more, self.widths)

    def start(self, masters: Masters) -> None:
        """Begin at the present weights."""
        for part in self.parts:
            self.flats[part] = [tensor.detach().clone() for tensor in masters.local]

    @torch.no_grad()
    def update(self, masters: Masters) -> None:
        """Follow the weights by one optimizer step."""
        young = (1 + self.updates) / (10 + self.updates)
        shares = {part: 1 - min(decay, young) for part, decay in self._decays.items()}
        for part, exponent in self._exponents.items():
            shares[part] = newest_share(exponent, self.updates + 1)
        for part, share in shares.items():
            torch._foreach_lerp_(self.flats[part], masters.local, share)
        self.updates += 1

    @contextmanager
    def applied(self, masters: Masters, part: str = EMA) -> Iterator[None]:
        """The network computes with the average; afterwards all is as before, bit for bit."""
        saved = masters.snapshot()
        try:
            masters.show(self.flats[part])
            yield
        finally:
            masters.unshow(saved)

    def state_dict(self) -> dict[str, Any]:
        """As JSON; the averages themselves are parts of a checkpoint."""
        told = {"decay": self.decay, "more": list(self.more), "widths": list(self.widths)}
        return {**told, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state_dict()`."""
        self.updates = int(state["updates"])

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
from echolab.training.masters import Masters

EMA = "ema"


def part_of(decay: float) -> str:
    """The name under which a further average is saved."""
    return f"{EMA}-{decay!r}"


class Ema:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)).

    n counts updates: a young average forgets its start quickly (TensorFlow's rule).  The average of
    `decay` is the one that validation and sampling use; those of `more` are kept beside it.
    """

    def __init__(self, decay: float, more: Sequence[float] = ()) -> None:
        for number in (decay, *more):
            if not 0 <= number < 1:
                raise ConfigError(f"ema_decay={number:g}: must lie in [0, 1); 0.999 is usual")
        if len({part_of(number) for number in more}) < len(more):
            raise ConfigError(f"ema_more={list(more)}: a decay is given twice; give each once")
        self.decay, self.more, self.updates = decay, tuple(more), 0
        self.decays = {EMA: decay, **{part_of(number): number for number in more}}  # by part
        self.flats: dict[str, list[Tensor]] = {}  # by part, as `Masters.local`

    def start(self, masters: Masters) -> None:
        """Begin at the present weights."""
        for part in self.decays:
            self.flats[part] = [tensor.detach().clone() for tensor in masters.local]

    @torch.no_grad()
    def update(self, masters: Masters) -> None:
        """Follow the weights by one optimizer step."""
        young = (1 + self.updates) / (10 + self.updates)
        for part, decay in self.decays.items():
            torch._foreach_lerp_(self.flats[part], masters.local, 1 - min(decay, young))
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
        return {"decay": self.decay, "more": list(self.more), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from `state_dict()`."""
        self.updates = int(state["updates"])

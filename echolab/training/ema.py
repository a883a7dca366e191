"""An fp32 average of the weights, kept beside the fp32 masters that each rank owns.

Averaging is element by element, so a rank's pieces are enough: no gather, no communication, under
every ZeRO stage.  Lightning's own callback loses its average under ZeRO.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from echolab.errors import ConfigError
from echolab.training.masters import Masters


class Ema:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)).

    n counts updates: a young average forgets its start quickly (TensorFlow's rule).
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema_decay={decay:g}: must lie in [0, 1); 0.999 is usual")
        self.decay, self.updates = decay, 0
        self._average: list[Tensor] = []

    def start(self, masters: Masters) -> None:
        """Begin at the present weights."""
        self._average = [tensor.detach().clone() for tensor in masters.local]

    @torch.no_grad()
    def update(self, masters: Masters) -> None:
        """Follow the weights by one optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._average, masters.local, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def _exchange(self, masters: Masters) -> None:
        for average, master in zip(self._average, masters.local, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)

    @contextmanager
    def in_masters(self, masters: Masters) -> Iterator[None]:
        """The masters hold the average, to be read whole; a sharded network does not change."""
        self._exchange(masters)
        try:
            yield
        finally:
            self._exchange(masters)

    @contextmanager
    def applied(self, masters: Masters) -> Iterator[None]:
        """The network computes with the average; afterwards all is as before, bit for bit."""
        saved = masters.snapshot()
        try:
            with self.in_masters(masters):
                masters.show()
                yield
        finally:
            masters.unshow(saved)

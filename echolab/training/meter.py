"""Means over the steps since the last look, gathered without touching the device's queue."""

import torch
from torch import Tensor

from echolab.tasks.table import TASKS
from echolab.training import distributed
from echolab.types import Loss


class Meter:
    """Collects losses and their parts; `flush` gives `train/...` means over steps and ranks."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._tasks: list[str] = []

    def add(self, loss: Loss, tasks: list[str]) -> None:
        """One micro-batch: the loss, and parts [B] or []."""
        self.add_value("loss", loss.value)
        for name, part in loss.parts.items():
            self.add_value(name, part)
        if "error" in loss.parts:
            self._tasks += tasks

    def add_value(self, name: str, value: Tensor) -> None:
        """Any number of values [...]."""
        self._values.setdefault(name, []).append(value.detach().reshape(-1))

    def flush(self) -> dict[str, float]:
        """Means, and an empty meter.  Collective: every rank met the same kinds of steps."""
        totals: dict[str, tuple[float, int]] = {}
        for name, parts in self._values.items():
            values = torch.cat(parts).double().cpu()
            if name == "error":  # by task; which tasks a rank met is chance, so name them all
                for task in TASKS:
                    own = [
                        v for v, t in zip(values.tolist(), self._tasks, strict=True) if t == task
                    ]
                    totals[f"train/error/{task}"] = (sum(own), len(own))
            else:
                totals[f"train/{name}"] = (float(values.sum()), len(values))
        self._values, self._tasks = {}, []
        return means(totals)


def means(totals: dict[str, tuple[float, int]]) -> dict[str, float]:
    """(sum, count) by name to means over all ranks; names nobody met are left out.  Collective."""
    names = sorted(totals)
    flat = distributed.sums([float(x) for name in names for x in totals[name]])
    pairs = zip(names, flat[::2], flat[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}

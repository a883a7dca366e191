"""Compare two checkpoints bit by bit."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from echolab.training.checkpoints.checkpoint import Checkpoint

ORIGIN = "origin"  # state entry with the writer's world size and strategy: not compared


class TensorDifference(NamedTuple):
    """A tensor that differs between two checkpoints a and b."""

    part: str
    name: str
    what: str  # "values", or why the values cannot be compared
    different: int = 0  # number of elements whose bits differ
    of: int = 0  # number of all elements
    largest: float = 0.0  # maximum of |a - b|; 0 if only signs of zeros differ

    def line(self) -> str:
        """Return a one-line description."""
        if self.what != "values":
            return f"{self.part} {self.name}: {self.what}"
        return (
            f"{self.part} {self.name}: {self.different:,} of {self.of:,} values differ, by up to "
            f"{self.largest:.3g}"
        )


def flatten(state: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for all entries of nested dicts; a list counts as one value."""
    if isinstance(state, dict) and state:
        for name, value in state.items():
            yield from flatten(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, state


def state_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return {"key", "a", "b"} for each entry that differs; omit "a" or "b" if it is missing."""
    entries_a, entries_b = (
        dict(flatten({k: v for k, v in state.items() if k != ORIGIN})) for state in (a, b)
    )
    differences = []
    for key in sorted(entries_a.keys() | entries_b.keys()):
        values = {
            side: entries[key]
            for side, entries in (("a", entries_a), ("b", entries_b))
            if key in entries
        }
        # An entry that exists on only one side is a difference too.
        if len(values) < 2 or not _is_equal(values["a"], values["b"]):
            differences.append({"key": key, **values})
    return differences


def _is_equal(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # 1 is not 1.0, and nan is nan


def tensor_differences(a: Checkpoint, b: Checkpoint) -> Iterator[TensorDifference]:
    """Yield the differences in all parts; hold only one tensor of each checkpoint in memory."""
    for part in sorted({*a.parts, *b.parts}):
        if part not in a.parts or part not in b.parts:
            yield TensorDifference(part, "*", f"only in {'a' if part in a.parts else 'b'}")
            continue
        # The files are memory-mapped: a tensor is read only when it is compared.
        tensors_a, tensors_b = a.tensors(part), b.tensors(part)
        for name in sorted({*tensors_a, *tensors_b}):
            if name not in tensors_a or name not in tensors_b:
                side = "a" if name in tensors_a else "b"
                yield TensorDifference(part, name, f"only in {side}")
            elif difference := _compare_tensors(part, name, tensors_a[name], tensors_b[name]):
                yield difference


def _compare_tensors(part: str, name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        # Values of different shapes cannot be compared.
        forms = [f"{list(tensor.shape)} {tensor.dtype}" for tensor in (a, b)]
        return TensorDifference(part, name, f"{forms[0]} in a, {forms[1]} in b")
    # Compare as integers: NaN equals itself, and 0 differs from -0.
    unequal = a.view(torch.int32) != b.view(torch.int32)
    if not unequal.any():
        return None
    largest = float((a[unequal].double() - b[unequal].double()).abs().max())
    largest = math.inf if math.isnan(largest) else largest
    return TensorDifference(part, name, "values", int(unequal.sum()), a.numel(), largest)

"""Check that ranks hold the same weights, and that frozen weights stay as they were.

Tensors are compared between ranks by one all-reduce of hashes.  A hash is a sum of all elements'
bits times odd factors that depend on the position, modulo 2^64: on the tensors' own device, without
a copy of them, and with a single synchronization.  A change of one element always changes it, since
an odd factor has an inverse; a swap of two does except with a probability of 2^-63.
(`torch.hash_tensor` is a xor of all elements: it misses swaps.)
"""

import json
from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from echolab.errors import ReplicaError
from echolab.models.frozen import Frozen
from echolab.training import distributed
from echolab.training.callbacks.callback import Callback, RunState
from echolab.training.engine.ema import Ema
from echolab.training.engine.master_weights import MOMENTS, Masters, shape
from echolab.training.intervals import Intervals

WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 20  # elements at once, so that what is kept on the way stays small
# Constants of splitmix64 (Steele, Lea, Flood 2014), as signed numbers.
GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
REMEDY = (
    "a fault of memory or of the network between them, or code that draws or skips by rank; "
    "exclude the node, and go back by `echolab rollback` to a checkpoint from before"
)


def _factors(count: int, device: torch.device) -> Tensor:
    """Return odd pseudorandom factors [count]: splitmix64 of the position.  int64 wraps around."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device) * GOLDEN
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_1  # masked: >> repeats the sign
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_2
    return (z ^ ((z >> 31) & ((1 << 33) - 1))) | 1


def _digest(tensor: Tensor, factors: Tensor) -> Tensor:
    """Return the hash of a tensor's bits, int64 [] on its device, for any dtype."""
    # Bits as integers of the same width: NaN and -0 count as they are.
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(WIDTHS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # Chunks are chained, so that a swap between chunks shows too.
    for part in bits.split(CHUNK):
        total = total * MIX_1 + (part * factors[: len(part)]).sum()
    return total


@torch.no_grad()
def digests(named: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a hash of 64 bits for each tensor, by name; the tensors lie on one device."""
    if not named:
        return {}
    largest = min(CHUNK, max(tensor.numel() * 2 for tensor in named.values()))  # 2: complex
    factors = _factors(largest, next(iter(named.values())).device)
    values = torch.stack([_digest(tensor, factors) for tensor in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def _combined(state: str, values: Mapping[str, int], named: Mapping[str, Tensor]) -> int:
    about = [[n, v, str(named[n].dtype), list(named[n].shape)] for n, v in values.items()]
    text = json.dumps([state, about])
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")


def digest(named: Mapping[str, Tensor]) -> int:
    """Return 56 bits of all tensors: their names, types, shapes and values.  Not collective."""
    return _combined("", digests(named), named)


def check_replicas(named: Mapping[str, Tensor], state: str = "") -> None:
    """Raise ReplicaError on every rank unless all hold the same tensors and the same `state`.

    Collective.  One all-reduce of two numbers if all is well; else the error names the tensor that
    differs and the ranks that differ from the majority. `state` is other replicated state, as JSON.
    """
    values = digests(named)
    own = _combined(state, values, named)
    # Largest and smallest hash in one reduction: equal if all are equal.
    highest, lowest = distributed.largest([own, -own])
    if highest == -lowest:
        return
    parts = {
        name: f"{v} {named[name].dtype} {list(named[name].shape)}" for name, v in values.items()
    }
    # Only now, when something differs, are all hashes exchanged.
    of_ranks = [json.loads(text) for text in distributed.gather_text(json.dumps([parts, state]))]
    raise ReplicaError(
        difference([p for p, _ in of_ranks], [t for _, t in of_ranks]),
        rank=odd_rank([json.dumps(one) for one in of_ranks]),
    )


def difference(parts: list[dict[str, str]], states: list[str]) -> str:
    """Describe what differs between ranks, given each rank's hashes by name, and its state."""
    names = dict.fromkeys(name for own in parts for name in own)
    differing = {n: s for n in names if (s := odd([own.get(n, "missing") for own in parts]))}
    if odd(states):
        differing["state"] = odd(states)
    first, who = next(iter(differing.items()))
    more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{first}{more} is not the same on all ranks: {who}; {REMEDY}"


def odd(values: list[str]) -> str:
    """Describe the ranks that differ from the majority; return an empty text if none does."""
    # The majority is right; without one, all sides are named.
    counts = Counter(values).most_common()
    if len(counts) < 2:
        return ""
    if counts[0][1] == counts[1][1]:  # no side has most ranks
        sides = [[r for r, v in enumerate(values) if v == value] for value, _ in counts]
        return " against ".join(_ranks(side) for side in sides)
    return f"{_ranks([r for r, v in enumerate(values) if v != counts[0][0]])} against the others"


def odd_rank(values: list[str]) -> int | None:
    """Return the one rank that differs from the majority, if it is exactly one."""
    most, count = Counter(values).most_common(1)[0]
    others = [rank for rank, value in enumerate(values) if value != most]
    return others[0] if len(others) == 1 and count > 1 else None


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def replicated(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers that every rank holds in full, under every strategy.

    Under ZeRO 3 these are the small ones that it never partitions; others that happen to be
    gathered are left out.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        cut = hasattr(parameter, "ds_id") and not getattr(parameter, "ds_persist", False)
        if not cut and parameter.numel() == shape(parameter).numel():
            tensors[name] = parameter.data
    return tensors | {name: buffer for name, buffer in net.named_buffers() if buffer.numel()}


def frozen(net: nn.Module) -> dict[str, Tensor]:
    """Return what this rank holds of the parameters that are not trained, for `Unchanged`.

    Without a reference's adapters: these change at every preference epoch.
    """
    still = {
        name: getattr(parameter, "ds_tensor", parameter).data
        for name, parameter in net.named_parameters()
        if not parameter.requires_grad
    }
    if not still:
        return still
    from echolab.training.adapters.lora import (
        AVERAGE,  # peft takes seconds, and only adapters need it
    )

    return {name: tensor for name, tensor in still.items() if f".{AVERAGE}." not in name}


class Unchanged:
    """Watches tensors that must not change, such as a frozen reference."""

    def __init__(self, what: str, named: Mapping[str, Tensor]) -> None:
        """Hash `named` now; `what` is for the message."""
        self.what, self.before = what, digests(named)

    def check(self, named: Mapping[str, Tensor]) -> None:
        """Raise ReplicaError on every rank if anything changed on any; collective."""
        now = digests(named)
        changed = [
            name for name in {**self.before, **now} if self.before.get(name) != now.get(name)
        ]
        if not distributed.largest([len(changed)])[0]:
            return
        of_ranks = [json.loads(text) for text in distributed.gather_text(json.dumps(changed[:1]))]
        changed_on = [rank for rank, names in enumerate(of_ranks) if names]
        rank, first = changed_on[0], of_ranks[changed_on[0]][0]
        raise ReplicaError(
            f"{self.what} is frozen, and {first} has changed on rank {rank}; its fault lies in "
            "code that trains it, or in memory: go on from the newest checkpoint",
            rank=rank if len(changed_on) == 1 and distributed.world() > 1 else None,
        )


class ReplicaCheck(Callback):
    """Compares digests of the weights: between ranks, and of frozen networks with their start."""

    def __init__(
        self, net: nn.Module, masters: Masters, ema: Ema, *, reference: object, intervals: Intervals
    ) -> None:
        self.net, self.masters, self.ema = net, masters, ema
        self.reference, self.intervals = reference, intervals
        self._frozen_base: Unchanged | None = None  # of adapters
        self._frozen_reference: Unchanged | None = None

    def on_start(self, state: RunState) -> None:
        """Watch the frozen base of adapters, if the network has one."""
        if parameters := frozen(self.net):
            self._frozen_base = Unchanged("the base of the adapters", parameters)

    def watch_reference(self) -> None:
        """Watch the reference, which must not change in its preference epoch."""
        # A reference of adapters has no network of its own to watch.
        parameters = self._reference_parameters()
        self._frozen_reference = Unchanged("the reference", parameters) if parameters else None

    def _reference_parameters(self) -> dict[str, Any]:
        reference = self.reference
        return dict(reference.net.named_parameters()) if isinstance(reference, Frozen) else {}

    def check_frozen(self) -> None:
        """Raise ReplicaError if a network that is not trained has changed; collective."""
        if self._frozen_base:
            self._frozen_base.check(frozen(self.net))
        if self._frozen_reference:
            self._frozen_reference.check(self._reference_parameters())

    def after_step(self, state: RunState) -> None:
        """Raise ReplicaError if ranks that should hold the same do not; collective."""
        if not self.intervals.due(self.intervals.replica_check_every, state.step):
            return
        # Without ZeRO the moments and averages are equal on all ranks too.
        tensors = replicated(self.net)
        if not self.masters.sharded:
            flats = {part: self.masters.flats(part) for part in MOMENTS} | self.ema.flats
            tensors |= {f"{part}/{i}": t for part, ts in flats.items() for i, t in enumerate(ts)}
        # The event is written before the run ends by the error.
        try:
            check_replicas(tensors, json.dumps(state.schedule.state_dict(), sort_keys=True))
        except ReplicaError as error:
            state.events.add(state.step, "replicas", words=str(error))
            raise

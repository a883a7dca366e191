"""Check that all ranks hold the same weights, and that frozen weights do not change.

Tensors are compared between ranks by one all-reduce of hashes.  A hash is the sum, modulo 2^64, of
all elements' bits times odd factors that depend on the position.  It is computed on the tensors'
device, without a copy and with a single synchronization.  A change of one element always changes
the hash, since an odd factor is invertible; a swap of two elements changes the hash except with
probability 2^-63.  (`torch.hash_tensor` is a xor of all elements, so it misses swaps.)
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
CHUNK = 1 << 20  # elements hashed at once, to limit the memory of intermediate results
# Constants of splitmix64 (Steele, Lea, Flood 2014), as signed numbers.
GOLDEN, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
REMEDY = (
    "a fault of memory or of the network between them, or code that draws or skips by rank; "
    "exclude the node, and go back by `echolab rollback` to a checkpoint from before"
)


def _hash_factors(count: int, device: torch.device) -> Tensor:
    """Return odd pseudorandom int64 factors [count]: splitmix64 of the position, wrapping."""
    z = torch.arange(1, count + 1, dtype=torch.int64, device=device) * GOLDEN
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * MIX_1  # mask the sign bits that >> shifts in
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * MIX_2
    return (z ^ ((z >> 31) & ((1 << 33) - 1))) | 1


def _hash_tensor(tensor: Tensor, factors: Tensor) -> Tensor:
    """Return the hash of a tensor's bits, int64 [] on its device, for any dtype."""
    # View the bits as integers of the same width, so that NaN and -0 are compared bit by bit.
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(WIDTHS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # Chain the chunks, so that a swap between chunks changes the hash too.
    for part in bits.split(CHUNK):
        total = total * MIX_1 + (part * factors[: len(part)]).sum()
    return total


@torch.no_grad()
def digests(named: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a 64-bit hash of each tensor, by name; all tensors must be on one device."""
    if not named:
        return {}
    largest = min(CHUNK, max(tensor.numel() * 2 for tensor in named.values()))  # 2: complex
    factors = _hash_factors(largest, next(iter(named.values())).device)
    values = torch.stack([_hash_tensor(tensor, factors) for tensor in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def _combined_hash(state: str, values: Mapping[str, int], named: Mapping[str, Tensor]) -> int:
    about = [[n, v, str(named[n].dtype), list(named[n].shape)] for n, v in values.items()]
    text = json.dumps([state, about])
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")


def digest(named: Mapping[str, Tensor]) -> int:
    """Return a 56-bit hash of the names, dtypes, shapes and values of all tensors.

    Not collective.
    """
    return _combined_hash("", digests(named), named)


def check_replicas(named: Mapping[str, Tensor], state: str = "") -> None:
    """Raise ReplicaError on every rank unless all hold the same tensors and the same `state`.

    `state` is other replicated state, as JSON.  The error names the tensor that differs and the
    ranks that differ from the majority.  Collective: one all-reduce of two numbers if all are
    equal.
    """
    values = digests(named)
    local_hash = _combined_hash(state, values, named)
    # Reduce the largest and smallest hash at once: they are equal if all hashes are.
    highest, lowest = distributed.largest([local_hash, -local_hash])
    if highest == -lowest:
        return
    parts = {
        name: f"{v} {named[name].dtype} {list(named[name].shape)}" for name, v in values.items()
    }
    # Exchange all hashes only if a difference was detected.
    of_ranks = [json.loads(text) for text in distributed.gather_text(json.dumps([parts, state]))]
    raise ReplicaError(
        difference([p for p, _ in of_ranks], [t for _, t in of_ranks]),
        rank=outlier_rank([json.dumps(one) for one in of_ranks]),
    )


def difference(parts: list[dict[str, str]], states: list[str]) -> str:
    """Describe the difference between ranks, given each rank's hashes by name and its state."""
    names = dict.fromkeys(name for hashes in parts for name in hashes)
    differing = {
        n: s
        for n in names
        if (s := describe_outliers([hashes.get(n, "missing") for hashes in parts]))
    }
    if describe_outliers(states):
        differing["state"] = describe_outliers(states)
    first, ranks = next(iter(differing.items()))
    suffix = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{first}{suffix} is not the same on all ranks: {ranks}; {REMEDY}"


def describe_outliers(values: list[str]) -> str:
    """Describe the ranks that differ from the majority; return "" if all ranks agree."""
    # The majority is assumed correct; without a majority, list all sides.
    counts = Counter(values).most_common()
    if len(counts) < 2:
        return ""
    if counts[0][1] == counts[1][1]:  # no majority
        sides = [[r for r, v in enumerate(values) if v == value] for value, _ in counts]
        return " against ".join(_format_ranks(side) for side in sides)
    outliers = [rank for rank, value in enumerate(values) if value != counts[0][0]]
    return f"{_format_ranks(outliers)} against the others"


def outlier_rank(values: list[str]) -> int | None:
    """Return the rank that differs from the majority; None unless exactly one rank differs."""
    majority, count = Counter(values).most_common(1)[0]
    others = [rank for rank, value in enumerate(values) if value != majority]
    return others[0] if len(others) == 1 and count > 1 else None


def _format_ranks(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {listed}"


def replicated(net: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that every rank holds in full.

    Under ZeRO 3 these are the buffers and the small parameters that are never partitioned.
    Partitioned parameters are excluded even while they are gathered.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        partitioned = hasattr(parameter, "ds_id") and not getattr(parameter, "ds_persist", False)
        if not partitioned and parameter.numel() == shape(parameter).numel():
            tensors[name] = parameter.data
    return tensors | {name: buffer for name, buffer in net.named_buffers() if buffer.numel()}


def frozen(net: nn.Module) -> dict[str, Tensor]:
    """Return this rank's part of the parameters that are not trained, for `Unchanged`.

    The adapters of a reference are excluded, since they change at every preference epoch.
    """
    untrained = {
        name: getattr(parameter, "ds_tensor", parameter).data
        for name, parameter in net.named_parameters()
        if not parameter.requires_grad
    }
    if not untrained:
        return untrained
    from echolab.training.adapters.lora import AVERAGE

    return {name: tensor for name, tensor in untrained.items() if f".{AVERAGE}." not in name}


class Unchanged:
    """Watches tensors that must not change, such as a frozen reference."""

    def __init__(self, what: str, named: Mapping[str, Tensor]) -> None:
        """Hash `named` now; `what` is the name of the network in the error message."""
        self.what, self.before = what, digests(named)

    def check(self, named: Mapping[str, Tensor]) -> None:
        """Raise ReplicaError on every rank if a tensor changed on any rank; collective."""
        current = digests(named)
        changed = [
            name
            for name in {**self.before, **current}
            if self.before.get(name) != current.get(name)
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
    """Compares weights between ranks, and frozen weights with their initial values, by hashes."""

    def __init__(
        self, net: nn.Module, masters: Masters, ema: Ema, *, reference: object, intervals: Intervals
    ) -> None:
        self.net, self.masters, self.ema = net, masters, ema
        self.reference, self.intervals = reference, intervals
        self._frozen_base: Unchanged | None = None  # the base of adapters
        self._frozen_reference: Unchanged | None = None

    def on_start(self, state: RunState) -> None:
        """Watch the frozen base of adapters, if the network has one."""
        if parameters := frozen(self.net):
            self._frozen_base = Unchanged("the base of the adapters", parameters)

    def watch_reference(self) -> None:
        """Watch the reference, which must not change within a preference epoch."""
        # A reference that consists of adapters has no separate network to watch.
        parameters = self._reference_parameters()
        self._frozen_reference = Unchanged("the reference", parameters) if parameters else None

    def _reference_parameters(self) -> dict[str, Any]:
        reference = self.reference
        return dict(reference.net.named_parameters()) if isinstance(reference, Frozen) else {}

    def check_frozen(self) -> None:
        """Raise ReplicaError if a frozen network has changed; collective."""
        if self._frozen_base:
            self._frozen_base.check(frozen(self.net))
        if self._frozen_reference:
            self._frozen_reference.check(self._reference_parameters())

    def after_step(self, state: RunState) -> None:
        """Raise ReplicaError if replicated state differs between ranks; collective."""
        if not self.intervals.due(self.intervals.replica_check_every, state.step):
            return
        # Without ZeRO, moments and averages are replicated too.
        tensors = replicated(self.net)
        if not self.masters.sharded:
            flats = {part: self.masters.flats(part) for part in MOMENTS} | self.ema.flats
            tensors |= {f"{part}/{i}": t for part, ts in flats.items() for i, t in enumerate(ts)}
        # Write the event before the error ends the run.
        try:
            check_replicas(tensors, json.dumps(state.schedule.state_dict(), sort_keys=True))
        except ReplicaError as error:
            state.events.add(state.step, "replicas", words=str(error))
            raise

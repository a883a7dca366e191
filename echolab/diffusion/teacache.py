"""Step caching (TeaCache, arXiv 2411.19108): steps that change little reuse the last one's work.

The blocks are left out of a step whose time embedding has moved too little since they last ran;
what they added to the tokens then is added again.  How much the embedding's movement says about
the output's is a polynomial that was fitted for each model.  Applied from outside: the network's
blocks are exchanged for one that wraps them, for as long as a `with` lasts.

Each branch of guidance and each window of a long video has a memory of its own.  (In the released
Flash code two passes share one, and its counter runs twice a step: that is not copied.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from echolab.types import Conditions

Net = Callable[[Tensor, Tensor, Conditions], Tensor]

# antgroup/echomimic_v3, `src/cache_utils.py`; highest power first.
WAN_1B3 = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2)
IDENTITY = (1.0, 0.0)  # for a network that no polynomial was fitted for
FIRST, LAST = 5, 1  # steps that are always computed, as released; the last one ends the video


class CachePlan(NamedTuple):
    """When a step may be left out."""

    threshold: float  # of the movement that is added up; 0 leaves out nothing
    timesteps: Tensor  # [steps] that the network will be given
    coefficients: Sequence[float] = WAN_1B3
    first: int = FIRST
    last: int = LAST


@dataclass
class Memory:
    """What one branch remembers."""

    steering: Tensor | None = None  # [B, 6, D] of the last call
    added: Tensor | None = None  # [B, S, D] what the blocks added when they last ran
    moved: float = 0.0  # since then


def movement(before: Tensor, now: Tensor, coefficients: Sequence[float]) -> float:
    """The polynomial of the relative L1 distance of two time embeddings."""
    distance = float((now - before).abs().mean() / before.abs().mean())
    total = 0.0
    for coefficient in coefficients:
        total = total * distance + coefficient
    return total


class CachedBlocks(nn.Module):
    """All blocks as one, which may be left out."""

    def __init__(self, blocks: nn.ModuleList, plan: CachePlan) -> None:
        super().__init__()
        self.blocks, self.plan = blocks, plan
        self.memory, self.step = Memory(), 0  # of the call at hand; set before it

    def forward(self, tokens: Tensor, steering: Tensor, *told: Any) -> Tensor:
        """[B, S, D], [B, 6, D], whatever else a block takes -> [B, S, D]."""
        memory = self.memory
        if self._may_reuse(tokens, steering):
            assert memory.added is not None
            return tokens + memory.added
        after = tokens
        for block in self.blocks:
            after = block(after, steering, *told)
        memory.added, memory.moved = after - tokens, 0.0
        return after

    def _may_reuse(self, tokens: Tensor, steering: Tensor) -> bool:
        memory, plan = self.memory, self.plan
        before, memory.steering = memory.steering, steering
        if not plan.first <= self.step < len(plan.timesteps) - plan.last:
            return False
        if before is None or memory.added is None or memory.added.shape != tokens.shape:
            return False
        memory.moved += movement(before, steering, plan.coefficients)
        # The polynomial dips below 0 for small movements, so that 0 must be asked for by itself.
        return plan.threshold > 0 and memory.moved < plan.threshold


class StepCached:
    """A network whose blocks are cached; `branch(name)` is the same one with another memory."""

    def __init__(
        self, net: Net, blocks: CachedBlocks, memories: dict[str, Memory], name: str = ""
    ) -> None:
        self.net, self.blocks, self.memories, self.name = net, blocks, memories, name

    def branch(self, name: str) -> "StepCached":
        """The network for one more level of names, such as a window and then a branch in it."""
        return StepCached(self.net, self.blocks, self.memories, f"{self.name}/{name}")

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        levels = self.blocks.plan.timesteps
        self.blocks.step = int((levels - timesteps[0].cpu()).abs().argmin())
        self.blocks.memory = self.memories.setdefault(self.name, Memory())
        return self.net(noisy_latents, timesteps, conditions)


def branch_of(net: Net, name: str) -> Net:
    """The network that a branch is to call: a memory of its own, where there is a cache."""
    return net.branch(name) if isinstance(net, StepCached) else net


@contextmanager
def step_cached(net: nn.Module, plan: CachePlan) -> Iterator[StepCached]:
    """`net` with its `blocks` cached for one sampling run; afterwards it is as it was."""
    blocks = net.blocks
    assert isinstance(blocks, nn.ModuleList)
    cached = CachedBlocks(blocks, plan._replace(timesteps=plan.timesteps.cpu()))
    net.blocks = nn.ModuleList([cached])
    try:
        yield StepCached(net, cached, {})
    finally:
        net.blocks = blocks

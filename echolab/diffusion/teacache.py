"""Step caching (TeaCache, arXiv 2411.19108): steps that change little reuse the last residual.

The blocks are skipped in a step if the time embedding has changed too little since they last ran;
the residual that they added to the tokens is then added again.  A polynomial, fitted for each
model, maps the change of the embedding to the change of the output.  The cache is applied from
outside: within a `with` block, one module that wraps the network's blocks replaces them.

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

# From antgroup/echomimic_v3, `src/cache_utils.py`; highest power first.
WAN_1B3 = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2)
IDENTITY = (1.0, 0.0)  # for a network without a fitted polynomial
FIRST, LAST = 5, 1  # number of first and last steps that are always computed, as released


class CachePlan(NamedTuple):
    """When a step may be skipped."""

    threshold: float  # of the accumulated movement; 0 skips nothing
    timesteps: Tensor  # [steps] of the sampling run
    coefficients: Sequence[float] = WAN_1B3
    first: int = FIRST
    last: int = LAST


@dataclass
class Memory:
    """State that is kept between the steps of one branch."""

    modulation: Tensor | None = None  # [B, 6, D] of the last call
    residual: Tensor | None = None  # [B, S, D] that the blocks added when they last ran
    movement: float = 0.0  # since then


def movement(before: Tensor, now: Tensor, coefficients: Sequence[float]) -> float:
    """Return the polynomial of the relative L1 distance of two time embeddings."""
    # Horner's scheme, highest power first.
    distance = float((now - before).abs().mean() / before.abs().mean())
    total = 0.0
    for coefficient in coefficients:
        total = total * distance + coefficient
    return total


class CachedBlocks(nn.Module):
    """All blocks as one module, whose residual may be reused."""

    def __init__(self, blocks: nn.ModuleList, plan: CachePlan) -> None:
        super().__init__()
        self.blocks, self.plan = blocks, plan
        self.memory, self.step = Memory(), 0  # of the current call; set before it

    def forward(self, tokens: Tensor, modulation: Tensor, *context: Any) -> Tensor:
        """Run or skip the blocks: [B, S, D], [B, 6, D], a block's other inputs -> [B, S, D]."""
        memory = self.memory
        if self._may_reuse(tokens, modulation):
            assert memory.residual is not None
            return tokens + memory.residual
        # Run all blocks, and keep what they added for the next steps.
        after = tokens
        for block in self.blocks:
            after = block(after, modulation, *context)
        memory.residual, memory.movement = after - tokens, 0.0
        return after

    def _may_reuse(self, tokens: Tensor, modulation: Tensor) -> bool:
        """Return whether the blocks may be skipped; accumulate the movement of the embedding."""
        memory, plan = self.memory, self.plan
        before, memory.modulation = memory.modulation, modulation
        # The first and last steps are always computed, and so is a clip of another size.
        if not plan.first <= self.step < len(plan.timesteps) - plan.last:
            return False
        if before is None or memory.residual is None or memory.residual.shape != tokens.shape:
            return False
        memory.movement += movement(before, modulation, plan.coefficients)
        # The polynomial dips below 0 for small movements, so threshold 0 needs its own test.
        return plan.threshold > 0 and memory.movement < plan.threshold


class StepCached:
    """A network whose blocks are cached; `branch(name)` is the same network with other memory."""

    def __init__(
        self, net: Net, blocks: CachedBlocks, memories: dict[str, Memory], name: str = ""
    ) -> None:
        self.net, self.blocks, self.memories, self.name = net, blocks, memories, name

    def branch(self, name: str) -> "StepCached":
        """Return the network with the memory of `name`, such as a branch within a window."""
        return StepCached(self.net, self.blocks, self.memories, f"{self.name}/{name}")

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        # The step is determined by its timestep: a solver may call the network in any order.
        levels = self.blocks.plan.timesteps
        self.blocks.step = int((levels - timesteps[0].cpu()).abs().argmin())
        self.blocks.memory = self.memories.setdefault(self.name, Memory())
        return self.net(noisy_latents, timesteps, conditions)


def branch_of(net: Net, name: str) -> Net:
    """Return the network of a branch, with memory of its own if steps are cached."""
    return net.branch(name) if isinstance(net, StepCached) else net


@contextmanager
def step_cached(net: nn.Module, plan: CachePlan) -> Iterator[StepCached]:
    """Yield `net` with its `blocks` cached for one sampling run; restore it afterwards."""
    blocks = net.blocks
    assert isinstance(blocks, nn.ModuleList)
    # The network sees one block that wraps all of them; parameters stay where they are.
    cached = CachedBlocks(blocks, plan._replace(timesteps=plan.timesteps.cpu()))
    net.blocks = nn.ModuleList([cached])
    try:
        yield StepCached(net, cached, {})
    finally:
        net.blocks = blocks

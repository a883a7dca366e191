"""Step caching (TeaCache, arXiv 2411.19108): steps that change little reuse the last residual.

The blocks are skipped in a step if the time embedding has changed little since they last ran; then
their last residual is added to the tokens again.  A polynomial, fitted for each model, maps the
change of the embedding to the change of the output.  The cache is applied from outside: inside a
`with` block one module that wraps the network's blocks replaces them.

Each guidance branch and each window of a long video has a separate memory.  (In the released Flash
code two passes share one memory, and its counter advances twice per step; this error is not
reproduced.)
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
FIRST, LAST = 5, 1  # number of first and last steps that are always computed, as in the release


class CachePlan(NamedTuple):
    """Settings that determine which steps may be skipped."""

    threshold: float  # skip while the accumulated movement is below it; 0 skips nothing
    timesteps: Tensor  # [steps] timesteps of the sampling run
    coefficients: Sequence[float] = WAN_1B3
    first: int = FIRST
    last: int = LAST


@dataclass
class Memory:
    """State of one branch between steps."""

    modulation: Tensor | None = None  # [B, 6, D] time embedding of the last call
    residual: Tensor | None = None  # [B, S, D] residual of the blocks when they last ran
    movement: float = 0.0  # accumulated movement since the blocks last ran


def movement(before: Tensor, now: Tensor, coefficients: Sequence[float]) -> float:
    """Return the polynomial of the relative L1 distance between two time embeddings."""
    # Evaluate by Horner's scheme, highest power first.
    distance = float((now - before).abs().mean() / before.abs().mean())
    total = 0.0
    for coefficient in coefficients:
        total = total * distance + coefficient
    return total


class CachedBlocks(nn.Module):
    """The blocks of a network as one module that may reuse its last residual."""

    def __init__(self, blocks: nn.ModuleList, plan: CachePlan) -> None:
        super().__init__()
        self.blocks, self.plan = blocks, plan
        self.memory, self.step = Memory(), 0  # set before each call

    def forward(self, tokens: Tensor, modulation: Tensor, *context: Any) -> Tensor:
        """Run or skip the blocks: [B, S, D], [B, 6, D], further block inputs -> [B, S, D]."""
        memory = self.memory
        if self._may_reuse(tokens, modulation):
            assert memory.residual is not None
            return tokens + memory.residual
        # Run all blocks, and store their residual for the next steps.
        after = tokens
        for block in self.blocks:
            after = block(after, modulation, *context)
        memory.residual, memory.movement = after - tokens, 0.0
        return after

    def _may_reuse(self, tokens: Tensor, modulation: Tensor) -> bool:
        """Return whether the blocks may be skipped; accumulate the movement of the embedding."""
        memory, plan = self.memory, self.plan
        before, memory.modulation = memory.modulation, modulation
        # Always compute the first and last steps, and clips of a new size.
        if not plan.first <= self.step < len(plan.timesteps) - plan.last:
            return False
        if before is None or memory.residual is None or memory.residual.shape != tokens.shape:
            return False
        memory.movement += movement(before, modulation, plan.coefficients)
        # The polynomial is negative for small distances, so threshold 0 needs a separate test.
        return plan.threshold > 0 and memory.movement < plan.threshold


class StepCached:
    """A network with cached blocks; `branch(name)` is the same network with a separate memory."""

    def __init__(
        self, net: Net, blocks: CachedBlocks, memories: dict[str, Memory], name: str = ""
    ) -> None:
        self.net, self.blocks, self.memories, self.name = net, blocks, memories, name

    def branch(self, name: str) -> "StepCached":
        """Return the network with the memory of branch `name`; names can be nested."""
        return StepCached(self.net, self.blocks, self.memories, f"{self.name}/{name}")

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        # Identify the step by its timestep, since a solver may call the network in any order.
        levels = self.blocks.plan.timesteps
        self.blocks.step = int((levels - timesteps[0].cpu()).abs().argmin())
        self.blocks.memory = self.memories.setdefault(self.name, Memory())
        return self.net(noisy_latents, timesteps, conditions)


def branch_of(net: Net, name: str) -> Net:
    """Return the network for a branch, with a separate memory if steps are cached."""
    return net.branch(name) if isinstance(net, StepCached) else net


@contextmanager
def step_cached(net: nn.Module, plan: CachePlan) -> Iterator[StepCached]:
    """Yield `net` with its `blocks` cached for one sampling run; restore it afterwards."""
    blocks = net.blocks
    assert isinstance(blocks, nn.ModuleList)
    # Replace the blocks by one module that wraps them; parameters are not copied.
    cached = CachedBlocks(blocks, plan._replace(timesteps=plan.timesteps.cpu()))
    net.blocks = nn.ModuleList([cached])
    try:
        yield StepCached(net, cached, {})
    finally:
        net.blocks = blocks

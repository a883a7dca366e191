"""Task probabilities as a function of the step: hard tasks first, easy ones join later.

The probabilities are an EMA of the stage's targets, so that new tasks are introduced smoothly; a
minimum probability prevents forgetting of earlier tasks.  (EchoMimicV3's "counter-intuitive task
allocation"; its ratios and stage lengths are not published.)
"""

import bisect
import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from echolab.errors import ConfigError
from echolab.tasks.table import CURRICULUM_TASKS, TASKS


class Stage(NamedTuple):
    """Number of steps, and the target probabilities during them (unnormalized)."""

    steps: int
    targets: dict[str, float]


def hard_to_easy(steps: int, tasks: Sequence[str] = CURRICULUM_TASKS) -> list[Stage]:
    """Return a stage of `steps` steps for each task; each adds a task, all equally likely."""
    return [
        Stage(steps, dict.fromkeys(tasks[:count], 1 / count)) for count in range(1, len(tasks) + 1)
    ]


def draw_task(probabilities: Mapping[str, float], u: float) -> str:
    """Return the task at which the cumulative probability first exceeds u, in [0, 1)."""
    remaining = u * sum(probabilities.values())
    for task, probability in probabilities.items():
        if remaining < probability:
            return task
        remaining -= probability
    # Rounding can leave a remainder of 1e-16: return the last task with a nonzero probability.
    return [task for task, probability in probabilities.items() if probability > 0][-1]


def _check(stages: Sequence[Stage], ema_decay: float, min_prob: float) -> None:
    """Raise ConfigError for an invalid curriculum."""
    if not stages:
        raise ConfigError("tasks.stages: empty; give at least one stage")
    if not 0 <= ema_decay < 1:
        raise ConfigError(f"tasks.ema_decay={ema_decay:g}: must lie in [0, 1)")
    tasks = {task for stage in stages for task in stage.targets}
    if not 0 <= min_prob * len(tasks) < 1:
        raise ConfigError(
            f"tasks.min_prob={min_prob:g}: times {len(tasks)} tasks must stay below 1"
        )
    # Check each stage separately.
    for number, stage in enumerate(stages):
        unknown = [task for task in stage.targets if task not in TASKS]
        if unknown:
            raise ConfigError(
                f"tasks.stages[{number}]: no task {unknown[0]!r}; one of {', '.join(TASKS)}"
            )
        shares = list(stage.targets.values())
        if stage.steps < 1 or not any(shares) or min(shares) < 0:
            raise ConfigError(
                f"tasks.stages[{number}]: needs steps of 1 or more, and targets of 0 or more"
            )


class Curriculum:
    """Task probabilities at a step: a recursion from a known origin, the same on every rank.

    p(0) is the first stage's target and p(k + 1) = ema_decay p(k) + (1 - ema_decay) target(k), in
    Python floats; the last stage never ends.  `min_prob` is mixed into the targets of all
    tasks introduced so far: target = min_prob + (1 - n min_prob) stage target, which sums to 1.
    """

    def __init__(self, stages: Sequence[Stage], ema_decay: float = 0.999, min_prob: float = 0.0):
        # Keep tasks in the table's order, so that the order does not depend on the stages.
        stages = [Stage(int(steps), dict(targets)) for steps, targets in stages]
        _check(stages, ema_decay, min_prob)
        self.ema_decay = ema_decay
        trained = {task for stage in stages for task, share in stage.targets.items() if share > 0}
        self.tasks = tuple(task for task in TASKS if task in trained)
        self._ends, self._targets, introduced, end = [], [], set[str](), 0
        # Compute the target of each stage, with min_prob for all tasks introduced so far.
        for stage in stages:
            introduced |= {task for task, share in stage.targets.items() if share > 0}
            end, total = end + stage.steps, sum(stage.targets.values())
            remaining = 1 - min_prob * len(introduced)
            self._ends.append(end)
            self._targets.append(
                [
                    (min_prob if task in introduced else 0.0)
                    + remaining * stage.targets.get(task, 0.0) / total
                    for task in self.tasks
                ]
            )
        self._origin = self._latest = (0, self._targets[0])
        self.before = 0  # steps of earlier runs that this run continues; they count for the stages

    def _stage(self, step: int) -> int:
        """Return the index of the stage that contains a step."""
        return min(bisect.bisect(self._ends, self.before + step), len(self._ends) - 1)

    def probabilities(self, step: int) -> dict[str, float]:
        """Return the probability of each task of the stages, hard to easy; they sum to 1.

        Raise ConfigError for a step before the loaded state, which is unknown.
        """
        # The recursion runs forward only: for an earlier step restart it from the known origin.
        if step < self._latest[0]:
            self._latest = self._origin
        known_step, probabilities = self._latest
        if step < known_step:
            raise ConfigError(
                f"step {step}: the curriculum was loaded at step {known_step}; ask for later steps"
            )
        keep = self.ema_decay
        for index in range(known_step, step):
            target = self._targets[self._stage(index)]
            pairs = zip(probabilities, target, strict=True)
            probabilities = [keep * p + (1 - keep) * t for p, t in pairs]
        self._latest = (step, probabilities)
        return dict(zip(self.tasks, probabilities, strict=True))

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that later steps depend on, as JSON values.

        `stages_left` is 0 if no tasks remain to be added in a run that continues from this state.
        """
        return {
            "step": step,
            "probabilities": self.probabilities(step),
            "before": self.before,
            "stages_left": len(self._ends) - 1 - self._stage(step),
        }

    def continued_from(self, state: Mapping[str, Any]) -> "Curriculum":
        """Return the curriculum of a new run that starts from another run's weights and `state`.

        Step 0 has the probabilities and the stage that the other run had reached.  If the other run
        had reached its last stage, step 0 is in the last stage here, for any stage lengths.  If the
        two have no task in common, the curriculum starts from its beginning.
        """
        continued = copy.copy(self)
        # Steps of all earlier runs count for the current stage.
        done = int(state.get("before", 0)) + int(state["step"])
        last = self._ends[-2] if len(self._ends) > 1 else 0
        try:
            continued.load_state_dict({**state, "step": 0})
        except ConfigError:
            return self
        continued.before = max(done, last) if state.get("stages_left") == 0 else done
        return continued

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit-exactly.

        A task that is not in the state starts from 0; the probability of a task that is in no stage
        is distributed to the others.  Raise ConfigError if there is no task in common.
        """
        # Keep the probabilities of known tasks; renormalize if a task was dropped.
        saved = [float(state["probabilities"].get(task, 0.0)) for task in self.tasks]
        if not sum(saved):
            raise ConfigError(
                f"curriculum state of step {state['step']}: none of its tasks "
                f"({', '.join(state['probabilities'])}) is in this run's stages"
            )
        # Renormalize only in this case, because the division could change the last bit.
        if set(state["probabilities"]) - set(self.tasks):
            saved = [share / sum(saved) for share in saved]
        self._origin = self._latest = (int(state["step"]), saved)
        self.before = int(state.get("before", 0))

"""On PYTHONPATH of the drills' ranks: a validation and a save take as long as those of real runs.

ECHOLAB_DRILL_EVAL, ECHOLAB_DRILL_SAVE and ECHOLAB_DRILL_STEP are the seconds that a batch of
held-out clips, a file of a checkpoint and a step take longer: long enough to be hit by a signal.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

SLOWED = {
    "echolab.training.checkpoints.writer": ("write_file", "ECHOLAB_DRILL_SAVE"),
    "echolab.training.callbacks.validation": ("on_device", "ECHOLAB_DRILL_EVAL"),
    "echolab.training.callbacks.step_sync": ("step_vote", "ECHOLAB_DRILL_STEP"),
}


def slowed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any, **words: Any) -> Any:
        time.sleep(seconds)
        return function(*arguments, **words)

    return slow


class Slow(MetaPathFinder):
    """Wraps one function of each module as soon as it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in SLOWED or name in self.met:
            return None
        self.met.add(name)
        spec = importlib.util.find_spec(name)
        assert spec and spec.loader
        execute, (function, variable) = spec.loader.exec_module, SLOWED[name]

        def executed(module: ModuleType) -> None:
            execute(module)
            setattr(
                module, function, slowed(getattr(module, function), float(os.environ[variable]))
            )

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec

    def __init__(self) -> None:
        self.met: set[str] = set()


if "ECHOLAB_DRILL_SAVE" in os.environ:
    sys.meta_path.insert(0, Slow())

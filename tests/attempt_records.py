"""Attempts of a launch, for tests of what is computed from them."""

from typing import Any

from echolab.launch.attempts import Attempt
from echolab.launch.exit_codes import CAUSES


def attempt(cause: str, **changes: Any) -> Attempt:
    """Return an attempt that saved no checkpoint, of rank 1 on n1."""
    fields: dict[str, Any] = {
        "launch": "slurm-12-0-0", "cause": cause, "rank": 1, "host": "n1", "section": "forward",
        "step": 7, "detail": "", "exit_code": CAUSES[cause].exit_code if cause in CAUSES else -1,
        "started": 1000.0, "ended": 1100.0, "hosts": ("n1", "n2"), "first_step": 0,
        "last_step": 7, "checkpoint_before": -1, "checkpoint": -1, "seconds": {},
        "save_seconds": 0.0, "waited": 0.0, "last_section": "vote", "last_stay": 0.0, "stack": "",
        "first_error": "", **changes,
    }  # fmt: skip
    return Attempt(**{"elapsed": fields["ended"] - fields["started"], **fields})


def saved(cause: str, before: int, after: int, **changes: Any) -> Attempt:
    """Return an attempt that saved checkpoints."""
    return attempt(cause, checkpoint_before=before, checkpoint=after, **changes)

"""What ranks tell of their end, as files in the node-local folder of their sections.

rank-N.error.json  an exception: type, message, trace, time, step, section, cause
rank-N.end.json    how training ended by itself

Local, so that a file system that is full or hangs, which may be why they end, keeps none of it; the
supervisor copies errors into the run's folder.
"""

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from echolab.data.files import write_whole
from echolab.errors import EcholabError, SharedError
from echolab.launch.blame import Failure
from echolab.launch.exit_codes import (
    CAUSES,
    DONE,
    PRUNED,
    STOPPED_SAVED,
    STOPPED_UNSAVED,
    cause_of_exception,
)
from echolab.redaction import masked
from echolab.training.sections import FOLDER

TRACE_CHARACTERS = 20_000  # the end of a longer one is kept


class End(NamedTuple):
    """How training ended by itself: of `FitResult`."""

    reason: str
    stopped_by: int
    unsaved: bool
    step: int
    steps: int


def tell_failure(folder: Path, rank: int, error: BaseException, section: str, step: int) -> int:
    """Write down an exception; returns the exit code for it.

    Nothing of the environment is told, and secrets in the message and the trace are masked.
    """
    cause = cause_of_exception(error, section)
    trace = masked("".join(traceback.format_exception(error)))[-TRACE_CHARACTERS:]
    failure = Failure(type(error).__name__, masked(str(error)), cause, time.time(), trace)
    if isinstance(error, SharedError):
        failure = failure._replace(shared=True, rank=error.rank)
    told = {**failure._asdict(), "section": section, "step": step}
    try:
        write_whole(error_path(folder, rank), json.dumps(told).encode())
    except EcholabError:  # the exit code still says something
        pass
    return CAUSES[cause].exit_code


def error_path(folder: Path, rank: int) -> Path:
    """Where the exception of a rank is told."""
    return folder / f"rank-{rank}.error.json"


def tell_end(folder: Path, rank: int, end: End) -> None:
    """Write down how training ended."""
    write_whole(folder / f"rank-{rank}.end.json", json.dumps(end._asdict()).encode())


def failure_of(folder: Path, rank: int) -> Failure | None:
    """The exception that a rank told."""
    told = read_json(error_path(folder, rank))
    return Failure(**{name: told[name] for name in Failure._fields}) if told else None


def end_of(folder: Path, rank: int) -> End | None:
    """The end that a rank told."""
    told = read_json(folder / f"rank-{rank}.end.json")
    return End(**told) if told else None


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's content; None where there is none, or half of one."""
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return told


def expected(code: int) -> bool:
    """Whether a rank's exit code is of an end that all ranks reach together."""
    return code in (DONE, STOPPED_SAVED, STOPPED_UNSAVED, PRUNED)


def own_folder() -> Path | None:
    """Where this rank tells; None where no supervisor started it."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else None

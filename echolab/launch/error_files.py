"""What ranks tell of their end, as files in the node-local folder of their sections.

rank-N.error.json  an exception: type, message, trace, time, step, section, cause
rank-N.end.json    how training ended by itself

Local, so that a file system that is full or hangs, which may be why they end, keeps none of it; the
supervisor copies errors into the run's folder.
"""

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from echolab.errors import SharedError
from echolab.heartbeat import FOLDER, keep_room, reserve
from echolab.launch.diagnosis import Failure
from echolab.launch.exit_codes import (
    CAUSES,
    DONE,
    PRUNED,
    STOPPED_SAVED,
    STOPPED_UNSAVED,
    cause_of_exception,
)
from echolab.redaction import masked

PREFIX = "echolab-beats-"
TRACE_CHARACTERS = 20_000  # the end of a longer one is kept
WORDS_ROOM = 1 << 17  # bytes that are kept free for what a rank tells of its end


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
        _write(error_path(folder, rank), told)
    except OSError:  # the exit code still says something
        pass
    return CAUSES[cause].exit_code


def error_path(folder: Path, rank: int) -> Path:
    """Where the exception of a rank is told."""
    return folder / f"rank-{rank}.error.json"


def end_path(folder: Path, rank: int) -> Path:
    """Where a rank tells how training ended."""
    return folder / f"rank-{rank}.end.json"


def make_folder(ranks: Iterable[int]) -> Path:
    """Make the node-local folder of these ranks, in memory if there is room, else on disk.

    Room is kept for all that they may tell later.  Raise OSError if there is none anywhere.
    """
    numbers = list(ranks)
    places = ["/dev/shm"] if os.access("/dev/shm", os.W_OK) else []
    for place in (*places, tempfile.gettempdir()):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        try:
            for rank in numbers:
                reserve(folder, rank)
                for path in (error_path(folder, rank), end_path(folder, rank)):
                    keep_room(_partial(path), WORDS_ROOM)
            return folder
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            full = error
    raise full


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole, into the room that was kept for it."""
    partial = _partial(path)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o644)
    with open(descriptor, "wb") as file:
        file.write(json.dumps(content).encode())
    partial.replace(path)


def tell_end(folder: Path, rank: int, end: End) -> None:
    """Write down how training ended."""
    _write(end_path(folder, rank), end._asdict())


def failure_of(folder: Path, rank: int) -> Failure | None:
    """The exception that a rank told."""
    told = read_json(error_path(folder, rank))
    return Failure(**{name: told[name] for name in Failure._fields}) if told else None


def end_of(folder: Path, rank: int) -> End | None:
    """The end that a rank told."""
    told = read_json(end_path(folder, rank))
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

"""`python -m data_prep STEP`: finds the step's module, runs it, and turns errors into one line."""

from echolab.safe_path import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()  # before anything else is imported

import importlib
import sys
from collections.abc import Callable

from echolab.atomic_io import write_error
from echolab.errors import BusyError, EcholabError, PassingError
from echolab.redaction import masked_output

RETRYABLE = 77  # the exit code for what another try may cure, as of `echolab train`

STEPS = {
    "run": ("data_prep.run", "raw talking videos -> shards, and the reasons of what is refused"),
    "draw": ("data_prep.draw", "talkers drawn by the program -> shards"),
    "encode": ("data_prep.encode", "raw shards -> encoded shards, which training reads"),
}


def help_text() -> str:
    """Every step with one line."""
    steps = [f"  {name:<8}{summary}" for name, (_, summary) in STEPS.items()]
    return "\n".join(
        [
            "usage: python -m data_prep STEP [arguments] [key=value ...]",
            "",
            *steps,
            "",
            "`python -m data_prep STEP --help` says what a step takes.",
        ]
    )


def main(argv: list[str]) -> int:
    """Run one step and return its exit code.

    0 done, 1 an error of the user's, 2 no such step, 77 a passing failure, 130 interrupted.
    """
    with masked_output():
        return _run(argv)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] not in STEPS:
        print(f"data_prep: error: no step {argv[0]!r}; known: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    return _guarded(lambda: importlib.import_module(STEPS[argv[0]][0]).main(argv[1:]))


def _guarded(run: Callable[[], int | None]) -> int:
    try:
        return run() or 0
    except (BusyError, PassingError) as error:
        _say(str(error))
        return RETRYABLE
    except EcholabError as error:
        line = str(error)
    except OSError as error:
        if not error.filename:
            raise
        line = str(write_error(error.filename, error))
    except KeyboardInterrupt:
        print("data_prep: stopped; give the same command again", file=sys.stderr)
        return 130
    _say(line)
    return 1


def _say(line: str) -> None:
    """Print an error in one line, whatever the names in it hold."""
    print("data_prep: error:", "\\n".join(line.splitlines()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m data_prep ACTION`: parse arguments, run the action, print errors in one line."""

from echolab import remove_working_directory

if __name__ == "__main__":
    remove_working_directory()  # before all other imports

import sys
from collections.abc import Callable

from data_prep.options import DrawOptions, EncodeOptions, RunOptions
from echolab.arguments import Action, parse, run_action
from echolab.atomic_io import check_writable, write_error
from echolab.errors import BusyError, EcholabError, RetryableError
from echolab.redaction import mask_output

RETRYABLE = 77  # exit code of transient failures, as in `echolab train`


# Each action parses its arguments before it imports the heavy modules, which takes seconds.
def run(argv: list[str]) -> int:
    """Cut raw videos into a dataset and print a summary."""
    options = parse(
        RunOptions, argv, command="python -m data_prep run", positional=("source", "out")
    )
    check_writable(options.out, folder=True)
    options.check_inputs()
    from data_prep.run import prepare, summarize

    print(summarize(prepare(options), options.format))
    return 0


def draw(argv: list[str]) -> int:
    """Draw synthetic talkers and print a summary."""
    options = parse(DrawOptions, argv, command="python -m data_prep draw", positional=("out",))
    check_writable(options.out, folder=True)
    from data_prep.draw import draw_and_report

    draw_and_report(options)
    return 0


def encode(argv: list[str]) -> int:
    """Encode a raw dataset and print a summary."""
    options = parse(
        EncodeOptions, argv, command="python -m data_prep encode", positional=("source", "out")
    )
    check_writable(options.out, folder=True)
    options.check_inputs()
    from data_prep.encode import encode_and_report

    encode_and_report(options)
    return 0


ACTIONS = {
    "run": Action("data_prep.__main__:run", "raw talking videos -> raw shards, and refused spans"),
    "draw": Action("data_prep.__main__:draw", "synthetic talkers -> raw shards"),
    "encode": Action("data_prep.__main__:encode", "raw shards -> encoded shards for training"),
}


def main(argv: list[str]) -> int:
    """Run one action and return its exit code.

    0: done.  1: an error that the user can fix.  2: no action given.  77: transient failure, retry.
    130: interrupted.
    """
    # Mask passwords of addresses in all printed text.
    with mask_output():
        return _guarded(lambda: run_action(argv, ACTIONS, command="python -m data_prep"))


def _guarded(action: Callable[[], int]) -> int:
    """Run an action and turn errors that the user can fix into one line and an exit code."""
    try:
        return action()
    # A locked folder, or a shortage of memory or disk space.
    except (BusyError, RetryableError) as error:
        _print_error(str(error))
        return RETRYABLE
    except EcholabError as error:
        line = str(error)
    # An OSError with a file name comes from the user's disk; an OSError without one is a bug.
    except OSError as error:
        if not error.filename:
            raise
        line = str(write_error(error.filename, error))
    # The user pressed Ctrl-C: print no stack trace, and return the shell's exit code.
    except KeyboardInterrupt:
        print("data_prep: stopped; the same command resumes", file=sys.stderr)
        return 130
    _print_error(line)
    return 1


def _print_error(line: str) -> None:
    """Print an error in one line, even if file names in it hold line breaks."""
    print("data_prep: error:", "\\n".join(line.splitlines()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The command `echolab`: import the module of a command, run it, print errors in one line."""

from echolab import remove_working_directory

if __name__ == "__main__":
    remove_working_directory()  # before anything else is imported

import errno
import os
import sys
from collections.abc import Callable
from importlib.metadata import version

from echolab.arguments import Action, closest
from echolab.errors import BusyError, DiskFullError, EcholabError, FencedError, StorageError
from echolab.launch.exit_codes import RETRYABLE
from echolab.redaction import mask_output

# OSErrors that the user can fix; others are bugs and keep their traceback.
USER_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip


# Commands by name.  The module of a command is imported only when the command runs.
COMMANDS = {
    "demo": Action(
        "echolab.cli.demo", "data, training and report of a small example on two CPU cores"
    ),
    "train": Action("echolab.cli.train", "train a run, or a sweep with -m"),
    "why": Action("echolab.cli.why", "cause of a run's end: rank, host, step, remedy"),
    "rollback": Action(
        "echolab.cli.rollback", "resume a run from an earlier checkpoint, skipping batches"
    ),
    "replay": Action("echolab.cli.replay", "repeat training steps and compare them with the run's"),
    "generate": Action(
        "echolab.inference.commands:generate", "image + speech + prompt -> talking video"
    ),
    "evaluate": Action(
        "echolab.inference.commands:evaluate", "score a checkpoint on held-out clips"
    ),
    "estimate": Action("echolab.bench.commands:estimate", "GPU memory of training, by kind"),
    "fit": Action(
        "echolab.inference.commands:fit", "fit a demo network: autoencoder, SyncNet, features"
    ),
    "export": Action("echolab.cli.export", "weights as safetensors for other programs"),
    "checkpoint": Action("echolab.cli.checkpoint", "inspect, verify or compare checkpoints"),
    "pairs": Action("echolab.inference.commands:pairs", "preference pairs: sample, score, pack"),
    "data": Action("echolab.cli.data", "datasets: verify, index, audit"),
    "doctor": Action("echolab.cli.doctor", "released networks of the scores: present or missing"),
    "bench": Action("echolab.bench.commands", "speed on this machine: step, generate, data"),
    "report": Action("echolab.cli.report", "rewrite a run's report.html"),
}


def help_text() -> str:
    """Return the list of commands with one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: echolab COMMAND [key=value ...]",
            "",
            "Trains and runs EchoMimicV3-style human animation.",
            "",
            *lines,
            "",
            "`echolab COMMAND --help` lists the arguments of a command.",
            "`python -m data_prep` turns raw videos into datasets.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done.  1: an error that the user can fix.  2: no such command.  77: a retry may succeed, for
    example if another process uses the run folder.  130: interrupted.  Commands may return other
    codes.
    """
    if argv is None:  # started as a program
        remove_working_directory()
    with mask_output():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(words: list[str]) -> int:
    """Handle `--help` and `--version`, or import and run the command that `words` begin with."""
    # Options that need no command.
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"echolab {version('echolab')}")
        return 0
    # Set before torch is imported: OpenMP threads that wait spin briefly, then sleep.  Without a
    # limit a step takes ten times as long on cores that other processes use too.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Run the command, or propose known commands with a similar name.
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        remedy = closest(name, COMMANDS) or f"; known: {', '.join(COMMANDS)}"
        print(f"echolab: error: no command {name!r}{remedy}", file=sys.stderr)
        return 2
    return _run_reporting_errors(lambda: COMMANDS[name].run(rest))


def _run_reporting_errors(run: Callable[[], int]) -> int:
    """Run a command and turn errors that the user can fix into one line and an exit code."""
    try:
        return run()
    except EcholabError as error:
        print(f"echolab: error: {error}", file=sys.stderr)
        transient = isinstance(error, StorageError) and not isinstance(error, DiskFullError)
        return RETRYABLE if transient or isinstance(error, BusyError | FencedError) else 1
    except BrokenPipeError:  # the reader of standard output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in USER_ERRORS:
            raise
        prefix = f"{error.filename}: " if error.filename else ""
        remedy = "free space there, or give another path"
        print(
            f"echolab: error: {prefix}{error.strerror} (errno {error.errno}); {remedy}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("echolab: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

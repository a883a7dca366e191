"""The command `echolab`: finds the subcommand's module, runs it, and turns errors into one line."""

from echolab.safe_path import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()  # before anything else is imported

import errno
import importlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

from echolab.errors import BusyError, DiskFullError, EcholabError, FencedError, StorageError
from echolab.launch.exit_codes import RETRYABLE
from echolab.redaction import masked_output

# What the user can put right; other OSErrors are our mistakes.
USERS_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR,
    errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip


class Command(NamedTuple):
    module: str  # has main(argv: list[str]) -> int | None; imported only when it is run
    summary: str


COMMANDS = {
    "demo": Command("echolab.cli.demo", "everything on two CPU cores: data, training, report"),
    "train": Command("echolab.cli.train", "train one run, or a sweep with -m"),
    "why": Command("echolab.cli.why", "how a run ended, which rank is to blame, what to do"),
    "rollback": Command("echolab.cli.rollback", "let a run go on from an earlier checkpoint"),
    "replay": Command("echolab.cli.replay", "train a step again, and compare it with the run's"),
    "generate": Command("echolab.cli.generate", "picture + speech + prompt -> video with sound"),
    "evaluate": Command("echolab.cli.evaluate", "score a checkpoint on held-out clips"),
    "estimate": Command("echolab.cli.estimate", "memory that training needs, by kind"),
    "fit": Command("echolab.cli.fit", "fit a stand-in network: autoencoder, SyncNet, features"),
    "export": Command("echolab.cli.export", "weights as safetensors for other programs"),
    "checkpoint": Command("echolab.cli.checkpoint", "inspect, verify or compare checkpoints"),
    "pairs": Command("echolab.cli.pairs", "preference data: sample, score, pack"),
    "data": Command("echolab.cli.data", "look at shards: verify, index, audit, shuffle-report"),
    "bench": Command("echolab.cli.bench", "how fast it is here: step, generate, data"),
    "report": Command("echolab.cli.report", "write a run's report.html again"),
}


def help_text() -> str:
    """Every command with one line."""
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
            "`echolab COMMAND --help` says what a command takes.",
            "Raw videos become shards by `python -m data_prep`.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 done, 1 an error the user can put right, 77 a run that another process
    is at work in, 130 interrupted.

    A command may return, or exit with, a code of its own.
    """
    if argv is None:  # a process of its own
        leave_working_folder()
    with masked_output():
        return _run(sys.argv[1:] if argv is None else argv)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"echolab {version('echolab')}")
        return 0
    # Before torch is imported: threads that wait for each other spin a little, then sleep.  Without
    # a limit a step takes ten times as long on cores that others use too.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"echolab: error: no command {name!r}; known: {known}", file=sys.stderr)
        return 2
    return _guarded(lambda: importlib.import_module(COMMANDS[name].module).main(rest))


def _guarded(run: Callable[[], int | None]) -> int:
    try:
        return run() or 0
    except EcholabError as error:
        print(f"echolab: error: {error}", file=sys.stderr)
        passing = isinstance(error, StorageError) and not isinstance(error, DiskFullError)
        return RETRYABLE if passing or isinstance(error, BusyError | FencedError) else 1
    except BrokenPipeError:  # whoever read our words, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in USERS_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = "make room there, or give another place"
        print(
            f"echolab: error: {where}{error.strerror} (errno {error.errno}); {remedy}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("echolab: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

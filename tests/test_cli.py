"""The `echolab` command: its sub-commands, exit codes and one-line errors."""

import errno
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from echolab.arguments import Action
from echolab.cli import __main__ as cli
from echolab.errors import MediaError


def run_with(monkeypatch: pytest.MonkeyPatch, main: object) -> int:
    """Return the exit code of `echolab demo` if the module of `demo` has this `main`."""
    module = ModuleType("echolab.cli.stand_in")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "demo", Action(module.__name__, ""))
    return cli.main(["demo", "a=1"])


def raising(error: BaseException) -> object:
    def main(argv: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module(name: str) -> None:
    assert find_spec(cli.COMMANDS[name].target.partition(":")[0]) is not None


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in cli.COMMANDS)


def test_an_unknown_command_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err
    assert cli.main(["qqq"]) == 2
    assert "no command 'qqq'; known: demo, train" in capsys.readouterr().err


def test_a_command_gets_the_remaining_words_and_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_with(monkeypatch, lambda argv: {"a=1": 75}[argv[0]]) == 75
    assert run_with(monkeypatch, lambda argv: None) == 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MediaError("a.mp4: no sound"), 1, "echolab: error: a.mp4: no sound\n"),
        (KeyboardInterrupt(), 130, "echolab: stopped\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x.mp4"),
            1,
            "echolab: error: out/x.mp4: No space left on device (errno 28); "
            "free space there, or give another path\n",
        ),
    ],
)
def test_user_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    assert run_with(monkeypatch, raising(error)) == code
    assert capsys.readouterr().err == line


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, raising(ZeroDivisionError()))

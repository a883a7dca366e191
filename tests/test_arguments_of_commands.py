"""The arguments of all commands: documented, and answered before anything heavy is imported."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import ACTIONS as DATA_PREP_ACTIONS
from echolab.arguments import help_text
from echolab.cli.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "numpy", "av", "cv2", "safetensors", "transformers", "diffusers", "lightning"}
RUN = """
import json, sys
from {module} import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
print(json.dumps([code, sorted({heavy} & set(sys.modules))]), file=sys.stderr)
"""


def command_lines() -> list[list[str]]:
    """Return the words of every command and action, such as data verify."""
    lines = []
    for name, command in COMMANDS.items():
        module, _, function = command.target.partition(":")
        actions = None if function else getattr(importlib.import_module(module), "ACTIONS", None)
        lines += [[name, action] for action in actions] if actions else [[name]]
    return lines


def run(module: str, words: list[str]) -> tuple[int, list[str], str]:
    """Return exit code, heavy modules that were imported and standard error of a process."""
    script = RUN.format(module=module, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT
    )
    *lines, last = done.stderr.splitlines()
    code, heavy = json.loads(last)
    return code, heavy, "\n".join(lines)


COMMAND_LINES = [
    *(("echolab.cli.__main__", words) for words in command_lines()),
    *(("data_prep.__main__", [action]) for action in DATA_PREP_ACTIONS),
]
IDS = [" ".join(words) for _, words in COMMAND_LINES]


@pytest.mark.parametrize(("module", "words"), COMMAND_LINES, ids=IDS)
def test_help_and_a_wrong_argument_import_nothing_heavy(module: str, words: list[str]) -> None:
    code, heavy, error = run(module, [*words, "no_such_argument=1"])
    assert (code, heavy) == (1, []) and "no_such_argument" in error, error
    assert run(module, [*words, "--help"])[:2] == (0, [])


def schemas() -> dict[str, type]:
    """Return every dataclass that is passed to `arguments.parse`, by module and name."""
    by_name: dict[str, type] = {}
    for path in sorted([*ROOT.glob("echolab/**/*.py"), *ROOT.glob("data_prep/**/*.py")]):
        tree = ast.parse(path.read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names = {a.name for n in imports if n.module == "echolab.arguments" for a in n.names}
        if "parse" not in names:
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse":
                name = ast.unparse(node.args[0])
                by_name[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    return by_name


def choices(hint: Any) -> list[str]:
    """Return the values of an argument that has only some."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    if hint is bool:
        return ["true", "false"]
    return [choice for inner in typing.get_args(hint) for choice in choices(inner)]


SCHEMAS = schemas()


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
def test_every_argument_has_help_type_and_choices(schema: type) -> None:
    hints = typing.get_type_hints(schema)
    lines = help_text(schema, command="x").splitlines()
    for field in dataclasses.fields(schema):
        assert len(field.metadata.get("help", "")) > 3, field.name
        line = next(line for line in lines if line.startswith(f"  {field.name} "))
        assert (line.split()[1:2] or [""])[0].strip("{}"), f"{field.name} has no type"
        if allowed := choices(hints[field.name]) or list(field.metadata.get("choices", ())):
            assert "{" + ",".join(allowed) + "}" in line


def test_every_command_that_takes_arguments_is_among_them() -> None:
    names = {name.rsplit(".", 1)[1] for name in SCHEMAS}
    assert {"GenerateArguments", "EstimateArguments", "RunOptions", "VerifyArguments"} <= names
    assert len(SCHEMAS) >= 20

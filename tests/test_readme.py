"""What README and CONTRIBUTING name is there: files, commands, arguments, settings."""

import ast
import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from echolab.arguments import parse
from echolab.cli.__main__ import COMMANDS
from echolab.config.check import names
from echolab.config.folders import CONF, group_choices
from echolab.config.parts import callbacks_from

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
# Paths may be written from one of these folders.
FOLDERS = (ROOT, ROOT / "echolab", ROOT / "echolab/training")
# Files that a run, a dataset or a user's own package has.
MADE = ("runs/", "FOLDER/", "./weights", "../shared/weights", "lab/", "NAME", "RUN/", "RUN_DIR/")
FILES_OF_RUNS = {
    "report.html", "scores.json", "metrics.jsonl", "events.jsonl", "dataset.json", "refused.jsonl",
}  # fmt: skip
PATH = re.compile(r"[\w.-]*(?:/[\w.*-]+)+/?|[\w-]+\.(?:py|md|yaml|toml|json|jsonl|html|sh)")


def named_paths(text: str) -> list[str]:
    """Return what looks like a path between backticks, or is the target of a link."""
    quoted = re.findall(r"`([^`\n]+)`", text)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    return [*(word for word in quoted if PATH.fullmatch(word)), *links]


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_that_is_named_exists(name: str) -> None:
    paths = [p for p in named_paths(TEXTS[name]) if not p.startswith(MADE)]
    paths = [path for path in paths if path not in FILES_OF_RUNS]
    assert len(paths) > 10
    missing = [path for path in paths if not any(any(f.glob(path.strip("/"))) for f in FOLDERS)]
    assert missing == []


def test_every_name_of_code_in_contributing_exists() -> None:
    source = "".join(path.read_text() for path in (ROOT / "echolab").rglob("*.py"))
    words = re.findall(r"`([A-Za-z_]+)`", TEXTS["CONTRIBUTING.md"])
    assert [word for word in words if not re.search(rf"\b{word}\b", source)] == []


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the commands in the indented blocks of README, one a line."""
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith(("echolab ", "python -m data_prep ", "sbatch ")):
            yield shlex.split(line, comments=True)


def schemas(module: str) -> dict[str, tuple[type, tuple[str, ...]]]:
    """Return schema and positional arguments by command, from the calls of `parse` in a module."""
    loaded = importlib.import_module(module)
    assert loaded.__file__
    tree = ast.parse(Path(loaded.__file__).read_text())
    by_command = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse":
            words = {word.arg: word.value for word in node.keywords}
            schema = getattr(loaded, ast.unparse(node.args[0]))
            positional = ast.literal_eval(words.get("positional", ast.Constant(())))
            command = words["command"]
            if isinstance(command, ast.Name):  # the last assignment before the call
                command = max(
                    (n.value for n in ast.walk(tree) if isinstance(n, ast.Assign)
                     and ast.unparse(n.targets[0]) == "command" and n.lineno < node.lineno),
                    key=lambda value: value.lineno,
                )  # fmt: skip
            by_command[ast.literal_eval(command)] = (schema, positional)
    return by_command


MODULES = {action.target.partition(":")[0] for action in COMMANDS.values()}
MODULES |= {"data_prep.__main__"}
SCHEMAS = {key: value for module in MODULES for key, value in schemas(module).items()}
LINES = list(command_lines(README))


def is_setting(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and key in {*names(), *group_choices([CONF]), "hydra.launcher.partition"}


@pytest.mark.parametrize("words", LINES, ids=[" ".join(line[:4]) for line in LINES])
def test_every_command_of_the_readme_takes_its_arguments(words: list[str]) -> None:
    if words[0] == "sbatch" or words[:2] == ["echolab", "train"]:
        settings = [word for word in words[2:] if not word.startswith("-")]
        settings = [word for word in settings if word != "slurm/train.sbatch"]
        assert [word for word in settings if not is_setting(word)] == []
        return
    count = next(n for n in (4, 3, 2) if " ".join(words[:n]) in SCHEMAS)
    schema, positional = SCHEMAS[" ".join(words[:count])]
    parse(schema, words[count:], command="x", positional=positional)


def test_the_table_of_commands_names_commands_and_arguments() -> None:
    table = README.partition("## Commands")[2].partition("##")[0]
    assert set(re.findall(r"`echolab (\w+)", table)) - set(COMMANDS) == set()
    assert set(COMMANDS) - set(re.findall(r"`echolab (\w+)", table)) == set()
    for command, arguments in re.findall(r"`echolab (\w+) ([^`]*)`", table):
        schema = next((s for name, (s, _) in SCHEMAS.items() if name.split()[1] == command), None)
        for key in re.findall(r"(\w+)=", arguments):
            fields = dataclasses.fields(schema) if schema else ()
            assert key in {field.name for field in fields} or is_setting(f"{key}=")


def test_the_callback_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = README.partition("**Own callbacks.**")[2].partition("Only registered")[0]
    code = "\n".join(line[4:] for line in recipe.splitlines() if line.startswith("    "))
    assert 5 < len(code.splitlines()) <= 12

    # Install it as the README says.
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/training.py").write_text(code)
    info = tmp_path / "lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[echolab.callbacks]\nlab = lab.training\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("lab", "lab.training"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    entry = {"target": "lab.training:WeightNorm", "args": {"every": 2}}
    (callback,) = callbacks_from({"custom": [entry]})
    net = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(net.weight, 3.0)
    torch.nn.init.constant_(net.bias, 4.0)
    states = [SimpleNamespace(step=step, module=SimpleNamespace(net=net)) for step in (1, 2)]
    assert [callback.metrics(state) for state in states] == [{}, {"lab/norm": 5.0}]

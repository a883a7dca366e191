"""The size of files and functions, and the absence of unpickling and of shells."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("echolab/**/*.py"), *ROOT.glob("data_prep/**/*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
FILE_LINES, FUNCTION_LINES = 500, 40


def calls(tree: ast.AST) -> list[tuple[str, dict[str, ast.expr]]]:
    """List the dotted name of each call with its keywords."""
    return [
        (ast.unparse(node.func), {word.arg: word.value for word in node.keywords if word.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def unsafe(source: str) -> list[str]:
    """List the calls that unpickle, run a shell, or extract an archive unchecked."""
    unsafe_calls = []
    for name, keywords in calls(ast.parse(source)):
        last = name.rsplit(".", 1)[-1]
        weights_only = isinstance(only := keywords.get("weights_only"), ast.Constant) and only.value
        if name in ("os.system", "os.popen") or last == "extractall":
            unsafe_calls.append(name)
        if name == "torch.load" and weights_only is not True:
            unsafe_calls.append(name)
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"):
            unsafe_calls.append(name)
        for word in ("shell", "allow_pickle"):
            value = keywords.get(word)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                unsafe_calls.append(f"{name}({word}={ast.unparse(value)})")
    return unsafe_calls


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_unpickled_and_no_shell_is_run(path: Path) -> None:
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    lines = source.count("\n")
    assert lines <= FILE_LINES, f"{lines} lines: two subjects?"
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {
        node.name: length
        for node in functions
        if (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }
    assert not long, f"functions over {FUNCTION_LINES} lines: {long}"


def test_the_rule_itself() -> None:
    assert unsafe("torch.load(path)") == ["torch.load"]
    assert unsafe("torch.load(path, weights_only=chosen)") == ["torch.load"]
    assert unsafe("torch.load(path, weights_only=True)") == []
    assert unsafe("subprocess.run(words, shell=True)") == ["subprocess.run(shell=True)"]
    assert unsafe("np.load(path, allow_pickle=False)") == []
    assert unsafe("tar.extractall(folder)") == ["tar.extractall"]

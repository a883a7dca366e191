"""The table of tasks: complete, and the only list of tasks in the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from echolab.inference.generate_arguments import GenerateArguments
from echolab.tasks.masks import MASK_RULES
from echolab.tasks.table import (
    CURRICULUM_TASKS,
    DEFAULT_TASK,
    KNOWN_TASKS,
    LOCAL_TASKS,
    TASK_TABLE,
    TASKS,
    VALIDATION_TASKS,
    tasks_with,
)

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("echolab/**/*.py"), *ROOT.glob("data_prep/**/*.py")])


def second_lists(source: str) -> list[int]:
    """Return the lines of literals that name two tasks or more."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            items = node.elts
        elif isinstance(node, ast.Dict):
            items = [key for key in node.keys if key is not None]
        else:
            continue
        named = {item.value for item in items if isinstance(item, ast.Constant)}
        if len(named & set(TASKS)) >= 2:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_task_list_is_written_twice(path: Path) -> None:
    if path != ROOT / "echolab/tasks/table.py":
        assert second_lists(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        'TASKS = ["t2v", "i2v"]',
        'Task = Literal["flf2v", "lip_sync"]',
        'TITLES = {"t2v": 1, "other": 2, "continuation": 3}',
        'local = task in {"avatar_sync", "lip_sync"}',
        'CLIPS, TASK, REST = 1, "i2v", ("t2v", 0, "i2v")',
    ],
)
def test_a_second_list_is_noticed(source: str) -> None:
    assert second_lists(source) == [1]


def test_one_task_by_name_is_not_a_list() -> None:
    assert second_lists('x = ["i2v", "other"]\ny = {"t2v": "i2v"}\nz = task == "t2v"') == []


def test_every_task_is_complete() -> None:
    fields = GenerateArguments.__dataclass_fields__
    for name, task in TASK_TABLE.items():
        assert name == task.name and task.title and task.given
        assert task.mask in MASK_RULES
        assert {*task.inputs, *task.optional_inputs} <= fields.keys()
    assert {task.mask for task in TASK_TABLE.values()} == MASK_RULES.keys()
    titles = [task.title for task in TASK_TABLE.values()]
    assert len(set(titles)) == len(titles)


def test_the_groups_of_tasks_are_complete() -> None:
    assert CURRICULUM_TASKS == TASKS[:5] and TASKS[5] == "continuation"
    assert KNOWN_TASKS == TASKS[1:]
    assert set(LOCAL_TASKS) == {"avatar_sync", "lip_sync"}
    assert VALIDATION_TASKS == ("i2v", "lip_sync")
    assert DEFAULT_TASK in TASKS and tasks_with("image") == "i2v, flf2v"


def test_the_table_imports_no_torch() -> None:
    """Parsing arguments needs nothing heavy."""
    code = "import sys, echolab.tasks.table; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

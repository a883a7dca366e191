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
for words in json.loads(sys.argv[1]):
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    heavy = sorted({heavy} & set(sys.modules))
    print("\\0" + json.dumps([code, heavy]), end="\\0", file=sys.stderr)
"""


def command_lines() -> list[list[str]]:
    """Return the words of every command and action, such as data verify."""
    lines = []
    for name, command in COMMANDS.items():
        module, _, function = command.target.partition(":")
        actions = None if function else getattr(importlib.import_module(module), "ACTIONS", None)
        lines += [[name, action] for action in actions] if actions else [[name]]
    return lines


def run(module: str, lines: list[list[str]], cwd: Path = ROOT) -> list[tuple[int, list[str], str]]:
    """Run command lines one after another in one process.

    Return the exit code of each, the heavy modules that were imported until then, and its errors.
    """
    script = RUN.format(module=module, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(lines)],
        capture_output=True, text=True, cwd=cwd, timeout=120,
    )  # fmt: skip
    parts = done.stderr.split("\0")
    assert len(parts) == 2 * len(lines) + 1, done.stderr
    return [(*json.loads(parts[k + 1]), parts[k]) for k in range(0, len(parts) - 1, 2)]


COMMAND_LINES = [
    *(("echolab.cli.__main__", words) for words in command_lines()),
    *(("data_prep.__main__", [action]) for action in DATA_PREP_ACTIONS),
]
IDS = [" ".join(words) for _, words in COMMAND_LINES]


@pytest.mark.parametrize(("module", "words"), COMMAND_LINES, ids=IDS)
def test_help_and_a_wrong_argument_import_nothing_heavy(module: str, words: list[str]) -> None:
    shown, wrong = run(module, [[*words, "--help"], [*words, "no_such_argument=1"]])
    assert shown[:2] == (0, [])
    code, heavy, error = wrong
    assert (code, heavy) == (1, []) and "no_such_argument" in error, error


# For each command and action: command lines with a mistake, and what the one line says of it.
# Nothing of TYPO exists.  TORCH_FREE are imported to look at a dataset or at settings.
TORCH_FREE = {"numpy"}
REMEDIES = (";", "give", "one of", "must ", "--help")
MISTAKES: dict[str, list[tuple[str, str]]] = {
    "demo": [
        ("sft_stesp=1", "did you mean sft_steps=...?"),
        ("seeds=0", "seeds=0 is not a whole number, at least 1"),
        ("prompts=9999", "more than train_clips=640; give fewer"),
    ],
    "train": [
        ("experiment=TYPO", "experiment=TYPO: must be one of demo_dpo, "),
        ("experiment=stf", "did you mean sft?"),
        ("model=dmeo data.clips=x", "did you mean demo?"),
        ("experiment=sft data.clips=TYPO", "data.clips=TYPO: TYPO/dataset.json: not there"),
        ("", "data.clips: is missing; give data.clips=..., dataset of clips, encoded"),
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("data.clips=x optim.lr=-1", "optim.lr=-1: must be a number, at least 0"),
        ("--dry-run", "no option --dry-run; options are -m"),
        ("--config-dir=TYPO", "--config-dir=TYPO: no such folder"),
        ("-m data.clips=x seed=1,1", "a value is given twice"),
    ],
    "why": [("TYPO", "TYPO: no attempts of a run in it; give"), ("run_dir=TYPO", "mean run=...?")],
    "rollback": [
        ("TYPO", "give to=..."),
        ("TYPO to=x", "to=x is not a whole number, at least 0"),
        ("TYPO to=1", "TYPO/config.json: cannot be read"),
        ("TYPO to=1 skip=9", "skip=9: give first:stop"),
    ],
    "replay": [
        ("TYPO", "give step=..."),
        ("TYPO step=0", "step=0 is not a whole number, at least 1"),
        ("TYPO step=1", "TYPO/config.json: cannot be read"),
    ],
    "generate": [
        ("image=missing.png", "give out=..."),
        ("image=missing.png audio=a.wav out=a.mp4", "image=missing.png: not there; check"),
        ("image=portrat.png audio=a.wav out=a.mp4", "not there; did you mean portrait.png?"),
        ("image=portrait.png audio=TYPO out=a.mp4", "audio=TYPO: not there; check the name"),
        ("taks=i2v", "did you mean task=...?"),
        ("task=i2vv", "did you mean i2v?"),
        ("solver=eulr", "did you mean euler?"),
        ("task=t2v seconds=1 out=a.mp4", "checkpoint=runs/demo/seed_0/dpo: not there"),
        ("task=t2v seconds=1 out=a.mp4 model=dmeo encoder_dir=.", "did you mean demo?"),
        ("task=t2v seconds=1 out=a.avi", "out=a.avi: must end in .mp4"),
    ],
    "evaluate": [
        ("", "needs checkpoint= or reference="),
        ("TYPO", "checkpoint=TYPO: not there"),
        ("run_dir=TYPO", "did you mean checkpoint=...?"),
        ("reference=shufled", "did you mean shuffled_sound?"),
        ("reference=ground_truth raw=TYPO", "raw=TYPO: TYPO/dataset.json: not there"),
        ("reference=ground_truth task=TYPO", "task=TYPO is not one of t2v, i2v"),
    ],
    "estimate": [
        ("", "give model=..."),
        ("dmeo", "model=dmeo: unknown; one of demo, "),
        ("dmeo", "did you mean demo?"),
        ("demo lora=atention", "did you mean attention?"),
        ("demo height=17", "height=17: must be a multiple of 16"),
        ("demo frames=18", "frames=18: must be 4n+1, such as 17"),
    ],
    "fit": [
        ("", "give network=... data=... out=..."),
        ("snc a b", "did you mean sync?"),
        ("frames TYPO b.safetensors vae=x", "is for the network sync; leave it out"),
        ("sync TYPO b.safetensors", "data=TYPO: TYPO/dataset.json: not there"),
    ],
    "export": [
        ("", "give source=... out=..."),
        ("TYPO out=a", "TYPO: no run or checkpoint; for released weights give model=NAME"),
        ("TYPO out=a model=dmeo", "did you mean demo?"),
        ("TYPO out=a model=demo", "source=TYPO: not there"),
        ("TYPO out=a which=emaa", "which=emaa: unknown; ema, raw, adapters"),
        ("TYPO out=a.bin", "must end in .safetensors, or have no suffix"),
    ],
    "pairs": [
        ("sampel", "did you mean sample?"),
        ("sample", "give folder=..."),
        ("sample f", "echolab pairs sample: give clips="),
        ("sample f clips=TYPO", "clips=TYPO: TYPO/dataset.json: not there"),
        ("score f raw=TYPO", "raw=TYPO: TYPO/dataset.json: not there"),
        ("pack f clips=TYPO", "clips=TYPO: TYPO/dataset.json: not there"),
    ],
    "report": [("", "give run=..."), ("TYPO", "TYPO: no such folder; give one")],
    "checkpoint inspect": [("TYPO", "TYPO: no checkpoint there; give a run")],
    "checkpoint verify": [("TYPO", "TYPO: no checkpoint there; give a run")],
    "checkpoint diff": [("TYPO", "give b=..."), ("TYPO TYPO", "TYPO: no checkpoint there")],
    "data verify": [("", "give folder=..."), ("TYPO workers=0", "at least 1")],
    "data index": [
        ("TYPO", "TYPO: no such folder; give one of tars"),
        ("TYPO kind=rw", "did you mean raw?"),
        ("TYPO about=TYPO", "about=TYPO: cannot be read"),
    ],
    "data audit": [("TYPO", "TYPO/ledger: holds no ledger; a run with data.log_samples=true")],
    "doctor": [
        ("metrcis", "is not one of metrics"),
        ("metrics networks=TYPO", "networks=TYPO: "),
    ],
    "bench step": [
        ("model=dmeo", "did you mean demo?"),
        ("attention=flash4", "is not one of auto, sdpa, cudnn, flash2, flash3"),
        ("precision=fp16", "each one of fp32, bf16"),
        ("frames=6", "frames=6: must be 4n+1, such as 5"),
    ],
    "bench generate": [
        ("model=dmeo", "did you mean demo?"),
        ("solvers=euler,heun", "each one of euler, unipc, dpmpp"),
    ],
    "bench data": [
        ("clips=TYPO", "clips=TYPO: TYPO/dataset.json: not there"),
        ("raw=TYPO", "raw=TYPO: TYPO/dataset.json: not there"),
    ],
    "bench metrics": [
        ("scores=snyc", "each one of sync"),
        ("frames=20", "frames=20 is not a whole number, at least 21"),
    ],
}  # fmt: skip


def test_every_command_has_mistakes_in_the_table() -> None:
    assert set(MISTAKES) == {" ".join(words) for words in command_lines()}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_in_one_line_before_torch_is_imported(
    command: str, tmp_path: Path
) -> None:
    (tmp_path / "portrait.png").touch()
    lines = [[*command.split(), *words.split()] for words, _ in MISTAKES[command]]
    answers = run("echolab.cli.__main__", lines, tmp_path)
    for (words, message), (code, heavy, error) in zip(MISTAKES[command], answers, strict=True):
        assert code == 1 and set(heavy) <= TORCH_FREE, f"{words}: {code}, {heavy}, {error}"
        assert error.startswith("echolab: error: ") and error.count("\n") == 1, error
        assert message in error, error
        assert any(word in error for word in REMEDIES), f"no remedy: {error}"
    assert [path.name for path in tmp_path.iterdir()] == ["portrait.png"], "nothing is left behind"


@pytest.mark.parametrize("command", ["", "checkpoint", "data", "bench"])
def test_an_unknown_word_gets_the_nearest_and_no_word_the_list(command: str) -> None:
    nearest = {"": "trian", "checkpoint": "dif", "data": "veryfy", "bench": "stp"}[command]
    known = {"": "train", "checkpoint": "diff", "data": "verify", "bench": "step"}[command]
    words = command.split()
    unknown, nothing = run("echolab.cli.__main__", [[*words, nearest], words])
    assert unknown[:2] == (1 if command else 2, []) and f"did you mean {known}?" in unknown[2]
    assert nothing == (2, [], "")


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

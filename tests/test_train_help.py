"""`echolab train --help`: every setting once, from the types that validate it, within a second."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from echolab.cli.__main__ import main
from echolab.config import schema
from echolab.config.check import RENAMED, names, renamed
from echolab.config.compose import compose
from echolab.config.folders import CONF, default_settings, group_choices
from echolab.config.help import help_of, keys_of
from echolab.launch import exit_codes

ITEMS = {  # settings that hold sections of their own
    "schedule.epochs": schema.Epoch,
    "tasks.stages": schema.Stage,
}


def items() -> set[str]:
    return {f"{name}[*].{key}" for name, section in ITEMS.items() for key in section.model_fields}


def test_every_setting_is_documented_once() -> None:
    lines = help_of([], [CONF]).splitlines()
    for name in sorted({*names(), *items()}):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name


def test_every_setting_has_a_line_of_meaning_a_type_and_a_default() -> None:
    def described(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            assert field.description and "\n" not in field.description, name

    for section in vars(schema).values():
        if isinstance(section, type) and issubclass(section, BaseModel):
            described(section)
    for key in keys_of(schema.Settings, default_settings([CONF])[0]):
        assert re.search(r"\[.+\]$", key.text) and key.metavar, key.name
        assert "PydanticUndefined" not in key.text and "Annotated" not in key.metavar, key.name


def test_every_group_and_choice_is_documented() -> None:
    text = help_of([], [CONF])
    for group, files in group_choices([CONF]).items():
        assert f"  {group} {{{','.join(files)}}}" in text
        about = help_of([group], [CONF])
        for choice in files:
            assert re.search(rf"^  {choice} +\w", about, re.MULTILINE), f"{group}={choice}"


def test_the_shown_defaults_equal_the_composed_ones() -> None:
    settings, chosen = default_settings([CONF])
    composed = compose(["data.clips=x"])
    settings["data"]["clips"] = "x"
    assert settings == composed
    assert chosen["experiment"] is None and chosen["model"] == "demo"


def test_help_shows_one_setting_or_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "optim.lr"]) == 0
    said = capsys.readouterr().out
    assert "optim.lr FLOAT" in said and "at least 0" in said and "betas" not in said
    assert main(["train", "--help", "schedule"]) == 0
    said = capsys.readouterr().out
    assert "schedule.epochs[*].kind {sft,ndpo,dpo,sync}" in said and "cycle" in said
    assert main(["train", "experiment=real_smoke", "--help", "optim.lr"]) == 0
    assert "[0.0005]" in capsys.readouterr().out, "the default is the experiment's"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--help", "optim.lrr"], "did you mean optim.lr?"),
        (["--help", "trainr"], "did you mean trainer?"),
        (["modle=demo"], "did you mean model?"),
        (["model=dmeo"], "did you mean demo?"),
        (["experiment=stf"], "did you mean sft?"),
        (["phases.mode=dropuot"], "did you mean dropout?"),
        (["optm.lr=1"], "did you mean optim.lr?"),
        (["schedule.epochs=[{kind:sft,steps:2,lr:1}]"], "did you mean optim.lr?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str], words: list[str], remedy: str
) -> None:
    assert main(["train", "data.clips=x", *words]) == exit_codes.FATAL
    said = capsys.readouterr().err
    assert remedy in said and said.count("\n") == 1


OLD = [
    (section, old) for section, table in RENAMED.items() for old in table
]  # fmt: skip


@pytest.mark.parametrize(("section", "old"), OLD)
def test_an_old_key_is_answered_with_the_new_one(section: str, old: str) -> None:
    new = renamed(f"{section}.{old}".strip("."))
    assert new in {*names(), *schema.Settings.model_fields}
    assert f"{section}.{old}".strip(".") not in names()


def test_an_old_key_on_the_command_line_is_refused_with_the_new_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    earlier = {"every": "log", "guards": "back", "preference": "anchor", "supervise": "floor"}
    for section, name in earlier.items():
        assert main(["train", "data.clips=x", f"{section}.{name}=1"]) == exit_codes.FATAL
        said = capsys.readouterr().err
        assert f"did you mean {renamed(f'{section}.{name}')}?" in said and said.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from echolab.cli.__main__ import main; code = main(['train', '--help']); "
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy'} & set(sys.modules); "
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
    assert (Path(CONF) / "train.yaml").is_file()

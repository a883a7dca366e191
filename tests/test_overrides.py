"""A path or free text is taken as typed; all else on the command line is Hydra's."""

import copy
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pydantic import ValidationError

from echolab.cli import train
from echolab.cli.train import command
from echolab.config.compose import DATASETS, TEXTS, as_hydra, compose, compose_both, quoted
from echolab.config.schema import Settings
from echolab.config.sweep_members import members
from echolab.errors import ConfigError
from echolab.launch import run_dir

TYPED = (
    "runs/a=b#c", "/d/(x)/~y/ü", "~/x", "a b", " a ", "a:b@c", "it's", 'say "x"', "'a'b", '"',
    "a$b", "$HOME/x", "a\\b", "a\\=b", "C:\\x\\", "{a}", "a{b}c", "x[1]", "a,b", "(1,2)", "1e3",
    "2024", "007", "1_000", "true", "nan", "-x", "--x", "=x", "a=", "a;b&c|d<e>f", "界/模型",
    "a${b", "${", "a\tb", "a\nb", "!x`y`", "*?", "%j", "str(1)", "nul", "base",
)  # fmt: skip


def setting(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("key", TEXTS)
def test_text_is_taken_as_typed(key: str) -> None:
    """Composing takes a quarter of a second, so each setting gets one odd text here; the other
    texts are below.
    """
    start = "" if key in ("lora.init_from", "data.clips") else "data.clips=x"
    text = TYPED[TEXTS.index(key)]
    config = compose([word for word in (start, "lora=all", f"{key}={text}") if word] + (
        ["data.clips=x"] if key == "lora.init_from" else []
    ))  # fmt: skip
    assert setting(config, key) == os.path.expanduser(text)


def read(word: str) -> Any:
    """Parse an override with Hydra and OmegaConf, without composing."""
    value = OverridesParser.create().parse_override(word).value()
    return OmegaConf.to_container(OmegaConf.create({"key": value}), resolve=True)["key"]


@pytest.mark.parametrize("key", ["run_dir", "+pretrained", "data.clips", "logger.project"])
def test_every_text_reads_back(key: str) -> None:
    for text in TYPED:
        assert read(as_hydra([f"{key}={text}"])[0]) == text, text
    chance = random.Random(0)
    letters = "ab=#()~ü ,:@'\"$\\{[]!;&<>^`\t\n|?*%+-.1e0_/界"
    for _ in range(1500):  # without }: no ${...}
        text = "".join(chance.choice(letters) for _ in range(chance.randrange(2, 9)))
        if re.fullmatch(r"'.*'|\".*\"", text, re.DOTALL) or text.startswith("["):
            continue
        assert read(as_hydra([f"{key}={text}"])[0]) == text, text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("pretrained='a'", "a"),
        ('run_dir="a b"', "a b"),
        ("pretrained=null", None),
        ("init_from='null'", "null"),
        ("data.clips=[a=b, 'c,d',/e#(1)]", ["a=b", "c,d", "/e#(1)"]),
        ("data.pairs=[]", []),
        ("run_dir=[a]", "[a]"),
        ("seed=3", 3),
        ("optim.betas=[0.9,0.95]", [0.9, 0.95]),
        (
            "schedule.epochs=[{kind:sft,steps:2,lr_scale:1e-3}]",
            [{"kind": "sft", "steps": 2, "lr_scale": 1e-3}],
        ),
    ],
)
def test_other_values_are_parsed_by_hydra(word: str, value: Any) -> None:
    assert read(as_hydra([word])[0]) == value


def test_interpolations_still_work() -> None:
    config = compose(["data.clips=x", "seed=7", "run_dir=runs/a=b (${seed})"])
    assert config["run_dir"] == "runs/a=b (7)"
    assert as_hydra(["--cfg", "job", "-m", "~optim.max_grad_norm", "seed"]) == [
        "--cfg", "job", "-m", "~optim.max_grad_norm", "seed",
    ]  # fmt: skip


def test_in_a_sweep_a_comma_separates_unless_it_is_quoted() -> None:
    typed = ["/d/(x)/~y/ü", "a=b#c", "$x{y}", "it's", "a\\b", "2024"]
    runs = members([f"data.clips={','.join(typed)},'p,q',[r=s,t]"], compose_both)
    values = [compose(member.words)["data"]["clips"] for member in runs]
    assert values == [*typed, "p,q", ["r=s", "t"]]
    chosen = members(["data.clips=x", "pretrained=choice(/a/(x),b#c)"], compose_both)
    assert [member.config["pretrained"] for member in chosen] == ["/a/(x)", "b#c"]


def test_words_pass_through_the_command_of_a_rank() -> None:
    """The folder of a sweep's member passes too, with any name."""
    words = [f"pretrained={text}" for text in TYPED]
    program = "import json, sys; print(json.dumps(sys.argv[1:]))"
    given = [sys.executable, "-c", program, *command(words)[-len(words) :]]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == words
    for text in (*TYPED, "\\${", "${seed}", "\\\\${a}\\", "'a'", "null"):
        assert read(as_hydra([f"run_dir={quoted(text)}"])[0]) == text


@pytest.mark.parametrize("run", ["runs/${now:%H%M%S%f}", "runs/a=b#c (d)", "'x,y'", "2024"])
def test_ranks_get_the_folder_of_their_supervisor(
    run: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks compose the settings again, later."""
    commands: list[list[str]] = []

    class Recorded:
        def __init__(self, _: object, command: list[str], folder: Path, *more: object) -> None:
            commands.append([*command, str(folder)])

        def watch(self) -> None:
            pass

    monkeypatch.setattr(train, "Supervisor", Recorded)
    monkeypatch.setattr("echolab.config.paths.check_paths", lambda config: None)  # x is no dataset
    monkeypatch.chdir(tmp_path)
    words = ["data.clips=x", f"run_dir={run}"]
    train.supervise(words, compose(words))
    *command, folder = commands[0]
    assert compose(command[command.index("train") + 1 :])["run_dir"] == folder


def test_all_settings_that_hold_paths_or_text_are_known() -> None:
    """They are the settings whose schema accepts any text."""

    def takes_text(config: Any, path: tuple[str, ...]) -> bool:
        changed = copy.deepcopy(config)
        *parents, last = path
        section = changed
        for name in parents:
            section = section[name]
        section[last] = "any=text#"
        try:
            Settings.model_validate(changed)
        except ValidationError:
            return False
        return True

    config = compose(["data.clips=x", "lora=all"])
    keys = [tuple(key.split(".")) for key in run_dir.flatten(config)]
    texts = {".".join(key) for key in keys if takes_text(config, key)}
    assert texts - {"trainer.precision"} == set(TEXTS)  # Lightning's words, which it checks itself
    assert set(DATASETS) < set(TEXTS)


def test_the_home_folder_stands_for_a_tilde() -> None:
    """The shell leaves that of key=~/path to the program."""
    config = compose(
        ["data.clips=[~/a b,x]", "run_dir=~/r=1", "logger.project=~/p", "data.pairs=~"]
    )
    home = os.path.expanduser("~")
    assert config["data"]["clips"] == [f"{home}/a b", "x"] and config["run_dir"] == f"{home}/r=1"
    assert (config["logger"]["project"], config["data"]["pairs"]) == ("~/p", "~")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("seed=1,2", "seed=1,2: is several values; add -m to sweep over them"),
        ("optim.betas=0.9,0.95", "or write a list as optim.betas=[0.9,0.95]"),
        ("seed=range(1,3)", "seed=range(1,3): is several values; add -m"),
        ("pretrained=choice(a,b)", "or write text as pretrained='choice(a,b)'"),
        ("experiment", "experiment: is no setting with a value, key=value; write experiment=VALUE"),
        ("sed", "did you mean seed?"),
        ("seed =3", "seed =3: has no plain key before its `=`; write seed=3"),
        ("'seed'=3", "write seed=3"),
        ("=3", "write key=value"),
        ("seed=a(b", "seed=a(b: must be a whole number"),
        ("seed=é#{", "seed=é#{: must be a whole number"),
        ("seed='1", "seed='1: must be a whole number"),
        ("seed=\\", "seed=\\: must be a whole number"),
        ("trainer.precision=a=b#c", "trainer.precision=a=b#c: unknown; one of 32-true"),
        ("model=a#b=c", "model=a#b=c: must be one of demo"),
        ("model.dim=1@2", "model.dim=1@2: must be a whole number"),
        ("optim.betas=[0.9,0.95", "cannot be read; close every bracket"),
        ("lora.target_modules=[a#b]", "in quotes: ['a#b', 'c=d']"),
        ("+seed=1", "+seed=1: exists; leave out the +"),
        ("~optim.foo", "~optim.foo: Could not delete"),
        ("foo=a b", "foo=a b: there is no such setting; `echolab train --help` lists all"),
        ("hydra.launcher.partition=gpu", "is for jobs of Slurm; give launcher=slurm too"),
        ("seed=${oc.env:NO_SUCH_NAME}", "'NO_SUCH_NAME' not found\"; give a value"),
        ("init_from=${nope}", "init_from=${nope}: Interpolation key 'nope' not found; give"),
        ("run_dir=${run_dir}", "run_dir=${run_dir}: Recursive interpolation detected; give"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_a_remedy(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["data.clips=x", words])
    assert message in str(refused.value) and "hydra.cc" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_values_of_lists_and_mappings_may_be_quoted() -> None:
    config = compose(["data.clips=x", "lora=all", "lora.target_modules=['a#b','c=d',\"é {f}\"]"])
    assert config["lora"]["target_modules"] == ["a#b", "c=d", "é {f}"]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_option_of_a_sweep_may_stand_anywhere(
    position: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    swept: list[str] = []

    def recorded(members: Any, *_: Any) -> int:
        swept.extend(member.config["pretrained"] for member in members)
        return 0

    monkeypatch.setattr(train.sweep, "run", recorded)
    words = [f"run_dir='{tmp_path}/a=b, c'", "data.clips=x", "pretrained=a b,c=d#e,'f,g',-h"]
    words.insert(position, "-m")
    assert train.main(words) == 0
    assert swept == ["a b", "c=d#e", "f,g", "-h"]

"""Arguments of commands: typed, read back as written, refused in one line, and shown in the
help.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.arguments import Action, argument, help_text, parse, run_action
from echolab.errors import ConfigError


@dataclass
class Draw:
    """Draw talkers."""

    out: Path = field(metadata={"help": "a new folder"})
    clips: int = field(default=64, metadata={"help": "how many"})
    rate: float = 0.5
    loop: bool = False
    sizes: tuple[int, ...] = (48, 64)
    span: tuple[float, float] = (0.0, 1.0)
    prompt: str | None = None
    format: Literal["text", "json"] = "text"
    names: tuple[str, ...] = field(default_factory=tuple)
    scales: tuple[float, ...] = field(default=(1.0,), metadata={"ge": 0, "lt": 10})
    steps: int | None = field(default=None, metadata={"ge": 1})


def draw(*words: str) -> Draw:
    return parse(Draw, list(words), command="data_prep draw", positional=("out",))


def test_values_have_the_type_of_their_field() -> None:
    words = ["clips=8", "rate=1e-3", "loop=yes", "sizes=1, 2,3", "span=0,2", "prompt=a=b c"]
    expected = Draw(Path("a=b"), 8, 1e-3, True, (1, 2, 3), (0.0, 2.0), "a=b c")
    assert draw("./a=b", *words) == expected


ODD = [
    "a b",
    "a,b",
    "a:b@c",
    "it's",
    '"q"',
    "界/é",
    "{x}",
    "$HOME",
    "a#b",
    "a\\b",
    "=",
    "a\nb",
    " a ",
]


@pytest.mark.parametrize("text", ODD)
def test_text_and_paths_are_taken_as_typed(text: str) -> None:
    assert draw(f"out={text}", f"prompt={text}") == Draw(Path(text), prompt=text)
    if "=" not in text:
        assert draw(text) == Draw(Path(text))


@pytest.mark.parametrize("name", ["a=b", "-x", "--x y", "clip=3"])
def test_a_path_that_is_there_may_look_like_an_argument(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no argument|no option"):
        draw(name)
    (tmp_path / name).mkdir()
    assert draw(name) == draw(f"out={name}") == Draw(Path(name))


def test_the_home_folder_stands_for_a_tilde() -> None:
    assert draw("~/x y").out == Path.home() / "x y"
    assert draw("~nobody-of-this-name/x").out == Path("~nobody-of-this-name/x")


def test_positional_arguments_may_be_given_by_name() -> None:
    assert draw("x") == draw("out=x") == Draw(Path("x"))
    assert draw("x", "prompt=none").prompt is None
    assert draw("x", "sizes=").sizes == ()


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text())
def test_a_written_value_is_read_back(clips: int, rate: float, loop: bool, prompt: str) -> None:
    words = [f"clips={clips}", f"rate={rate!r}", f"loop={loop}", f"prompt={prompt}"]
    read = draw("x", *words)
    expected = None if prompt.lower() in ("none", "null") else prompt
    assert (read.clips, read.rate, read.loop, read.prompt) == (clips, rate, loop, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data_prep draw: give out=... (see data_prep draw --help)"),
        (["x", "clip=3"], "no argument 'clip'; did you mean clips=...?"),
        (["x", "--clips=3"], "no argument '--clips'; did you mean clips=...?"),
        (["x", "qqqq=3"], "no argument 'qqqq'; known: out, clips"),
        (["x", "--fast"], "no option --fast; arguments are written key=value"),
        (["x", "y"], "one word too many, 'y'"),
        (["x", "out=y"], "out is given twice ('x' and 'y')"),
        (["x", "clips=3.5"], "clips=3.5 is not a whole number"),
        (["x", "loop=maybe"], "loop=maybe is not true or false"),
        (["x", "format=xml"], "format=xml is not one of text, json"),
        (["x", "format=jsn"], "is not one of text, json; did you mean json? (see"),
        (["x", "span=1"], "span=1 is not 2 values with commas between"),
        (["x", "sizes=1,b"], "sizes=1,b is not a list of int with commas between"),
        (["out="], "out= is not a path"),
        (["x", "rate=nan"], "rate=nan is not a number"),
        (["x", "rate=-inf"], "rate=-inf is not a number"),
        (["x", "scales=1,-1"], "scales=1,-1 is not a list of float with commas between, at least"),
        (["x", "scales=10"], "scales=10 is not a list of float with commas between, at least 0"),
        (["x", "steps=0"], "steps=0 is not a whole number or none, at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line_with_a_remedy(
    words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        draw(*words)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_help_names_every_field_with_its_type_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        draw("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: data_prep draw OUT [key=value ...]\n\nDraw talkers.\n")
    assert all(field.name in text for field in dataclasses.fields(Draw))
    assert "out PATH" in text and "a new folder [required]" in text
    assert "sizes INT,..." in text and "[48,64]" in text
    assert "format {text,json}" in text and "loop {true,false}" in text
    assert "steps INT" in text and "at least 1 [none]" in text


@dataclass
class Sample:
    """Sample a clip."""

    image: Path = argument("image with one face", section="Inputs")
    solver: Literal["euler", "unipc"] | None = argument(
        "ODE solver", None, section="Sampling", default_text="preset's"
    )
    sigma_schedule: str = argument(
        "noise levels", "even", choices=("even", "wan"), aka=("grid", "schedule")
    )


def test_help_has_sections_choices_and_defaults() -> None:
    lines = help_text(Sample, command="sample").splitlines()
    assert lines[0] == "usage: sample image=... [key=value ...]"
    assert lines[4:] == [
        "Inputs:",
        "  image PATH                 image with one face [required]",
        "",
        "Sampling:",
        "  solver {euler,unipc}       ODE solver [preset's]",
        "  sigma_schedule {even,wan}  noise levels [even]",
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("grid=wan", "no argument 'grid'; did you mean sigma_schedule=...?"),
        ("sigma_schedule=want", "is not one of even, wan; did you mean wan?"),
        ("solver=eular", "is not one of euler, unipc or none; did you mean euler?"),
    ],
)
def test_an_old_or_mistyped_name_is_answered_with_the_right_one(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(Sample, ["image=a.png", word], command="sample")
    assert message in str(raised.value)


def test_actions_are_listed_run_and_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    actions = {"verify": Action("math:fsum", "check"), "index": Action("math:fsum", "list")}
    assert run_action(["--help"], actions, command="data") == 0
    assert "usage: data ACTION [key=value ...]" in capsys.readouterr().out
    assert run_action([], actions, command="data") == 2
    with pytest.raises(ConfigError, match=r"data verfy: no such action; did you mean verify\?"):
        run_action(["verfy"], actions, command="data")
    assert run_action(["index"], actions, command="data") == 0

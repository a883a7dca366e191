import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echolab.arguments import parse
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


def test_values_take_the_type_of_their_field() -> None:
    words = ["clips=8", "rate=1e-3", "loop=yes", "sizes=1, 2,3", "span=0,2", "prompt=a=b c"]
    expected = Draw(Path("a=b"), 8, 1e-3, True, (1, 2, 3), (0.0, 2.0), "a=b c")
    assert draw("./a=b", *words) == expected


def test_defaults_stay_and_a_place_may_be_named() -> None:
    assert draw("x") == draw("out=x") == Draw(Path("x"))
    assert draw("x", "prompt=none").prompt is None
    assert draw("x", "sizes=").sizes == ()


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.text())
def test_what_is_written_is_read(clips: int, rate: float, loop: bool, prompt: str) -> None:
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
def test_bad_words_give_one_line_with_the_remedy(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        draw(*words)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_help_names_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        draw("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: data_prep draw OUT [key=value ...]\n\nDraw talkers.\n")
    assert all(field.name in text for field in dataclasses.fields(Draw))
    assert "(required)  a new folder" in text and "48,64" in text

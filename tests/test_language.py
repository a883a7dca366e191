"""The language of the source: the field's words, imperative docstrings, American spelling.

Tests are held to the same words.  Their helpers have imperative docstrings; the docstring of a test
states its law instead, in the indicative.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from test_house import FILES, NAMES, ROOT

# Words of the private vocabulary that this project once had: in no identifier, docstring, comment.
PRIVATE = frozenset(
    "told tell telling tells found alike beside whole mend mended looked heard hears apart "
    "somebody whatever nowhere meanwhile afresh anew learnt".split()
)
PHRASES = (
    "goes on", "go on", "going on", "gone on", "gone back", "gone past", "by heart", "the sound",
    "first values", "comes to its end", "a picture", "the picture",
)  # fmt: skip
# Words with an innocent use in a sentence, which name nothing.  `own`, `place`, `look`, `turn` and
# `number` are not among them: a key of its own, to place a copy, a look at the clock, to take turns
# and the number of a frame are all plain English.
NO_NAMES = frozenset("picture pictures gone mends hearing".split())
BRITISH = frozenset(
    "colour colours normalise normalised initialise initialised initialises grey centre centred "
    "behaviour neighbour neighbours artefact artefacts optimise optimised optimiser serialise "
    "standardise standardised minimise minimised signalled cancelled labelled".split()
)
VERBS = frozenset((ROOT / "tests/imperative_verbs.txt").read_text().split())
COMMENT_SHARE = 0.04
THIS = Path(__file__).resolve()
TEST_FILES = sorted(path for path in ROOT.glob("tests/**/*.py") if path != THIS)


def spaced(identifier: str) -> str:
    """Write an identifier as lower-case words: `firstLoss_of` becomes `first loss of`."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower()
    return " ".join(re.findall(r"[a-z]+", snake))


def identifiers(tree: ast.AST) -> list[str]:
    """List the names that a source defines: functions, classes, arguments, variables."""
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.append(node.name)
            case ast.arg():
                names.append(node.arg)
            case ast.Name(ctx=ast.Store()):
                names.append(node.id)
            case ast.Attribute(ctx=ast.Store()):
                names.append(node.attr)
    return names


def docstrings(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """List the nodes that have a docstring, with the docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [(node, text) for node in nodes if (text := ast.get_docstring(node))]


def comments(source: str) -> list[str]:
    """List the comments of a source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def private_words(text: str) -> list[str]:
    """List the private words and phrases of a text."""
    text = " ".join(text.lower().split())
    return [word for word in [*sorted(PRIVATE), *PHRASES] if re.search(rf"\b{word}\b", text)]


def is_well_named(identifier: str) -> bool:
    """Return whether an identifier has neither private words nor British spelling."""
    words = spaced(identifier)
    return not private_words(words) and not set(words.split()) & (NO_NAMES | BRITISH)


def needs_a_verb(node: ast.AST) -> bool:
    """Return whether a docstring must begin with a verb: of functions, but properties and tests."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    is_property = any("property" in ast.dump(item) for item in node.decorator_list)
    return not is_property and not node.name.startswith("test_")


def faults(source: str) -> list[str]:
    """List what a source says in words that the field does not use."""
    tree = ast.parse(source)
    lines = [f"name {name}" for name in identifiers(tree) if not is_well_named(name)]
    for node, text in docstrings(tree):
        name = getattr(node, "name", "module")
        lines += [f"docstring of {name}: {word}" for word in private_words(text)]
        first = re.match(r"[\W_]*([A-Za-z]+)", text)
        if needs_a_verb(node) and (not first or first[1].lower() not in VERBS):
            lines.append(f"docstring of {name} begins with {text.split()[0]!r}, not a verb")
    return lines + [f"comment: {word}" for text in comments(source) for word in private_words(text)]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_speaks_the_language_of_the_field(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize("path", TEST_FILES, ids=[path.name for path in TEST_FILES])
def test_every_test_speaks_the_language_of_the_field(path: Path) -> None:
    assert faults(path.read_text()) == []


ROOMS = sorted({"/".join(Path(name).parts[:2][: len(Path(name).parts) - 1]) for name in NAMES})


@pytest.mark.parametrize("room", ROOMS)
def test_a_line_in_25_of_a_room_is_a_comment(room: str) -> None:
    """A room is a package with the packages in it; modules directly in echolab are one room."""
    pattern = "*.py" if room == "echolab" else "**/*.py"
    lines = [line.strip() for path in ROOT.glob(f"{room}/{pattern}") for line in path.open()]
    assert sum(line.startswith("#") for line in lines) >= COMMENT_SHARE * len(lines)


def test_the_rule_itself() -> None:
    assert faults("def f():\n    '''Return a sum.'''\n    total = 1  # of all\n") == []
    assert faults("def tell_all(): pass") == ["name tell_all"]
    assert faults("def test_it_goes_on(): pass") == ["name test_it_goes_on"]
    assert faults("gridColour = 1") == ["name gridColour"]
    assert faults("picture = 1  # of the screen\n") == ["name picture"]
    assert faults("def f():\n    '''Of rank 0.'''\n") == [
        "docstring of f begins with 'Of', not a verb"
    ]
    assert faults("def test_f():\n    '''A sum is a sum.'''\n") == []
    assert faults("'''What is told.'''\n") == ["docstring of module: told"]
    assert faults("x = 1  # the run goes on\n") == ["comment: goes on"]
    assert faults("import found\n") == []  # other people's names

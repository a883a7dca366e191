"""Command-line arguments written `key=value`, as in Hydra, typed by a dataclass.

    @dataclass
    class DrawOptions:
        \"\"\"Draw synthetic talkers and write them as shards.\"\"\"
        out: Path = argument("new folder")
        num_clips: int = argument("clips to draw", 64, ge=1)

    parse(DrawOptions, ["talkers", "num_clips=8"], command="data_prep draw", positional=("out",))

Types: str, int, float, bool, Path, Literal, tuples of these (`1,2,3`), and `X | None` (`none`).
Numbers are finite.  This module imports nothing heavy: a command parses before it imports torch.
"""

import dataclasses
import difflib
import importlib
import math
import operator
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from echolab.errors import ConfigError

Schema = TypeVar("Schema")

BOOLEANS = {"true": True, "yes": True, "1": True, "on": True}
BOOLEANS |= {"false": False, "no": False, "0": False, "off": False}
NONE_WORDS = ("none", "null")
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
# An argument is key=value only if its start reads as a key, so that paths may hold `=`.
KEY_VALUE = re.compile(r"(?P<key>-{0,2}[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
HELP_COLUMNS = 100
NAME_COLUMNS = 34  # of help: a longer name and type get a line of their own
PLAIN_NAMES = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
METAVARS = {bool: "{true,false}", int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}


def argument(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    section: str = "",
    choices: Sequence[str] = (),
    default_text: str = "",
    aka: Sequence[str] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return a dataclass field for one argument; without a default it is required.

    `text` is its line of help.  `section` is a heading that the help prints before it.  `choices`
    are the values of a string that has no Literal type.  `default_text` says what None stands for.
    `aka` are other names under which people look for it: they are refused with this one as the
    remedy.  `ge`, `gt`, `le` and `lt` are limits of a number, or of each in a tuple.
    """
    about: dict[str, Any] = {"help": text, "section": section, "choices": tuple(choices)}
    about |= {"default_text": default_text, "aka": tuple(aka)}
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    about |= {name: limit for name, limit in limits.items() if limit is not None}
    return dataclasses.field(default=default, metadata=about)


def parse(
    schema: type[Schema], argv: list[str], *, command: str, positional: tuple[str, ...] = ()
) -> Schema:
    """Return an instance of the dataclass `schema` from `argv` (the words after the command).

    A field without a default is required.  The fields named in `positional` may be given by
    position, in that order.  `-h` or `--help` prints the fields and exits with 0.  Raise
    ConfigError for unknown, missing, repeated and badly typed arguments.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(schema, command=command, positional=positional))
        raise SystemExit(0)
    fields = {field.name: field for field in _fields(schema)}
    words = _words_by_key(argv, fields, positional, command)
    hints = typing.get_type_hints(schema)
    values = {
        key: _convert(word, hints[key], fields[key].metadata, key, command)
        for key, word in words.items()
    }
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        wanted = " ".join(f"{name}=..." for name in missing)
        raise ConfigError(f"{command}: give {wanted} (see {command} --help)")
    return schema(**values)


def expand_home(path: str) -> str:
    """Return a path with the home folder in place of a leading `~` or `~user`, if that is known."""
    return os.path.expanduser(path)


def check_exists(arguments: object, *names: str) -> None:
    """Raise ConfigError for the first of the named arguments whose file or folder is not there.

    Arguments that are None are skipped.
    """
    for name in names:
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            remedy = closest(path.name, siblings) or "; check the name"
            raise ConfigError(f"{name}={path}: not there{remedy}")


def closest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known word nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


class Action(NamedTuple):
    """A command or sub-command: `echolab data`, `echolab data verify`."""

    target: str  # MODULE (its function main) or MODULE:FUNCTION, imported only when it runs
    summary: str

    def run(self, argv: list[str]) -> int:
        """Import the function, call it with the words after the command, return its exit code."""
        module, _, function = self.target.partition(":")
        code: int | None = getattr(importlib.import_module(module), function or "main")(argv)
        return code or 0


def run_action(argv: list[str], actions: Mapping[str, Action], *, command: str) -> int:
    """Run the action that `argv` begins with and return its exit code.

    Print the list of actions for `--help`, and for no words at all, then with exit code 2.  Raise
    ConfigError for an unknown action.
    """
    # No words at all is a mistake, and gets the list with exit code 2.
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, actions))
        lines = [f"  {name:<{width}}  {action.summary}" for name, action in actions.items()]
        more = f"`{command} ACTION --help` lists the arguments of an action."
        print("\n".join([f"usage: {command} ACTION [key=value ...]", "", *lines, "", more]))
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in actions:
        known = ", ".join(actions)
        raise ConfigError(f"{command} {name}: no such action{closest(name, actions)}; use {known}")
    return actions[name].run(rest)


def help_text(schema: type, *, command: str, positional: tuple[str, ...] = ()) -> str:
    """Return usage, the schema's docstring, and the fields in sections."""
    fields = _fields(schema)
    hints = typing.get_type_hints(schema)
    usage = [f"usage: {command}", *(name.upper() for name in positional)]
    required = [field.name for field in fields if _required(field)]
    usage += [f"{name}=..." for name in required if name not in positional]
    usage += ["[key=value ...]"] if len(required) < len(fields) else []
    lines = [" ".join(usage)]
    # dataclasses writes a docstring of its own, the signature, when the author gave none
    if schema.__doc__ and not schema.__doc__.startswith(f"{schema.__name__}("):
        lines += ["", *(line.strip() for line in schema.__doc__.strip().splitlines())]
    names = {f.name: f"{f.name} {_metavar(f, hints[f.name])}".strip() for f in fields}
    # Longer names get a line of their own, so they do not widen the column.
    width = max((len(name) for name in names.values() if len(name) <= NAME_COLUMNS), default=0)
    if not fields or not fields[0].metadata.get("section"):
        lines.append("")
    for field in fields:
        if section := field.metadata.get("section"):
            lines += ["", f"{section}:"]
        lines += help_lines(names[field.name], _help_of(field, hints[field.name]), width)
    return "\n".join(lines)


def _fields(schema: type) -> list[Any]:
    return [field for field in dataclasses.fields(schema) if field.init]


def help_lines(name: str, text: str, width: int) -> list[str]:
    """Return one field's help: its name with type, then its wrapped text."""
    indent = " " * (width + 4)
    wrapped = textwrap.wrap(text, HELP_COLUMNS - len(indent), break_on_hyphens=False) or [""]
    if len(name) > width:
        return [f"  {name}", *(indent + line for line in wrapped)]
    return [f"  {name:<{width}}  {wrapped[0]}".rstrip(), *(indent + line for line in wrapped[1:])]


def _help_of(field: Any, hint: Any) -> str:
    """Return the help text of a field with its limits and its default."""
    limits = [
        f"{LIMITS[key][0]} {field.metadata[key]:g}" for key in LIMITS if key in field.metadata
    ]
    parts = [str(field.metadata.get("help", "")), *limits]
    return f"{', '.join(part for part in parts if part)} [{_default(field, hint)}]"


def _metavar(field: Any, hint: Any) -> str:
    """Return the type of a field as help shows it: {a,b}, INT, FLOAT, PATH, TEXT or X,X,..."""
    if choices := field.metadata.get("choices"):
        return "{" + ",".join(choices) + "}"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return "|".join(_metavar(field, part) for part in inner if part is not type(None))
    if origin is typing.Literal:
        return "{" + ",".join(str(choice) for choice in inner) + "}"
    if origin is tuple:
        parts = [_metavar(field, part) for part in inner if part is not Ellipsis]
        return ",".join(parts) + (",..." if Ellipsis in inner else "")
    return METAVARS.get(hint, str(hint))


def _words_by_key(
    argv: list[str], fields: Mapping[str, Any], positional: tuple[str, ...], command: str
) -> dict[str, str]:
    """Return the text of each argument; raise ConfigError for words that cannot be placed."""
    places = list(positional)
    words: dict[str, str] = {}
    for word in argv:
        match = KEY_VALUE.fullmatch(word)
        # A path by position may look like key=value, or like an option: then it must exist.
        is_path = bool(places) and (match is None or match["key"] not in fields) and exists(word)
        if match and not is_path:
            key, value = match["key"], match["value"]
        elif word.startswith("-") and len(word) > 1 and not is_path:
            raise ConfigError(f"{command}: no option {word}; arguments are written key=value")
        elif places:
            key, value = places.pop(0), word
        else:
            raise ConfigError(f"{command}: one word too many, {word!r}; write it as key=value")
        if key not in fields:
            raise ConfigError(f"{command}: no argument {key!r}{_nearest(key, fields)}")
        if key in words:
            raise ConfigError(f"{command}: {key} is given twice ({words[key]!r} and {value!r})")
        words[key] = value
        # An argument given by name is no longer expected by position.
        places = [name for name in places if name not in words]
    return words


def exists(word: str) -> bool:
    """Return whether a word names a file or folder."""
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # longer than any name, or with a NUL character
        return False


def _nearest(key: str, fields: Mapping[str, Any]) -> str:
    """Return the remedy for an unknown key: names that know it as an alias, or a similar name."""
    plain = key.lstrip("-").replace("-", "_")
    near = [name for name, field in fields.items() if plain in field.metadata.get("aka", ())]
    # An alias answers first: it names the argument that replaced it.
    near = near or difflib.get_close_matches(plain, list(fields), n=1, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(f'{name}=...' for name in near)}?"
    return f"; known: {', '.join(fields)}"


def _convert(word: str, hint: Any, about: Mapping[str, Any], key: str, command: str) -> Any:
    """Return the value of one argument; raise ConfigError if it has another type or range."""
    try:
        value = _value(word, hint)
        _check_limits(value, about)
    except ValueError:
        limits = [f"{LIMITS[name][0]} {about[name]}" for name in LIMITS if name in about]
        wanted = ", ".join([_described(hint, about), *([" and ".join(limits)] if limits else [])])
        near = closest(word, _choices(hint, about))
        problem = f"{command}: {key}={word} is not {wanted}{near}"
        raise ConfigError(f"{problem} (see {command} --help)") from None
    return value


def _choices(hint: Any, about: Mapping[str, Any]) -> list[str]:
    """Return the values of an argument that has only some."""
    if about.get("choices"):
        return list(about["choices"])
    if typing.get_origin(hint) is typing.Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part, {})]


def _check_limits(value: Any, about: Mapping[str, Any]) -> None:
    """Raise ValueError for a value, or one of several, that is out of its limits or choices."""
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, str) and about.get("choices") and one not in about["choices"]:
            raise ValueError(one)
        if isinstance(one, int | float) and not all(
            holds(one, about[name]) for name, (_, holds) in LIMITS.items() if name in about
        ):
            raise ValueError(one)


def _value(word: str, hint: Any) -> Any:
    """Return the text `word` as a value of type `hint`; raise ValueError if it is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _value_of_union(word, inner)
    if origin is typing.Literal:
        by_text = {str(choice): choice for choice in inner}
        if word not in by_text:
            raise ValueError(word)
        return by_text[word]
    if origin is tuple:
        return _value_of_tuple(word, inner)
    if hint is bool:
        if word.lower() not in BOOLEANS:
            raise ValueError(word)
        return BOOLEANS[word.lower()]
    if hint is Path:
        if not word:
            raise ValueError(word)
        return Path(expand_home(word))
    if hint is float:
        # float accepts "nan" and "inf", which no argument means.
        number = float(word)
        if not math.isfinite(number):
            raise ValueError(word)
        return number
    if hint in (str, int):
        return hint(word)
    raise TypeError(f"arguments cannot have the type {hint}")


def _value_of_union(word: str, inner: tuple[Any, ...]) -> Any:
    if type(None) in inner and word.lower() in NONE_WORDS:
        return None
    for choice in inner:
        if choice is not type(None):
            try:
                return _value(word, choice)
            except ValueError:
                continue
    raise ValueError(word)


def _value_of_tuple(word: str, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    # Brackets are allowed, as Hydra and Python write lists.
    parts = [part.strip() for part in word.strip("()[]").split(",")] if word.strip("()[]") else []
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_value(part, inner[0]) for part in parts)
    if len(parts) != len(inner):
        raise ValueError(word)
    return tuple(_value(part, hint) for part, hint in zip(parts, inner, strict=True))


def _described(hint: Any, about: Mapping[str, Any]) -> str:
    """Return a plain description of the values of a type, for an error."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if about.get("choices"):
        return "one of " + ", ".join(about["choices"])
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if i is type(None) else _described(i, {}) for i in inner)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            if typing.get_origin(inner[0]) is typing.Literal:
                return f"a list with commas between, each {_described(inner[0], {})}"
            return f"a list of {inner[0].__name__} with commas between"
        return f"{len(inner)} values with commas between"
    return PLAIN_NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _required(field: Any) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(field: Any, hint: Any) -> str:
    """Return the default as a user would type it, or "required"."""
    if _required(field):
        return "required"
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()
    if value is None:
        return str(field.metadata.get("default_text") or "none")
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if str(value) or hint is not str else '""'

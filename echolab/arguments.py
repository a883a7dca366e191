"""Command-line arguments written `key=value`, as in Hydra, typed by a dataclass.

    @dataclass
    class DrawOptions:
        \"\"\"Draw synthetic talkers and write them as shards.\"\"\"
        out: Path = argument("new folder")
        num_clips: int = argument("clips to draw", 64, ge=1)

    parse(DrawOptions, ["talkers", "num_clips=8"], command="data_prep draw", positional=("out",))

Types: str, int, float, bool, Path, Literal, tuples of these (`1,2,3`), and `X | None` (`none`).
Numbers are finite.  This module imports no large package: a command parses its arguments before it
imports torch.
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
# A word is key=value only if it begins with an identifier, so that paths may contain `=`.
KEY_VALUE = re.compile(r"(?P<key>-{0,2}[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
HELP_COLUMNS = 100
NAME_COLUMNS = 34  # width of names with types in the help; longer ones get a separate line
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
    """Return a dataclass field for one argument; the argument is required if it has no default.

    `text` is the help text.  `section` is a heading that the help prints before the argument.
    `choices` are the allowed values of a string without a Literal type.  `default_text` describes
    the meaning of the default None.  `aka` are other names that users may try: they are refused
    with a hint at this argument.  `ge`, `gt`, `le` and `lt` limit a number, or each number of a
    tuple.
    """
    metadata: dict[str, Any] = {"help": text, "section": section, "choices": tuple(choices)}
    metadata |= {"default_text": default_text, "aka": tuple(aka)}
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata |= {name: limit for name, limit in limits.items() if limit is not None}
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    schema: type[Schema], argv: list[str], *, command: str, positional: tuple[str, ...] = ()
) -> Schema:
    """Parse `argv` (the words after the command) into an instance of the dataclass `schema`.

    A field without a default is required.  The fields named in `positional` may be given by
    position, in that order.  `-h` or `--help` prints the help and exits with 0.  Raise ConfigError
    for an argument that is unknown, missing, repeated or of the wrong type.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(schema, command=command, positional=positional))
        raise SystemExit(0)
    fields = {field.name: field for field in _init_fields(schema)}
    words = _texts_by_key(argv, fields, positional, command)
    hints = typing.get_type_hints(schema)
    values = {
        key: _convert_argument(word, hints[key], fields[key].metadata, key, command)
        for key, word in words.items()
    }
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        arguments = " ".join(f"{name}=..." for name in missing)
        raise ConfigError(f"{command}: give {arguments} (see {command} --help)")
    return schema(**values)


def expand_home(path: str) -> str:
    """Expand a leading `~` or `~user` to the home folder, if the user exists."""
    return os.path.expanduser(path)


def check_exists(arguments: object, *names: str) -> None:
    """Raise ConfigError for the first of the named arguments whose file or folder does not exist.

    Arguments that are None are skipped.
    """
    for name in names:
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            remedy = closest(path.name, siblings) or "; check the name"
            raise ConfigError(f"{name}={path}: not there{remedy}")


def closest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known word closest to `word`, or "" if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


class Action(NamedTuple):
    """A command or sub-command: `echolab data`, `echolab data verify`."""

    target: str  # MODULE (then its function main) or MODULE:FUNCTION; imported only when run
    summary: str

    def run(self, argv: list[str]) -> int:
        """Import the function, call it with the words after the command, return its exit code."""
        module, _, function = self.target.partition(":")
        code: int | None = getattr(importlib.import_module(module), function or "main")(argv)
        return code or 0


def run_action(argv: list[str], actions: Mapping[str, Action], *, command: str) -> int:
    """Run the action named by the first word of `argv` and return its exit code.

    Print the list of actions for `--help` (exit code 0) and for an empty `argv` (exit code 2).
    Raise ConfigError for an unknown action.
    """
    # An empty command line is an error: print the list of actions and return 2.
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
    """Return the help text: usage, the docstring of `schema`, and the arguments in sections."""
    fields = _init_fields(schema)
    hints = typing.get_type_hints(schema)
    usage = [f"usage: {command}", *(name.upper() for name in positional)]
    required = [field.name for field in fields if _is_required(field)]
    usage += [f"{name}=..." for name in required if name not in positional]
    usage += ["[key=value ...]"] if len(required) < len(fields) else []
    lines = [" ".join(usage)]
    # Skip the docstring that dataclasses generates (the signature) if the class has none.
    if schema.__doc__ and not schema.__doc__.startswith(f"{schema.__name__}("):
        lines += ["", *(line.strip() for line in schema.__doc__.strip().splitlines())]
    names = {f.name: f"{f.name} {_metavar(f, hints[f.name])}".strip() for f in fields}
    # Longer names get a separate line, so that they do not widen the column.
    width = max((len(name) for name in names.values() if len(name) <= NAME_COLUMNS), default=0)
    if not fields or not fields[0].metadata.get("section"):
        lines.append("")
    for field in fields:
        if section := field.metadata.get("section"):
            lines += ["", f"{section}:"]
        lines += help_lines(names[field.name], _field_help(field, hints[field.name]), width)
    return "\n".join(lines)


def _init_fields(schema: type) -> list[Any]:
    return [field for field in dataclasses.fields(schema) if field.init]


def help_lines(name: str, text: str, width: int) -> list[str]:
    """Return the help lines of one argument: its name with type, then its wrapped text."""
    indent = " " * (width + 4)
    wrapped = textwrap.wrap(text, HELP_COLUMNS - len(indent), break_on_hyphens=False) or [""]
    if len(name) > width:
        return [f"  {name}", *(indent + line for line in wrapped)]
    return [f"  {name:<{width}}  {wrapped[0]}".rstrip(), *(indent + line for line in wrapped[1:])]


def _field_help(field: Any, hint: Any) -> str:
    """Return the help text of an argument with its limits and its default."""
    limits = [
        f"{LIMITS[key][0]} {field.metadata[key]:g}" for key in LIMITS if key in field.metadata
    ]
    parts = [str(field.metadata.get("help", "")), *limits]
    return f"{', '.join(part for part in parts if part)} [{_format_default(field, hint)}]"


def _metavar(field: Any, hint: Any) -> str:
    """Return the type of an argument for the help: {a,b}, INT, FLOAT, PATH, TEXT or X,X,..."""
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


def _texts_by_key(
    argv: list[str], fields: Mapping[str, Any], positional: tuple[str, ...], command: str
) -> dict[str, str]:
    """Return the text of each argument; raise ConfigError for a word that matches no argument."""
    remaining = list(positional)
    words: dict[str, str] = {}
    for word in argv:
        match = KEY_VALUE.fullmatch(word)
        # A positional path that looks like key=value or like an option must exist.
        is_path = bool(remaining) and (match is None or match["key"] not in fields) and exists(word)
        if match and not is_path:
            key, value = match["key"], match["value"]
        elif word.startswith("-") and len(word) > 1 and not is_path:
            raise ConfigError(f"{command}: no option {word}; arguments are written key=value")
        elif remaining:
            key, value = remaining.pop(0), word
        else:
            raise ConfigError(f"{command}: one word too many, {word!r}; write it as key=value")
        if key not in fields:
            raise ConfigError(f"{command}: no argument {key!r}{_suggestion(key, fields)}")
        if key in words:
            raise ConfigError(f"{command}: {key} is given twice ({words[key]!r} and {value!r})")
        words[key] = value
        # An argument that is given by name is not expected by position any more.
        remaining = [name for name in remaining if name not in words]
    return words


def exists(word: str) -> bool:
    """Return whether a word is the path of an existing file or folder."""
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # the word is too long for a path, or contains NUL
        return False


def _suggestion(key: str, fields: Mapping[str, Any]) -> str:
    """Return a hint for an unknown key: the arguments with it as an alias, else a similar name."""
    plain = key.lstrip("-").replace("-", "_")
    matches = [name for name, field in fields.items() if plain in field.metadata.get("aka", ())]
    # Prefer an exact alias to a similar name.
    matches = matches or difflib.get_close_matches(plain, list(fields), n=1, cutoff=0.5)
    if matches:
        return f"; did you mean {' or '.join(f'{name}=...' for name in matches)}?"
    return f"; known: {', '.join(fields)}"


def _convert_argument(
    word: str, hint: Any, metadata: Mapping[str, Any], key: str, command: str
) -> Any:
    """Return the value of one argument; raise ConfigError if its type or range is wrong."""
    try:
        value = _parse_value(word, hint)
        _check_limits(value, metadata)
    except ValueError:
        limits = [f"{LIMITS[name][0]} {metadata[name]}" for name in LIMITS if name in metadata]
        expected = ", ".join(
            [_describe_type(hint, metadata), *([" and ".join(limits)] if limits else [])]
        )
        hint_text = closest(word, _allowed_values(hint, metadata))
        problem = f"{command}: {key}={word} is not {expected}{hint_text}"
        raise ConfigError(f"{problem} (see {command} --help)") from None
    return value


def _allowed_values(hint: Any, metadata: Mapping[str, Any]) -> list[str]:
    """Return the allowed values of an argument, as text; empty if they are not enumerated."""
    if metadata.get("choices"):
        return list(metadata["choices"])
    if typing.get_origin(hint) is typing.Literal:
        return [str(choice) for choice in typing.get_args(hint)]
    return [choice for part in typing.get_args(hint) for choice in _allowed_values(part, {})]


def _check_limits(value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if a value, or an item of a tuple, is outside its limits or choices."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str) and metadata.get("choices") and item not in metadata["choices"]:
            raise ValueError(item)
        if isinstance(item, int | float) and not all(
            holds(item, metadata[name]) for name, (_, holds) in LIMITS.items() if name in metadata
        ):
            raise ValueError(item)


def _parse_value(word: str, hint: Any) -> Any:
    """Convert the text `word` to a value of type `hint`; raise ValueError if that fails."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _parse_union(word, inner)
    if origin is typing.Literal:
        by_text = {str(choice): choice for choice in inner}
        if word not in by_text:
            raise ValueError(word)
        return by_text[word]
    if origin is tuple:
        return _parse_tuple(word, inner)
    if hint is bool:
        if word.lower() not in BOOLEANS:
            raise ValueError(word)
        return BOOLEANS[word.lower()]
    if hint is Path:
        if not word:
            raise ValueError(word)
        return Path(expand_home(word))
    if hint is float:
        # Reject "nan" and "inf", which float accepts but no argument allows.
        number = float(word)
        if not math.isfinite(number):
            raise ValueError(word)
        return number
    if hint in (str, int):
        return hint(word)
    raise TypeError(f"arguments cannot have the type {hint}")


def _parse_union(word: str, inner: tuple[Any, ...]) -> Any:
    if type(None) in inner and word.lower() in NONE_WORDS:
        return None
    for choice in inner:
        if choice is not type(None):
            try:
                return _parse_value(word, choice)
            except ValueError:
                continue
    raise ValueError(word)


def _parse_tuple(word: str, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    # Brackets are optional, since Hydra and Python write lists with brackets.
    parts = [part.strip() for part in word.strip("()[]").split(",")] if word.strip("()[]") else []
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_parse_value(part, inner[0]) for part in parts)
    if len(parts) != len(inner):
        raise ValueError(word)
    return tuple(_parse_value(part, hint) for part, hint in zip(parts, inner, strict=True))


def _describe_type(hint: Any, metadata: Mapping[str, Any]) -> str:
    """Describe the allowed values of a type, for an error message."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if metadata.get("choices"):
        return "one of " + ", ".join(metadata["choices"])
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if i is type(None) else _describe_type(i, {}) for i in inner)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            if typing.get_origin(inner[0]) is typing.Literal:
                return f"a list with commas between, each {_describe_type(inner[0], {})}"
            return f"a list of {inner[0].__name__} with commas between"
        return f"{len(inner)} values with commas between"
    return PLAIN_NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _is_required(field: Any) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _format_default(field: Any, hint: Any) -> str:
    """Return the default as a user would type it, or "required" if there is none."""
    if _is_required(field):
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

"""Command-line arguments written `key=value`, as in Hydra, typed by a dataclass.

    @dataclass
    class Draw:
        \"\"\"Draw talkers and write them as shards.\"\"\"
        out: Path = field(metadata={"help": "new folder"})
        clips: int = field(default=64, metadata={"help": "how many"})

    parse(Draw, ["talkers", "clips=8"], command="data_prep draw", positional=("out",))

Types: str, int, float, bool, Path, Literal, tuples of these (`1,2,3`), and `X | None` (`none`).
Numbers are finite, and `ge`, `gt`, `le` and `lt` in a field's metadata are limits of them.
"""

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from echolab.errors import ConfigError

Schema = TypeVar("Schema")

BOOLEANS = {"true": True, "yes": True, "1": True, "on": True}
BOOLEANS |= {"false": False, "no": False, "0": False, "off": False}
NOTHING = ("none", "null")
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
# An argument is key=value only if its start reads as a key, so that paths may hold `=`.
KEY_VALUE = re.compile(r"(?P<key>-{0,2}[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)


def parse(
    schema: type[Schema], argv: list[str], *, command: str, positional: tuple[str, ...] = ()
) -> Schema:
    """An instance of the dataclass `schema` from `argv` (the words after the command).

    A field without a default is required.  The fields named in `positional` may be given by
    place alone, in that order.  `-h` or `--help` prints a table of the fields and exits 0.
    Raises ConfigError for unknown, missing, repeated and badly typed arguments.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(schema, command=command, positional=positional))
        raise SystemExit(0)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}  # type: ignore[arg-type]
    words = _words_by_key(argv, list(fields), positional, command)
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


def help_text(schema: type, *, command: str, positional: tuple[str, ...] = ()) -> str:
    """Usage, the first paragraph of the schema's docstring, and one line a field."""
    fields = [field for field in dataclasses.fields(schema) if field.init]
    hints = typing.get_type_hints(schema)
    usage = [f"usage: {command}", *(name.upper() for name in positional)]
    required = [field.name for field in fields if _required(field)]
    usage += [f"{name}=..." for name in required if name not in positional]
    usage += ["[key=value ...]"] if len(required) < len(fields) else []
    rows = [
        (field.name, _default(field, hints[field.name]), str(field.metadata.get("help", "")))
        for field in fields
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [" ".join(usage)]
    # dataclasses writes a docstring of its own, the signature, when the author gave none
    if schema.__doc__ and not schema.__doc__.startswith(f"{schema.__name__}("):
        lines += ["", *(line.strip() for line in schema.__doc__.strip().splitlines())]
    lines += ["", *(f"  {n:<{widths[0]}}  {d:<{widths[1]}}  {h}".rstrip() for n, d, h in rows)]
    return "\n".join(lines)


def _words_by_key(
    argv: list[str], known: list[str], positional: tuple[str, ...], command: str
) -> dict[str, str]:
    places = list(positional)
    words: dict[str, str] = {}
    for word in argv:
        match = KEY_VALUE.fullmatch(word)
        if match:
            key, value = match["key"], match["value"]
        elif word.startswith("-") and len(word) > 1:
            raise ConfigError(f"{command}: no option {word}; arguments are written key=value")
        elif places:
            key, value = places.pop(0), word
        else:
            raise ConfigError(f"{command}: one word too many, {word!r}; write it as key=value")
        if key not in known:
            raise ConfigError(f"{command}: no argument {key!r}{_nearest(key, known)}")
        if key in words:
            raise ConfigError(f"{command}: {key} is given twice ({words[key]!r} and {value!r})")
        words[key] = value
        places = [name for name in places if name not in words]
    return words


def _nearest(key: str, known: list[str]) -> str:
    plain = key.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}=...?" if near else f"; known: {', '.join(known)}"


def _convert(word: str, hint: Any, limits: Mapping[str, Any], key: str, command: str) -> Any:
    try:
        value = _value(word, hint)
        _check_limits(value, limits)
    except ValueError:
        words = [f"{LIMITS[name][0]} {limits[name]}" for name in LIMITS if name in limits]
        what = ", ".join([_described(hint), " and ".join(words)] if words else [_described(hint)])
        problem = f"{command}: {key}={word} is not {what}"
        raise ConfigError(f"{problem} (see {command} --help)") from None
    return value


def _check_limits(value: Any, limits: Mapping[str, Any]) -> None:
    """Raise ValueError for a number, or one of several, that is not within its limits."""
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, int | float) and not all(
            holds(number, limits[name]) for name, (_, holds) in LIMITS.items() if name in limits
        ):
            raise ValueError(number)


def _value(word: str, hint: Any) -> Any:
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
        return Path(word).expanduser()
    if hint is float:
        number = float(word)
        if not math.isfinite(number):
            raise ValueError(word)
        return number
    if hint in (str, int):
        return hint(word)
    raise TypeError(f"arguments cannot have the type {hint}")


def _value_of_union(word: str, inner: tuple[Any, ...]) -> Any:
    if type(None) in inner and word.lower() in NOTHING:
        return None
    for choice in inner:
        if choice is not type(None):
            try:
                return _value(word, choice)
            except ValueError:
                continue
    raise ValueError(word)


def _value_of_tuple(word: str, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = [part.strip() for part in word.strip("()[]").split(",")] if word.strip("()[]") else []
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_value(part, inner[0]) for part in parts)
    if len(parts) != len(inner):
        raise ValueError(word)
    return tuple(_value(part, hint) for part, hint in zip(parts, inner, strict=True))


def _described(hint: Any) -> str:
    """What a value of this type looks like, for people."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if i is type(None) else _described(i) for i in inner)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"a list of {inner[0].__name__} with commas between"
        return f"{len(inner)} values with commas between"
    named = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    return named.get(hint, getattr(hint, "__name__", str(hint)))


def _required(field: Any) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(field: Any, hint: Any) -> str:
    """The default as it would be typed; what is wanted, where the field is required."""
    if _required(field):
        return "(required)"
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    return str(value) if str(value) or hint is not str else '""'

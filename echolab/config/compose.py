"""Compose the settings of a run from the words of a command line, and check them.

Words are `key=value`, quoted here for Hydra.  A path or free text is taken as typed, with any
characters: Hydra's grammar knows `=`, `#`, `(`, `~`, accents and more only in quotes, so such a
value is quoted before Hydra sees it.  What remains Hydra's in these settings: 'quoted' and "quoted"
text, null, ${...}, [lists] of datasets, and in a sweep commas, choice(...), range(...) and
glob(...).  All other settings are Hydra's.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from echolab.arguments import closest
from echolab.config.check import OPTIONAL, check, missing, names, no_such_setting
from echolab.config.folders import CONF, folders_of, group_choices, without_folder
from echolab.errors import ConfigError

# What Hydra raises for overrides that it does not expect, such as data=[1].
HYDRAS_OWN = (TypeError, ValueError, AttributeError, KeyError, AssertionError, RecursionError)

# Settings that hold a list of paths, or one.
DATASETS = ("data.clips", "data.pairs", "data.val_clips")
PATHS = (
    *DATASETS,
    "data.cache_dir",
    "run_dir",
    "init_from",
    "pretrained",
    "ref_model",
    "lora.init_from",
)
TEXTS = (*PATHS, "logger.project")

WORD = re.compile(r"(?P<start>\+{0,2}(?P<key>[\w.]+)=)(?P<value>.*)", re.DOTALL)
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
OF_HYDRA = re.compile(rf"{QUOTED}|null|", re.DOTALL | re.IGNORECASE)
CHOICE = re.compile(r"choice\((?P<values>.*)\)", re.DOTALL)
FUNCTION = re.compile(r"(range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
# One of several values with commas between: quoted, a list, or characters without a comma but in
# ${...}.
ITEM = re.compile(
    rf"\s*(?:{QUOTED})\s*(?=,|$)|\s*\[(?:{QUOTED}|[^\]])*\]\s*(?=,|$)"
    r"|(?:\$\{(?:[^{}]|\{[^{}]*\})*\}|[^,])*",
    re.DOTALL,
)
INTERPOLATION = re.compile(r"(\\*)\$\{")


def compose(overrides: list[str]) -> dict[str, Any]:
    """Return the resolved and checked settings as plain values.

    Raise ConfigError, in one line, for what Hydra or `check` refuses.
    """
    return compose_both(overrides)[0]


def compose_both(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `compose`, and the same without secrets, for the run's folder."""
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    from echolab.config.stored import stored, with_types

    with hydra_config(overrides):
        config = hydra_compose("train", as_hydra(overrides))
        plain: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            config, resolve=True, throw_on_missing=True
        )
        kept = stored(config)
    checked = check(plain)
    return checked, with_types(kept, plain, checked)


def compose_unresolved(words: list[str]) -> dict[str, Any]:
    """Return the composed settings with their interpolations; they may be incomplete.

    Words that are no overrides are left out.
    """
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    overrides = [word for word in words if "=" in word]
    with hydra_config(overrides):
        config = hydra_compose("train", as_hydra(overrides))
        written: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    return written


# -- Hydra ----------------------------------------------------------------------------------------


@contextmanager
def hydra_config(words: Sequence[str] = ()) -> Iterator[None]:
    """Make Hydra ready to compose conf/; raise ConfigError, in one line, for what it refuses.

    `words` are the overrides that are composed, and the folder that is searched first.
    """
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        _search_shipped_files()
        folder = str(folders_of(words)[0])
        with initialize_config_dir(folder, job_name="train", version_base="1.3"):
            yield
    except MissingMandatoryValue as error:
        raise ConfigError(missing(tuple(str(error.full_key).split(".")))) from error
    except (HydraException, OmegaConfBaseException, *HYDRAS_OWN) as error:
        raise ConfigError(_refused_by_hydra(error, words)) from error


def _search_shipped_files() -> None:
    """Let Hydra look up what a user's folder lacks in the files of echolab."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class ShippedFiles(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append(provider="echolab", path=f"file://{CONF}")

    if not any(
        plugin.__name__ == ShippedFiles.__name__ for plugin in Plugins.instance().discover()
    ):
        Plugins.instance().register(ShippedFiles)


def _refused_by_hydra(error: Exception, overrides: Sequence[str]) -> str:
    """Return Hydra's message on one line; groups and unknown settings get one of ours.

    Hydra advises `+key=value`, which would be refused as well.
    """
    words = " ".join(str(error).split()).partition(" Config search path:")[0]
    groups = group_choices(folders_of(overrides))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        choices = [*groups.get(key, ()), *(["null"] if key in OPTIONAL else [])]
        if choices and value not in choices:
            known = ", ".join(groups[key])
            return f"{key}={value}: must be one of {known}{closest(value, groups[key])}"
    if match := re.match(r"Could not override '([\w.]+)'", words):
        key = match[1]
        value = next((w.partition("=")[2] for w in overrides if w.startswith(f"{key}=")), "")
        if key not in names():
            return no_such_setting(tuple(key.split(".")), value)
    subject = getattr(error, "override", None) or CONF
    return f"{subject}: {words}; `echolab train --help` lists the settings"


# -- words for Hydra -----------------------------------------------------------------------------


def as_hydra(words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Return the words with the values of TEXTS quoted; others, and flags, as they are.

    The folder that is searched first is no override, and left out.
    """
    return [_word(word, sweep) for word in without_folder(words)]


def quoted(text: str) -> str:
    """Return the value that Hydra and OmegaConf read as exactly this text."""
    return _in_quotes(INTERPOLATION.sub(lambda match: rf"{2 * match[1]}\${{", text))


def _in_quotes(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _interpolates(text: str) -> bool:
    """Return whether OmegaConf can read `${...}` in a text, or its escape."""
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    try:
        parse(text)
    except GrammarParseError:  # `${` without an end, or with nonsense in it
        return False
    return "${" in text


def _word(word: str, sweep: bool) -> str:
    match = WORD.fullmatch(word)
    if not match or match["key"] not in TEXTS:
        return word
    value, key = match["value"], match["key"]
    choice = CHOICE.fullmatch(value)
    if sweep and (choice or not FUNCTION.fullmatch(value)):
        value = ",".join(_items(choice["values"] if choice else value, key))
    elif not choice and not FUNCTION.fullmatch(value):
        value = _value(value, key)
    return match["start"] + value


def _items(text: str, key: str) -> list[str]:
    """Return the values of a sweep or list, each as Hydra reads it."""
    items, position = [], 0
    while position <= len(text):
        match = ITEM.match(text, position)
        assert match
        items.append(_value(match[0].strip(), key))
        position = match.end() + 1
    return items


def _value(text: str, key: str) -> str:
    if OF_HYDRA.fullmatch(text):
        return text
    if key in DATASETS and text.startswith("[") and text.endswith("]"):
        return f"[{','.join(_items(text[1:-1], key))}]"
    return _in_quotes(text) if _interpolates(text) else quoted(text)

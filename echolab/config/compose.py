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

from echolab.arguments import closest, expand_home
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
PLAIN = re.compile(r"\+{0,2}[\w.]+=[\w.,+-]*")  # certainly in Hydra's grammar
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
    checked = check(with_home(plain))
    return checked, with_types(kept, plain, checked)


def with_home(config: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which paths that begin with `~/` have the home folder in its place.

    The shell leaves the `~` of `key=~/path` to the program.
    """

    # Only settings that hold paths: a project may be called ~/x.
    def expanded(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: expanded(f"{key}.{name}", inner) for name, inner in value.items()}
        if isinstance(value, list) and key in PATHS:
            return [expanded(key, item) for item in value]
        is_home = isinstance(value, str) and value.startswith("~/")
        return expand_home(value) if is_home and key in PATHS else value

    return {name: expanded(name, value) for name, value in config.items()}


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

    # Refuse words that are no overrides before Hydra is imported.
    check_words(words)
    try:
        _search_shipped_files()
        folder = str(folders_of(words)[0])
        with initialize_config_dir(folder, job_name="train", version_base="1.3"):
            yield
    except MissingMandatoryValue as error:
        raise ConfigError(missing(tuple(str(error.full_key).split(".")))) from error
    except (HydraException, OmegaConfBaseException, *HYDRAS_OWN) as error:
        raise ConfigError(_refused_by_hydra(error, words)) from error


def check_words(words: Sequence[str]) -> None:
    """Raise ConfigError for a word that is no override, such as `seed` or `seed =3`."""
    known = [*names(), *group_choices([CONF])]
    for word in without_folder(words):
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            advice = closest(word, known) if word not in known else f"; write {word}=VALUE"
            raise ConfigError(f"{word}: is no setting with a value, key=value{advice}")
        plain = key.strip(" \t'\"")
        if plain != key or not plain:
            advice = f"write {plain}={value.strip()}" if plain else "write key=value"
            raise ConfigError(f"{word}: has no plain key before its `=`; {advice}")


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
    """Return one line in place of Hydra's message, which advises what would be refused as well."""
    words = " ".join(str(error).split()).partition(" Config search path:")[0]
    if line := _wrong_choice(overrides) or _sweep_without_option(words, overrides):
        return line

    # A setting that does not exist, or an interpolation that cannot be resolved.
    given = {word.lstrip("+").partition("=")[0]: word for word in overrides if "=" in word}
    if match := re.match(r"Could not override '([\w.]+)'", words):
        key = match[1]
        if key.startswith("hydra.launcher."):
            return f"{given.get(key, key)}: is for jobs of Slurm; give launcher=slurm too"
        if key not in names():
            return no_such_setting(tuple(key.split(".")), given.get(key, "").partition("=")[2])
    if match := re.match(r"Could not append to config.*already at '([\w.]+)'", words):
        return f"{given.get(match[1], match[1])}: exists; leave out the +"
    if key := getattr(error, "full_key", None):
        reason = words.partition(" full_key:")[0].removeprefix("KeyError raised while resolving ")
        remedy = "give a value, and write \\${ for the text ${ itself"
        return f"{given.get(key, key)}: {reason}; {remedy}"
    named = (word for word in overrides if word.lstrip("~+").partition("=")[0] in words)
    subject = getattr(error, "override", None) or next(named, CONF)
    reason = words.partition(" See https:")[0]
    return f"{subject}: {reason}; `echolab train --help` lists the settings"


def _wrong_choice(overrides: Sequence[str]) -> str | None:
    """Return one line on the first override of a group that names no file of it."""
    # Hydra names the file that it did not find; the choices say more.
    groups = group_choices(folders_of(overrides))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        choices = [*groups.get(key, ()), *(["null"] if key in OPTIONAL else [])]
        if choices and value not in choices:
            known = ", ".join(groups[key])
            return f"{key}={value}: must be one of {known}{closest(value, groups[key])}"
    return None


def _sweep_without_option(words: str, overrides: Sequence[str]) -> str | None:
    """Return one line on an override with several values if the command line has no -m."""
    if not re.match(r"Ambiguous value|Sweep parameters", words):
        return None
    word = next((word for word in overrides if f"'{word}'" in words), "")
    key, _, value = word.partition("=")
    other = f"a list as {key}=[{value}]" if words.startswith("Amb") else f"text as {key}='{value}'"
    return f"{word}: is several values; add -m to sweep over them, or write {other}"


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
    # Flags, and keys with a slash or a package, are left to Hydra.
    match = WORD.fullmatch(word)
    if not match:
        return word
    if match["key"] not in TEXTS:
        if _is_readable(word):
            return word
        if match["value"][:1] in ("[", "{"):
            raise ConfigError(
                f"{word}: cannot be read; close every bracket, separate by commas, and put text "
                "with other characters than letters, digits and ._-/ in quotes: ['a#b', 'c=d']"
            )
        return match["start"] + quoted(match["value"])  # `check` says what is wrong with the text
    # In a sweep commas separate values, unless a function of Hydra does.
    value, key = match["value"], match["key"]
    choice = CHOICE.fullmatch(value)
    if sweep and (choice or not FUNCTION.fullmatch(value)):
        value = ",".join(_items(choice["values"] if choice else value, key))
    elif not choice and not FUNCTION.fullmatch(value):
        value = _value(value, key)
    return match["start"] + value


def _is_readable(word: str) -> bool:
    """Return whether Hydra can read an override;"""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if PLAIN.fullmatch(word):
        return True
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


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
    # Text in quotes, null and nothing keep Hydra's meaning.
    if OF_HYDRA.fullmatch(text):
        return text
    if key in DATASETS and text.startswith("[") and text.endswith("]"):
        return f"[{','.join(_items(text[1:-1], key))}]"
    return _in_quotes(text) if _interpolates(text) else quoted(text)

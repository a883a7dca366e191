"""Compose the settings of a run from the words of a command line, and check them.

Words are `key=value`.  Paths and free text are used as typed, with any characters: Hydra's grammar
accepts `=`, `#`, `(`, `~`, accents and more only in quotes, so this module quotes such values.  In
these settings the following keep their meaning in Hydra: 'quoted' and "quoted" text, null, ${...},
[lists] of datasets, and in a sweep commas, choice(...), range(...) and glob(...).  Hydra parses all
other settings unchanged.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from echolab.arguments import closest, expand_home
from echolab.config.check import OPTIONAL, check, missing, names, no_such_setting
from echolab.config.folders import CONF, folders_of, group_choices, without_folder
from echolab.errors import ConfigError

# Exceptions that Hydra raises for unexpected overrides, such as data=[1].
HYDRA_ERRORS = (TypeError, ValueError, AttributeError, KeyError, AssertionError, RecursionError)

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
    "evaluation.raw",
    "evaluation.clips",
    "evaluation.vae",
    "metrics.networks",
    "metrics.real",
)
TEXTS = (*PATHS, "logger.project")

WORD = re.compile(r"(?P<start>\+{0,2}(?P<key>[\w.]+)=)(?P<value>.*)", re.DOTALL)
PLAIN = re.compile(r"\+{0,2}[\w.]+=[\w.,+-]*")  # always valid in Hydra's grammar
QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
HYDRA_VALUE = re.compile(rf"{QUOTED}|null|", re.DOTALL | re.IGNORECASE)
CHOICE = re.compile(r"choice\((?P<values>.*)\)", re.DOTALL)
FUNCTION = re.compile(r"(range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
# One of several values separated by commas: quoted text, a list, or characters without a comma
# outside of ${...}.
ITEM = re.compile(
    rf"\s*(?:{QUOTED})\s*(?=,|$)|\s*\[(?:{QUOTED}|[^\]])*\]\s*(?=,|$)"
    r"|(?:\$\{(?:[^{}]|\{[^{}]*\})*\}|[^,])*",
    re.DOTALL,
)
INTERPOLATION = re.compile(r"(\\*)\$\{")


def compose(overrides: list[str]) -> dict[str, Any]:
    """Return the resolved and checked settings as plain values.

    Raise ConfigError, in one line, for settings that Hydra or `check` refuses.
    """
    return compose_both(overrides)[0]


def compose_both(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of `compose`, and the settings without secrets for the run folder."""
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
    """Return the settings with `~/` at the beginning of paths replaced by the home folder.

    The shell does not expand the `~` of `key=~/path`.
    """

    # Expand only settings that hold paths: a project may be called ~/x.
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

    Words that are not overrides are ignored.
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
    """Prepare Hydra to compose conf/; raise ConfigError, in one line, for what Hydra refuses.

    `words` are the overrides and the option --config-dir.
    """
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    # Refuse words that are not overrides before Hydra is imported.
    check_words(words)
    try:
        _search_shipped_files()
        folder = str(folders_of(words)[0])
        with initialize_config_dir(folder, job_name="train", version_base="1.3"):
            yield
    except MissingMandatoryValue as error:
        raise ConfigError(missing(tuple(str(error.full_key).split(".")))) from error
    except (HydraException, OmegaConfBaseException, *HYDRA_ERRORS) as error:
        raise ConfigError(_refused_by_hydra(error, words)) from error


def check_words(words: Sequence[str]) -> None:
    """Raise ConfigError for a word that is not an override, such as `seed` or `seed =3`."""
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
    """Let Hydra search the files of echolab for files that a user's folder lacks."""
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
    """Return one line instead of Hydra's message, whose advice would be refused as well."""
    words = " ".join(str(error).split()).partition(" Config search path:")[0]
    if line := _unknown_choice(overrides) or _sweep_without_option(words, overrides):
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


def _unknown_choice(overrides: Sequence[str]) -> str | None:
    """Return a one-line message for the first GROUP=CHOICE whose choice does not exist."""
    # Hydra only names the missing file; list the choices instead.
    groups = group_choices(folders_of(overrides))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        choices = [*groups.get(key, ()), *(["null"] if key in OPTIONAL else [])]
        if choices and value not in choices:
            known = ", ".join(groups[key])
            return f"{key}={value}: must be one of {known}{closest(value, groups[key])}"
    return None


def _sweep_without_option(words: str, overrides: Sequence[str]) -> str | None:
    """Return a one-line message for an override with several values, if -m is missing."""
    if not re.match(r"Ambiguous value|Sweep parameters", words):
        return None
    word = next((word for word in overrides if f"'{word}'" in words), "")
    key, _, value = word.partition("=")
    other = f"a list as {key}=[{value}]" if words.startswith("Amb") else f"text as {key}='{value}'"
    return f"{word}: is several values; add -m to sweep over them, or write {other}"


# -- words for Hydra -----------------------------------------------------------------------------


def as_hydra(words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """Return the words with the values of TEXTS quoted, and all other words unchanged.

    The option --config-dir is removed, since it is not an override.
    """
    return [_quoted_word(word, sweep) for word in without_folder(words)]


def quoted(text: str) -> str:
    """Return a quoted value that Hydra and OmegaConf read as exactly this text."""
    return _add_quotes(INTERPOLATION.sub(lambda match: rf"{2 * match[1]}\${{", text))


def _add_quotes(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def _interpolates(text: str) -> bool:
    """Return whether a text holds a `${...}`, or its escape, that OmegaConf can read."""
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    try:
        parse(text)
    except GrammarParseError:  # `${` without an end, or with invalid content
        return False
    return "${" in text


def _quoted_word(word: str, sweep: bool) -> str:
    # Hydra parses flags, and keys with a slash or a package.
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
        return match["start"] + quoted(match["value"])  # `check` reports the fault of the text
    # In a sweep commas separate values, unless a function of Hydra does.
    value, key = match["value"], match["key"]
    choice = CHOICE.fullmatch(value)
    if sweep and (choice or not FUNCTION.fullmatch(value)):
        value = ",".join(_split_values(choice["values"] if choice else value, key))
    elif not choice and not FUNCTION.fullmatch(value):
        value = _quoted_value(value, key)
    return match["start"] + value


def _is_readable(word: str) -> bool:
    """Return whether Hydra can read an override."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if PLAIN.fullmatch(word):
        return True
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _split_values(text: str, key: str) -> list[str]:
    """Return the values of a sweep or list, each quoted for Hydra."""
    items, position = [], 0
    while position <= len(text):
        match = ITEM.match(text, position)
        assert match
        items.append(_quoted_value(match[0].strip(), key))
        position = match.end() + 1
    return items


def _quoted_value(text: str, key: str) -> str:
    # Quoted text, null and the empty value keep their meaning in Hydra.
    if HYDRA_VALUE.fullmatch(text):
        return text
    if key in DATASETS and text.startswith("[") and text.endswith("]"):
        return f"[{','.join(_split_values(text[1:-1], key))}]"
    return _add_quotes(text) if _interpolates(text) else quoted(text)

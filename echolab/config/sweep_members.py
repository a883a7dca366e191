"""The members of a sweep, `echolab train -m key=a,b`: their settings, names and folders.

All members are composed, checked and named before the first starts.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from echolab.config.compose import PATHS, as_hydra, hydra_config, quoted
from echolab.config.folders import without_folder
from echolab.errors import ConfigError
from echolab.launch import run_dir
from echolab.redaction import is_secret_name, mask_secrets, strip_secrets

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PREFIX = 100  # characters of a name that show the swept values
HASH = 10  # hexadecimal digits
ADDRESS = re.compile(r"\w+://[^\s'\",\]]+")
# Signature and expiry in the query of a signed address.
SIGNATURE = re.compile(r"x-amz-|x-goog-|s[evprt]$|se$|expires", re.IGNORECASE)


class Member(NamedTuple):
    """One run of a sweep."""

    name: str
    folder: Path
    overrides: list[str]
    config: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """The words of the member's `echolab train`."""
        return [*self.overrides, f"run_dir={quoted(str(self.folder))}"]


def members(
    words: Sequence[str],
    compose: Callable[[list[str]], tuple[dict[str, Any], dict[str, Any]]],
) -> list[Member]:
    """Return all members of a sweep, in order.

    `compose` returns the settings of overrides, and the settings without secrets.  Raise
    ConfigError if the settings of a member are invalid, or if two members are the same.
    """
    made: dict[Path, Member] = {}
    # Compose every member first, so that an invalid setting stops the sweep before it starts.
    for own, values in expanded(words):
        for key in values:
            if key.startswith(("hydra.", "hydra/")) or key == "launcher":
                raise ConfigError(f"{key}: cannot be swept, it is the sweep's own; give one value")
        config, kept = compose(own)
        name = name_of(kept, values)
        folder = Path(config["run_dir"]) / name
        if folder in made:
            same = " ".join(f"{key}={value}" for key, value in values.items())
            raise ConfigError(
                f"{same}: two members have these settings, in one folder {folder}; give each "
                "value once"
            )
        made[folder] = Member(name, folder, own, config)
    return list(made.values())


# -- overrides -----------------------------------------------------------------------------------


class Swept(NamedTuple):
    """The overrides of one member of a sweep."""

    words: list[str]
    values: dict[str, str]  # overrides that differ between members: value by key, as Hydra text


def expanded(words: Sequence[str]) -> list[Swept]:
    """Return the members of a sweep over `key=a,b`, choice, range and glob: all combinations.

    An experiment may define further swept parameters in hydra.sweeper.params; the command line
    replaces them, and the last of several overrides of a key is used.  Raise ConfigError for words
    that Hydra cannot read, and for a sweep with the same value twice.
    """
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    # Parse the command line, with commas as separators.
    choices: dict[str, list[tuple[str, str]]] = {}
    folder = [word for word in words if word not in without_folder(words)]
    with hydra_config(folder):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        given = parser.parse_overrides(as_hydra(words, sweep=True))

    # Compose the overrides that are not swept: an experiment may define further parameters.
    fixed = [str(override.input_line) for override in given if not override.is_sweep_override()]
    with hydra_config([*folder, *fixed]):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        params = compose("train", fixed, return_hydra_config=True).hydra.sweeper.params or {}
        more = as_hydra([f"{key}={value}" for key, value in params.items()], sweep=True)
        # The last of several overrides of a key is used.
        for override in [*parser.parse_overrides(more), *given]:
            choices[override.get_key_element()] = _choices_of(override)

    # The members are all combinations; a key with one value is not part of their names.
    swept = [key for key, options in choices.items() if len({value for _, value in options}) > 1]
    return [
        Swept(
            [*folder, *(word for word, _ in options)],
            {k: value for k, (_, value) in zip(choices, options, strict=True) if k in swept},
        )
        for options in product(*choices.values())
    ]


def _choices_of(override: "Override") -> list[tuple[str, str]]:
    """Return word and value of each choice of an override; the value is empty without a sweep.

    Raise ConfigError for a repeated value, or for an interval, which has no single values.
    """
    line, key = str(override.input_line), override.get_key_element()
    if not override.is_sweep_override():
        return [(line, "")]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{line}: has no single values; use choice or range")
    values = list(override.sweep_string_iterator())
    if len(set(values)) < len(values):
        raise ConfigError(f"{line}: a value is given twice; give each once")
    return [(f"{key}={value}", value) for value in values]


def launcher_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the resolved settings of hydra.launcher, which starts the members of a sweep."""
    from hydra import compose
    from omegaconf import OmegaConf

    with hydra_config(words):
        config = compose("train", as_hydra(words), return_hydra_config=True)
        launcher: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
            config.hydra.launcher, resolve=True
        )
    return launcher


# -- names ---------------------------------------------------------------------------------------


def name_of(kept: Mapping[str, Any], values: Mapping[str, str]) -> str:
    """Return a folder's name: the swept values in readable form, and a hash of the settings.

    `kept` are a member's settings without secrets, `values` the overrides that differ between
    members, by key.  The hash covers the resolved settings, except for settings of the machine that
    are not swept.  So different members have different names, and a member has the same name when
    the sweep is run again or gets more values.
    """
    # The hash covers all settings except those of the machine.
    flat = {key: normalized_setting(key, value) for key, value in run_dir.flatten(kept).items()}
    own = {key: value for key, value in flat.items() if not is_machines(key)}
    swept = {key: resolved_value(flat, key, text) for key, text in values.items()}
    text = json.dumps([own, swept], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:HASH]
    return f"{prefix(values) or 'member'}-{digest}"


def is_machines(key: str) -> bool:
    """Return whether a setting may differ between attempts of one run."""
    return bool({key, key.split(".")[0]} & set(run_dir.MACHINE))


def resolved_value(flat: Mapping[str, Any], key: str, text: str) -> Any:
    """Return the resolved value of a swept override: a setting, those of a group, or text."""
    if "://" in text:  # stored settings lack the queries of addresses
        return re.sub(ADDRESS, lambda match: without_signature(match[0]), text)
    name = key.lstrip("+").replace("/", ".")
    values = {k: v for k, v in flat.items() if k == name or k.startswith(f"{name}.")}
    return values or text


def normalized_setting(key: str, value: Any) -> Any:
    """Return a setting with paths made absolute and links resolved, so that equal paths match."""
    if isinstance(value, list):
        return [normalized_setting(key, item) for item in value]
    is_path = key in PATHS and isinstance(value, str) and "://" not in value
    return os.path.realpath(value) if is_path and (key, value) != ("ref_model", "base") else value


def without_signature(address: str) -> str:
    """Return an address without user, password and the secrets in its query."""
    # A signature expires and changes, but the member is the same.
    query = parse_qsl(urlsplit(address).query)
    public = [(name, value) for name, value in query if not SIGNATURE.match(name)]
    public = [(name, value) for name, value in public if not is_secret_name(name)]
    return f"{strip_secrets(address)}?{urlencode(public)}" if public else strip_secrets(address)


def prefix(values: Mapping[str, str]) -> str:
    """Return the swept keys and the ends of their values in readable form.

    Long values are cut at the front, where paths are often equal.  No secret is shown.
    """
    # Long keys are shortened to their last part.
    keys = {key: key.lstrip("+") for key in sorted(values)}
    if sum(map(len, keys.values())) > PREFIX // 2:
        keys = {key: name.split(".")[-1] for key, name in keys.items()}
    room = max(1, PREFIX // max(1, len(keys)))
    parts = []
    for key, name in keys.items():
        value = (
            ""
            if is_secret_name(key.rpartition(".")[2])
            else file_name_part(mask_secrets(without_queries(values[key])))
        )
        parts.append(f"{file_name_part(name)}-{value[-max(8, room - len(name) - 1) :].lstrip('-')}")
    return "_".join(parts)[:PREFIX].strip("-_.")


def without_queries(text: str) -> str:
    """Return a text with its addresses cut to host and path."""
    return ADDRESS.sub(lambda match: strip_secrets(match[0]).partition("://")[2], text)


def file_name_part(text: str) -> str:
    """Return the text with only characters that need no quotes in any shell."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-")

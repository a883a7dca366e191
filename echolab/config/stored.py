"""Store the settings of a run without secrets, and resolve stored settings.

A value from the environment (`${oc.env:NAME}`) is stored as written, and an address without user,
password and query.  So the files of a run hold no secret, and the same command resumes the run even
if the variable or the signature of the address has changed.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from echolab.errors import ConfigError
from echolab.redaction import MASK, is_secret_name, mask_secrets

NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
SHORT = 8  # characters; shorter numbers are not secrets
VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)[^}]*\}")


def stored(config: DictConfig) -> dict[str, Any]:
    """Return composed settings as plain values: resolved, except for possible secrets.

    A short number is stored as a number unless its variable is named like a secret, so that the
    stored settings show it (`seed=${oc.env:SLURM_ARRAY_TASK_ID}`).
    """
    # Record which variables an interpolation reads.
    read: set[str] = set()
    with _observe_variables(read.add):
        kept: dict[str, Any] = _stored(config, OmegaConf.to_container(config), read)
    return kept


@contextmanager
def _observe_variables(call: Callable[[str], None]) -> Iterator[None]:
    """Call `call` with the name of each variable before an interpolation reads its value."""

    def value(name: str, *default: Any) -> Any:
        call(name)
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", value, replace=True)
    # Names of variables may themselves be interpolated, so each is checked when read.
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _stored(node: DictConfig | ListConfig, written: Any, read: set[str]) -> Any:
    """Return a node without secrets; `written` is its plain value with interpolations."""
    if isinstance(written, Mapping):
        return {key: _stored_value(node, key, inner, read) for key, inner in written.items()}
    return [_stored_value(node, number, inner, read) for number, inner in enumerate(written)]


def _stored_value(node: DictConfig | ListConfig, key: Any, written: Any, read: set[str]) -> Any:
    # Plain values and addresses contain no interpolation.
    if isinstance(written, Mapping | list):
        return _stored(node[key], written, read)
    if not isinstance(written, str):
        return written
    if "${" not in written:
        return mask_secrets(written)
    # Resolve the value to record which variables it reads.
    read.clear()
    value = node[key]
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    # Store numbers as values, text from the environment as written.
    secret = any(map(is_secret_name, read))
    if not secret and isinstance(value, str) and NUMBER.fullmatch(value) and len(value) < SHORT:
        return value
    if (read and isinstance(value, str | list | dict)) or "${" in str(value):
        return _without_defaults(mask_secrets(written))
    return mask_secrets(value) if isinstance(value, str) else value


def with_types(kept: Any, given: Any, checked: Any) -> Any:
    """Return stored settings with the checked value of every setting that holds no secret.

    `given` are the resolved settings before the check; `1e-4` given as text is stored as a number.
    """
    if isinstance(kept, Mapping) and isinstance(given, Mapping):
        return {key: with_types(kept[key], given[key], checked[key]) for key in kept}
    if isinstance(kept, list) and isinstance(given, list):
        return [with_types(*values) for values in zip(kept, given, checked, strict=True)]
    return checked if kept == given else kept


def _without_defaults(written: str) -> str:
    """Remove the defaults of secret variables, which may be secrets themselves."""

    def bare(match: re.Match[str]) -> str:
        return f"${{oc.env:{match[1]}}}" if is_secret_name(match[1]) else match[0]

    return VARIABLE.sub(bare, written)


def resolved(kept: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """Return stored settings with values for the `allowed` environment variables.

    Other variables are refused, because the settings of another user's run could send any variable
    to an address of theirs.  Raise ConfigError for variables that are not allowed or not set, and
    for settings whose secrets are not stored.
    """

    # Refuse variables that the caller did not allow.
    def check(*names: str) -> None:
        if wanted := sorted(set(names) - set(allowed)):
            raise ConfigError(
                f"config.json: takes {', '.join(wanted)} from the environment; if you trust it, "
                f"give env={','.join([*allowed, *wanted])}"
            )

    check(*VARIABLE.findall(str(kept)))
    try:
        config = OmegaConf.create(dict(kept))
        with _observe_variables(check):  # names may be interpolated themselves
            plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"config.json: {words}; set it as where the run was trained") from error
    return plain


def hidden(kept: Any, name: str = "") -> list[str]:
    """Return the dotted names of stored settings that hold `***` in place of a secret."""
    if isinstance(kept, Mapping):
        return [n for key, value in kept.items() for n in hidden(value, f"{name}.{key}".strip("."))]
    if isinstance(kept, list):
        return [n for value in kept for n in hidden(value, name)]
    return [name] if isinstance(kept, str) and MASK in kept else []

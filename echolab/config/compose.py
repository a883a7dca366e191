"""From the words of a command line to the checked settings of a run, as plain values."""

from typing import Any

from echolab.config.check import check
from echolab.config.overrides import as_hydra, hydra_config


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

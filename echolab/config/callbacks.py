"""The user's own callbacks: only classes that echolab or an installed distribution registers.

A distribution registers them by entry points of the group `echolab.callbacks`:

    [project.entry-points."echolab.callbacks"]
    weight_norms = "lab.training:WeightNorms"   # one class, by this name or by its import path
    lab = "lab.training"                        # every class in and below this module

An import path that is not registered is refused before anything is imported.  Imports no torch.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from echolab.errors import ConfigError

if TYPE_CHECKING:
    from echolab.training.callbacks.callback import Callback

GROUP = "echolab.callbacks"
OWN = "echolab.training.callbacks"  # the namespace that needs no registration


def callbacks_from(config: Mapping[str, Any]) -> list["Callback"]:
    """Build the callbacks of conf/callbacks, in order; raise ConfigError if one is refused."""
    return [
        _build(entry["target"], entry["args"], f"callbacks.custom[{number}]")
        for number, entry in enumerate(config["custom"])
    ]


def check_targets(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a target that is not registered; nothing is imported."""
    for number, entry in enumerate(config["custom"]):
        registered_path(entry["target"], f"callbacks.custom[{number}]")


def registered_path(target: str, setting: str) -> tuple[str, str]:
    """Return module and class of a target; raise ConfigError unless they are registered."""
    registered = entry_points(group=GROUP)
    named = {(entry.module, entry.attr) for entry in registered if entry.name == target}
    if len(named) > 1:
        raise ConfigError(
            f"{setting}.target={target}: several distributions register this name; give the "
            "import path package.module:Class"
        )
    # The name of an entry point stands for its class; anything else must be an import path.
    module, name = named.pop() if named else target.partition(":")[::2]
    if not name or not all(part.isidentifier() for part in [*module.split("."), name]):
        raise ConfigError(
            f"{setting}.target={target}: must be an import path package.module:Class, or the name "
            f"of an entry point of the group {GROUP} that is a class"
        )
    if not _allowed(module, name, list(registered)):
        raise ConfigError(
            f"{setting}.target={target}: is neither below {OWN} nor registered by an installed "
            f"distribution; register {module} as an entry point of the group {GROUP}"
        )
    return module, name


def _allowed(module: str, name: str, registered: list[EntryPoint]) -> bool:
    classes = {(entry.module, entry.attr) for entry in registered if entry.attr}
    namespaces = [OWN, *(entry.module for entry in registered if not entry.attr)]
    return (module, name) in classes or any(
        module == namespace or module.startswith(f"{namespace}.") for namespace in namespaces
    )


def _build(target: str, arguments: Mapping[str, Any], setting: str) -> "Callback":
    """Import a registered class and call it."""
    from echolab.training.callbacks.callback import Callback

    module, name = registered_path(target, setting)
    try:
        callback_class = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting}.target={target}: cannot be imported ({error}); correct the path"
        ) from error
    if not (isinstance(callback_class, type) and issubclass(callback_class, Callback)):
        raise ConfigError(
            f"{setting}.target={target}: is no subclass of {OWN}.callback.Callback; derive it"
        )
    try:
        inspect.signature(callback_class).bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{setting}.args={dict(arguments)}: {target} does not take them ({error}); give its "
            "arguments by name"
        ) from error
    return callback_class(**arguments)

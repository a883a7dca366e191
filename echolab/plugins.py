"""Which import paths a configuration may name: those of echolab and of registered distributions.

A distribution registers an object, or all objects in and below a module, by an entry point:

    [project.entry-points."echolab.callbacks"]
    weight_norms = "lab.training:WeightNorms"   # one class, by this name or by its import path
    lab = "lab.training"                        # every class in and below this module

An import path that is not registered is refused before anything is imported.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from echolab.errors import ConfigError


def registered_path(
    target: str, setting: str, *, group: str, namespace: str, kind: str
) -> tuple[str, str]:
    """Return module and name of a target; raise ConfigError unless they are registered.

    `group` is that of the entry points, `namespace` the package that needs no registration, and
    `kind` what the target must be, as `class`.
    """
    # A name may be registered by one distribution only.
    registered = entry_points(group=group)
    named = {(entry.module, entry.attr) for entry in registered if entry.name == target}
    title = kind.capitalize()
    if len(named) > 1:
        raise ConfigError(
            f"{setting}.target={target}: several distributions register this name; give the "
            f"import path package.module:{title}"
        )
    # The name of an entry point stands for its object; anything else must be an import path.
    module, name = named.pop() if named else target.partition(":")[::2]
    if not name or not all(part.isidentifier() for part in [*module.split("."), name]):
        raise ConfigError(
            f"{setting}.target={target}: must be an import path package.module:{title}, or the "
            f"name of an entry point of the group {group} that is a {kind}"
        )
    if not _allowed(module, name, list(registered), namespace):
        raise ConfigError(
            f"{setting}.target={target}: is neither below {namespace} nor registered by an "
            f"installed distribution; register {module} as an entry point of the group {group}"
        )
    return module, name


def import_registered(target: str, setting: str, *, group: str, namespace: str, kind: str) -> Any:
    """Import a registered object; raise ConfigError if that fails, or as `registered_path` does."""
    # Check the registration before anything is imported.
    module, name = registered_path(target, setting, group=group, namespace=namespace, kind=kind)
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting}.target={target}: cannot be imported ({error}); correct the path"
        ) from error


def check_arguments(
    callee: Any, given: tuple[Any, ...], arguments: Mapping[str, Any], target: str, setting: str
) -> None:
    """Raise ConfigError unless a callee takes `given` by position and `arguments` by name."""
    try:
        inspect.signature(callee).bind(*given, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{setting}.args={dict(arguments)}: {target} does not take them ({error}); give its "
            "arguments by name"
        ) from error


def _allowed(module: str, name: str, registered: list[EntryPoint], own: str) -> bool:
    # An entry point registers one object, or all objects in and below a module.
    objects = {(entry.module, entry.attr) for entry in registered if entry.attr}
    namespaces = [own, *(entry.module for entry in registered if not entry.attr)]
    return (module, name) in objects or any(
        module == namespace or module.startswith(f"{namespace}.") for namespace in namespaces
    )
